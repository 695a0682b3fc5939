"""What an evaluation shows, in the words and tables of a card: it claims no more than the paired test and controls do.

Pure: an evaluation in, Markdown out. The words are in `card_effect.md`; the record's own sentence is not repeated.
"""

from adaras_export.core.intervals import Estimate
from adaras_export.core.markdown import Markdown, render
from adaras_export.evaluation.claims import Judgement, Outcome, judge
from adaras_export.evaluation.record import Evaluation


def computed_arm(*, static: bool, gated: bool) -> str:
    """The arm that an artifact computes."""
    if static:
        return "everywhere"
    return "gated" if gated else "always"


def effect_text(evaluation: Evaluation, name: str, command: str, *, rounded: bool) -> Markdown:
    """The text below the heading Effect.

    Args:
        evaluation: what was measured.
        name: the arm that the artifact computes.
        command: the command that evaluates this arm.
        rounded: whether the artifact computes with rounded weights, which the evaluation did not.
    """
    arm = evaluation.arm(name)
    judgement = None if arm is None else judge(evaluation.arms, name)
    values = {
        "evaluation": evaluation,
        "arm": arm,
        "name": name,
        "command": Markdown(command),
        "rounded": rounded,
        "judgement": judgement,
        "outcome": None if judgement is None else _outcome(judgement),
        "dataset_path": Markdown(evaluation.dataset or ""),  # a Hub id, whose letters need no escape
        **{function.__name__: function for function in (share, chance, points, nats)},
    }
    return Markdown(render("delivery/card_effect.md", values).strip() + "\n")


_OUTCOMES: dict[Outcome, str] = {
    "unchanged": "No effect on accuracy is shown, which is no proof that there is none.",
    "harm": "**Steering harms here.**",
    "uncontrolled": "More are right, which is no claim for these neurons.",
    "flipped": "More are right, **but a control does as well**: no claim for these neurons.",
    "controls": "More are right, **but a control does as well, or nearly so**: no claim for these neurons.",
    "few draws": "More are right, and more than with any control; **so few draws are no claim**.",
}


def _outcome(judgement: Judgement) -> Markdown:
    """A gain is claimed where `Judgement` claims one."""
    if judgement.outcome == "gain":
        rank = f"rank test p = {chance(judgement.rank_p)}"
        return Markdown(f"**More are right, and more than by chance among random neurons ({rank}).**")
    return Markdown(_OUTCOMES[judgement.outcome])


def share(value: float) -> str:
    """A share in per cent, with one decimal."""
    return f"{value:.1%}"


def chance(value: float) -> str:
    """A p-value, with two digits."""
    return f"{value:.2g}"


def points(difference: Estimate) -> str:
    """A difference of accuracies with its interval, in points."""
    value, low, high = (100 * end for end in (difference.value, difference.low, difference.high))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def nats(figure: Estimate) -> str:
    """A divergence with its interval."""
    return f"{figure.value:.2g} ({figure.low:.2g} to {figure.high:.2g})"
