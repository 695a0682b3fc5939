"""Sample several attempts at each question, check them, and append them to a file of traces.

Knows nothing of steering and prints nothing. The batches follow from the arguments and from what the file holds, so a
run that was killed goes on where it stopped; with a model in this process it ends with the same bytes.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaras_export.core.base_model import BaseModel
from adaras_export.core.neuron_stats import NeuronStats
from adaras_export.core.trace_log import TraceLog
from adaras_export.core.traces import Checker, Question, Settings, Trace, by_question, name_of
from adaras_export.data.backends.local import Ledger, LocalBackend
from adaras_export.data.sampling_plan import Attempt, Backend, Completion, Goal, Plan
from adaras_export.errors import TraceError
from adaras_export.modeling.generation import Sampling

Progress = Callable[[int, int], None]
"""Of attempts done and attempts in all."""

Finished = Callable[[Collection[str], Mapping[str, Trace]], None]
"""Of questions that get no more traces, and all traces."""


@dataclass(frozen=True)
class Recording:
    """Where statistics of the activations go that the sampling itself produced, and whose they are."""

    path: Path
    base: BaseModel


@dataclass(frozen=True)
class CollectReport:
    """What the file holds after a run, and what the run did.

    Attributes:
        traces: traces in the file.
        correct: those that the checker accepted.
        questions: questions that have a trace.
        mixed_questions: questions that have correct and incorrect traces.
        resumed: traces that the file held before the run.
        unlabelled: traces that do not say with which settings they were sampled.
        blank: attempts of this run that gave no text; they make no trace.
        cut: traces of this run that the limit of tokens ended.
        repeated: traces with the text of an earlier one of their question; many where a server does not sample.
        seconds: wall-clock time of the run.
    """

    traces: int
    correct: int
    questions: int
    mixed_questions: int
    resumed: int
    unlabelled: int
    blank: int
    cut: int
    repeated: int
    seconds: float

    def cautions(self) -> list[str]:
        """What keeps the file from being contrasted, or makes a contrast doubtful."""
        found = []
        if self.unlabelled:
            found.append(
                f"{self.unlabelled} traces of an earlier version do not say how they were sampled: whether limit of "
                "tokens, temperature, template, checker and revision were those of this run is not known"
            )
        if not self.correct or self.correct == self.traces:
            kind, others = ("correct", "easier") if not self.correct else ("incorrect", "harder")
            found.append(f"no trace is {kind}, so identify and gate cannot use the file; ask {others} questions")
        elif not self.mixed_questions:
            found.append("no question has both outcomes, so identify cannot contrast them; sample more attempts")
        return found


def collect(  # noqa: PLR0913 - each is a decision of its own
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    out: str | Path,
    *,
    attempts: int,
    sampling: Sampling,
    check: Checker,
    batch_size: int,
    wanted: int | None = None,
    per_class: int | None = None,
    record: Recording | None = None,
    name: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> CollectReport:
    """Append ``attempts`` checked completions per question to the JSONL file ``out``.

    Trace ids are ``question#attempt``, attempts from 0. Batches hold prompts of similar length, attempts at a question
    together, and each is on disk before the next one starts. What the file holds already is kept; with unchanged
    arguments it ends as if the run had never been interrupted. `Goal` says what ``wanted`` and ``per_class`` stop.
    ``name`` and ``revision`` are the model's: each trace says who wrote it, and with which settings.

    With ``record``, the activations that sampling produces anyway are summed up per question with both
    outcomes, and saved as `NeuronStats`: what `identify` would read from the file, without a pass of its own.
    Traces that were there before are read once.

    Raises:
        TraceError: contradictory arguments, a file of other questions, settings or another model's name, one that
            another process writes, or one that cannot be read or written.
    """
    _require_questions(questions, attempts, batch_size)
    require_varied(attempts, sampling)
    goal = Goal(attempts, wanted, per_class)
    backend = LocalBackend(model, tokenizer, sampling, batch_size, None if record is None else {})
    how: dict[str, Any] = {"check": check, "batch_size": batch_size, "progress": progress}
    how |= {"name": name, "revision": revision}
    if record is None or backend.means is None:
        return collect_from(backend, questions, out, goal, **how)
    ledger = Ledger(model, tokenizer, NeuronStats.empty(record.base), backend.means)
    report = collect_from(backend, questions, out, goal, finished=ledger.close, **how)
    ledger.stats.save(record.path)
    return report


def collect_from(  # noqa: PLR0913 - each is a decision of its own
    backend: Backend,
    questions: Sequence[Question],
    out: str | Path,
    goal: Goal,
    *,
    check: Checker,
    batch_size: int,
    finished: Finished | None = None,
    name: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> CollectReport:
    """The same from any backend. Every piece of completions is on disk before the next one is looked at.

    Raises:
        TraceError: as of `collect`.
        AdarasError: what the backend raises; the file holds what was completed before.
    """
    started = time.perf_counter()
    _require_questions(questions, goal.attempts, batch_size)
    arranged = backend.arranged(questions)
    # Where the first questions could be all that are asked, they must not be chosen by their length.
    plan = Plan(arranged if goal.wanted is None else questions, goal, batch_size, whole=backend.streams)
    settings = {**backend.settings, "check": name_of(check), "revision": revision}
    with TraceLog(Path(out)) as log:
        held = log.resume(questions, name, settings)
        run = _Run(backend, check, log, held, name, settings, resumed=len(held))
        run.complete(plan, progress or _nobody, finished or _nobody)
    return run.report(time.perf_counter() - started)


def _nobody(_one: object, _other: object) -> None:
    """What is done, where nobody looks at it."""


def _require_questions(questions: Sequence[Question], attempts: int, batch_size: int) -> None:
    if not questions or attempts < 1 or batch_size < 1:
        raise TraceError(
            f"collect: {len(questions)} questions, {attempts} attempts, batches of {batch_size}; "
            "expected at least one of each"
        )
    repeated = [id_ for id_, count in Counter(q.id for q in questions).items() if count > 1]
    if repeated:
        raise TraceError(f"collect: question {repeated[0]} is given twice; expected unique ids")


def require_varied(attempts: int, sampling: Sampling) -> None:
    """Refuse several attempts of which each would be the first one again.

    Raises:
        TraceError: more than one attempt at temperature 0.
    """
    if attempts > 1 and sampling.temperature == 0:
        raise TraceError(
            f"collect: {attempts} attempts at temperature 0 are equal; expected a temperature above 0, or one attempt"
        )


@dataclass
class _Run:
    """The traces so far, by id, in memory and in the file."""

    backend: Backend
    check: Checker
    log: TraceLog
    traces: dict[str, Trace]
    name: str | None
    settings: Settings
    resumed: int
    blank: int = 0
    cut: int = 0

    def complete(self, plan: Plan, progress: Progress, finished: Finished) -> None:
        """Batch by batch, what the plan says and the file lacks."""
        done, seen = 0, set[str]()
        for batch in plan.batches():
            for left in self.fill(batch):
                progress(done + len(batch) - left, plan.total)
            done += len(batch)
            for attempt in batch:
                seen.add(attempt.question.id)
                if attempt.id in self.traces:
                    plan.count(attempt.question.id, correct=self.traces[attempt.id].correct)
            finished(plan.over(batch), self.traces)
        finished(seen, self.traces)
        if plan.goal.per_class is not None:
            progress(done, plan.total)  # the last questions may have been spared attempts

    def fill(self, batch: Sequence[Attempt]) -> Iterator[int]:
        """Complete what is missing of a batch; after each piece, how many are still to come."""
        missing = {attempt.id: attempt for attempt in batch if attempt.id not in self.traces}
        if not missing:
            yield 0
            return
        # Closed here: where an answer cannot be written, requests of others would go on until the process ends.
        with closing(self.backend.complete(batch, {*missing})) as pieces:
            for piece in pieces:
                self._keep([(missing.pop(key), completion) for key, completion in piece.items()])
                yield len(missing)

    def _keep(self, piece: Sequence[tuple[Attempt, Completion]]) -> None:
        fresh = [
            Trace(
                id=attempt.id,
                question_id=attempt.question.id,
                prompt=attempt.question.prompt,
                completion=completion.text,
                correct=self.check(completion.text, attempt.question.answer),
                model=self.name,
                settings=self.settings,
            )
            for attempt, completion in piece
            if completion.text.strip()
        ]
        self.log.append(fresh)
        self.traces.update({trace.id: trace for trace in fresh})
        self.blank += len(piece) - len(fresh)
        self.cut += sum(completion.cut for _, completion in piece if completion.text.strip())

    def report(self, seconds: float) -> CollectReport:
        traces = list(self.traces.values())
        groups = by_question(traces)
        return CollectReport(
            traces=len(traces),
            correct=sum(trace.correct for trace in traces),
            questions=len(groups),
            mixed_questions=sum(len({trace.correct for trace in group}) == 2 for group in groups.values()),
            resumed=self.resumed,
            unlabelled=sum(trace.settings is None for trace in traces),
            blank=self.blank,
            cut=self.cut,
            repeated=sum(len(group) - len({trace.completion for trace in group}) for group in groups.values()),
            seconds=seconds,
        )
