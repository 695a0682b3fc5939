"""The commands and snippets of docs/hub.md, followed as they stand there."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from hub.conftest import KEY
from places import DOCS

from adaras_export import cli

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")]
PAGE = (DOCS / "hub.md").read_text()
NAME = "user/steered-model"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def commands():
    return [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]


def follow(words, hub):
    """Run a command of the page; nobody is there to be asked, so the one that asks is told yes."""
    if words[0] == "hf":
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "huggingface_hub.cli.hf", *words[1:]]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return
    asks = "push" in words and not {"--yes", "--dry-run"} & {*words}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [*words, *(["--yes"] if asks else [])])
        with pytest.raises(SystemExit) as status:
            cli.main()
    assert not status.value.code, words


@pytest.fixture
def place(artifact, rules, tmp_path, monkeypatch):
    """A folder with the export and the rule that the page has."""
    rules[KEY].save(tmp_path / "rule.safetensors")
    monkeypatch.chdir(tmp_path)
    assert artifact == tmp_path / "steered"
    return tmp_path


def test_the_page_runs_as_it_stands(online, place, rules, capsys):
    pushing, checking = commands()[:3], commands()[3:]
    for words in pushing:
        follow(words, online)
    pushed = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = online.repositories[NAME]
    assert (found.private, found.branches) == (True, dict.fromkeys(("main", "v1"), pushed["commit"]))
    assert found.commits[pushed["commit"]]["summary"] == "The first of them"

    rule_alone, pull = blocks("python")
    values = {}
    exec(rule_alone, values)
    assert values["again"] == values["of_a_model"] == rules[KEY]
    exec(re.sub(r'"\d{40}"', repr(pushed["commit"]), pull), values)
    assert values["model"].steering.strength == rules[KEY].strength

    for words in checking:
        follow([re.sub(r"^\d{64}$", pushed["receipt"], word) for word in words], online)
