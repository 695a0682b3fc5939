"""`tune` on the command line, killed for real: the rule has the bytes of a run in one go."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from places import ROOT

from adaras_export import cli
from adaras_export.core.base_model import BaseModel
from adaras_export.core.neurons import NeuronSet
from adaras_export.core.trace_files import write_questions
from adaras_export.core.traces import Question
from adaras_export.data.checkers import last_number
from adaras_export.demo import planted
from adaras_export.evaluation.task import EvaluationTask
from adaras_export.evaluation.tune import TuneOptions, tune
from adaras_export.modeling.generation import Sampling
from adaras_export.modeling.loading import load_model

pytest.importorskip("scipy.stats")
pytestmark = pytest.mark.slow
PACKAGE = ROOT / "adaras_export"
MODEL = PACKAGE / "demo" / "planted_model"


def tuning(folder):
    """The words of the command."""
    command = ["tune", folder / "validation.jsonl", "-m", MODEL, "--neurons", folder / "neurons", "-o", folder / "rule"]
    command += ["--max-new-tokens", "40", "--counts", "5,20", "--strengths", "1,2", "--batch-size", "8"]
    return list(map(str, command))


def started(folder):
    """The command in a process of its own."""
    command = [sys.executable, "-c", "from adaras_export.cli import main; main()", *tuning(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *sys.path])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def whole(questions, neurons):
    """What a run that nobody killed finds."""
    model, tokenizer = load_model(str(MODEL))
    task = EvaluationTask(questions, last_number, Sampling(40), max_rows=8)
    return tune(model, tokenizer, neurons, None, task, BaseModel.of(str(MODEL)), TuneOptions((5, 20), (1, 2)))


def lines(path):
    return path.read_bytes().splitlines() if path.is_file() else []


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    neurons = NeuronSet(np.full(20, 3), np.arange(20), random.normal(size=20), base=BaseModel.of(MODEL))
    neurons.save(tmp_path / "neurons")
    rows = planted.splits({"validation": 32}, seed=5)["validation"]
    questions = [Question(r["id"], r["prompt"], r["answer"]) for r in rows]
    write_questions(tmp_path / "validation.jsonl", questions)
    journal, process = tmp_path / "rule.partial.jsonl", started(tmp_path)
    while process.poll() is None and len(lines(journal)) < 5:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -9
    kept = lines(journal)
    assert len(kept) >= 5
    assert not (tmp_path / "rule").exists()
    monkeypatch.setattr(sys, "argv", ["adaras-export", *tuning(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert not journal.exists()
    assert (tmp_path / "rule").read_bytes() == whole(questions, neurons).rule.to_bytes()
