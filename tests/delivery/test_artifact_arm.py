"""Exports answer the questions of an evaluation as the way of running their rule that their format can express."""

from dataclasses import replace
from functools import partial

import artifacts
import pytest

from adaras_export.core.traces import Question
from adaras_export.delivery.artifact_arm import artifact_arm
from adaras_export.errors import ArtifactError, ExportError
from adaras_export.evaluation.answers_by_arm import EvaluationOptions
from adaras_export.evaluation.compare import compare_arms
from adaras_export.evaluation.evaluate import evaluate
from adaras_export.evaluation.task import EvaluationTask
from adaras_export.modeling.generation import Sampling

pytest.importorskip("scipy.stats")

QUESTIONS = [Question(f"q{n}", f"{n * 37} and {'so ' * (n % 4)}on", "x") for n in range(10)]
CASES = [
    ("hf", "gated"),
    ("hf-thin", "gated"),
    pytest.param("onnx", "gated", marks=[pytest.mark.onnx, pytest.mark.slow]),
    pytest.param("peft-adaptive", "gated", marks=pytest.mark.slow),
    pytest.param("peft", "everywhere", marks=pytest.mark.slow),
    ("stock", "everywhere"),
    pytest.param("stock-switchable", "everywhere", marks=pytest.mark.slow),
]


def has_even_sum(completion, answer):
    """A verdict that random text gets right about every second time."""
    return sum(completion.encode()) % 2 == 0


TASK = EvaluationTask(QUESTIONS, has_even_sum, Sampling(5), max_rows=4)


@pytest.fixture
def run(stock, tokenizer, rules):
    """All ways to run the rule of the exports, and these artifacts."""

    def go(folders, task=TASK, **changes):
        rule, model = rules[artifacts.KEY], stock["llama"]
        openers = [partial(artifact_arm, folder, rule, tokenizer) for folder in folders]
        options = EvaluationOptions((), artifacts=openers, **changes)
        return compare_arms(model, tokenizer, rule, task, ["gated", "always", "everywhere"], options)

    return go


@pytest.fixture
def plain(stock, tokenizer, rules):
    """The plain evaluation, which reads no divergences."""

    def go(folders, **changes):
        rule = rules[artifacts.KEY]
        openers = [partial(artifact_arm, folder, rule, tokenizer) for folder in folders]
        return evaluate(stock["llama"], tokenizer, rule, TASK, EvaluationOptions((), artifacts=openers, **changes))

    return go


@pytest.mark.parametrize(("name", "arm"), CASES)
def test_an_artifact_answers_as_the_arm_that_it_computes(name, arm, exported, run):
    folder = exported[name]
    found = run([folder])
    (own,) = [one for one in found.verdicts if one.endswith(folder.name)]
    for column in (found.verdicts, found.tokens, found.cut):
        assert column[own].tolist() == column[arm].tolist()
    assert found.verdicts["gated"].tolist() != found.verdicts["everywhere"].tolist()
    assert found.seconds[own] > 0
    assert found.conclusion.startswith("gated")  # an artifact is no further way to run the rule, and no control


def test_an_artifact_samples_with_the_random_numbers_of_the_other_arms(exported, run):
    task = replace(TASK, sampling=Sampling(5, temperature=1.0, seed=3), samples=2)
    found = run([exported["hf"]], task)
    assert found.tokens[f"hf {exported['hf'].name}"].tolist() == found.tokens["gated"].tolist()


@pytest.mark.onnx
def test_a_graph_does_not_sample(exported, run):
    task = replace(TASK, sampling=Sampling(5, temperature=1.0))
    with pytest.raises(ExportError, match="expected 0, graphs answer greedily"):
        run([exported["onnx"]], task)


def test_a_journal_knows_the_answers_of_an_artifact(exported, plain, tmp_path, monkeypatch):
    whole = plain([exported["stock"]], journal=tmp_path / "journal").as_record()
    monkeypatch.setattr("adaras_export.modeling.generation._generate", lambda *_: pytest.fail("generated"))
    assert plain([exported["stock"]], journal=tmp_path / "journal").as_record() == whole


def test_a_changed_artifact_is_not_run(exported, run, tmp_path):
    folder = artifacts.copy(exported["hf"], tmp_path / "copy")
    code = next(folder.glob("steering_adaras.py"))
    code.write_text(code.read_text() + "\nraise SystemExit('it ran')\n")
    with pytest.raises(ArtifactError, match="expected an unchanged export; see verify"):
        run([artifacts.refit(folder)])


def test_what_cannot_be_an_arm_is_refused(exported, rules, tokenizer, tmp_path, run):
    other = replace(rules[artifacts.KEY], strength=0.5)
    refused = pytest.raises(ArtifactError, match=r"carries rule .*expected .*which is evaluated")
    with refused, artifact_arm(exported["hf"], other, tokenizer):
        pass
    with pytest.raises(ArtifactError, match="receipt"), artifact_arm(tmp_path, other, tokenizer):
        pass
    with pytest.raises(ArtifactError, match=r"two are called 'hf hf'"):
        run([exported["hf"], exported["hf"]])


def test_a_gguf_is_evaluated_where_it_runs(exported, rules, tokenizer):
    pytest.importorskip("gguf")
    with (
        pytest.raises(ExportError, match="target gguf is not run here"),
        artifact_arm(exported["gguf"], rules[artifacts.KEY], tokenizer),
    ):
        pass
