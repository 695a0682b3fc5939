"""Every pushed artifact, opened by repository and commit in a process that has nothing but the Hub's address."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from elsewhere import as_output
from hub.conftest import KEY, LOSSES, TOKENS, at
from hub.server import Hub
from huggingface_hub import HfApi
from places import ROOT
from tiny import EOS, LAYERS, PAD, PROMPTS, require_answers

from adaras_export.core import folding
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.rule import SteeringRule
from adaras_export.delivery import push as pushing
from adaras_export.delivery.writer import export

for library in ("gguf", "onnxruntime", "peft"):
    pytest.importorskip(library)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.onnx,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
]
BASE = "user/base"
SLACK = {"onnx": 4}  # as in tests/exporters/test_onnx.py: other kernels sum in other orders
TARGETS = {
    "hf": ("hf", "steered"),
    "hf-thin": ("hf-thin", "steered"),
    "onnx": ("onnx", "onnx"),
    "peft": ("peft", "peft"),
    "adaptive": ("peft", "adaptive"),
    "stock": ("stock", "stock"),
    "gguf": ("gguf", "gguf"),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub"), TOKENS) as found:
        yield found
    assert found.surprises == []


@pytest.fixture(scope="module")
def commits(hub, folders, rules, tmp_path_factory):
    """Name of a repository -> commit: the base, and an export of every target that names it by id and commit."""
    place = tmp_path_factory.mktemp("exports")
    found = {}
    with at(hub, place / "home"):
        HfApi().create_repo(BASE, private=True)
        found[BASE] = HfApi().upload_folder(repo_id=BASE, folder_path=folders[KEY[0]]).oid
        for name, (target, _) in TARGETS.items():
            how = {"adaptive": True} if name == "adaptive" else {"accept_loss": LOSSES.get(target, ())}
            export(rules[KEY], base=BASE, to=target, out=place / name, **how)
            found[f"user/{name}"] = pushing.push(place / name, f"user/{name}").commit
    return found


def client(hub, home, jobs, *, library=False, **settings):
    """What the other process made of each job, by name of a target; all that it has is in these variables."""
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(home), "HF_ENDPOINT": hub.endpoint}
    environment |= {"HF_TOKEN": "hf_reader", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", **settings}
    if library:
        environment["PYTHONPATH"] = str(ROOT)
    asked = {"library": library, "jobs": jobs, "rows": PROMPTS, "pad": PAD, "end": EOS, "state": LAYERS}
    command = [sys.executable, Path(__file__).parent / "client.py"]
    ran = subprocess.run(command, input=json.dumps(asked), cwd=home, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


def jobs_of(commits, names):
    return [{"how": TARGETS[name][1], "name": f"user/{name}", "revision": commits[f"user/{name}"]} for name in names]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def pulled(hub, commits, home):
    """What a process that cannot import the library makes of them, by name; and what it asked the Hub for."""
    names, before = [name for name in TARGETS if name != "adaptive"], len(hub.log)
    jobs = [*jobs_of(commits, names), {**jobs_of(commits, ["peft"])[0], "how": "stock"}]
    found = client(hub, home, jobs)
    return dict(zip([*names, "peft by Transformers"], found, strict=True)) | {"log": hub.log[before:]}


@pytest.mark.parametrize("name", ["hf", "hf-thin", "onnx"])
def test_adaptive_artifacts_say_what_the_oracle_says(name, pulled, told):
    require_answers(as_output(in_full(pulled[name])), told[KEY], slack=SLACK.get(name, 1))


@pytest.mark.parametrize("name", ["peft", "stock"])
def test_static_artifacts_say_what_the_oracle_says_of_steering_everywhere(name, pulled, told_everywhere):
    require_answers(as_output(pulled[name]), told_everywhere[KEY])


def test_a_control_vector_is_the_folded_vectors(pulled, rules, folders):
    vectors = folding.vectors(rules[KEY], Checkpoint(folders[KEY[0]]))
    assert pulled["gguf"] == {f"direction.{layer}": vector.tolist() for layer, vector in vectors.items()}


def test_with_the_library_an_adaptive_adapter_does_the_same(hub, commits, tmp_path, told):
    [found] = client(hub, tmp_path, jobs_of(commits, ["adaptive"]), library=True)
    require_answers(as_output(found), told[KEY])


def test_code_weights_and_base_are_those_of_the_commit(pulled, commits):
    asked = {path.split("/resolve/")[1] for _, path, *_ in pulled["log"] if path.startswith("/user/hf/resolve/")}
    assert {one.partition("/")[0] for one in asked} == {commits["user/hf"]}
    assert {one.partition("/")[2] for one in asked} > {"modeling_adaras.py", "steering_adaras.py", "config.json"}
    of_base = [path for _, path, status, _ in pulled["log"] if path.startswith("/user/base/resolve/") and status != 404]
    assert {path.split("/")[4] for path in of_base} == {commits[BASE]}


def test_transformers_takes_the_revision_of_an_adapter_for_its_bases(pulled, commits):
    """Why docs/hub.md opens the base first: one argument is used for both repositories."""
    assert pulled["peft by Transformers"].startswith(f"OSError: {commits['user/peft']} is not a valid git identifier")


def test_what_was_pulled_opens_without_the_hub(hub, commits, pulled, home):
    before = len(hub.log)
    found = client(hub, home, jobs_of(commits, ["hf", "hf-thin"]), HF_HUB_OFFLINE="1")
    assert found == [pulled["hf"], pulled["hf-thin"]]
    assert len(hub.log) == before


@pytest.mark.parametrize("name", TARGETS)
def test_every_repository_gives_its_rule(name, hub, commits, rules, home, tmp_path):
    with at(hub, tmp_path):
        found = SteeringRule.from_pretrained(f"user/{name}", revision=commits[f"user/{name}"])
    assert found == rules[KEY]


def in_full(result):
    """A result with the prompts before the new tokens, as generate() gives it; drivers give the new ones only."""
    if "decisions" not in result:
        return result
    padded = tiny.left_padded(PROMPTS)["input_ids"].tolist()
    return {**result, "sequences": [[*row, *new] for row, new in zip(padded, result["sequences"], strict=True)]}
