"""What an evaluation shows, in the words and tables of a card: it claims no more than the paired test and controls do.

Pure: the record of `adaras-export eval` in, Markdown out. Sentences are made from the figures; the record's own are not
repeated.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from adaras_export.core.intervals import Estimate
from adaras_export.core.markdown import Example, code, plain
from adaras_export.errors import ArtifactError
from adaras_export.evaluation.arms import RULE_ARMS, Arm, Comparison, Gap, is_random
from adaras_export.evaluation.claims import judge, lead_of
from adaras_export.files.hub import is_hub_id


@dataclass(frozen=True)
class Measured:
    """An evaluation as a card needs it.

    Attributes:
        questions: how many.
        arms: no steering first.
        steered_share: of the questions, that the gate steered.
        seen: how many of them the rule was made with; None where that was not recorded.
        dataset: Hub id of the dataset that the questions are from, where it was named.
        task: of that benchmark, where it was named.
        comparison: ways to run the rule, held against each other.
        example: one of the questions, where the file has one.
    """

    questions: int
    arms: tuple[Arm, ...]
    steered_share: float
    seen: int | None = None
    dataset: str | None = None
    task: str | None = None
    comparison: Comparison | None = None
    example: Example | None = None

    @classmethod
    def from_record(cls, record: Mapping[str, Any], subject: str) -> "Measured":
        """The value of a file of `adaras-export eval`.

        Raises:
            ArtifactError: it is not of that form.
        """
        try:
            found = cls(
                questions=_checked(record["questions"], int),
                arms=tuple(_restored(Arm, one) for one in record["arms"]),
                steered_share=_checked(record["steered_share"], float),
                seen=_checked(record.get("seen"), int | None),
                dataset=_checked(record.get("dataset"), str | None),
                task=_checked(record.get("task"), str | None),
                comparison=_comparison(record.get("comparison")),
                example=_example(record.get("example")),
            )
        except (KeyError, TypeError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ArtifactError(f"{subject}: {reason}; expected a file of adaras-export eval") from error
        if found.dataset is not None and not is_hub_id(found.dataset):
            raise ArtifactError(f"{subject}: is of dataset {found.dataset!r}; expected a Hub id")
        names = [arm.name for arm in found.arms]
        if len({*names}) != len(names) or "off" not in names or not {*RULE_ARMS} & {*names}:
            raise ArtifactError(
                f"{subject}: has arms {', '.join(names)}; expected off and one of {', '.join(RULE_ARMS)}"
            )
        return found

    def arm(self, name: str) -> Arm | None:
        """The arm of that name, where it was measured."""
        return next((arm for arm in self.arms if arm.name == name), None)

    @property
    def lead(self) -> str:
        """The arm that the controls are steered like."""
        return lead_of([arm.name for arm in self.arms])


def computed_arm(*, static: bool, gated: bool) -> str:
    """The arm that an artifact computes."""
    if static:
        return "everywhere"
    return "gated" if gated else "always"


def told(measured: Measured, name: str, command: str, *, rounded: bool) -> str:
    """The text below the heading Effect.

    Args:
        measured: the evaluation.
        name: the arm that the artifact computes.
        command: what evaluates that.
        rounded: whether the artifact computes with rounded weights, which the evaluation did not.
    """
    arm = measured.arm(name)
    if arm is None:
        opening = (
            f"**This artifact's own behaviour was not evaluated.** It computes the arm `{name}`; what follows is about "
            f"other ways to run its rule. {command} measures both."
        )
    else:
        opening = f"{_ROUNDED if rounded else _OWN} `{name}`:** {_result(measured, arm)} {_judged(measured, arm)}"
    table = "\n".join(_row(one) for one in measured.arms)
    return f"""{opening}

{_questions(measured)}
`off` is the base model; `random` are draws of other neurons of the same layers, with the same norm and random signs;
`flipped` is the rule with the opposite sign. Both are steered like `{measured.lead}`.

| arm | accuracy | 95 % Wilson interval | fixed | broken | exact McNemar p |
|---|---|---|---|---|---|
{table}
{_compared(measured.comparison)}"""


_OWN = "**This artifact computes the arm"
_ROUNDED = (
    "The weights of this artifact are rounded, and it was not evaluated with these. **With the base's own weights, the "
    "rule computes the arm"
)


def _result(measured: Measured, arm: Arm) -> str:
    off = measured.arm("off")
    assert off is not None
    found = judge(measured.arms, arm.name)
    return (
        f"{arm.accuracy:.1%} right (95 % interval {arm.low:.1%} to "
        f"{arm.high:.1%}), against {off.accuracy:.1%} ({off.low:.1%} to {off.high:.1%}) without steering: {arm.fixed} "
        f"fixed, {arm.broken} broken, exact McNemar p = {found.p_value:.2g}{found.corrected}."
    )


def _judged(measured: Measured, arm: Arm) -> str:
    """A gain is claimed where the conclusion is one: see `conclusions.Judgement`."""
    if measured.seen:
        return f"**No test:** the rule was made with {measured.seen} of these questions."
    found = judge(measured.arms, arm.name)
    if found.outcome == "gain":
        said = f"**More are right, and more than by chance among random neurons (rank test p = {found.rank_p:.2g}).**"
    else:
        said = {
            "unchanged": "No effect on accuracy is shown, which is no proof that there is none.",
            "harm": "**Steering harms here.**",
            "uncontrolled": "More are right, which is no claim for these neurons.",
            "flipped": "More are right, **but a control does as well**: no claim for these neurons.",
            "controls": "More are right, **but a control does as well, or nearly so**: no claim for these neurons.",
            "few draws": "More are right, and more than with any control; **so few draws are no claim**.",
        }[found.outcome]
    return f"{said} {_controls(measured, arm)}"


def _controls(measured: Measured, arm: Arm) -> str:
    """What random neurons do, in words."""
    random = [one.accuracy for one in measured.arms if is_random(one.name)]
    flipped = measured.arm("flipped")
    if not random or flipped is None:
        return "No random-neuron control was run."
    draws = f"{len(random)} draw{'s' if len(random) > 1 else ''} of random neurons of the same norm"
    above = sum(one < arm.accuracy for one in random)
    alike = "" if measured.lead == arm.name else f", steered like `{measured.lead}` and not like this artifact,"
    return (
        f"Of {draws}{alike} {above} stay below it: they reach {min(random):.1%} to {max(random):.1%}, and the "
        f"flipped sign {flipped.accuracy:.1%}."
    )


def _questions(measured: Measured) -> str:
    name = measured.dataset
    source = "" if name is None else f" of [{plain(name)}](https://huggingface.co/datasets/{name})"
    fresh = " that the rule was not made with" if measured.seen == 0 else ""
    gate = f" The gate steers {measured.steered_share:.1%} of them." if measured.lead == "gated" else ""
    return (
        f"{measured.questions} questions{source}{fresh}, answered greedily by the base "
        f"model with the rule applied by hooks.{gate}"
    )


def _row(arm: Arm) -> str:
    return (
        f"| {code(arm.name)} | {arm.accuracy:.1%} | {arm.low:.1%} to {arm.high:.1%} | {arm.fixed} | {arm.broken} | "
        f"{arm.p_value:.2g} |"
    )


def _compared(comparison: Comparison | None) -> str:
    """The ways to run the rule, held against the one nearest to it."""
    if comparison is None:
        return ""
    rows = "\n".join(_gap(gap, comparison.reference) for gap in comparison.gaps)
    reference = code(comparison.reference)
    return f"""
Held against {reference}. KL from x: KL(x || arm) of next-token distributions in nats, along the base's own answer
(up to {comparison.tokens} tokens, {comparison.mean_tokens:.1f} on average). In brackets 95 % intervals over questions;
one around 0 is no proof of equality.

| arm | points of accuracy | fixed | broken | exact McNemar p | KL from {reference}, a token | first token | \
KL from off, a token | first token |
|---|---|---|---|---|---|---|---|---|
{rows}
"""


def _gap(gap: Gap, reference: str) -> str:
    paired = "| | |" if gap.name == reference else _paired(gap)
    return f"| {code(gap.name)} | {paired} | {' | '.join(_with_interval(one) for one in gap.divergences())} |"


def _paired(gap: Gap) -> str:
    value, low, high = (100 * one for one in (gap.difference.value, gap.difference.low, gap.difference.high))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f}) | {gap.fixed} | {gap.broken} | {gap.p_value:.2g}"


def _with_interval(figure: Estimate) -> str:
    return f"{figure.value:.2g} ({figure.low:.2g} to {figure.high:.2g})"


def _example(record: Any) -> Example | None:  # noqa: ANN401 - comes from a file
    if record is None:
        return None
    found = Example.of(_checked(record, str | list))
    if found is None:
        raise TypeError("an example that is no short question")
    return found


def _comparison(record: Any) -> Comparison | None:  # noqa: ANN401 - comes from a file
    if record is None:
        return None
    gaps = tuple(_restored(Gap, one) for one in record["gaps"])
    rest = {name: _checked(record[name], kind) for name, kind in (("reference", str), ("tokens", int))}
    return Comparison(**rest, mean_tokens=_checked(record["mean_tokens"], float), gaps=gaps)


def _restored(kind: Any, record: Mapping[str, Any]) -> Any:  # noqa: ANN401 - a dataclass of verdicts
    """A value of a dataclass of texts, numbers and estimates."""
    values = {one.name: record[one.name] for one in fields(kind)}
    return kind(**{one.name: _field(values[one.name], one.type) for one in fields(kind)})


def _field(value: Any, kind: Any) -> Any:  # noqa: ANN401
    return _restored(Estimate, value) if kind is Estimate else _checked(value, kind)


def _checked(value: Any, kind: Any) -> Any:  # noqa: ANN401
    """``value`` where it is of this type, and finite; whole numbers are numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float if kind is float else kind):
        raise TypeError(f"{value!r} where there should be a {kind}")
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"{value} where there should be a number")
    return value
