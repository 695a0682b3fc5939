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

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaras_export.core.base_model import BaseModel
from adaras_export.core.neuron_stats import NeuronStats
from adaras_export.core.trace_log import TraceLog
from adaras_export.core.traces import Checker, Question, Settings, Trace, by_question, name_of
from adaras_export.data.backends.local import Ledger, LocalBackend
from adaras_export.data.checkers import checker_for
from adaras_export.data.sampling_plan import Attempt, Backend, Completion, Goal, SamplingPlan
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


@dataclass(frozen=True)
class CollectOptions:
    """How attempts are checked and labelled, beside what is asked and how it is sampled.

    Attributes:
        check: tells right answers from wrong ones; None: the checker that the questions name, `last_number` if none.
        batch_size: rows of one batch; for a server, attempts between two checks of the goal.
        name: of the model that writes the traces; each trace carries it.
        revision: commit of that model, where it has one.
        progress: called with the attempts done and the attempts in all.
    """

    check: Checker | None = None
    batch_size: int = 32
    name: str | None = None
    revision: str | None = None
    progress: Progress | None = None


_PLAIN = CollectOptions()


def collect(  # noqa: PLR0913 - what the job is made of
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    out: str | Path,
    *,
    goal: Goal | None = None,
    sampling: Sampling | None = None,
    record: Recording | None = None,
    options: CollectOptions = _PLAIN,
) -> CollectReport:
    """Sample several attempts at each question, check them, and append them to the JSONL file ``out``.

    Trace ids are ``question#attempt``, attempts from 0. Batches hold prompts of similar length, attempts at a question
    together, and each is on disk before the next one starts. What the file holds already is kept; with unchanged
    arguments it ends as if the run had never been interrupted.

    Args:
        model: the model that answers.
        tokenizer: its tokenizer.
        questions: with unique ids.
        out: JSONL file of traces, new or of an earlier run with the same arguments.
        goal: how many attempts; default: 8 at each question.
        sampling: default: 512 new tokens at temperature 1.
        record: sum up the activations that sampling produces anyway, per question with both outcomes, into a file of
            `NeuronStats` ((L, M) sums over traces): what `identify` would read, without a pass of its own. Traces
            that were there before are read once.
        options: checker, batch size, and what the traces say of the model.

    Raises:
        TraceError: contradictory arguments; or the file holds other questions, settings or another model's traces, is
            written by another process, or cannot be read or written.

    Source: the paper (arXiv 2601.19847).

    Example:
        model, tokenizer = load_model("Qwen/Qwen3-1.7B")
        report = collect(model, tokenizer, read_questions("questions.jsonl"), "traces.jsonl", goal=Goal(attempts=8))
        print(report.mixed_questions, "questions with both outcomes")
    """
    goal, sampling = goal or Goal(), sampling or Sampling(512, temperature=1.0)
    _require_questions(questions, options.batch_size)
    require_varied(goal.attempts, sampling)
    backend = LocalBackend(model, tokenizer, sampling, options.batch_size, None if record is None else {})
    if record is None or backend.means is None:
        return collect_from(backend, questions, out, goal=goal, options=options)
    ledger = Ledger(model, tokenizer, NeuronStats.empty(record.base), backend.means)
    report = collect_from(backend, questions, out, goal=goal, options=options, finished=ledger.close)
    ledger.stats.save(record.path)
    return report


def collect_from(
    backend: Backend,
    questions: Sequence[Question],
    out: str | Path,
    *,
    goal: Goal | None = None,
    options: CollectOptions = _PLAIN,
    finished: Finished | None = None,
) -> CollectReport:
    """`collect` from any backend: vLLM, a server, a model in this process.

    Every piece of completions is on disk before the next one is looked at. ``finished`` is called with the ids of
    questions that get no more traces, and with all traces.

    Raises:
        TraceError: see `collect`.
        AdarasError: the backend fails; the file holds what was completed before.
    """
    started, goal = time.perf_counter(), goal or Goal()
    _require_questions(questions, options.batch_size)
    check = options.check or checker_for(questions, None)
    arranged = backend.arranged(questions)
    # Where the first questions could be all that are asked, they must not be chosen by their length.
    plan = SamplingPlan(arranged if goal.wanted is None else questions, goal, options.batch_size, whole=backend.streams)
    settings = {**backend.settings, "check": name_of(check), "revision": options.revision}
    with TraceLog(Path(out)) as log:
        held = log.resume(questions, options.name, settings)
        run = _Run(backend, check, log, held, options.name, settings, resumed=len(held))
        run.complete(plan, options.progress or _nobody, finished or _nobody)
    return run.report(time.perf_counter() - started)


def _nobody(_one: object, _other: object) -> None:
    """What is done, where nobody looks at it."""


def _require_questions(questions: Sequence[Question], batch_size: int) -> None:
    if not questions or batch_size < 1:
        raise TraceError(f"collect: {len(questions)} questions, batches of {batch_size}; expected at least one of each")
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

    def complete(self, plan: SamplingPlan, progress: Progress, finished: Finished) -> None:
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
