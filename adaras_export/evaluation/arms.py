"""Arms: ways of steering compared with no steering on the same questions, and their tables.

Pure; knows no model, no rule and no question. Claims from arms are made in claims.py. N questions, n answers to each.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

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
