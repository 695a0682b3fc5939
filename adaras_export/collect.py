"""Sample several attempts at each question, check them, and append them to a file of traces.

Knows nothing of steering and prints nothing. The batches follow from the arguments alone, so a run
that was killed goes on where it stopped and ends with the same bytes.
"""

import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaras_export import foreign
from adaras_export.activations import Reading, Recorder, recording, trace_means
from adaras_export.checkers import Checker
from adaras_export.errors import TraceError
from adaras_export.foreign import UnreadableError
from adaras_export.generation import Sampling, continue_ids, decode, encode_prompt, end_ids, pad_id, prefill
from adaras_export.models import BaseModel
from adaras_export.statistics import NeuronStats, with_question
from adaras_export.storage import Array, append
from adaras_export.traces import Question, Trace, by_question, digest, read_traces, trace_line

Progress = Callable[[int, int], None]
"""Of attempts done and attempts in all."""

_LINE_START = b'{"id": '


@dataclass(frozen=True)
class CollectReport:
    """What the file holds after a run, and what the run did.

    Attributes:
        traces: traces in the file.
        correct: those that the checker accepted.
        questions: questions that have a trace.
        mixed_questions: questions that have correct and incorrect traces.
        resumed: traces that the file held before the run.
        blank: attempts of this run that gave no text; they make no trace.
        seconds: wall-clock time of the run.
    """

    traces: int
    correct: int
    questions: int
    mixed_questions: int
    resumed: int
    blank: int
    seconds: float


@dataclass(frozen=True)
class _Attempt:
    id: str
    question: Question
    prompt_ids: Sequence[int]


@dataclass(frozen=True)
class Recording:
    """Where statistics of the activations go that the sampling itself produced, and whose they are."""

    path: Path
    base: BaseModel


@dataclass(frozen=True)
class _Sampler:
    """Turns attempts into traces, one batch at a time."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    check: Checker

    def traces(self, batch: Sequence[_Attempt], means: dict[str, Array] | None) -> list[Trace]:
        """The traces of the attempts that gave any text; their activation means go into ``means``, if given."""
        keys = [attempt.id for attempt in batch]
        ends = end_ids(self.model, self.tokenizer, self.sampling.stop)
        with nullcontext() if means is None else recording(self.model, ends) as recorder:
            texts = self._complete(batch, keys, recorder)
        if means is not None and recorder is not None:
            means.update(zip(keys, recorder.means().numpy(), strict=True))
        return [
            Trace(
                id=attempt.id,
                question_id=attempt.question.id,
                prompt=attempt.question.prompt,
                completion=text,
                correct=self.check(text, attempt.question.answer),
            )
            for attempt, text in zip(batch, texts, strict=True)
            if text.strip()
        ]

    def _complete(self, batch: Sequence[_Attempt], keys: Sequence[str], recorder: Recorder | None) -> list[str]:
        """The texts. A prompt is prefilled once, however many attempts at it the batch holds."""
        prompts = list({tuple(attempt.prompt_ids): None for attempt in batch})
        rows = [prompts.index(tuple(attempt.prompt_ids)) for attempt in batch]
        prefilled = prefill(self.model, prompts, pad_id(self.tokenizer)).repeated(rows)
        if recorder is not None:
            recorder.repeat(rows)
        found = continue_ids(self.model, self.tokenizer, prefilled, self.sampling, keys)
        return [decode(self.tokenizer, ids) for ids in found]


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
    record: Recording | None = None,
    progress: Progress | None = None,
) -> CollectReport:
    """Append ``attempts`` checked completions per question to the JSONL file ``out``.

    Trace ids are ``question#attempt``, attempts from 0. Batches follow the order of the questions,
    attempts at a question together, and each is on disk before the next one starts. With
    ``wanted``, no batch starts once so many questions have both outcomes. What the file holds
    already is kept; with unchanged arguments it ends as if the run had never been interrupted.

    With ``record``, the activations that sampling produces anyway are summed up per question with both
    outcomes, and saved as `NeuronStats`: what `identify` would read from the file, without a pass of its own.
    Traces that were there before are read once.

    Raises:
        TraceError: contradictory arguments, a file of other questions, or one that cannot be read
            or written.
    """
    started = time.perf_counter()
    _require_sound(questions, attempts=attempts, sampling=sampling, batch_size=batch_size)
    plan = _plan(tokenizer, questions, attempts)
    out = Path(out)
    traces = _resume(out, questions)
    resumed, blank = len(traces), 0
    sampler = _Sampler(model, tokenizer, sampling, check)
    ledger = None if record is None else _Ledger(model, tokenizer, NeuronStats.empty(record.base))
    outcomes: dict[str, set[bool]] = defaultdict(set)
    for start in range(0, len(plan), batch_size):
        if wanted is not None and _mixed(outcomes) >= wanted:
            break
        batch = plan[start : start + batch_size]
        blank += _fill(sampler, batch, traces, out, None if ledger is None else ledger.means)
        for attempt in batch:
            if attempt.id in traces:
                outcomes[attempt.question.id].add(traces[attempt.id].correct)
        if ledger is not None:  # the last question of the batch may go on in the next one
            ledger.close({attempt.question.id for attempt in batch} - {batch[-1].question.id}, traces)
        if progress is not None:
            progress(start + len(batch), len(plan))
    if ledger is not None and record is not None:
        ledger.close(set(outcomes), traces)
        ledger.stats.save(record.path)
    return _report(list(traces.values()), resumed, blank, time.perf_counter() - started)


def _require_sound(questions: Sequence[Question], *, attempts: int, sampling: Sampling, batch_size: int) -> None:
    if not questions or attempts < 1 or batch_size < 1:
        raise TraceError(
            f"collect: {len(questions)} questions, {attempts} attempts, batches of {batch_size}; "
            "expected at least one of each"
        )
    repeated = [id_ for id_, count in Counter(q.id for q in questions).items() if count > 1]
    if repeated:
        raise TraceError(f"collect: question {repeated[0]} is given twice; expected unique ids")
    if attempts > 1 and sampling.temperature == 0:
        raise TraceError(
            f"collect: {attempts} attempts at temperature 0 are equal; expected a temperature above 0, or one attempt"
        )


def _plan(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], attempts: int) -> list[_Attempt]:
    """Every attempt in the order in which the file holds them."""
    encoded = [(question, encode_prompt(tokenizer, question.prompt)) for question in questions]
    return [
        _Attempt(f"{question.id}#{attempt}", question, prompt_ids)
        for question, prompt_ids in encoded
        for attempt in range(attempts)
    ]


@dataclass
class _Ledger:
    """Activation means of unfinished questions, and the statistics of finished ones."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stats: NeuronStats
    means: dict[str, Array] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)

    def close(self, questions: Collection[str], traces: Mapping[str, Trace]) -> None:
        """Count questions of which no more traces will come, and forget their means."""
        wanted = {*questions} - self.closed
        groups = by_question([trace for trace in traces.values() if trace.question_id in wanted])
        for group in groups.values():
            if len({trace.correct for trace in group}) == 2:
                absent = [trace for trace in group if trace.id not in self.means]
                read = trace_means(self.model, self.tokenizer, absent, Reading()) if absent else {}
                self.stats = with_question(self.stats, group, {**self.means, **read})
        self.closed |= wanted
        self.means = {key: mean for key, mean in self.means.items() if key.rpartition("#")[0] not in self.closed}


def _fill(
    sampler: _Sampler,
    batch: Sequence[_Attempt],
    traces: dict[str, Trace],
    out: Path,
    means: dict[str, Array] | None,
) -> int:
    """Sample what ``traces`` lacks of a batch, into it and the file; returns the blank attempts."""
    missing = {attempt.id for attempt in batch if attempt.id not in traces}
    if not missing:
        return 0
    # The whole batch again, also where a part is known: another batch shape rounds differently.
    fresh = [trace for trace in sampler.traces(batch, means) if trace.id in missing]
    _append(out, fresh)
    traces.update({trace.id: trace for trace in fresh})
    return len(missing) - len(fresh)


def _append(out: Path, traces: Sequence[Trace]) -> None:
    content = "".join(f"{trace_line(trace)}\n" for trace in traces).encode()
    try:
        append(out, content)
    except OSError as error:
        raise _unwritable(out, error) from error


def _resume(out: Path, questions: Sequence[Question]) -> dict[str, Trace]:
    """The traces that the file holds, by id; the file is made if there is none."""
    try:
        if out.is_file():
            _mend_last_line(out)
        out.open("ab").close()  # fails now, not after the first batch
    except OSError as error:
        raise _unwritable(out, error) from error
    if not out.is_file() or out.stat().st_size == 0:
        return {}
    traces = read_traces(out)
    prompts = {question.id: digest(question.prompt) for question in questions}
    for trace in traces:
        if prompts.get(trace.question_id, digest(trace.prompt)) != digest(trace.prompt):
            raise TraceError(
                f"{out}: trace {trace.id} has another prompt than question {trace.question_id}; "
                "expected a file of the same questions, or a new one"
            )
    return {trace.id: trace for trace in traces}


def _mend_last_line(out: Path) -> None:
    """Cut off a line that a crash left unfinished; end one that lacks only its line end."""
    with out.open("rb") as file:
        last = b"".join(deque(file, maxlen=1))
    if last.endswith(b"\n") or not last:
        return
    if last[: len(_LINE_START)] != _LINE_START[: len(last)]:
        raise TraceError(f"{out}: last line is no trace of ours; expected a file of traces or a new one")
    with out.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        if _is_json(last):
            file.write(b"\n")
        else:
            file.truncate(end - len(last))


def _is_json(line: bytes) -> bool:
    try:
        foreign.parsed(line, exact=True)
    except UnreadableError:
        return False
    return True


def _unwritable(out: Path, error: OSError) -> TraceError:
    return TraceError(
        f"{out}: cannot be written ({error.strerror}); "
        "expected a writable place with room; run again to go on with what it holds"
    )


def _mixed(outcomes: dict[str, set[bool]]) -> int:
    return sum(len(seen) == 2 for seen in outcomes.values())


def _report(traces: Sequence[Trace], resumed: int, blank: int, seconds: float) -> CollectReport:
    groups = by_question(traces)
    return CollectReport(
        traces=len(traces),
        correct=sum(trace.correct for trace in traces),
        questions=len(groups),
        mixed_questions=_mixed({id_: {t.correct for t in group} for id_, group in groups.items()}),
        resumed=resumed,
        blank=blank,
        seconds=seconds,
    )
