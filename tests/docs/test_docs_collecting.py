"""docs/collecting.md: its options are those of `collect`, and its teacher's traces are read by a target."""

import inspect
import re
import shlex
import sys

import pytest
import transformers
from completions import Completions
from places import DOCS

from adaras_export import cli
from adaras_export.cli.collect import collect
from adaras_export.core.neurons import NeuronSet
from adaras_export.core.trace_files import read_traces, write_questions
from adaras_export.core.traces import Question, by_question

PAGE = (DOCS / "collecting.md").read_text()


def test_the_page_names_options_of_collect_and_all_that_are_its_own():
    others = {"generation_config"}  # of vLLM's server
    named = {one.replace("-", "_") for one in re.findall(r"--([a-z][a-z-]+)", PAGE)} - others
    common = {"questions", "model", "out", "as_json"}
    assert named == {*inspect.signature(collect).parameters} - common


def test_traces_of_a_served_teacher_are_read_by_the_target(folders, tmp_path, monkeypatch, capsys):
    """The two commands of the page, with other names, fewer attempts and as many neurons as a tiny model has."""
    pytest.importorskip("openai")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    questions = [Question(f"q{n}", [{"role": "user", "content": f"{n} + 1 ="}], "3") for n in range(3)]
    write_questions("questions.jsonl", questions)
    [block] = [block for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) if "identify" in block]
    first, second = block.replace("\\\n", "").replace("per-class 4", "per-class 2").splitlines()
    with Completions() as server:
        call(first.replace("http://127.0.0.1:8000/v1", server.url).replace("TEACHER", "teacher"))
    groups = by_question(read_traces("traces.jsonl"))
    assert [{trace.correct for trace in group} for group in groups.values()] == [{True, False}] * 3
    call(second.replace("TARGET", str(folders["llama"])) + " --keep 7")
    assert len(NeuronSet.load("neurons.safetensors").layer) == 7
    assert "3 questions with both outcomes" in capsys.readouterr().out


def call(line):
    verbosity = transformers.logging.get_verbosity()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as end:
            cli.main()
    transformers.logging.set_verbosity(verbosity)
    assert not end.value.code
