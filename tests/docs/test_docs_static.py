"""The commands and the snippet of docs/static.md, followed as they stand there, on fewer questions."""

import json
import re
import shlex
from pathlib import Path

import pytest
import tiny
from places import DOCS, PLANTED

from adaras_export import cli
from adaras_export.cli import demo_job
from adaras_export.core.base_model import BaseModel
from adaras_export.core.neurons import NeuronSet
from adaras_export.core.rule import SteeringRule
from adaras_export.core.trace_files import write_questions

pytest.importorskip("scipy.stats")

PAGE = (DOCS / "static.md").read_text()
MODEL = PLANTED


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the demo's questions, and a rule that takes less time than the demo's."""
    (tmp_path / "demo-out").mkdir()
    for part, questions in demo_job.planted_task(tmp_path).questions.items():
        write_questions(tmp_path / "demo-out" / f"{part}.jsonl", questions)
    base = BaseModel.of(MODEL)
    rule = SteeringRule(NeuronSet([base.layers - 1], [0], [1.0], base=base), 0.5, base, gate=tiny.make_gate())
    for ranking in demo_job.RANKINGS:
        rule.save(tmp_path / "demo-out" / f"rule-{ranking}.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_snippet_writes_fresh_questions_and_the_commands_compare_arms_on_them(place, monkeypatch):
    (snippet,) = blocks("python")
    exec(snippet, {})
    fresh = (place / "fresh.jsonl").read_text().splitlines()
    used = [line for part in place.glob("demo-out/*.jsonl") for line in part.read_text().splitlines()]
    assert len(fresh) == len({json.loads(line)["id"] for line in fresh} - {json.loads(line)["id"] for line in used})
    (place / "fresh.jsonl").write_text("\n".join(fresh[:3]))
    commands = [shlex.split(line) for line in blocks("bash")[-1].splitlines()[1:]]
    assert len(commands) == 4
    for words in commands:
        monkeypatch.setattr("sys.argv", [str(MODEL) if word == "$M" else word for word in words])
        with pytest.raises(SystemExit) as status:
            cli.main()
        assert not status.value.code
        assert json.loads(Path(words[-1]).read_text())["comparison"]["gaps"]
