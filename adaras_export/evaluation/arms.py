"""What verdicts on the same questions show: accuracies, paired tests, intervals and tables.

What they allow to say is in conclusions.py.

Pure statistics over arrays and numbers; knows no model, no rule and no question. N questions.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from adaras_export.core.intervals import changed, mean_at_n, paired_test, require_statistics
from adaras_export.files.safetensors_record import Array

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


def compare(name: str, arm: Array, off: Array) -> Arm:
    """Accuracy with its 95 % Wilson interval, and the exact McNemar test against no steering."""
    stats = require_statistics()
    count, right = len(arm), int(arm.sum())
    interval = stats.binomtest(right, count).proportion_ci(confidence_level=0.95, method="wilson")
    fixed, broken, p_value = paired_test(arm, off)
    return Arm(name, count, right / count, float(interval.low), float(interval.high), fixed, broken, p_value)


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


def compared(name: str, arm: Array, off: Array) -> Arm:
    """An arm, (N,) or (N, n), held against no steering.

    Of one answer a question: Wilson's interval and McNemar's exact test. Of several: the bootstrap interval of the
    mean over questions, questions that do better and worse, and the exact swap test.
    """
    if arm.ndim == 1 or arm.shape[1] == 1:
        return compare(name, arm.reshape(-1).astype(bool), off.reshape(-1).astype(bool))
    mean = mean_at_n(arm)
    return Arm(name, len(arm), mean.value, mean.low, mean.high, *changed(arm, off))
