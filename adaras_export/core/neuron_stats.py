"""Running sums over questions, from which neurons are ranked: a few (L, M) arrays for any number of traces.

Sums are exact (see `compensated_sums`): parts that were read separately merge to the same bytes in any order.
L layers, M MLP neurons, N traces.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar, get_args

import numpy as np

from adaras_export.core import compensated_sums
from adaras_export.core.base_model import BaseModel
from adaras_export.core.question_identity import identity
from adaras_export.core.traces import Trace
from adaras_export.core.value import Value, check_choice, check_count, check_version, freeze, set_questions
from adaras_export.errors import RuleError, TraceError
from adaras_export.files.safetensors_record import Array

Contrast = Literal["within_question", "unpaired"]
Tokens = Literal["all", "completion"]
"""The tokens that a trace's mean is taken over; the paper takes all, with the prompt."""

_REST = "_rest"
_S = TypeVar("_S", bound="_Sums")


@dataclass(frozen=True, eq=False)
class _Sums(Value):
    """Arrays of shape (L, M) and counts that are summed over questions.

    ``rests`` holds the rest of each exact sum by its name, see `compensated_sums`; a missing one is zero.
    """

    base: BaseModel
    questions: tuple[str, ...]
    rests: Mapping[str, Array] = field(default_factory=dict, kw_only=True)

    largest: ClassVar[int] = 1 << 30
    _sums: ClassVar[tuple[str, ...]]
    _counts: ClassVar[tuple[str, ...]] = ()
    _labels: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    _later: ClassVar[tuple[str, ...]] = ()
    """Fields that files of earlier releases lack; they have defaults."""

    def __post_init__(self) -> None:
        for name in self._sums:
            freeze(self, name, compensated_sums.on_grid(self._checked(name, getattr(self, name))))
        if strange := sorted(self.rests.keys() - {*self._sums}):
            raise RuleError(f"{self.kind}: {strange[0]}{_REST} belongs to no sum; expected: {', '.join(self._sums)}")
        rests = {name: self._checked(name + _REST, rest) for name, rest in self.rests.items()}
        object.__setattr__(self, "rests", {name: rest for name, rest in rests.items() if rest.any()})
        for name in self._counts:
            check_count(self.kind, name, getattr(self, name))
        for name, choices in self._labels.items():
            check_choice(self.kind, name, getattr(self, name), choices)
        set_questions(self, self.kind)

    def _checked(self, name: str, given: Array) -> Array:
        """A sum as float64 of shape (L, M), zero where a layer has no such neuron; a scalar 0 stands for zeros."""
        shape = (self.base.layers, self.base.widest)
        values = np.asarray(given, dtype=np.float64)
        if values.shape == () and not values:
            return np.zeros(shape)
        if values.shape != shape:
            raise RuleError(f"{self.kind}: {name} has shape {values.shape}; expected {shape} of {self.base.id}")
        if not np.isfinite(values).all():
            raise RuleError(f"{self.kind}: {name} holds NaN or infinity; expected finite numbers")
        if values.any() and any(values[layer, self.base.width(layer) :].any() for layer in range(self.base.layers)):
            raise RuleError(f"{self.kind}: {name} holds values of neurons that {self.base.id} does not have")
        return values

    def _exact(self, name: str) -> tuple[Array, Array]:
        """A sum as the pair that `compensated_sums.add` takes."""
        total: Array = getattr(self, name)
        return total, self.rests.get(name, np.zeros_like(total))

    @classmethod
    def empty(cls: type[_S], base: BaseModel, **labels: Any) -> _S:
        """The neutral element of `merge`."""
        zeros: dict[str, Any] = {name: np.zeros((base.layers, base.widest)) for name in cls._sums}
        return cls(base=base, questions=(), **zeros, **labels)

    def merge(self: _S, other: _S) -> _S:
        """The sums over the questions of both, in any order and grouping.

        Raises:
            RuleError: the sums belong to different models, or use another contrast or other tokens.
            TraceError: a question is in both.
        """
        self.base.require_same(other.base)
        for name in self._labels:
            if getattr(self, name) != getattr(other, name):
                found = f"{getattr(self, name)} and {getattr(other, name)}"
                raise RuleError(f"{self.kind}: {name} differs ({found}); expected parts of one kind")
        if common := sorted({*self.questions} & {*other.questions}):
            raise TraceError(f"{self.kind}: question {common[0]} is in both parts; expected disjoint questions")
        zeros = [name for name in self._sums if not getattr(other, name).any() and name not in other.rests]
        sums = {
            name: self._exact(name) if name in zeros else compensated_sums.add(self._exact(name), other._exact(name))
            for name in self._sums
        }
        counts = {name: getattr(self, name) + getattr(other, name) for name in self._counts}
        totals: dict[str, Any] = {name: pair[0] for name, pair in sums.items()}
        rests = {name: pair[1] for name, pair in sums.items()}
        return replace(self, questions=(*self.questions, *other.questions), rests=rests, **totals, **counts)

    def _arrays(self) -> dict[str, Array]:
        rests = {name + _REST: rest for name, rest in self.rests.items()}
        return {**{name: getattr(self, name) for name in self._sums}, **rests}

    def _record(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in (*self._counts, *self._labels)}
        return {
            "version": 1,
            "base": self.base.as_record(),
            "questions": list(self.questions),
            **counts,
        }

    @classmethod
    def _restore(cls: type[_S], arrays: Mapping[str, Array], record: Mapping[str, Any], subject: str) -> _S:
        check_version(record, subject)
        base = BaseModel.from_record(record["base"], subject)
        names = [name for name in (*cls._counts, *cls._labels) if name in record or name not in cls._later]
        counts = {name: record[name] for name in names}
        sums = {name: array for name, array in arrays.items() if not name.endswith(_REST)}
        later = [name for name in cls._later if name in record]
        if later and (missing := [*({*cls._later} - {*later}), *({*cls._sums} - {*sums})]):
            raise KeyError(min(missing))  # a file has all later fields, or is old and has none
        rests = {name.removesuffix(_REST): array for name, array in arrays.items() if name.endswith(_REST)}
        return cls(base=base, questions=record["questions"], rests=rests, **sums, **counts)


_PLAIN_SUMS = ("correct_sum", "incorrect_sum", "difference_square_sum", "trace_sum", "trace_square_sum")
_PLAIN_COUNTS = ("correct_count", "incorrect_count", "trace_count")
_FIRST = "first_half_"


def _none() -> Array:
    """A scalar zero, which stands for an array of zeros."""
    return np.zeros(())


def is_first_half(question: str) -> bool:
    """Whether a question is in the first half; the digest of its prompt decides."""
    return int(question.partition(".")[0], 16) % 2 == 1


@dataclass(frozen=True, eq=False)
class NeuronStats(_Sums):
    """Class means of every neuron, contrasted within questions (section 2 of the design; paper, section 3).

    Each trace is represented by the mean of h over its tokens, each question by the mean over its correct traces and
    the mean over its incorrect ones. So every question has the same weight. With the contrast "unpaired" every trace
    has the same weight; it finds neurons that separate easy questions from hard ones, so it is not the default.

    Attributes:
        base: the model whose activations these are.
        questions: identities of the questions in the sums.
        correct_sum: (L, M) sum over questions of the mean over correct traces.
        incorrect_sum: the same over incorrect traces.
        difference_square_sum: (L, M) sum over questions of their squared difference.
        trace_sum: (L, M) sum over all traces.
        trace_square_sum: (L, M) sum of squares over all traces.
        correct_count: questions (or, unpaired, traces) in ``correct_sum``.
        incorrect_count: the same for ``incorrect_sum``.
        trace_count: number of traces.
        contrast: "within_question", or "unpaired".
        tokens: the tokens that a trace's mean is taken over: "all", or those of the "completion".
        first_half_correct_sum: ``correct_sum`` over the first half of the questions, see `is_first_half`; so for all
            fields with this prefix. A file of an earlier release lacks them.
    """

    correct_sum: Array
    incorrect_sum: Array
    difference_square_sum: Array
    trace_sum: Array
    trace_square_sum: Array
    correct_count: int = 0
    incorrect_count: int = 0
    trace_count: int = 0
    contrast: Contrast = "within_question"
    tokens: Tokens = "all"
    first_half_correct_sum: Array = field(default_factory=_none)
    first_half_incorrect_sum: Array = field(default_factory=_none)
    first_half_difference_square_sum: Array = field(default_factory=_none)
    first_half_trace_sum: Array = field(default_factory=_none)
    first_half_trace_square_sum: Array = field(default_factory=_none)
    first_half_correct_count: int = 0
    first_half_incorrect_count: int = 0
    first_half_trace_count: int = 0

    kind: ClassVar[str] = "neuron statistics"
    _sums: ClassVar[tuple[str, ...]] = (*_PLAIN_SUMS, *(_FIRST + name for name in _PLAIN_SUMS))
    _counts: ClassVar[tuple[str, ...]] = (*_PLAIN_COUNTS, *(_FIRST + name for name in _PLAIN_COUNTS))
    _labels: ClassVar[Mapping[str, tuple[str, ...]]] = {"contrast": get_args(Contrast), "tokens": get_args(Tokens)}
    _later: ClassVar[tuple[str, ...]] = ("tokens", *(_FIRST + name for name in _PLAIN_COUNTS))

    def update(self, question: str, correct_NLM: Array, incorrect_NLM: Array) -> "NeuronStats":
        """These sums and one more question, given by its traces' means; with "unpaired", one class may be empty.

        Raises:
            TraceError: an activation is NaN or infinite, a class is empty, or the question is already in the sums.
        """
        traces = np.concatenate([correct_NLM, incorrect_NLM]).astype(np.float64)
        bad = sorted(set(np.argwhere(~np.isfinite(traces))[:, 1].tolist()))
        if bad:
            raise TraceError(
                f"question {question}: activations of layers {bad[:5]} are NaN or infinite; expected finite ones; "
                "load the model in float32 or bfloat16"
            )
        sizes = (len(correct_NLM), len(incorrect_NLM))
        correct, incorrect = (part.sum(0, dtype=np.float64) for part in (correct_NLM, incorrect_NLM))
        square = np.zeros_like(correct)
        if self.contrast == "within_question":
            if not all(sizes):
                raise TraceError(
                    f"question {question}: {sizes[0]} correct and {sizes[1]} incorrect traces; expected both"
                )
            correct, incorrect = correct / sizes[0], incorrect / sizes[1]
            square, sizes = (correct - incorrect) ** 2, (1, 1)
        sums = (correct, incorrect, square, traces.sum(0), (traces**2).sum(0))
        values: dict[str, Any] = dict(zip(_PLAIN_SUMS, sums, strict=True))
        values |= dict(zip(_PLAIN_COUNTS, (*sizes, len(traces)), strict=True))
        if is_first_half(question):
            values |= {_FIRST + name: value for name, value in values.items()}
        return self.merge(
            NeuronStats(base=self.base, questions=(question,), contrast=self.contrast, tokens=self.tokens, **values)
        )

    def halves(self) -> tuple["NeuronStats", "NeuronStats"]:
        """The sums over each half of the questions; in a file of an earlier release the first half is empty."""
        names = (*_PLAIN_SUMS, *_PLAIN_COUNTS)
        first: dict[str, Any] = {name: getattr(self, _FIRST + name) for name in names}
        rests = {name: self.rests[_FIRST + name] for name in _PLAIN_SUMS if _FIRST + name in self.rests}
        second: dict[str, Any] = {name: getattr(self, name) - first[name] for name in _PLAIN_COUNTS}
        second_rests = {}
        for name in _PLAIN_SUMS:
            taken = tuple(-part for part in self._exact(_FIRST + name))
            second[name], second_rests[name] = compensated_sums.add(self._exact(name), (taken[0], taken[1]))
        labels: dict[str, Any] = {"contrast": self.contrast, "tokens": self.tokens}
        odd = tuple(question for question in self.questions if is_first_half(question))
        even = tuple(question for question in self.questions if not is_first_half(question))
        return (
            NeuronStats(base=self.base, questions=odd, rests=rests, **first, **labels),
            NeuronStats(base=self.base, questions=even, rests=second_rests, **second, **labels),
        )

    def means(self) -> tuple[Array, Array]:
        """Mean over correct and over incorrect traces, (L, M) each.

        Raises:
            TraceError: a class has no traces.
        """
        if not self.correct_count or not self.incorrect_count:
            label = "correct" if not self.correct_count else "incorrect"
            raise TraceError(f"traces: none is {label}; expected questions with both correct and incorrect traces")
        return self.correct_sum / self.correct_count, self.incorrect_sum / self.incorrect_count

    def deviation(self) -> Array:
        """Standard deviation of each neuron's mean over all traces, (L, M): the unit of attribution deltas."""
        mean = self.trace_sum / self.trace_count
        return np.sqrt(np.maximum(self.trace_square_sum / self.trace_count - mean**2, 0.0))


def with_question(stats: NeuronStats, question: Sequence[Trace], means: Mapping[str, Array]) -> NeuronStats:
    """Add one question to ``stats``: its traces, and the (L, M) mean of each by trace id."""
    shape = (0, stats.base.layers, stats.base.widest)
    parts = [[means[trace.id] for trace in question if trace.correct is label] for label in (True, False)]
    correct, incorrect = (np.stack(part) if part else np.zeros(shape, np.float32) for part in parts)
    return stats.update(identity(question[0].prompt), correct, incorrect)


@dataclass(frozen=True, eq=False)
class AttributionStats(_Sums):
    """Gradients of the margin between correct and incorrect completions, summed over questions.

    Attributes:
        base: the model.
        questions: identities of the questions in the sums.
        gradient_sum: (L, M) sum over questions of d margin / d c.
        gradient_square_sum: (L, M) sum of its square.
        first_half_sum: (L, M) ``gradient_sum`` over the first half of the questions, see `is_first_half`.
        first_half_count: questions in that half.
    """

    gradient_sum: Array
    gradient_square_sum: Array
    first_half_sum: Array
    first_half_count: int = 0

    kind: ClassVar[str] = "attribution statistics"
    _sums: ClassVar[tuple[str, ...]] = ("gradient_sum", "gradient_square_sum", "first_half_sum")
    _counts: ClassVar[tuple[str, ...]] = ("first_half_count",)

    def update(self, question: str, gradient_LM: Array) -> "AttributionStats":
        """These sums and one more question.

        Raises:
            TraceError: a gradient is NaN or infinite, or the question is already in the sums.
        """
        if not np.isfinite(gradient_LM).all():
            raise TraceError(f"question {question}: its gradient is NaN or infinite; load the model in float32")
        gradient, first = gradient_LM.astype(np.float64), int(is_first_half(question))
        return self.merge(
            AttributionStats(
                self.base,
                (question,),
                gradient,
                gradient**2,
                gradient * first,
                first_half_count=first,
            )
        )

    def mean(self) -> Array:
        """a = d margin / d c, averaged over questions, (L, M).

        Raises:
            TraceError: there are no questions.
        """
        if not self.questions:
            raise TraceError("traces: no question has both correct and incorrect traces; sample more attempts")
        return self.gradient_sum / len(self.questions)

    def standard_error(self) -> Array:
        """Standard error of `mean`, (L, M); infinite for one question."""
        count = len(self.questions)
        if count < 2:
            return np.full_like(self.gradient_sum, np.inf)
        variance = np.maximum(self.gradient_square_sum / count - self.mean() ** 2, 0.0)
        error: Array = np.sqrt(variance / (count - 1))
        return error

    def split_half_cosine(self) -> float:
        """Cosine between the mean attributions of the two halves; NaN where a half is empty."""
        first, second = self.first_half_sum, self.gradient_sum - self.first_half_sum
        norm = float(np.linalg.norm(first) * np.linalg.norm(second))
        return float((first * second).sum()) / norm if norm else float("nan")
