"""How well probabilities tell right answers from wrong ones, and from where on to steer.

Pure statistics over arrays; knows no model, no prompt and no gate. N questions; p(correct) is compared as runtimes do,
in float32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from adaras_export.core.intervals import require_statistics
from adaras_export.errors import RuleError
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.gate import _below, _cuts, is_below

Fit = Callable[[Array, Array], float]
"""A threshold, from p(correct) and labels."""

_Z = 1.959964
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
        cuts = np.append(_cuts(p_correct), np.float32(1))
        missed = (~correct).sum() - _below(p_correct[~correct], cuts)
        cost = self.missed * missed + self.needless * _below(p_correct[correct], cuts)
        return float(cuts[int(np.argmin(cost))])

    def of(self, is_steered: Array, correct: Array) -> float:
        """What these decisions cost, a question on average."""
        missed, needless = (~is_steered & ~correct).sum(), (is_steered & correct).sum()
        return float((self.missed * missed + self.needless * needless) / len(correct))


def dealt(correct: Array, folds: int, seed: int) -> Array:
    """The fold of each question, (N,): of equal size within one, and each with its share of either label."""
    draw = np.random.default_rng(seed)
    found, start = np.zeros(len(correct), np.int64), 0
    for label in (True, False):
        rows = draw.permutation(np.flatnonzero(correct == label))
        found[rows] = (start + np.arange(len(rows))) % folds
        start += len(rows)
    return found


def cross_fitted(p_correct: Array, correct: Array, fit: Fit, seed: int) -> Array:
    """Which questions are steered below a threshold that was chosen on others, (N,) bool.

    Ten folds, or as many as there are questions of the rarer label.
    """
    folds = min(_FOLDS, int(correct.sum()), int((~correct).sum()))
    fold, found = dealt(correct, folds, seed), np.zeros(len(correct), bool)
    for one in range(folds):
        own = fold == one
        found[own] = is_below(p_correct[own], fit(p_correct[~own], correct[~own]))
    return found


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
    """The calibration curve, in bins of about equally many questions: ten, or fewer so that each has ten."""
    stats = require_statistics()
    p_correct = p_correct.astype(np.float64)
    bins = max(2, min(_BINS, len(p_correct) // 10))
    edges = np.quantile(p_correct, np.linspace(0, 1, bins + 1))
    place = np.searchsorted(edges[1:-1], p_correct)
    found = []
    for one in np.unique(place):
        own = place == one
        count, right = int(own.sum()), int(correct[own].sum())
        interval = stats.binomtest(right, count).proportion_ci(confidence_level=0.95, method="wilson")
        found.append(Bin(count, float(p_correct[own].mean()), right / count, float(interval.low), float(interval.high)))
    return tuple(found)


def brier(p_correct: Array | float, correct: Array) -> float:
    """Mean squared distance of p(correct) from what happened: 0 is best."""
    return float(((p_correct - correct) ** 2).mean())
