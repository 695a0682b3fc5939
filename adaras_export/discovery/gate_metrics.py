"""Gate metrics: the cost of decisions, cross-fitted rates and the calibration curve.

Pure functions of arrays; knows no model, no prompt and no gate. N questions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from adaras_export.core.intervals import require_statistics
from adaras_export.errors import RuleError
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.gate import counts_below, cuts_of, is_below

Fit = Callable[[Array, Array], float]
"""A threshold, from p(correct) and labels."""

_FOLDS = 10
_BINS = 10


@dataclass(frozen=True)
class Costs:
    """What wrong decisions cost; only the ratio matters.

    Attributes:
        missed: of leaving alone a question that is answered wrongly.
        needless: of steering one that is answered right.

    Raises:
        RuleError: a cost that is no positive number.
    """

    missed: float
    needless: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(cost) and cost > 0 for cost in (self.missed, self.needless)):
            raise RuleError(
                f"costs: {self.missed:g} of a wrong answer left alone, {self.needless:g} of a right one steered; "
                "expected positive numbers"
            )

    def threshold(self, p_correct: Array, correct: Array) -> float:
        """The threshold t, midway between two scores, for which steering where p < t costs least on these questions.

        It may be 0 (steer none) or 1 (steer all). The lowest such t, so that ties steer less.
        """
        p_correct = p_correct.astype(np.float32)
        cuts = np.append(cuts_of(p_correct), np.float32(1))
        missed = (~correct).sum() - counts_below(p_correct[~correct], cuts)
        cost = self.missed * missed + self.needless * counts_below(p_correct[correct], cuts)
        return float(cuts[int(np.argmin(cost))])

    def of(self, is_steered: Array, correct: Array) -> float:
        """What these decisions cost, a question on average."""
        missed, needless = (~is_steered & ~correct).sum(), (is_steered & correct).sum()
        return float((self.missed * missed + self.needless * needless) / len(correct))


def held_out(correct: Array, folds: int, seed: int) -> list[Array]:
    """Which questions each fold holds out, (N,) bool: every question in one, each with its share of either label.

    There are as many folds as questions of the rarer label, two or more, where that is fewer than ``folds``.
    """
    from sklearn.model_selection import StratifiedKFold

    count = min(folds, int(correct.sum()), int((~correct).sum()))
    splits = StratifiedKFold(count, shuffle=True, random_state=seed % 2**32).split(correct, correct)
    return [np.isin(np.arange(len(correct)), held) for _, held in splits]


def cross_fitted(p_correct: Array, correct: Array, fit: Fit, seed: int) -> Array:
    """Which questions are steered below a threshold that was chosen on others, in ten folds, (N,) bool."""
    is_steered = np.zeros(len(correct), bool)
    for held in held_out(correct, _FOLDS, seed):
        is_steered[held] = is_below(p_correct[held], fit(p_correct[~held], correct[~held]))
    return is_steered


def rates(is_steered: Array, correct: Array) -> tuple[float, float]:
    """Sensitivity (share of the wrong answers that are steered) and specificity (of the right ones that are not)."""
    return float(is_steered[~correct].mean()), float((~is_steered[correct]).mean())


@dataclass(frozen=True)
class Bin:
    """Questions of similar p(correct).

    Attributes:
        questions: how many.
        predicted: their mean p(correct).
        correct: the share that is answered right.
        low: of its 95 % interval by Wilson.
        high: of the same.
    """

    questions: int
    predicted: float
    correct: float
    low: float
    high: float


def reliability(p_correct: Array, correct: Array) -> tuple[Bin, ...]:
    """The calibration curve, in bins of about equally many questions: ten, or fewer so that each has ten.

    The bins are those of scikit-learn's `calibration_curve`, which does not say how many questions each has.
    """
    stats = require_statistics()
    p_correct = p_correct.astype(np.float64)
    bins = max(2, min(_BINS, len(p_correct) // 10))
    edges = np.quantile(p_correct, np.linspace(0, 1, bins + 1))
    place = np.searchsorted(edges[1:-1], p_correct)
    curve = []
    for number in np.unique(place):
        within = place == number
        count, right = int(within.sum()), int(correct[within].sum())
        interval = stats.binomtest(right, count).proportion_ci(confidence_level=0.95, method="wilson")
        curve.append(
            Bin(count, float(p_correct[within].mean()), right / count, float(interval.low), float(interval.high))
        )
    return tuple(curve)
