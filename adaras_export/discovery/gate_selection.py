"""Which neurons a gate reads, and how many: F-scores, and the cross-validation that chooses among settings.

Everything that depends on labels - scores, scaling, weights - is found inside each fold, on the questions that the fold
does not hold out. N questions, M columns (neurons of all layers that may be read), F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from adaras_export.discovery.gate_metrics import held_out
from adaras_export.errors import RuleError
from adaras_export.files.memory_mapped import KeptRows
from adaras_export.files.safetensors_record import Array

FEATURE_COUNTS = (8, 16, 32, 64, 128)
"""Numbers of features that are tried where none is given."""

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


def f_scores(correct: Moments, wrong: Moments) -> Array:
    """One-way ANOVA F-score of every column for two classes, (M,); 0 where a column is constant.

    Infinite where it is constant in either class and differs between them. From moments, because scikit-learn's would
    need the whole matrix in memory, in float64.
    """
    both = correct.merge(wrong)
    between = sum(part.count * (part.mean - both.mean) ** 2 for part in (correct, wrong))
    within = (correct.squares + wrong.squares) / max(1, both.count - 2)  # of two questions, no class varies
    # By the range: the mean of equal numbers may miss them by a rounding, which would leave noise over noise.
    varying = both.high > both.low
    within_varies = (correct.high > correct.low) | (wrong.high > wrong.low)
    scores: Array = np.where(varying, np.inf, 0.0)
    return np.divide(between, within, out=scores, where=varying & within_varies)


@dataclass(frozen=True, eq=False)
class Training:
    """The training questions: their rows among the means of all prompts, their labels, and their folds.

    Attributes:
        means: of all prompts, M columns.
        rows: of the training questions, (N,).
        correct: labels, (N,) bool.
        folds: which questions each fold holds out, (N,) bool each.
    """

    means: KeptRows
    rows: Array
    correct: Array
    folds: Sequence[Array]

    @classmethod
    def of(cls, means: KeptRows, rows: Array, correct: Array, folds: int, seed: int) -> "Training":
        """With so many folds, or as many as there are questions of the rarer label."""
        return cls(means, rows, correct, held_out(correct, folds, seed))

    def rankings(self, count: int) -> tuple[list[Array], Array]:
        """The ``count`` columns with the highest F-score, best first: without each fold, and of all questions.

        The means are read once, fold after fold.
        """
        groups = [[self._moments(held & (self.correct == label)) for label in (True, False)] for held in self.folds]

        def ranking(parts: Sequence[Sequence[Moments]]) -> Array:
            score = f_scores(*(reduce(Moments.merge, of_label) for of_label in zip(*parts, strict=True)))
            return np.lexsort((np.arange(len(score)), -score))[:count]

        without = [ranking([*groups[:fold], *groups[fold + 1 :]]) for fold in range(len(groups))]
        return without, ranking(groups)

    def _moments(self, which: Array) -> Moments:
        rows = self.rows[which]
        step = max(1, _NUMBERS // int(self.means.widths[0]))
        blocks = [rows[first : first + step] for first in range(0, len(rows), step)]
        return reduce(Moments.merge, (Moments.of(np.stack([self.means[row] for row in block])) for block in blocks))

    def columns(self, places: Array) -> Array:
        """The means of some columns, (N, F) float64."""
        return np.stack([self.means[row][places] for row in self.rows]).astype(np.float64)


def sizes(features: int | None, available: int) -> tuple[int, ...]:
    """The numbers of features to try; those of `FEATURE_COUNTS` that there are, if none is given.

    Raises:
        RuleError: ``features`` is less than 1, or more than ``available``.
    """
    if features is None:
        return tuple(count for count in FEATURE_COUNTS if count <= available) or (available,)
    if features < 1:
        raise RuleError(f"gate: {features} features wanted; expected one or more, or auto")
    if features > available:
        raise RuleError(f"gate: {features} features wanted; the layers that it may read have {available} neurons")
    return (features,)
