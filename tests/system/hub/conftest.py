"""A Hub of its own for each test, artifacts to push, and the settings with which huggingface_hub talks to that Hub."""

import shutil
from contextlib import contextmanager

import pytest
import tiny
from hub.server import Hub
from huggingface_hub import constants

from adaras_export.delivery.writer import export

TOKENS = {"hf_writer": ("user", "write"), "hf_reader": ("user", "read"), "hf_other": ("other", "write")}
KEY = ("llama", "causal", "last_prompt_token")


@pytest.fixture
def hub(tmp_path):
    """A Hub on loopback; that it was asked for nothing that it does not know is part of every test."""
    with Hub(tmp_path / "hub", TOKENS) as found:
        yield found
    assert found.surprises == []


@contextmanager
def at(hub, home):
    """This process as a client of the Hub, as user: what huggingface_hub reads of its environment when imported."""
    settings = {"ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    settings["HUGGINGFACE_CO_URL_TEMPLATE"] = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    settings |= {"HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(constants, name, value)
        patch.setenv("HF_TOKEN", "hf_writer")
        # Transformers 5 keeps one client, with the address of the Hub that it was first asked to speak with.
        patch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        yield


@pytest.fixture
def online(hub, tmp_path):
    """The Hub, with this process as its client."""
    with at(hub, tmp_path / "home"):
        yield hub


@pytest.fixture(scope="session")
def exported(rules, folders, tmp_path_factory):
    """A folder that `export` wrote, by (target, *options); read only."""

    def write(key):
        target, *options = key
        out = tmp_path_factory.mktemp("exported") / "steered"
        how = {"base": folders[KEY[0]], "to": target, "accept_loss": LOSSES.get(target, ())}
        export(rules[KEY], out=out, **how, **dict.fromkeys(options, True))
        return out

    return tiny.Lazy(write)


LOSSES = {"peft": ("gate", "start"), "stock": ("gate", "start", "dial"), "gguf": ("gate", "start")}


@pytest.fixture
def artifact(exported, tmp_path):
    """An export to `hf` that a test may change."""
    return shutil.copytree(exported[("hf",)], tmp_path / "steered")
