"""docs/receipt.md and the schema beside it, against receipts of every target."""

import json
import re
import subprocess

import artifacts
import pytest
from places import DOCS

PAGE = (DOCS / "receipt.md").read_text(encoding="utf-8")
SCHEMA = json.loads((DOCS / "receipt.schema.json").read_text(encoding="utf-8"))
SLOW = {"onnx": [pytest.mark.onnx, pytest.mark.slow]}
each_export = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=SLOW.get(name, [] if name == "hf" else pytest.mark.slow)) for name in artifacts.EXPORTS],
)

jsonschema = pytest.importorskip("jsonschema")


def receipt_of(folder):
    return json.loads((folder / "receipt.json").read_text(encoding="utf-8"))


@each_export
def test_the_receipt_of_every_target_is_as_the_schema_says(name, exported):
    receipt = receipt_of(exported[name])
    jsonschema.Draft202012Validator(SCHEMA).validate(receipt)
    assert SCHEMA["properties"].keys() == receipt.keys() == {*SCHEMA["required"]}


DAMAGE = {
    "version": 1,
    "rule": "0" * 63,
    "drops": ["gates"],
    "files": {"receipt.json": "0" * 64},
    "parity": [{"check": "x"}],
    "strength_zero": {"difference": 0.0},
    "more": 1,
}


@pytest.mark.parametrize(("field", "value"), DAMAGE.items(), ids=DAMAGE)
def test_the_schema_refuses_what_is_none(field, value, exported):
    found = [*jsonschema.Draft202012Validator(SCHEMA).iter_errors(receipt_of(exported["hf"]) | {field: value})]
    assert {error.path[0] if error.path else "more" for error in found} == {field}


def test_strength_zero_is_null_where_the_page_says_so(exported):
    assert receipt_of(exported["hf"])["strength_zero"] == {"difference": 0.0, "limit": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "switchable"),
    [
        ("stock", False),
        ("peft-merge", False),
        ("gguf-into", False),
        ("stock-switchable", True),
        ("gguf-switchable", True),
    ],
)
def test_strength_zero_of_static_targets_is_as_the_page_says(name, switchable, exported):
    found = receipt_of(exported[name])["strength_zero"]
    assert (found is not None) == switchable
    assert found is None or (found["limit"] > 0) == (name == "stock-switchable")  # the other one is exact


@pytest.fixture
def by_hand(exported, tmp_path):
    """What the two commands of the page print in a folder."""
    folder = artifacts.copy(exported["hf"], tmp_path / "copy")

    def run():
        commands = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
        shell = [["bash", "-c", command] for command in commands]
        done = [subprocess.run(one, cwd=folder, capture_output=True, text=True, check=False) for one in shell]
        if any("jq: command not found" in one.stderr for one in done):
            pytest.skip("needs jq")
        return [one.stdout.split() for one in done]

    return folder, run


def test_the_commands_of_the_page_find_changed_and_unknown_files(by_hand):
    folder, run = by_hand
    assert run() == [[], []]
    (folder / "config.json").write_text("{}")
    (folder / "extra").write_text("x")
    changed, unknown = run()
    assert changed == ["config.json:", "FAILED"]
    assert unknown[-1] == "extra"
