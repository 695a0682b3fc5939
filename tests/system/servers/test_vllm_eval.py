"""`eval` and `tune` with `--backend vllm` on the command line, inside vLLM's own environment, on the planted model."""

import json
import os
import subprocess

import drive
import numpy as np
import pytest
from places import ROOT

from adaras_export.core.base_model import BaseModel
from adaras_export.core.gate import Gate
from adaras_export.core.neurons import NeuronSet
from adaras_export.core.rule import SteeringRule
from adaras_export.core.trace_files import write_questions
from adaras_export.core.traces import Question
from adaras_export.data.checkers import last_number
from adaras_export.demo import planted
from adaras_export.evaluation.answers_by_arm import EvaluationOptions
from adaras_export.evaluation.evaluate import evaluate
from adaras_export.evaluation.record import read_evaluation
from adaras_export.evaluation.task import EvaluationTask
from adaras_export.evaluation.tune import TuneOptions, tune
from adaras_export.evaluation.tune_search import Search
from adaras_export.modeling.gate import gate_probabilities
from adaras_export.modeling.generation import Sampling
from adaras_export.modeling.loading import load_model

pytest.importorskip("scipy.stats")
MODEL = ROOT / "adaras_export" / "demo" / "planted_model"
SAMPLING = Sampling(40)
DRAWS = 1


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL, device="cpu")


@pytest.fixture(scope="module")
def questions():
    rows = planted.splits({"test": 12}, seed=5)["test"]
    return [Question(row["id"], row["prompt"], row["answer"]) for row in rows]


@pytest.fixture(scope="module")
def rule(model, questions):
    """A rule whose gate steers about half of the questions, from random neurons that change answers."""
    base, random = BaseModel.of(MODEL), np.random.default_rng(0)
    neurons = NeuronSet(np.full(20, 3), np.arange(20), 3 * random.normal(size=20), base=base)
    width, hidden = 6, 4
    weights = {
        "attention_weight": random.normal(size=width),
        "attention_bias": 0.2,
        "hidden_weight": random.normal(size=(hidden, width)),
        "hidden_bias": np.ones(hidden),
        "output_weight": random.normal(size=hidden),
        "output_bias": 0.0,
    }
    gate = Gate(np.ones(width, np.int64), np.arange(width), **weights, threshold=0.5, base=base)
    found = np.sort(gate_probabilities(*model, gate, [one.prompt for one in questions]))
    gate = Gate(gate.layer, gate.index, **weights, threshold=float(found[5:7].mean()), base=base)
    return SteeringRule(neurons, 10.0, base, gate=gate)


@pytest.fixture(scope="module")
def run(questions, rule, tmp_path_factory, pytestconfig):
    """A command with `--backend vllm`; its folder."""
    drive.require_built("vllm", required=pytestconfig.option.require_runtimes)
    vllm, folder = drive.RUNTIMES["vllm"], tmp_path_factory.mktemp("run")
    shared = {"PATH": os.environ["PATH"], "HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_AOT_COMPILE": "0", "TMPDIR": str(folder)}
    environment = {**shared, **vllm.settings, **own, "PYTHONPATH": str(ROOT)}
    write_questions(folder / "q.jsonl", questions)
    rule.save(folder / "rule")
    rule.neurons.save(folder / "neurons")
    rule.gate.save(folder / "gate")

    def go(*arguments):
        command = [vllm.command[0], "-m", "adaras_export", *arguments, "-m", MODEL, "--backend", "vllm"]
        command += ["--max-new-tokens", "40", "--batch-size", "16"]
        done = subprocess.run([*map(str, command)], env=environment, cwd=folder, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        assert not [*folder.glob("adaras-bank-*")]  # the bank's folder is gone
        return folder

    return go


def test_an_evaluation_has_the_verdicts_of_the_model_in_memory(run, model, questions, rule):
    arguments = ["eval", "q.jsonl", "--rule", "rule", "-o", "found.json", "--random-controls", DRAWS]
    folder = run(*arguments, "--compare", "gated,always,everywhere")
    task = EvaluationTask(questions, last_number, SAMPLING, name="q")
    options = EvaluationOptions(range(DRAWS))
    expected = evaluate(*model, rule, task, options, arms=("gated", "always", "everywhere"))
    found = read_evaluation(folder / "found.json")
    assert found.model["backend"] == "vllm"
    for part in ("verdicts", "tokens", "cut"):
        assert {name: one.tolist() for name, one in getattr(found, part).items()} == {
            name: one.tolist() for name, one in getattr(expected, part).items()
        }
    assert 0 < found.steered_share == expected.steered_share < 1
    assert found.conclusion == expected.conclusion
    changed = {name: (one != found.verdicts["off"]).any() for name, one in found.verdicts.items()}
    assert all(changed[name] for name in ("always", "everywhere", "flipped"))


def test_a_grid_has_the_table_of_the_model_in_memory(run, model, questions, rule):
    arguments = ["tune", "q.jsonl", "--neurons", "neurons", "--gate", "gate", "-o", "best", "--report", "report.json"]
    folder = run(*arguments, "--counts", "5,20", "--strengths", "-10,10")
    task = EvaluationTask(questions, last_number, SAMPLING, name="q")
    options = TuneOptions((5, 20), (-10.0, 10.0), search=Search(first=0))
    expected = tune(*model, rule.neurons, rule.gate, task, rule.base, options)
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(expected.as_record()))
    assert len({trial.arm.accuracy for trial in expected.trials}) > 1
    assert SteeringRule.load(folder / "best").fingerprint == expected.rule.fingerprint
