"""What verdicts on the same questions show: accuracies, paired tests, intervals and tables.

What they allow to say is in conclusions.py.

Pure statistics over arrays and numbers; knows no model, no rule and no question. N questions.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from adaras_export.errors import require
from adaras_export.storage import Array

RULE_ARMS = ("gated", "always", "everywhere")
"""Ways to run one rule, nearest to the paper's first: with its gate; without; without its start too."""

Z = NormalDist().inv_cdf(0.975)
"""Half the width of a 95 % interval of the normal distribution, in standard errors."""

_RESAMPLES = 9999
_FEW = 64  # different values
_AT_ONCE = 1 << 17  # numbers of resamples in memory; few, so that they fit in the processor's cache


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


@dataclass(frozen=True)
class Gap:
    """How far one arm is from the reference arm, on the same questions.

    Attributes:
        name: the arm.
        difference: its accuracy minus that of the reference.
        fixed: questions that it has right and the reference wrong.
        broken: questions that it has wrong and the reference right.
        p_value: of the exact McNemar test between the two.
        kl_reference: KL(reference || arm) of next-token distributions in nats, mean over the tokens of a text.
        kl_reference_first: the same of the first token that follows the prompt.
        kl_off: KL(off || arm): the size of the arm's own effect.
        kl_off_first: the same of the first token.
    """

    name: str
    difference: Estimate
    fixed: int
    broken: int
    p_value: float
    kl_reference: Estimate
    kl_reference_first: Estimate
    kl_off: Estimate
    kl_off_first: Estimate

    def divergences(self) -> tuple[Estimate, ...]:
        """From the reference and from no steering, each over the tokens and of the first one."""
        return self.kl_reference, self.kl_reference_first, self.kl_off, self.kl_off_first


@dataclass(frozen=True)
class Comparison:
    """Ways to run one rule, side by side.

    Attributes:
        reference: the arm that the others are held against.
        tokens: up to how many tokens of the base's own greedy completion the divergences are means over.
        mean_tokens: how many there were, on average.
        gaps: one for each arm, the reference's own first.
    """

    reference: str
    tokens: int
    mean_tokens: float
    gaps: tuple[Gap, ...]

    def as_record(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "gaps": [asdict(gap) for gap in self.gaps]}

    def table(self) -> str:
        """All gaps, one line each; divergences in nats."""
        width = max(len(gap.name) for gap in self.gaps)
        paired = (f"minus {self.reference}", "  95 % interval", "fixed", "broken", "McNemar p")
        heads = (*paired, f"KL({self.reference})/token", "   first", "KL(off)/token", "   first")
        lines = [f"{'':{width}}  " + "  ".join(heads)]
        for gap in self.gaps:
            cells = [*self._paired(gap), *(f"{one.value:.3g}" for one in gap.divergences())]
            own = "  ".join(f"{cell:>{len(head)}}" for cell, head in zip(cells, heads, strict=True))
            lines.append(f"{gap.name:{width}}  {own}")
        return "\n".join(lines)

    def _paired(self, gap: Gap) -> Sequence[str]:
        if gap.name == self.reference:
            return [""] * 5
        change = gap.difference
        interval = f"{100 * change.low:+.1f} to {100 * change.high:+.1f}"
        return [f"{100 * change.value:+.1f}", interval, str(gap.fixed), str(gap.broken), f"{gap.p_value:.2g}"]

    def sentence(self) -> str:
        """How far the arm that leaves most of the rule out is from the reference; empty without another arm."""
        gap, change = self.gaps[-1], self.gaps[-1].difference
        if gap.name == self.reference:
            return ""
        unshown = " The test shows no difference, which is no proof of equality: the interval says how large it may be."
        return (
            f"{gap.name} against {self.reference}: {100 * change.value:+.1f} points (95 % interval "
            f"{100 * change.low:+.1f} to {100 * change.high:+.1f}; {gap.fixed} fixed, {gap.broken} broken, "
            f"p = {gap.p_value:.2g}), next-token KL {gap.kl_reference.value:.2g} nats."
            f"{unshown if gap.p_value >= 0.05 else ''}"
        )


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
    if len(levels) <= _FEW:
        # How often each value is drawn is all that a mean needs: N draws of N questions are one multinomial draw.
        means = np.round(draw.multinomial(count, times / count, size=_RESAMPLES) @ levels / count, 11)
        drawn = SimpleNamespace(bootstrap_distribution=means)
    interval = (
        require_statistics()
        .bootstrap(
            (scaled,),
            statistic,
            n_resamples=0 if drawn else _RESAMPLES,
            bootstrap_result=drawn,
            method="BCa",
            batch=1 + _AT_ONCE // count,
            random_state=draw,  # called `rng` from SciPy 1.15 on, which takes both
        )
        .confidence_interval
    )
    return Estimate(mean, float(interval.low) * scale, float(interval.high) * scale)


def require_statistics() -> ModuleType:
    """SciPy's statistics, or the error that names the extra to install."""
    return require("scipy.stats", "identify", "comparing verdicts")


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
