"""What an evaluation shows, in the words and tables of a card: it claims no more than the paired test and controls do.

Pure: an evaluation in, Markdown out. Sentences are made from the figures; the record's own sentence is not repeated.
"""

from adaras_export.core.intervals import Estimate
from adaras_export.core.markdown import code, plain
from adaras_export.evaluation.arms import Arm, is_random
from adaras_export.evaluation.claims import judge
from adaras_export.evaluation.record import Comparison, Evaluation, Gap


def computed_arm(*, static: bool, gated: bool) -> str:
    """The arm that an artifact computes."""
    if static:
        return "everywhere"
    return "gated" if gated else "always"


def effect_text(evaluation: Evaluation, name: str, command: str, *, rounded: bool) -> str:
    """The text below the heading Effect.

    Args:
        evaluation: what was measured.
        name: the arm that the artifact computes.
        command: the command that evaluates this arm.
        rounded: whether the artifact computes with rounded weights, which the evaluation did not.
    """
    arm = evaluation.arm(name)
    if arm is None:
        opening = (
            f"**This artifact's own behaviour was not evaluated.** It computes the arm `{name}`; what follows is about "
            f"other ways to run its rule. {command} measures both."
        )
    else:
        opening = f"{_ROUNDED if rounded else _OWN} `{name}`:** {_result(evaluation, arm)} {_judged(evaluation, arm)}"
    table = "\n".join(_row(each) for each in evaluation.arms)
    return f"""{opening}

{_questions(evaluation)}
`off` is the base model; `random` are draws of other neurons of the same layers, with the same norm and random signs;
`flipped` is the rule with the opposite sign. Both are steered like `{evaluation.primary}`.

| arm | accuracy | 95 % Wilson interval | fixed | broken | exact McNemar p |
|---|---|---|---|---|---|
{table}
{_compared(evaluation.comparison)}"""


_OWN = "**This artifact computes the arm"
_ROUNDED = (
    "The weights of this artifact are rounded, and it was not evaluated with these. **With the base's own weights, the "
    "rule computes the arm"
)


def _result(evaluation: Evaluation, arm: Arm) -> str:
    off = evaluation.arm("off")
    assert off is not None
    judgement = judge(evaluation.arms, arm.name)
    return (
        f"{arm.accuracy:.1%} right (95 % interval {arm.low:.1%} to "
        f"{arm.high:.1%}), against {off.accuracy:.1%} ({off.low:.1%} to {off.high:.1%}) without steering: {arm.fixed} "
        f"fixed, {arm.broken} broken, exact McNemar p = {judgement.p_value:.2g}{judgement.corrected}."
    )


def _judged(evaluation: Evaluation, arm: Arm) -> str:
    """A gain is claimed where the conclusion is one: see `conclusions.Judgement`."""
    if evaluation.seen:
        return f"**No test:** the rule was made with {evaluation.seen} of these questions."
    judgement = judge(evaluation.arms, arm.name)
    if judgement.outcome == "gain":
        rank = f"rank test p = {judgement.rank_p:.2g}"
        sentence = f"**More are right, and more than by chance among random neurons ({rank}).**"
    else:
        sentence = {
            "unchanged": "No effect on accuracy is shown, which is no proof that there is none.",
            "harm": "**Steering harms here.**",
            "uncontrolled": "More are right, which is no claim for these neurons.",
            "flipped": "More are right, **but a control does as well**: no claim for these neurons.",
            "controls": "More are right, **but a control does as well, or nearly so**: no claim for these neurons.",
            "few draws": "More are right, and more than with any control; **so few draws are no claim**.",
        }[judgement.outcome]
    return f"{sentence} {_controls(evaluation, arm)}"


def _controls(evaluation: Evaluation, arm: Arm) -> str:
    """What random neurons do, in words."""
    random = [each.accuracy for each in evaluation.arms if is_random(each.name)]
    flipped = evaluation.arm("flipped")
    if not random or flipped is None:
        return "No random-neuron control was run."
    draws = f"{len(random)} draw{'s' if len(random) > 1 else ''} of random neurons of the same norm"
    above = sum(accuracy < arm.accuracy for accuracy in random)
    alike = (
        "" if evaluation.primary == arm.name else f", steered like `{evaluation.primary}` and not like this artifact,"
    )
    return (
        f"Of {draws}{alike} {above} stay below it: they reach {min(random):.1%} to {max(random):.1%}, and the "
        f"flipped sign {flipped.accuracy:.1%}."
    )


def _questions(evaluation: Evaluation) -> str:
    name = evaluation.dataset
    source = "" if name is None else f" of [{plain(name)}](https://huggingface.co/datasets/{name})"
    fresh = " that the rule was not made with" if evaluation.seen == 0 else ""
    gate = f" The gate steers {evaluation.steered_share:.1%} of them." if evaluation.primary == "gated" else ""
    return (
        f"{evaluation.questions} questions{source}{fresh}, answered greedily by the base "
        f"model with the rule applied by hooks.{gate}"
    )


def _row(arm: Arm) -> str:
    return (
        f"| {code(arm.name)} | {arm.accuracy:.1%} | {arm.low:.1%} to {arm.high:.1%} | {arm.fixed} | {arm.broken} | "
        f"{arm.p_value:.2g} |"
    )


def _compared(comparison: Comparison | None) -> str:
    """The ways to run the rule, compared with the one nearest to it."""
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
    return f"| {code(gap.name)} | {paired} | {' | '.join(_with_interval(figure) for figure in gap.divergences())} |"


def _paired(gap: Gap) -> str:
    value, low, high = (100 * share for share in (gap.difference.value, gap.difference.low, gap.difference.high))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f}) | {gap.fixed} | {gap.broken} | {gap.p_value:.2g}"


def _with_interval(figure: Estimate) -> str:
    return f"{figure.value:.2g} ({figure.low:.2g} to {figure.high:.2g})"
