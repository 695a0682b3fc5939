"""A reading of labelled traces as a job of many chunks, which any number of processes can share and resume.

Knows nothing of rankings and of process groups. The chunks follow from the traces, the tokenizer and the options
alone, and sums are exact, so that the result has the same bytes whoever read which chunk.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaras_export.core import families
from adaras_export.core.neuron_stats import AttributionStats, Contrast, NeuronStats
from adaras_export.core.trace_files import trace_line
from adaras_export.core.traces import Trace, by_question
from adaras_export.core.value import Value, check_count, check_version
from adaras_export.errors import RuleError, TraceError
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.activations import MAX_ROWS, Progress, Reading
from adaras_export.modeling.generation import encode_trace

Question = Sequence[Trace]
ReadChunk = Callable[[Sequence[Question]], tuple[NeuronStats | None, AttributionStats | None]]

_PATIENCE = 20  # times what writing the file took
_BATCHES = 4  # of a chunk, where traces are long; more would cost more work when a run is killed


def mixed(questions: Sequence[Question]) -> list[Question]:
    """The questions that have both correct and incorrect traces.

    Raises:
        TraceError: there is none.
    """
    found = [question for question in questions if len({trace.correct for trace in question}) == 2]
    if not found:
        raise TraceError(
            f"traces: none of {len(questions)} questions has both correct and incorrect traces; sample more attempts "
            "per question, or contrast them unpaired"
        )
    return found


@dataclass(frozen=True)
class ReadingPlan:
    """Questions in chunks, and what there is to know before they are read.

    Attributes:
        chunks: of questions, in the order of the traces.
        tokens: of each chunk.
        context: tokens that the model was made for.
        skipped: traces that were left out because they exceed it.
        beyond: traces that are read although they do.
    """

    chunks: tuple[tuple[Question, ...], ...]
    tokens: tuple[int, ...]
    context: int
    skipped: int
    beyond: int

    def cautions(self) -> list[str]:
        """What a reader of the result must know of the traces, a sentence each."""
        left_out = "traces left out because they exceed the model's context of"
        beyond = f"traces read beyond the model's context of {self.context} tokens, which it was not made for"
        return [
            *([f"{left_out} {self.context} tokens: {self.skipped}"] if self.skipped else []),
            *([f"{beyond}: {self.beyond}"] if self.beyond else []),
        ]

    def share(self, index: int, count: int) -> list[int]:
        """The chunks of one of ``count`` readers: about the same number of tokens each, every chunk once."""
        loads, shares = [0] * count, [[] for _ in range(count)]  # type: list[int], list[list[int]]
        for chunk in sorted(range(len(self.chunks)), key=lambda chunk: (-self.tokens[chunk], chunk)):
            lightest = loads.index(min(loads))
            loads[lightest] += self.tokens[chunk]
            shares[lightest].append(chunk)
        return sorted(shares[index])


def plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    contrast: Contrast,
    reading: Reading,
) -> ReadingPlan:
    """Cut traces into chunks: questions together, until they have 64 traces or four batches of tokens.

    Raises:
        TraceError: traces exceed the context, and neither to skip nor to read them was asked for; or no question has
            both outcomes.
    """
    lengths = {trace.id: sum(map(len, encode_trace(tokenizer, trace))) for trace in traces}
    context = families.text_config(model).max_position_embeddings
    long = [id_ for id_, length in lengths.items() if length > context]
    _require_bearable(model, long, lengths, reading)
    kept = [trace for trace in traces if reading.too_long != "skip" or lengths[trace.id] <= context]
    questions: list[Question] = list(by_question(kept).values())
    chunks: list[list[Question]] = []
    for question in mixed(questions) if contrast == "within_question" and traces else questions:
        own = [trace.id for one in chunks[-1] for trace in one] if chunks else []
        if not own or len(own) >= MAX_ROWS or sum(lengths[id_] for id_ in own) >= _BATCHES * reading.token_budget:
            chunks.append([])
        chunks[-1].append(question)
    return ReadingPlan(
        chunks=tuple(map(tuple, chunks)),
        tokens=tuple(sum(lengths[trace.id] for question in chunk for trace in question) for chunk in chunks),
        context=context,
        skipped=len(traces) - len(kept),
        beyond=len(long) if reading.too_long == "read" else 0,
    )


def _require_bearable(
    model: PreTrainedModel, long: Sequence[str], lengths: Mapping[str, int], reading: Reading
) -> None:
    """Refuse traces beyond the context, unless what becomes of them was decided."""
    learned = reading.too_long == "read" and model.config.model_type == "gpt2"  # it has no positions there
    if not long or (reading.too_long != "refuse" and not learned):
        return
    context = families.text_config(model).max_position_embeddings
    longest = max(long, key=lambda id_: lengths[id_])
    remedy = "leave them out (skip)" if learned else "leave them out (skip), or read them all the same (read)"
    raise TraceError(
        f"traces: {len(long)} of {len(lengths)} exceed the model's context of {context} "
        f"tokens (the longest, {longest}, has {lengths[longest]}); expected shorter ones; --too-long says: {remedy}"
    )


@dataclass(frozen=True, eq=False)
class Part(Value):
    """The sums over some chunks of a job.

    Attributes:
        key: what the job is, JSON values by name; parts of one job have the same.
        done: numbers of the chunks.
        total: chunks of the job.
        stats: of the activations, unless the job has them from elsewhere.
        attribution: of the gradients, if the job needs them.
    """

    key: Mapping[str, Any]
    done: tuple[int, ...]
    total: int
    stats: NeuronStats | None
    attribution: AttributionStats | None

    kind: ClassVar[str] = "part of a reading"
    largest: ClassVar[int] = 1 << 32

    def __post_init__(self) -> None:
        if not isinstance(self.key, Mapping):
            raise RuleError(f"{self.kind}: key is no object; expected what was read, and how")
        for number in (*self.done, self.total):
            check_count(self.kind, "chunk", number)
        object.__setattr__(self, "done", tuple(sorted(self.done)))

    def merge(self, other: "Part") -> "Part":
        """The sums over the chunks of both.

        Raises:
            TraceError: they are of different jobs, or share a chunk.
        """
        if differences := self.differences(other.key):
            raise TraceError(f"parts: of different readings ({differences}); expected parts of one")
        if common := {*self.done} & {*other.done}:
            raise TraceError(f"parts: chunk {min(common)} is in both; expected each once")
        return replace(
            self,
            done=(*self.done, *other.done),
            stats=None if self.stats is None or other.stats is None else self.stats.merge(other.stats),
            attribution=None
            if self.attribution is None or other.attribution is None
            else self.attribution.merge(other.attribution),
        )

    def differences(self, key: Mapping[str, Any]) -> str:
        """In which entries another key differs, for a person."""
        names = sorted(name for name in {*self.key, *key} if self.key.get(name) != key.get(name))
        return ", ".join(f"{name}: {self.key.get(name)} and {key.get(name)}" for name in names)

    def _arrays(self) -> dict[str, Array]:
        return {
            f"{name}.{key}": array
            for name, value in (("stats", self.stats), ("attribution", self.attribution))
            if value is not None
            for key, array in value._arrays().items()
        }

    def _record(self) -> dict[str, Any]:
        values = {"stats": self.stats, "attribution": self.attribution}
        records = {name: None if value is None else value._record() for name, value in values.items()}
        return {"version": 1, "key": dict(self.key), "done": list(self.done), "total": self.total, **records}

    @classmethod
    def _restore(cls, arrays: Mapping[str, Array], record: Mapping[str, Any], subject: str) -> "Part":
        check_version(record, subject)
        values: dict[str, Any] = {}
        for name, kind in (("stats", NeuronStats), ("attribution", AttributionStats)):
            own = {key.removeprefix(f"{name}."): one for key, one in arrays.items() if key.startswith(f"{name}.")}
            values[name] = None if record[name] is None else kind._restore(own, record[name], subject)
        return cls(record["key"], tuple(record["done"]), record["total"], **values)


def merged(parts: Mapping[str, Part]) -> Part:
    """The whole job, from parts by the name of their file.

    Raises:
        TraceError: a part is of another job, a chunk is in two, or one is in none; names the files.
    """
    whole, owners = None, dict[int, str]()
    for name, part in parts.items():
        if whole is not None and (differences := whole.differences(part.key)):
            raise TraceError(f"{name}: is of another reading than {next(iter(parts))} ({differences}); expected one")
        if common := [chunk for chunk in part.done if chunk in owners]:
            raise TraceError(f"{name}: holds chunk {common[0]}, as does {owners[common[0]]}; expected each once")
        owners.update(dict.fromkeys(part.done, name))
        whole = part if whole is None else whole.merge(part)
    if whole is None:
        raise TraceError("parts: none given; expected the files that identify --shard wrote")
    if missing := sorted({*range(whole.total)} - {*whole.done}):
        raise TraceError(
            f"{', '.join(parts)}: {len(missing)} of {whole.total} chunks are in none of them "
            f"(the first is {missing[0]}); expected the files of all shards"
        )
    return whole


@dataclass(frozen=True)
class Job:
    """Chunks, how one is read, and what the sums begin with."""

    plan: ReadingPlan
    empty: Part
    read_chunk: ReadChunk

    def read(
        self,
        chunks: Sequence[int],
        partial: Path | None = None,
        progress: Progress | None = None,
        between: Callable[[], None] | None = None,
    ) -> Part:
        """The sums over these chunks.

        With ``partial``, they are kept in that file meanwhile, and a run that was killed goes on from it: it costs the
        chunk that was being read, or as long as twenty times what writing the file takes. It is removed by the caller,
        once the result is safe. ``between`` is called before each chunk.

        Raises:
            TraceError: a trace cannot be read, or the file is of another job.
        """
        keeper = None if partial is None else _Keeper(partial)
        part = self.empty if keeper is None else keeper.resumed(self.empty, chunks)
        total, done = sum(len(self.plan.chunks[at]) for at in chunks), 0
        for at in chunks:
            if between is not None:
                between()
            if at not in part.done:
                found = self.read_chunk(self.plan.chunks[at])
                part = part.merge(replace(self.empty, done=(at,), stats=found[0], attribution=found[1]))
                if keeper is not None:
                    keeper.keep(part)
            done += len(self.plan.chunks[at])
            if progress is not None:
                progress(done, total)
        return part


@dataclass
class _Keeper:
    """Writes a part into its file, in no more than a twentieth of the time."""

    path: Path
    due: float = field(default=0.0)

    def resumed(self, empty: Part, chunks: Sequence[int]) -> Part:
        """What the file holds of these chunks; nothing where there is no file."""
        if not self.path.is_file():
            return empty
        found = Part.load(self.path)
        if differences := found.differences(empty.key):
            raise TraceError(
                f"{self.path}: is of an unfinished run with other input ({differences}: then and now); "
                "expected the same; run that one again, or delete the file"
            )
        if not {*found.done} <= {*chunks}:
            raise TraceError(f"{self.path}: is of an unfinished run that read other chunks; delete the file")
        return found

    def keep(self, part: Part) -> None:
        """Replace the file, unless it was replaced just now."""
        began = time.monotonic()
        if began >= self.due:
            part.save(self.path)
            ended = time.monotonic()
            self.due = ended + _PATIENCE * (ended - began)


def digest_of(traces: Sequence[Trace]) -> str:
    """SHA-256 over traces in their order."""
    found = hashlib.sha256()
    for trace in traces:
        found.update(f"{trace_line(trace)}\n".encode())
    return found.hexdigest()
