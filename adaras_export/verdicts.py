"""What verdicts on the same questions show: accuracies, paired tests, intervals and tables.

What they allow to say is in conclusions.py.

Pure statistics over arrays and numbers; knows no model, no rule and no question. N questions.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from adaras_export.errors import require
from adaras_export.storage import Array

RULE_ARMS = ("gated", "always", "everywhere")
"""Ways to run one rule, nearest to the paper's first: with its gate; without; without its start too."""

_Z = 1.959963984540054
_RESAMPLES = 2000


@dataclass(frozen=True)
class Arm:
    """One way of steering, compared with no steering on the same questions."""

    name: str
    questions: int
    accuracy: float
    low: float
    high: float
    fixed: int
    broken: int
    p_value: float


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval over questions."""

    value: float
    low: float
    high: float


def compare(name: str, arm: Array, off: Array) -> Arm:
    """Accuracy with its 95 % Wilson interval, and the exact McNemar test against no steering."""
    stats = require_statistics()
    count, right = len(arm), int(arm.sum())
    interval = stats.binomtest(right, count).proportion_ci(confidence_level=0.95, method="wilson")
    fixed, broken, p_value = paired_test(arm, off)
    return Arm(name, count, right / count, float(interval.low), float(interval.high), fixed, broken, p_value)


def paired_test(arm: Array, other: Array) -> tuple[int, int, float]:
    """Questions that ``arm`` fixes and breaks, seen from ``other``, and the p-value of the exact McNemar test."""
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

    low = _root(lambda difference: score(difference) - _Z, -1.0, value)
    high = _root(lambda difference: score(difference) + _Z, value, 1.0)
    return Estimate(value, low, high)


def _score(difference: float, count: int, fixed: int, broken: int) -> float:
    """Standardised distance from a difference, under the likeliest shares that have this difference (Tango 1998)."""
    a, c = 2 * count, -broken * difference * (1 - difference)
    b = (2 * count - fixed + broken) * difference - fixed - broken
    share_broken = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = count * (2 * share_broken + difference * (1 - difference))
    return (fixed - broken - count * difference) / math.sqrt(max(variance, 1e-300))  # 0 at the ends of the range


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses 0, or the end of the range that it does not cross it before."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2


def mean_interval(values_N: Array) -> Estimate:
    """Mean with its percentile bootstrap interval; the same values give the same interval."""
    draw, count = np.random.default_rng(0), len(values_N)
    means = [values_N[draw.integers(count, size=count)].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values_N.mean()), float(low), float(high))


def require_statistics() -> ModuleType:
    """SciPy's statistics, or the error that names the extra to install."""
    return require("scipy.stats", "identify", "comparing verdicts")


def primary_arm(names: Collection[str]) -> str:
    """The way to run the rule, among the named arms, that is nearest to the paper's; controls are steered like it."""
    return next(name for name in RULE_ARMS if name in names)


def is_random(name: str) -> bool:
    """Whether an arm of that name is a random-neuron control."""
    return name.startswith("random")


def arms_table(arms: Sequence[Arm]) -> str:
    """Arms for a person, one line each; where there are several draws of random neurons, one line for all of these."""
    draws = [arm for arm in arms if is_random(arm.name)]
    together = f"{len(draws)} random" if len(draws) > 1 else ""
    alone = [arm for arm in arms if arm not in draws] if together else arms
    width = max(len(together), *(len(arm.name) for arm in alone))
    head = f"{'':{width}}  accuracy   95 % interval     fixed  broken  McNemar p"
    lines = [
        f"{arm.name:{width}}  {arm.accuracy:7.1%}   {arm.low:6.1%} - {arm.high:6.1%}  {arm.fixed:5d}  {arm.broken:6d}  "
        f"{arm.p_value:9.2g}"
        for arm in alone
    ]
    if together:
        least, most = (pick(arm.accuracy for arm in draws) for pick in (min, max))
        lines.append(f"{together:{width}}  {least:7.1%} to {most:.1%}")
    return "\n".join([head, *lines])
