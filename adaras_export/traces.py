"""Questions and labelled reasoning traces: what they are, how they are read and split.

Knows no tokenizer and no model. Splits are made by question and never by trace: two traces of one
question share its prompt, so a split by trace would test on what it was trained on.
"""

import hashlib
import json
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from itertools import accumulate, combinations, pairwise
from pathlib import Path
from typing import Any, TypeVar

from adaras_export import foreign
from adaras_export.errors import TraceError
from adaras_export.foreign import UnreadableError
from adaras_export.storage import replace_file

Prompt = str | Sequence[Mapping[str, str]]
"""Raw text, or chat messages that hold a role and a content each."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Question:
    """A prompt, the answer that a checker compares with, and the checker's name, where the question names one.

    Attributes:
        place: path:line where it was read, for who has something to say against it; no part of the question.

    Raises:
        TraceError: an empty text, or a prompt that is neither text nor chat messages.
    """

    id: str
    prompt: Prompt
    answer: str
    check: str | None = None
    place: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        _require_text("question", "id", self.id)
        object.__setattr__(self, "prompt", _checked_prompt(f"question {self.id}", self.prompt))
        _require_text(f"question {self.id}", "answer", self.answer)
        if self.check is not None:
            _require_text(f"question {self.id}", "check", self.check)


@dataclass(frozen=True)
class Trace:
    """One attempt at a question: what was asked, what was written, and whether it was right.

    Attributes:
        model: the name of the model that wrote it, where the file says so.

    Raises:
        TraceError: an empty text, a prompt of another form, or a label that is not a boolean.
    """

    id: str
    question_id: str
    prompt: Prompt
    completion: str
    correct: bool
    model: str | None = None

    def __post_init__(self) -> None:
        _require_text("trace", "id", self.id)
        subject = f"trace {self.id}"
        _require_text(subject, "question_id", self.question_id)
        object.__setattr__(self, "prompt", _checked_prompt(subject, self.prompt))
        _require_text(subject, "completion", self.completion)
        if not isinstance(self.correct, bool):
            raise TraceError(f"{subject}: correct is {reprlib.repr(self.correct)}; expected true or false")
        if self.model is not None:
            _require_text(subject, "model", self.model)


def read_traces(path: str | Path) -> list[Trace]:
    """The traces of a JSONL file, ours or the reference's, in file order.

    The reference's lines (``id`` is the question, ``_id`` the attempt) get the prompt text that its
    authors used, and the trace id ``question#attempt``.

    Raises:
        TraceError: with path:line of the first line that is not a trace, repeats a trace id, or
            asks something else under a known question id; with the path, where there is no line.
    """
    traces: list[Trace] = []
    lines: dict[str, int] = {}
    prompts: dict[str, tuple[str, int]] = {}
    for line, trace in _parsed(path, _trace_of):
        _claim(lines, f"trace {trace.id}", path, line)
        prompt, first = prompts.setdefault(trace.question_id, (digest(trace.prompt), line))
        if prompt != digest(trace.prompt):
            raise TraceError(
                f"{path}:{line}: question {trace.question_id} has another prompt than on "
                f"line {first}; expected one prompt per question_id"
            )
        traces.append(trace)
    return traces


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a JSONL file, in file order.

    A ``prompt`` is taken as it is (text stays raw text), a ``question`` becomes the one user
    message of a chat. Some of the reference's files give one id to different questions: such ids
    get ``@`` and the digest of the prompt appended.

    Raises:
        TraceError: with path:line of the first line that is not a question or repeats one; with the
            path, where the file has no line.
    """
    rows = list(_parsed(path, _question_of))
    shared = Counter(question.id for _, (question, _) in rows)
    lines: dict[str, int] = {}
    questions: list[Question] = []
    for line, (question, is_reference) in rows:
        if is_reference and shared[question.id] > 1:
            question = replace(question, id=f"{question.id}@{digest(question.prompt)}")
        _claim(lines, f"question {question.id}", path, line)
        questions.append(replace(question, place=f"{path}:{line}"))
    return questions


def read_prompts(path: str | Path) -> list[Trace] | list[Question]:
    """The labelled traces of a JSONL file whose first line has a label, else its questions.

    Raises:
        TraceError: as of `read_traces` and `read_questions`.
    """
    _, first = next(_parsed(path, dict))
    return read_traces(path) if {"correct", "is_good"} & first.keys() else read_questions(path)


def write_traces(path: str | Path, traces: Sequence[Trace]) -> None:
    """Write what `read_traces` reads; the file is replaced as a whole or left as it was.

    Raises:
        ArtifactError: the file cannot be written.
    """
    replace_file(path, _jsonl([trace_line(trace) for trace in traces]))


def write_questions(path: str | Path, questions: Sequence[Question]) -> None:
    """Write what `read_questions` reads; the file is replaced as a whole or left as it was.

    Raises:
        ArtifactError: the file cannot be written.
    """
    replace_file(path, _jsonl([question_line(question) for question in questions]))


def trace_line(trace: Trace) -> str:
    """One JSON object in a fixed key order, without the line end."""
    named = () if trace.model is None else ("model",)
    return _line(trace, ("id", "question_id", "prompt", "completion", "correct", *named))


def question_line(question: Question) -> str:
    """One JSON object in a fixed key order, without the line end."""
    return _line(question, ("id", "prompt", "answer", *(() if question.check is None else ("check",))))


def digest(prompt: Prompt) -> str:
    """16 hex digits of SHA-256 over the prompt: the identity of a question across files."""
    canonical = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    content = json.dumps(canonical, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def by_question(traces: Sequence[Trace]) -> dict[str, list[Trace]]:
    """The traces of each question, questions and traces in the order of their first appearance."""
    groups: dict[str, list[Trace]] = {}
    for trace in traces:
        groups.setdefault(trace.question_id, []).append(trace)
    return groups


def split(ids: Sequence[str], shares: Mapping[str, float], seed: int) -> dict[str, list[str]]:
    """Deal question ids to named splits, each id to exactly one.

    Depends on the set of ids and the seed, not on their order; sizes differ from the exact shares
    by at most one. Inside a split the given order is kept.

    Raises:
        TraceError: shares that are not positive or do not sum to 1, a repeated id, or so few ids
            that a split would be empty.
    """
    if not all(share > 0 for share in shares.values()) or not math.isclose(sum(shares.values()), 1.0):
        raise TraceError(f"shares {dict(shares)}: expected positive numbers that sum to 1")
    repeated = sorted(id_ for id_, count in Counter(ids).items() if count > 1)
    if repeated:
        raise TraceError(f"question ids {_listing(repeated)}: given more than once; expected each once")
    dealt = sorted(ids, key=lambda id_: _rank(seed, id_))
    bounds = [round(share * len(ids)) for share in accumulate(shares.values(), initial=0.0)]
    chosen = [set(dealt[start:end]) for start, end in pairwise(bounds)]
    empty = [name for name, members in zip(shares, chosen, strict=True) if not members]
    if empty:
        raise TraceError(
            f"split {_listing(empty)}: has none of {len(ids)} questions; give more questions or larger shares"
        )
    return {name: [id_ for id_ in ids if id_ in members] for name, members in zip(shares, chosen, strict=True)}


def require_disjoint(splits: Mapping[str, Collection[str]]) -> None:
    """Refuse splits that share a question.

    Raises:
        TraceError: names the shared questions and the two splits of each.
    """
    shared = [
        f"{question} (in {first} and {second})"
        for first, second in combinations(splits, 2)
        for question in sorted(set(splits[first]) & set(splits[second]))
    ]
    if shared:
        raise TraceError(f"question {_listing(shared)}: in two splits; expected each question in one")


def balanced(traces: Sequence[Trace], seed: int, per_class: int | None = None) -> list[Trace]:
    """As many correct as incorrect traces of every question that has both, in the given order.

    A question keeps its smaller class whole and an equal, seeded choice of the other one, at most
    ``per_class`` of each. The reference's own sets are built so, with 4 and 4.

    Raises:
        TraceError: no question has both outcomes, or ``per_class`` is not positive.
    """
    if per_class is not None and per_class < 1:
        raise TraceError(f"per_class is {per_class}; expected a positive number of traces")
    kept: set[str] = set()
    for group in by_question(traces).values():
        ranked = sorted(group, key=lambda trace: _rank(seed, trace.id))
        correct = [trace.id for trace in ranked if trace.correct]
        incorrect = [trace.id for trace in ranked if not trace.correct]
        count = min(len(correct), len(incorrect), len(group) if per_class is None else per_class)
        kept.update(correct[:count], incorrect[:count])
    if not kept:
        raise TraceError(
            f"none of {len(by_question(traces))} questions has both correct and incorrect traces; "
            "sample more attempts, or questions of another difficulty"
        )
    return [trace for trace in traces if trace.id in kept]


def _parsed(path: str | Path, parse: Callable[[dict[str, Any]], _T]) -> Iterator[tuple[int, _T]]:
    """Line number (from 1) and value of every line that is not blank; errors get their place."""
    found = False
    try:
        foreign.size_of(Path(path))
        with Path(path).open("rb") as file:  # bytes: text mode would break lines at a lone carriage return
            for line, content in enumerate(iter(partial(file.readline, foreign.LARGEST + 1), b""), 1):
                if content.strip():
                    found = True
                    yield line, _located(f"{path}:{line}", content, parse)
    except (UnreadableError, OSError) as error:
        raise TraceError(f"{path}: cannot be read ({foreign.reason(error)}); expected a JSONL file") from error
    if not found:
        raise TraceError(f"{path}: is empty; expected one JSON object per line")


def _claim(lines: dict[str, int], name: str, path: str | Path, line: int) -> None:
    """Write down the line of a name, in ``lines``; refuse a second one."""
    if name in lines:
        raise TraceError(f"{path}:{line}: {name} was already on line {lines[name]}; expected unique ids")
    lines[name] = line


def _located(place: str, content: bytes, parse: Callable[[dict[str, Any]], _T]) -> _T:
    try:
        return parse(_object(content))
    except TraceError as error:
        raise TraceError(f"{place}: {error}") from error


def _object(content: bytes) -> dict[str, Any]:
    if len(content) > foreign.LARGEST:
        raise TraceError(f"is longer than {foreign.LARGEST} bytes; expected one JSON object per line")
    try:
        value = foreign.parsed(content, exact=True)  # a float would turn the answer 0.10 into 0.1
    except UnreadableError as error:
        raise TraceError(f"{error}; expected one JSON object in UTF-8 per line") from error
    if not isinstance(value, dict):
        raise TraceError(f"is {reprlib.repr(value)}; expected a JSON object")
    return value


def _trace_of(row: dict[str, Any]) -> Trace:
    if "_id" in row or "thinking" in row:
        _require_keys(row, ("id", "_id", "question", "thinking", "is_good"))
        question = _identifier(row, "id")
        _require_text("trace", "question", row["question"])
        return Trace(
            id=f"{question}#{_identifier(row, '_id')}",
            question_id=question,
            prompt=f"Question: {row['question']}\nThinking process:",
            completion=row["thinking"],
            correct=row["is_good"],
        )
    _require_keys(row, ("id", "question_id", "prompt", "completion", "correct"))
    return Trace(
        id=_identifier(row, "id"),
        question_id=_identifier(row, "question_id"),
        prompt=row["prompt"],
        completion=row["completion"],
        correct=row["correct"],
        model=row.get("model"),
    )


def _question_of(row: dict[str, Any]) -> tuple[Question, bool]:
    """The question, and whether the line has the reference's form."""
    if "prompt" in row and "question" in row:
        raise TraceError("has both prompt and question; expected one of them")
    is_reference = "question" in row
    _require_keys(row, ("id", "question" if is_reference else "prompt", "answer"))
    answer = row["answer"]
    if isinstance(answer, int | Decimal) and not isinstance(answer, bool):
        answer = str(answer)
    prompt = [{"role": "user", "content": row["question"]}] if is_reference else row["prompt"]
    return Question(_identifier(row, "id"), prompt, answer, row.get("check")), is_reference


def _require_keys(row: Mapping[str, Any], keys: Sequence[str]) -> None:
    missing = [key for key in keys if key not in row]
    if missing:
        found = ", ".join(row) or "no key"
        raise TraceError(f"has no {', '.join(missing)} (found {found}); expected {', '.join(keys)}")


def _identifier(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise TraceError(f"{key} is {reprlib.repr(value)}; expected text or a whole number")
    return value


def _require_text(subject: str, name: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise TraceError(f"{subject}: {name} is {reprlib.repr(value)}; expected non-empty text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair, which no tokenizer takes
        raise TraceError(
            f"{subject}: {name} is not Unicode text ({error.reason}); expected whole characters"
        ) from error


def _checked_prompt(subject: str, prompt: object) -> Prompt:
    """The prompt with messages of its own, so that nobody else can change it."""
    if isinstance(prompt, str):
        _require_text(subject, "prompt", prompt)
        return prompt
    if not isinstance(prompt, Sequence) or not prompt:
        raise TraceError(f"{subject}: prompt is {reprlib.repr(prompt)}; expected text or a list of messages")
    return tuple(_checked_message(subject, message) for message in prompt)


def _checked_message(subject: str, message: object) -> Mapping[str, str]:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise TraceError(f"{subject}: message is {reprlib.repr(message)}; expected an object of role and content")
    for key in ("role", "content"):
        _require_text(subject, f"message {key}", message[key])
    return {"role": message["role"], "content": message["content"]}


def _line(value: object, keys: Sequence[str]) -> str:
    return json.dumps({key: getattr(value, key) for key in keys}, ensure_ascii=False)


def _jsonl(lines: Sequence[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _rank(seed: int, text: str) -> str:
    """A place in a seeded order that does not depend on what else is ordered."""
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def _listing(names: Sequence[str]) -> str:
    """The names, of a long list the first five."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
