"""Arms: ways of steering compared with no steering on the same questions, and their tables.

Pure; knows no model, no rule and no question. Claims from arms are made in claims.py. N questions, n answers to each.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from adaras_export.core.intervals import Estimate, changed, mean_at_n, require_statistics
from adaras_export.files.safetensors_record import Array

RULE_ARMS = ("gated", "always", "everywhere")
"""Ways to run one rule, nearest to the paper's first: with its gate; without; without its start too."""


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
    """An arm compared with no steering on the same questions; verdicts are (N,) or (N, n) each.

    Of one answer to each question: Wilson's interval and McNemar's exact test. Of several: the bootstrap interval of
    the mean over questions, the questions that do better and worse, and the exact swap test.
    """
    accuracy = _accuracy(arm)
    return Arm(name, len(arm), accuracy.value, accuracy.low, accuracy.high, *changed(arm, off))


def _accuracy(verdicts: Array) -> Estimate:
    if verdicts.ndim == 2 and verdicts.shape[1] > 1:
        return mean_at_n(verdicts)
    count, right = len(verdicts), int(verdicts.sum())
    interval = require_statistics().binomtest(right, count).proportion_ci(confidence_level=0.95, method="wilson")
    return Estimate(right / count, float(interval.low), float(interval.high))


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
