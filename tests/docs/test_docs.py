"""The commands and snippets of docs/onnx.md, followed as they stand there."""

import re
import shlex
import subprocess
import sys

import pytest
from places import DOCS

from adaras_export import cli

PAGE = (DOCS / "onnx.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def command(beginning):
    """The first command of the page that begins so."""
    lines = (line for block in blocks("bash") for line in block.splitlines())
    return shlex.split(next(line for line in lines if line.startswith(beginning)), comments=True)


@pytest.fixture(scope="module")
def place(folders, rules, tmp_path_factory):
    """A folder in which the export of the page has been made, of a base whose graph other tests have made already."""
    place = tmp_path_factory.mktemp("docs")
    (place / "demo-out").mkdir()
    rules["llama", "causal", "last_prompt_token"].save(place / "demo-out" / "rule-attribution.safetensors")
    (place / "adaras_export" / "demo").mkdir(parents=True)
    (place / "adaras_export" / "demo" / "planted_model").symlink_to(folders["llama"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("sys.argv", command("adaras-export export"))
        with pytest.raises(SystemExit) as status:
            cli.main()
    assert not status.value.code
    return place


@pytest.mark.slow
def test_the_runner_answers_as_the_page_says(place):
    asked = [sys.executable, *command("python -m adaras_export.exporters.onnx")[1:]]
    done = subprocess.run(asked, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "steered" in done.stderr


@pytest.mark.slow
def test_the_loop_of_one_call_runs_as_it_stands(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    [snippet] = [block for block in blocks("python") if "InferenceSession" in block]
    exec(snippet, {})
    token, probability, steered = capsys.readouterr().out.splitlines()
    assert token.isdigit()
    assert 0 <= float(probability.removeprefix("p(correct) ")) <= 1
    assert steered in ("steered True", "steered False")
