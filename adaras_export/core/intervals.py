"""Intervals and tests of figures over questions: bootstrap, Tango, McNemar, Holm, DeLong; pure functions of arrays.

Questions are the units everywhere: several answers to one question are averaged before anything is drawn, so they
never count as evidence of their own. Knows no arms, no rule and no files.

N questions, n answers to each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from types import ModuleType, SimpleNamespace

import numpy as np

from adaras_export.errors import require
from adaras_export.files.safetensors_record import Array

Z = NormalDist().inv_cdf(0.975)
"""Half the width of a 95 % interval of the normal distribution, in standard errors."""

_POWER_Z = Z + NormalDist().inv_cdf(0.8)
_RESAMPLES = 9999
_FEW_LEVELS = 64  # different values
_AT_ONCE = 1 << 17  # numbers of resamples in memory; few, so that they fit in the processor's cache
_COUNTABLE = 10**9  # additions, about a second
_FEW_CHANGED = 10  # questions
_LEAST_CHANGED = 6  # as many verdicts must change, all one way, for an exact McNemar p below 0.05


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval over questions."""

    value: float
    low: float
    high: float


def per_question(verdicts: Array) -> Array:
    """The share of right answers to each question, (N,), of verdicts (N,) or (N, n)."""
    values: Array = verdicts.astype(float)
    return values if values.ndim == 1 else values.mean(axis=1)


def mean_interval(values_N: Array) -> Estimate:
    """Mean with its 95 % BCa bootstrap interval over questions (Efron 1987).

    The same values give the same interval. Where all values are equal it has no width.
    """
    mean, scale, count = float(values_N.mean()), float(np.abs(values_N).max()) or 1.0, len(values_N)
    scaled = np.round(values_N / scale, 12)
    levels, times = np.unique(scaled, return_counts=True)
    if len(levels) == 1:
        return Estimate(mean, mean, mean)

    def statistic(resamples: Array, axis: int) -> Array:
        # BCa counts the resamples whose mean equals that of the sample, in whatever order either was summed up.
        rounded: Array = np.round(resamples.mean(axis), 11)
        return rounded

    draw, drawn = np.random.default_rng(0), None
    if len(levels) <= _FEW_LEVELS:
        # How often each value is drawn is all that a mean needs: N draws of N questions are one multinomial draw.
        means = np.round(draw.multinomial(count, times / count, size=_RESAMPLES) @ levels / count, 11)
        drawn = SimpleNamespace(bootstrap_distribution=means)
    bootstrap = require_statistics().bootstrap(
        (scaled,),
        statistic,
        n_resamples=0 if drawn else _RESAMPLES,
        bootstrap_result=drawn,
        method="BCa",
        batch=1 + _AT_ONCE // count,
        random_state=draw,  # called `rng` from SciPy 1.15 on, which takes both
    )
    low, high = bootstrap.confidence_interval
    return Estimate(mean, float(low) * scale, float(high) * scale)


def bootstrap_mean(values_N: Array) -> Estimate:
    """Mean of values in [-1, 1] with its 95 % bootstrap interval over questions; see `mean_interval`.

    Where all values are equal a bootstrap has no width; see `_least_width`.
    """
    mean, width = mean_interval(values_N), _least_width(len(values_N))
    if mean.low < mean.high:
        return mean
    return Estimate(mean.value, max(mean.value - width, -1.0), min(mean.value + width, 1.0))


def difference(arm: Array, other: Array) -> Estimate:
    """Accuracy of ``arm`` minus that of ``other`` on the same questions, with its paired bootstrap interval.

    Verdicts are (N,) or (N, n) each; the number of answers may differ. Where fewer than ten questions changed, a
    bootstrap is too narrow: three broken and none fixed would look like harm. Then it is Tango's score interval, and
    for several answers at least as wide as the one of no changed verdict.
    """
    gained_N = per_question(arm) - per_question(other)
    if np.count_nonzero(gained_N) >= _FEW_CHANGED:
        return bootstrap_mean(gained_N)
    if arm.ndim == 1 or arm.shape[1] == other.shape[1] == 1:
        return paired_difference(arm.reshape(-1).astype(bool), other.reshape(-1).astype(bool))
    mean, width = bootstrap_mean(gained_N), _least_width(len(gained_N))
    low, high = min(mean.low, mean.value - width), max(mean.high, mean.value + width)
    return Estimate(mean.value, max(low, -1.0), min(high, 1.0))


def _least_width(count: int) -> float:
    """The half width of Tango's interval where no verdict changed."""
    return Z**2 / (count + Z**2)


def changed(arm: Array, other: Array) -> tuple[int, int, float]:
    """Questions on which ``arm`` does better and worse than ``other``, and the p-value of a paired test.

    For one answer a question this is McNemar's exact test. For several it is the exact test of the same kind, of all
    ways to swap the two arms question by question (Fisher's randomisation test of the mean difference).
    """
    if arm.ndim == 1 or arm.shape[1] == other.shape[1] == 1:
        return paired_test(arm.reshape(-1).astype(bool), other.reshape(-1).astype(bool))
    # Whole numbers, so that sums can be counted: differences are multiples of 1 / (n_arm * n_other).
    gained = arm.sum(axis=1) * other.shape[1] - other.sum(axis=1) * arm.shape[1]
    return int((gained > 0).sum()), int((gained < 0).sum()), _swap_p_value(gained.tolist())


def _swap_p_value(gained: list[int]) -> float:
    """The probability that the sum is at least as far from 0, if the sign of every term is a fair coin.

    It is counted exactly; for the largest sums, where that would take minutes, it is the normal approximation.
    """
    observed, sizes = abs(sum(gained)), [abs(term) for term in gained if term]
    step = math.gcd(*sizes) if sizes else 1
    total = sum(sizes) // step
    if len(sizes) * total > _COUNTABLE:
        return math.erfc(observed / math.sqrt(2 * sum(size**2 for size in sizes)))
    shares = np.zeros(total + 1)  # of the number of steps that the positive terms have together
    shares[0] = 1.0
    for size in sizes:
        shift = size // step
        shares[shift:] = (shares[shift:] + shares[:-shift]) / 2
        shares[:shift] /= 2
    distances = np.abs(2 * np.arange(total + 1) - total) * step
    return min(1.0, float(shares[distances >= observed].sum()))


def detectable(arm: Array, other: Array) -> float:
    """The smallest difference that these questions would show with 80 % power at 5 %, two-sided.

    As many changed verdicts as were seen are assumed, with no difference between the arms; six that change one way
    are the least that an exact test of one answer a question can call significant.
    """
    return detectable_from(len(arm), float(((per_question(arm) - per_question(other)) ** 2).sum()))


def detectable_from(questions: int, changed_squares: float) -> float:
    """The same from the sum of squared differences: with one answer a question, the number of changed verdicts."""
    return min(1.0, max(_POWER_Z * math.sqrt(changed_squares) / questions, _LEAST_CHANGED / questions))


def mean_at_n(verdicts_Nn: Array) -> Estimate:
    """Mean accuracy of n answers to each question, with its bootstrap interval over questions."""
    return bootstrap_mean(per_question(verdicts_Nn))


def pass_at_k(verdicts_Nn: Array, k: int) -> Estimate:
    """The chance that one of k answers is right, estimated without bias from n >= k (Chen et al. 2021).

    For a question with c right answers of n it is 1 - C(n - c, k) / C(n, k).
    """
    answers = verdicts_Nn.shape[1]
    assert 1 <= k <= answers, f"pass@{k} of {answers} answers"
    all_sets = math.comb(answers, k)
    chance = np.array([1 - math.comb(answers - right, k) / all_sets for right in range(answers + 1)])
    return bootstrap_mean(chance[verdicts_Nn.astype(int).sum(axis=1)])


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the given order, that control the family-wise error rate (Holm 1979)."""
    adjusted, largest, count = [0.0] * len(p_values), 0.0, len(p_values)
    for rank, place in enumerate(sorted(range(count), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (count - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def rank_p_value(reached: float, controls: Sequence[float]) -> float:
    """The p-value of the rule's rank among random controls: (1 + controls that do as well) / (1 + controls)."""
    return (1 + sum(control >= reached for control in controls)) / (1 + len(controls))


def in_points(difference: float) -> str:
    """A difference of two shares in percentage points, signed; the order of a sum does not change the rounding."""
    return f"{100 * (round(difference, 9) + 0.0):+.1f}"


def paired_test(arm: Array, other: Array) -> tuple[int, int, float]:
    """How many questions ``arm`` has right and ``other`` wrong, the reverse, and the exact McNemar test's p-value."""
    stats = require_statistics()
    fixed, broken = int((arm & ~other).sum()), int((other & ~arm).sum())
    p_value = float(stats.binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0
    return fixed, broken, p_value


def paired_difference(arm: Array, other: Array) -> Estimate:
    """Accuracy of ``arm`` minus that of ``other`` on the same questions, with Tango's score interval.

    Where not one verdict differs it still has a width, which a bootstrap has not: no difference among N questions
    does not mean none.
    """
    count, fixed, broken = len(arm), int((arm & ~other).sum()), int((other & ~arm).sum())
    value = (fixed - broken) / count

    def score(difference: float) -> float:
        return _score(difference, count, fixed, broken)

    # The score falls from above z at -1 to 0 at the observed difference, and on to below -z at 1.
    root = require("scipy.optimize", "identify", "comparing verdicts").brentq
    low = -1.0 if value == -1 else root(lambda difference: score(difference) - Z, -1.0, value, xtol=1e-12)
    high = 1.0 if value == 1 else root(lambda difference: score(difference) + Z, value, 1.0, xtol=1e-12)
    return Estimate(value, low, high)


def _score(difference: float, count: int, fixed: int, broken: int) -> float:
    """Standardised distance from a difference, under the likeliest shares that have this difference (Tango 1998)."""
    a, c = 2 * count, -broken * difference * (1 - difference)
    b = (2 * count - fixed + broken) * difference - fixed - broken
    share_broken = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = count * (2 * share_broken + difference * (1 - difference))
    return (fixed - broken - count * difference) / math.sqrt(max(variance, 1e-300))  # 0 at the ends of the range


def require_statistics() -> ModuleType:
    """SciPy's statistics, or the error that names the extra to install."""
    return require("scipy.stats", "identify", "comparing verdicts")


def auc_interval(p_correct: Array, correct: Array) -> tuple[float, float, float]:
    """Area under the ROC curve with its 95 % interval by DeLong, Biometrics 44 (1988) 837, within [0, 1]."""
    right, wrong = _placements(p_correct, correct)
    auc, margin = float(right.mean()), Z * _error(right, wrong)
    return auc, max(0.0, auc - margin), min(1.0, auc + margin)


def auc_difference(p_correct: Array, other: Array, correct: Array) -> Estimate:
    """How much larger the area of the first is on the same questions, with DeLong's interval for pairs."""
    pairs = zip(_placements(p_correct, correct), _placements(other, correct), strict=True)
    right, wrong = (first - second for first, second in pairs)
    difference, margin = float(right.mean()), Z * _error(right, wrong)
    return Estimate(difference, max(-1.0, difference - margin), min(1.0, difference + margin))


def _placements(p_correct: Array, correct: Array) -> tuple[Array, Array]:
    """For each right answer the share of wrong ones that it beats, for each wrong one that of right ones; ties half."""
    right, wrong = (np.sort(p_correct[which].astype(np.float64)) for which in (correct, ~correct))
    # In the order of the questions: differences pair them.
    each_right, each_wrong = p_correct[correct].astype(np.float64), p_correct[~correct].astype(np.float64)
    beaten = [np.searchsorted(wrong, each_right, side) for side in ("left", "right")]
    beating = [len(right) - np.searchsorted(right, each_wrong, side) for side in ("right", "left")]
    return (beaten[0] + beaten[1]) / 2 / len(wrong), (beating[0] + beating[1]) / 2 / len(right)


def _error(right: Array, wrong: Array) -> float:
    return math.sqrt(right.var(ddof=1) / len(right) + wrong.var(ddof=1) / len(wrong))
