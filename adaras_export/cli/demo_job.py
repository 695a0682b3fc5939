"""The whole job, stage by stage, as a user would do it with the public functions.

From questions to a steered repository that runs without this library, and an honest table at the end. Both rankings
are taken to the end, side by side; which one is exported is decided on the validation questions.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaras_export.core.base_model import BaseModel
from adaras_export.core.neuron_stats import NeuronStats
from adaras_export.core.neurons import Ranking
from adaras_export.core.trace_files import read_traces, write_questions
from adaras_export.core.traces import Question
from adaras_export.data.checkers import checker
from adaras_export.data.collect import CollectOptions, CollectReport, Recording, collect
from adaras_export.data.sampling_plan import Goal
from adaras_export.delivery.verifier import verify
from adaras_export.delivery.writer import ExportReport, export
from adaras_export.demo import planted, smollm2
from adaras_export.discovery.gate_report import GateReport
from adaras_export.discovery.gate_training import train_gate
from adaras_export.discovery.identify import Identified, IdentifyOptions, identify
from adaras_export.errors import ExportError, MissingExtraError, require
from adaras_export.evaluation.answers_by_arm import EvaluationOptions
from adaras_export.evaluation.evaluate import evaluate
from adaras_export.evaluation.record import Evaluation
from adaras_export.evaluation.task import EvaluationTask
from adaras_export.evaluation.tune import TuneOptions, tune
from adaras_export.evaluation.tune_report import TuneReport
from adaras_export.exporters.checks import ParityReport
from adaras_export.modeling.activations import Reading
from adaras_export.modeling.generation import Sampling
from adaras_export.modeling.loading import load_model

Bar = Callable[[str], Callable[[int, int], None]]

RANKINGS: tuple[Ranking, ...] = ("paper", "attribution")


@dataclass(frozen=True)
class Task:
    """A model at hand, its questions, and the settings of the job on it."""

    name: str
    base: Path
    questions: dict[str, list[Question]]
    attempts: int
    sampling: Sampling
    counts: Sequence[int]
    strengths: dict[Ranking, Sequence[float]]
    random_controls: int
    remark: str


def planted_task(_out: Path) -> Task:
    """The embedded synthetic model; see docs/planted.md.

    The paper's deltas are differences of means, about a seventh of a deviation here, so its strengths are larger: both
    rankings may add vectors of about the same norms.
    """
    return Task(
        name="planted",
        base=planted.MODEL,
        questions=planted.questions({"identify": 400, "validation": 300, "test": 1000}),
        attempts=8,
        sampling=Sampling(40, temperature=1.0),
        counts=(50, 200),
        strengths={
            "paper": (-30.0, -10.0, -3.0, -1.0, 1.0, 3.0, 10.0, 30.0),
            "attribution": (-4.0, -2.0, -1.0, -0.3, 0.3, 1.0, 2.0, 4.0),
        },
        random_controls=20,
        remark="SYNTHETIC: a small model with planted careful and careless modes. No evidence about real models.",
    )


def smollm2_task(out: Path) -> Task:
    """SmolLM2-135M-Instruct on multiplication word problems."""
    return Task(
        name="smollm2",
        base=smollm2.unpack(out / smollm2.NAME),
        questions=smollm2.splits({"identify": 400, "validation": 200, "test": 500}, seed=1),
        attempts=4,
        sampling=Sampling(12, temperature=1.0, stop="\n"),
        counts=(50,),
        # In deviations of trace means, which the shared examples of the prompt make small: see docs/decisions/004.
        strengths={"paper": (-30.0, -10.0, -3.0, 3.0, 10.0, 30.0), "attribution": (-4.0, 1.0, 2.0, 4.0, 8.0)},
        random_controls=3,
        remark="SmolLM2-135M-Instruct (Apache-2.0), 4-bit weights dequantised to float32, one kind of question.",
    )


TASKS: dict[str, Callable[[Path], Task]] = {"planted": planted_task, "smollm2": smollm2_task}


@dataclass(frozen=True)
class Candidate:
    """One ranking taken to the end."""

    identified: Identified
    tuned: TuneReport
    evaluation: Evaluation


@dataclass(frozen=True)
class Summary:
    """What the job found, and where its files are."""

    task: Task
    out: Path
    collected: CollectReport
    gate: GateReport
    candidates: dict[Ranking, Candidate]
    exported: Ranking
    delivery: ExportReport
    verified: ParityReport
    answers: list[dict[str, Any]]
    seconds: float

    def as_record(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "task": self.task.name,
            "remark": self.task.remark,
            "out": str(self.out),
            "collect": vars(self.collected),
            "gate": self.gate.as_record(),
            "rankings": {
                name: {
                    "identify": one.identified.as_record(),
                    "tune": one.tuned.as_record(),
                    "evaluation": {k: v for k, v in one.evaluation.as_record().items() if k != "verdicts"},
                }
                for name, one in self.candidates.items()
            },
            "exported": self.exported,
            "verified": self.verified.ok,
            "answers": self.answers,
            "seconds": self.seconds,
        }

    def text(self) -> str:
        """The summary for a person."""
        collected = self.collected
        lines = [
            f"{self.task.name}: {self.task.remark}",
            "",
            f"traces    {collected.traces} of {collected.questions} questions, "
            f"{collected.correct / collected.traces:.1%} correct, "
            f"{collected.mixed_questions} questions with both outcomes",
            f"gate      {self.gate.line()}",
        ]
        for name, one in self.candidates.items():
            lines += ["", f"ranking: {name}", f"  {one.identified.line()}", f"  {one.tuned.line()}"]
            lines += [f"  {line}" for line in one.evaluation.table().splitlines()]
            lines += [f"  {one.evaluation.conclusion}"]
        lines += ["", f"exported  {self.exported} (better on validation) -> {self.delivery.path}"]
        checks, failed = self.verified.checks, self.verified.failed()
        lines += [f"verified  {len(checks) - len(failed)} of {len(checks)} checks passed"]
        lines += ["in a process without this library (two questions that steering changed, if any, and another):"]
        lines += [f"  {_one_line(answer)}" for answer in self.answers]
        lines += ["", f"files in {self.out}: {', '.join(sorted(path.name for path in self.out.iterdir()))}"]
        return "\n".join([*lines, f"{self.seconds:.0f} seconds"])


_UNFINISHED = "unfinished"  # a file with the name of the task, in the folder for as long as the job is not done


def run(name: str, out: Path, bar: Bar) -> Summary:
    """The job on one of `TASKS`, with all files in the folder ``out``: a new one, or that of the same job cut off.

    Raises:
        ExportError: there is no such task, or ``out`` exists and is of something else.
        MissingExtraError: a library that a later stage needs is not installed; no folder is made.
    """
    if name not in TASKS:
        raise ExportError(f"demo: no model {name}; expected one of: {', '.join(TASKS)}")
    mark, new = out / _UNFINISHED, not out.exists()
    if not new and not (mark.is_file() and mark.read_text() == name):
        raise ExportError(f"{out}: exists already; choose another folder, or remove it first")
    for library in _LIBRARIES:
        require(library, "identify", "the demo")
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text(name)
    try:
        task = TASKS[name](out)
    except MissingExtraError:  # of the model itself
        if new:
            mark.unlink()
            out.rmdir()
        raise
    summary = job(task, out, bar)
    mark.unlink()
    return summary


_LIBRARIES = ("sklearn.linear_model", "scipy.stats", "threadpoolctl")


def job(task: Task, out: Path, bar: Bar) -> Summary:
    """The job on a task, with all files in the folder ``out``; traces that it has are kept, all else is made anew."""
    started = time.perf_counter()
    for part, questions in task.questions.items():
        write_questions(out / f"{part}.jsonl", questions)
    base = BaseModel.of(task.base)
    model, tokenizer = load_model(task.base)

    collected = collect(
        model,
        tokenizer,
        task.questions["identify"],
        out / "traces.jsonl",
        goal=Goal(task.attempts),
        sampling=task.sampling,
        record=Recording(out / "statistics.safetensors", base),
        options=CollectOptions(batch_size=128, progress=bar("sample and check")),
    )
    traces = read_traces(out / "traces.jsonl")
    reading = Reading(progress=bar("train the gate"))
    gate = train_gate(model, tokenizer, traces, base, reading=reading, out=out / "gate.safetensors")

    candidates: dict[Ranking, Candidate] = {}
    for ranking in RANKINGS:
        identified = identify(
            model,
            tokenizer,
            traces,
            base,
            IdentifyOptions(ranking),
            stats=NeuronStats.load(out / "statistics.safetensors"),
            reading=Reading(progress=bar("attribution")) if ranking == "attribution" else None,
            out=out / f"neurons-{ranking}.safetensors",
        )
        tuned = tune(
            model,
            tokenizer,
            identified.neurons,
            gate.gate,
            _evaluation_task(task, "validation", bar(f"tune {ranking}")),
            base,
            TuneOptions(task.counts, task.strengths[ranking]),
            out=out / f"rule-{ranking}.safetensors",
        )
        test = _evaluation_task(task, "test", bar(f"evaluate {ranking}"))
        controls = EvaluationOptions(range(task.random_controls))
        record = out / f"evaluation-{ranking}.json"
        evaluation = evaluate(model, tokenizer, tuned.rule, test, controls, out=record)
        candidates[ranking] = Candidate(identified, tuned, evaluation)

    if (out / "steered-model").exists():
        shutil.rmtree(out / "steered-model")
    exported = max(RANKINGS, key=lambda one: candidates[one].tuned.chosen.arm.accuracy)
    delivery = export(
        candidates[exported].tuned.rule,
        base=task.base,
        to="hf",
        out=out / "steered-model",
        evaluation=out / f"evaluation-{exported}.json",
    )
    return Summary(
        task=task,
        out=out,
        collected=collected,
        gate=gate,
        candidates=candidates,
        exported=exported,
        delivery=delivery,
        verified=verify(delivery.path),
        answers=_in_a_clean_process(delivery.path, _telling(task, candidates[exported].evaluation), task.sampling),
        seconds=time.perf_counter() - started,
    )


def _evaluation_task(task: Task, part: str, progress: Callable[[int, int], None]) -> EvaluationTask:
    greedy = Sampling(task.sampling.max_new_tokens, stop=task.sampling.stop)
    return EvaluationTask(task.questions[part], checker("last_number"), greedy, max_rows=128, progress=progress)


def _telling(task: Task, evaluation: Evaluation) -> list[Question]:
    """Test questions to show: two that steering changed, where there are any, and one that it left alone."""
    steered, off = (evaluation.verdicts[name][:, 0] for name in ("gated", "off"))
    changed = [
        question for question, one, other in zip(task.questions["test"], steered, off, strict=True) if one != other
    ]
    others = [question for question in task.questions["test"] if question not in changed[:2]]
    return [*changed[:2], *others][:3]


def _in_a_clean_process(folder: Path, questions: Sequence[Question], sampling: Sampling) -> list[dict[str, Any]]:
    """What the repository does where this library cannot be imported."""
    prompts = [question.prompt for question in questions]
    arguments = [str(folder), json.dumps(prompts, default=list), str(sampling.max_new_tokens)]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, str(Path(planted.__file__).with_name("clean_process.py")), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        raise ExportError(f"{folder}: does not run without this library: {done.stderr.strip().splitlines()[-1]}")
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def _one_line(answer: dict[str, Any]) -> str:
    decision = ", ".join(f"p(correct) {p:.2f}: {'steered' if on else 'left alone'}" for p, on in answer["decision"])
    question = " ".join(answer["prompt"].strip().split("\n\n")[-1].split())  # without the worked examples before it
    return f"{question!r} -> {answer['steered']!r} ({decision}; off: {answer['off']!r})"
