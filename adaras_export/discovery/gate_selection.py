"""Which neurons a gate reads, and how many: F-scores, and the cross-validation that chooses among settings.

Everything that depends on labels - scores, scaling, weights - is found inside each fold, on the questions that the fold
does not hold out. N questions, M columns (neurons of all layers that may be read), F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from adaras_export.discovery.gate_metrics import dealt
from adaras_export.errors import RuleError
from adaras_export.files.memory_mapped import KeptRows
from adaras_export.files.safetensors_record import Array

CANDIDATES = (8, 16, 32, 64, 128)
"""Numbers of features that are tried where none is given."""

_COLUMNS = 1 << 14  # of a matrix that are looked at together
_NUMBERS = 1 << 22  # of rows that are in memory together


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean, sum of squared deviations and range of every column over some rows, (M,) float64 each."""

    count: int
    mean: Array
    squares: Array
    low: Array
    high: Array

    @classmethod
    def of(cls, values_NM: Array) -> "Moments":
        """Of rows that are in memory."""
        values = values_NM.astype(np.float64)
        mean = values.mean(0)
        return cls(len(values), mean, ((values - mean) ** 2).sum(0), values.min(0), values.max(0))

    def merge(self, other: "Moments") -> "Moments":
        """Of the rows of both."""
        count = self.count + other.count
        gap = other.mean - self.mean
        return Moments(
            count,
            self.mean + gap * (other.count / count),
            self.squares + other.squares + gap**2 * (self.count * other.count / count),
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
        )


def f_scores(values_NM: Array, correct_N: Array) -> Array:
    """One-way ANOVA F-score of every column for two classes, (M,); 0 where a column is constant.

    Infinite where it is constant in either class and differs between them. In pieces of columns, because
    scikit-learn's would need the whole matrix in float64.
    """
    pieces = (values_NM[:, first : first + _COLUMNS] for first in range(0, values_NM.shape[1], _COLUMNS))
    return np.concatenate([_scores(Moments.of(one[correct_N]), Moments.of(one[~correct_N])) for one in pieces])


def _scores(correct: Moments, wrong: Moments) -> Array:
    both = correct.merge(wrong)
    between = sum(one.count * (one.mean - both.mean) ** 2 for one in (correct, wrong))
    within = (correct.squares + wrong.squares) / max(1, both.count - 2)  # of two questions, no class varies
    # By the range: the mean of equal numbers may miss them by a rounding, which would leave noise over noise.
    varying = both.high > both.low
    within_varies = (correct.high > correct.low) | (wrong.high > wrong.low)
    found: Array = np.where(varying, np.inf, 0.0)
    return np.divide(between, within, out=found, where=varying & within_varies)


@dataclass(frozen=True, eq=False)
class Training:
    """The training questions: their rows among the means of all prompts, their labels, and their folds.

    Attributes:
        means: of all prompts, M columns.
        rows: of the training questions, (N,).
        correct: labels, (N,) bool.
        fold: of each question, (N,).
    """

    means: KeptRows
    rows: Array
    correct: Array
    fold: Array

    @classmethod
    def dealt(cls, means: KeptRows, rows: Array, correct: Array, folds: int, seed: int) -> "Training":
        """With so many folds, or as many as there are questions of the rarer label."""
        count = max(2, min(folds, int(min(correct.sum(), (~correct).sum()))))
        return cls(means, rows, correct, dealt(correct, count, seed))

    def folds(self) -> list[Array]:
        """Which questions each fold holds out, (N,) bool."""
        return [self.fold == one for one in range(int(self.fold.max()) + 1)]

    def rankings(self, count: int) -> tuple[list[Array], Array]:
        """The ``count`` columns with the highest F-score, best first: without each fold, and of all questions.

        The means are read once, fold after fold.
        """
        groups = [[self._moments(held & (self.correct == label)) for label in (True, False)] for held in self.folds()]

        def ranking(parts: Sequence[Sequence[Moments]]) -> Array:
            score = _scores(*(reduce(Moments.merge, of_label) for of_label in zip(*parts, strict=True)))
            return np.lexsort((np.arange(len(score)), -score))[:count]

        without = [ranking([*groups[:one], *groups[one + 1 :]]) for one in range(len(groups))]
        return without, ranking(groups)

    def _moments(self, which: Array) -> Moments:
        rows = self.rows[which]
        step = max(1, _NUMBERS // int(self.means.widths[0]))
        blocks = [rows[first : first + step] for first in range(0, len(rows), step)]
        found = None
        for block in blocks:
            own = Moments.of(np.stack([self.means[row] for row in block]))
            found = own if found is None else found.merge(own)
        assert found is not None  # every fold has questions of both labels
        return found

    def columns(self, places: Array) -> Array:
        """The means of some columns, (N, F) float32."""
        return columns(self.means, self.rows, places)


def columns(means: KeptRows, rows: Array, places: Array) -> Array:
    """Some columns of some rows, (N, F) float32."""
    return np.stack([means[row][places] for row in rows])


def sizes(features: int | None, available: int) -> tuple[int, ...]:
    """The numbers of features to try; those of `CANDIDATES` that there are, if none is given.

    Raises:
        RuleError: none, or more than there are.
    """
    if features is None:
        return tuple(one for one in CANDIDATES if one <= available) or (available,)
    if features < 1:
        raise RuleError(f"gate: {features} features wanted; expected one or more, or auto")
    if features > available:
        raise RuleError(f"gate: {features} features wanted; the layers that it may read have {available} neurons")
    return (features,)


@dataclass(frozen=True)
class Scaling:
    """Standardisation of features, (F,) each."""

    mean: Array
    deviation: Array

    @classmethod
    def of(cls, values_NF: Array) -> "Scaling":
        """By the mean and deviation of these rows."""
        deviation = values_NF.std(0, dtype=np.float64)
        return cls(values_NF.mean(0, dtype=np.float64), np.where(deviation > 0, deviation, 1.0))

    def apply(self, values: Array) -> Array:
        """Standardised, float64."""
        standardised: Array = (values - self.mean) / self.deviation
        return standardised

    def fold(self, weights: dict[str, Array]) -> dict[str, Array]:
        """Weights on raw features that do what ``weights`` do on standardised ones."""
        folded = dict(weights)
        for weight, bias in (("attention_weight", "attention_bias"), ("hidden_weight", "hidden_bias")):
            folded[weight] = weights[weight] / self.deviation
            folded[bias] = weights[bias] - folded[weight] @ self.mean
        return folded
