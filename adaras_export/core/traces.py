"""Questions, labelled reasoning traces, and splits of them.

Splits are made by question, never by trace: the traces of one question share its prompt, so a split by trace would put
the same prompt into training and test.
"""

import hashlib
import json
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import accumulate, combinations, pairwise
from typing import TypeVar

import numpy as np

from adaras_export.errors import TraceError
from adaras_export.files.safetensors_record import Array

Checker = Callable[[str, str], bool]

Prompt = str | Sequence[Mapping[str, str]]
"""Raw text, or chat messages that hold a role and a content each."""

Settings = Mapping[str, str | int | float | bool | None]
"""How a completion was sampled and checked, by name."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Question:
    """A prompt, its correct answer, and optionally the name of its checker.

    Attributes:
        place: path:line where the question was read, for error messages; ignored in comparisons.

    Raises:
        TraceError: a text is empty, or the prompt is neither text nor chat messages.
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
    """One attempt at a question: the prompt, the completion, and whether its answer is correct.

    Attributes:
        model: the name of the model that wrote the completion; None where the file has none.
        settings: how the completion was sampled and checked; None where the file has none.

    Raises:
        TraceError: a text is empty, the prompt or the settings are malformed, or the label is not a boolean.
    """

    id: str
    question_id: str
    prompt: Prompt
    completion: str
    correct: bool
    model: str | None = None
    settings: Settings | None = field(default=None, hash=False)

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
        if self.settings is not None:
            object.__setattr__(self, "settings", _checked_settings(subject, self.settings))


def digest(prompt: Prompt) -> str:
    """16 hex digits of SHA-256 over the prompt: the identity of a question across files."""
    canonical = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    content = json.dumps(canonical, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def by_question(traces: Sequence[Trace]) -> dict[str, list[Trace]]:
    """The traces of each question, in the order of their first appearance."""
    groups: dict[str, list[Trace]] = {}
    for trace in traces:
        groups.setdefault(trace.question_id, []).append(trace)
    return groups


def split(ids: Sequence[str], shares: Mapping[str, float], seed: int) -> dict[str, list[str]]:
    """Assign every question id to one named split.

    Depends on the set of ids and the seed, not on their order; sizes differ from the exact shares
    by at most one. Each split keeps the given order.

    Raises:
        TraceError: shares are not positive or do not sum to 1, an id is repeated, or a split would be empty.
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
        TraceError: a question is in two splits; the message names both.
    """
    shared = [
        f"{question} (in {first} and {second})"
        for first, second in combinations(splits, 2)
        for question in sorted(set(splits[first]) & set(splits[second]))
    ]
    if shared:
        raise TraceError(f"question {_listing(shared)}: in two splits; expected each question in one")


def balanced(traces: Sequence[Trace], seed: int, per_class: int | None = None) -> list[Trace]:
    """Equally many correct and incorrect traces of every question that has both, in the given order.

    A question keeps its whole smaller class and as many seeded choices of the other one, at most ``per_class`` of each.
    The reference's sets are built in this way, with 4 and 4.

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


def _require_text(subject: str, name: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise TraceError(f"{subject}: {name} is {reprlib.repr(value)}; expected non-empty text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape a lone surrogate, which no tokenizer accepts
        raise TraceError(
            f"{subject}: {name} is not Unicode text ({error.reason}); expected whole characters"
        ) from error


def _checked_prompt(subject: str, prompt: object) -> Prompt:
    """A checked copy of the prompt, which other code cannot change."""
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


def _checked_settings(subject: str, settings: object) -> Settings:
    """A checked copy of the settings, with Decimal values as floats."""
    if not isinstance(settings, Mapping) or not all(
        isinstance(value, str | int | float | Decimal | None) for value in settings.values()
    ):
        raise TraceError(f"{subject}: settings are {reprlib.repr(settings)}; expected names with a text or number each")
    return {name: float(value) if isinstance(value, Decimal) else value for name, value in settings.items()}


def _rank(seed: int, text: str) -> str:
    """The sort key of a text in a seeded order; independent of the other texts."""
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def _listing(names: Sequence[str]) -> str:
    """The first five names, and the number of the others."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def labelled_prompts(traces: Sequence[Trace]) -> tuple[list[Prompt], Array]:
    """The prompts, and whether most of their traces are correct, (N,) bool; a tie counts as incorrect."""
    by_prompt: dict[str, list[Trace]] = {}  # one prompt with two ids must not be in two parts
    for group in by_question(traces).values():
        by_prompt.setdefault(digest(group[0].prompt), []).extend(group)
    groups = list(by_prompt.values())
    shares = [sum(trace.correct for trace in group) / len(group) for group in groups]
    return [group[0].prompt for group in groups], np.array(shares) > 0.5


def require_both(labels: Array, part: str) -> None:
    """Refuse labels that are too few to fit a threshold.

    Raises:
        TraceError: there are fewer than two labels of either kind.
    """
    correct = int(labels.sum())
    if not 2 <= correct <= len(labels) - 2:
        raise TraceError(
            f"traces: {correct} of {len(labels)} {part} questions are answered correctly; expected two or more of "
            "either kind; give more questions, or easier and harder ones"
        )


def name_of(check: Checker) -> str:
    """The name of a checker in files and reports."""
    name: str = getattr(check, "__name__", type(check).__name__)
    return name
