"""What arms and their controls allow to say: corrected for the arms that were tested, ranked among random controls.

A claim for the rule needs three things: a paired test that stands after Holm's correction for all the ways to run the
rule that were tested; a place among random-neuron controls that chance gives once in twenty; and a flipped sign that
does less. What is missing is said. Pure; knows no model, no rule and no question.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from adaras_export.core.intervals import detectable_from, holm, in_points, rank_p_value
from adaras_export.core.rule import SteeringRule
from adaras_export.errors import RuleError
from adaras_export.evaluation.arms import RULE_ARMS, Arm, is_random, primary_arm

Outcome = Literal["unchanged", "harm", "uncontrolled", "flipped", "controls", "few draws", "gain"]

LEVEL = 0.05
ENOUGH_DRAWS = 19
"""With fewer random controls, not even a rule that beats them all has a rank that chance gives once in twenty."""


@dataclass(frozen=True)
class Judgement:
    """One way to run the rule, held against no steering and the controls.

    Attributes:
        arm: that way.
        off: no steering.
        tested: ways to run the rule whose tests are corrected for each other; ``arm`` is one of them.
        p_value: of the paired test of ``arm`` and ``off``, after that correction.
        random: accuracies of random-neuron controls.
        flipped: accuracy with the sign turned round, where that was run.
        alike: whether the controls were steered like ``arm``, with its gate or without.
        detectable: the smallest difference that so many questions would show.
    """

    arm: Arm
    off: Arm
    tested: tuple[str, ...]
    p_value: float
    random: tuple[float, ...]
    flipped: float | None
    alike: bool
    detectable: float

    @property
    def as_good(self) -> int:
        """How many random controls reach at least what the rule reaches."""
        return sum(one >= self.arm.accuracy for one in self.random)

    @property
    def rank_p(self) -> float:
        """The p-value of the rule's place among its random controls."""
        return rank_p_value(self.arm.accuracy, self.random)

    @property
    def outcome(self) -> Outcome:
        """What is shown, or the first thing that is not."""
        if self.p_value >= LEVEL:
            return "unchanged"
        if self.arm.accuracy <= self.off.accuracy:
            return "harm"
        if not self.random or self.flipped is None or not self.alike:
            return "uncontrolled"
        if self.flipped >= self.arm.accuracy:
            return "flipped"
        if self.rank_p <= LEVEL:
            return "gain"
        return "few draws" if len(self.random) < ENOUGH_DRAWS and not self.as_good else "controls"

    @property
    def corrected(self) -> str:
        """How p-values were corrected; nothing where one way was tested."""
        count = len(self.tested)
        return f" (Holm-adjusted for {count} ways to run the rule: {', '.join(self.tested)})" if count > 1 else ""

    def sentence(self) -> str:
        """All of it in one sentence."""
        change = f"{in_points(self.arm.accuracy - self.off.accuracy)} points"
        figures = f"{change} ({self.arm.fixed} fixed, {self.arm.broken} broken), p = {self.p_value:.2g}{self.corrected}"
        outcome = self.outcome
        if outcome == "unchanged":
            return (
                f"no gain shown: {figures}. A true difference of {100 * self.detectable:.1f} points would have been "
                f"found on so many questions four times in five, a smaller one less often."
            )
        if outcome in ("harm", "gain"):
            return f"steering {'harms' if outcome == 'harm' else 'helps'}: {figures}{self._controls()}."
        return f"{figures}; {self.lack()}"

    def lack(self) -> str:
        """Why a significant gain is no claim for these neurons; empty where that is not the outcome."""
        tell = {
            "uncontrolled": f"not a claim, because {self._uncontrolled()}.",
            "flipped": "but a control does as well, the flipped sign: the direction is not what helps.",
            "controls": (
                f"but a control does as well, or nearly so: {self.as_good} of {len(self.random)} random draws "
                f"(rank test p = {self.rank_p:.2g}). That the choice of neurons is what helps is not shown."
            ),
            "few draws": (
                f"and more than each of {len(self.random)} random draws, which are too few to tell this from luck "
                f"(rank test p = {self.rank_p:.2g}; {ENOUGH_DRAWS} or more are needed): no claim for these neurons."
            ),
        }
        return tell.get(self.outcome, "")

    def _uncontrolled(self) -> str:
        if not self.random:
            return "no random-neuron control was run"
        return "the flipped sign was not run" if self.flipped is None else "no control was steered in the same way"

    def _controls(self) -> str:
        if not self.random or self.flipped is None:
            return ""
        below = len(self.random) - self.as_good
        if self.outcome == "harm":
            return (
                f"; draws of random neurons of the same norm reach {min(self.random):.1%} to {max(self.random):.1%}, "
                f"the flipped sign {self.flipped:.1%} (off: {self.off.accuracy:.1%})"
            )
        return (
            f"; {below} of {len(self.random)} draws of random neurons of the same norm reach less (rank test "
            f"p = {self.rank_p:.2g}; {min(self.random):.1%} to {max(self.random):.1%}), the flipped sign "
            f"{self.flipped:.1%} (off: {self.off.accuracy:.1%})"
        )


def arms_of(rule: SteeringRule, names: Sequence[str]) -> tuple[str, ...]:
    """The named arms, each once, nearest to the paper's rule first.

    Raises:
        RuleError: there is no such arm, the rule has no gate for it, or none is named.
    """
    known = RULE_ARMS if rule.gate is not None else RULE_ARMS[1:]
    expected = f"expected of: {', '.join(known)}"
    if unknown := [name for name in names if name not in RULE_ARMS]:
        raise RuleError(f"compare: no arm {', '.join(map(repr, unknown))}; {expected}")
    if lacking := [name for name in names if name not in known]:
        raise RuleError(f"compare: the rule has no gate for the arm {', '.join(lacking)}; {expected}")
    if not names:
        raise RuleError(f"compare: no arm is named; {expected}")
    return tuple(name for name in known if name in names)


def adjusted_of(arms: Sequence[Arm]) -> dict[str, float]:
    """The p-value of every way to run the rule among the arms, after Holm's correction for all of them."""
    p_values = {arm.name: arm.p_value for arm in arms}
    tested = [name for name in RULE_ARMS if name in p_values]
    return dict(zip(tested, holm([p_values[name] for name in tested]), strict=True))


def judge(arms: Sequence[Arm], name: str | None = None) -> Judgement:
    """The judgement of one way to run the rule among its arms: of the given one, or of the one nearest to the paper's.

    The arms hold "off" and that way.
    """
    by_name = {arm.name: arm for arm in arms}
    primary = primary_arm(by_name)
    arm, adjusted = by_name[name or primary], adjusted_of(arms)
    return Judgement(
        arm=arm,
        off=by_name["off"],
        tested=tuple(adjusted),
        p_value=adjusted[arm.name],
        random=tuple(one.accuracy for one in arms if is_random(one.name)),
        flipped=by_name["flipped"].accuracy if "flipped" in by_name else None,
        alike=arm.name == primary,
        detectable=detectable_from(arm.questions, arm.fixed + arm.broken),
    )


def conclusion(arms: Sequence[Arm]) -> str:
    """One sentence on the way to run the rule that its controls are steered like; see `Judgement`."""
    return judge(arms).sentence()
