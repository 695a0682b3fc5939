"""Figures over questions: resampled intervals, exact paired tests and sampled answers, with nothing but arrays.

Questions are the units everywhere: several answers to one question are averaged before anything is drawn, so they
never count as evidence of their own. Knows no arms, no rule and no files.

N questions, n answers to each.
"""

import math
from statistics import NormalDist

import numpy as np

from adaras_export.storage import Array
from adaras_export.verdicts import Arm, Estimate, Z, compare, mean_interval, paired_difference, paired_test

_POWER_Z = Z + NormalDist().inv_cdf(0.8)
_COUNTABLE = 10**9  # additions, about a second
_FEW = 10  # questions
_LEAST_CHANGED = 6  # as many verdicts must change, all one way, for an exact McNemar p below 0.05


def per_question(verdicts: Array) -> Array:
    """The share of right answers to each question, (N,), of verdicts (N,) or (N, n)."""
    values: Array = verdicts.astype(float)
    return values if values.ndim == 1 else values.mean(axis=1)


def bootstrap_mean(values_N: Array) -> Estimate:
    """Mean of values in [-1, 1] with its 95 % bootstrap interval over questions; see `mean_interval`.

    Where all values are equal a bootstrap has no width; see `_least_width`.
    """
    found, width = mean_interval(values_N), _least_width(len(values_N))
    if found.low < found.high:
        return found
    return Estimate(found.value, max(found.value - width, -1.0), min(found.value + width, 1.0))


def difference(arm: Array, other: Array) -> Estimate:
    """Accuracy of ``arm`` minus that of ``other`` on the same questions, with its paired bootstrap interval.

    Verdicts are (N,) or (N, n) each; the number of answers may differ. Where fewer than ten questions changed, a
    bootstrap is too narrow: three broken and none fixed would look like harm. Then it is Tango's score interval, and
    for several answers at least as wide as the one of no changed verdict.
    """
    gained_N = per_question(arm) - per_question(other)
    if np.count_nonzero(gained_N) >= _FEW:
        return bootstrap_mean(gained_N)
    if arm.ndim == 1 or arm.shape[1] == other.shape[1] == 1:
        return paired_difference(arm.reshape(-1).astype(bool), other.reshape(-1).astype(bool))
    found, width = bootstrap_mean(gained_N), _least_width(len(gained_N))
    low, high = min(found.low, found.value - width), max(found.high, found.value + width)
    return Estimate(found.value, max(low, -1.0), min(high, 1.0))


def _least_width(count: int) -> float:
    """What a score test leaves open where nothing at all was seen to change; Tango's interval then."""
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
    return int((gained > 0).sum()), int((gained < 0).sum()), _swap_p_value([int(one) for one in gained])


def _swap_p_value(gained: list[int]) -> float:
    """How likely a sum is at least as far from 0, if every term could as well have the opposite sign.

    Counted exactly, and for the largest sums, where that would take minutes, by the normal distribution.
    """
    observed, sizes = abs(sum(gained)), [abs(one) for one in gained if one]
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


def compared(name: str, arm: Array, off: Array) -> Arm:
    """An arm, (N,) or (N, n), held against no steering.

    Of one answer a question: Wilson's interval and McNemar's exact test. Of several: the bootstrap interval of the
    mean over questions, questions that do better and worse, and the exact swap test.
    """
    if arm.ndim == 1 or arm.shape[1] == 1:
        return compare(name, arm.reshape(-1).astype(bool), off.reshape(-1).astype(bool))
    mean = mean_at_n(arm)
    return Arm(name, len(arm), mean.value, mean.low, mean.high, *changed(arm, off))


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
