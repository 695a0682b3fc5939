"""Sentences that claim no more than the arms show."""

import pytest

from adaras_export.evaluation.arms import Arm
from adaras_export.evaluation.claims import conclusion, judge


def arm(name, accuracy, fixed=0, broken=0, p_value=1.0):
    return Arm(name, 1000, accuracy, 0.0, 1.0, fixed, broken, p_value)


def draws(*accuracies):
    return [arm(f"random {seed}", accuracy) for seed, accuracy in enumerate(accuracies)]


OFF, FLIPPED = arm("off", 0.5), arm("flipped", 0.45)
GAIN = arm("always", 0.6, 110, 10, 1e-9)
HARM = arm("always", 0.4, 10, 110, 1e-9)
MANY = draws(*[0.48, 0.52] * 10)

SENTENCES = {
    "harm": ([HARM, FLIPPED, *draws(0.5)], "steering harms: -10.0 points"),
    "no gain": (
        [arm("always", 0.51, 20, 10, 0.2), FLIPPED],
        "no gain shown: +1.0 points (20 fixed, 10 broken), p = 0.2.",
    ),
    "a loss": ([arm("always", 0.49, 10, 20, 0.2), FLIPPED], "no gain shown: -1.0 points"),
    "what would have been found": (
        [arm("always", 0.51, 20, 10, 0.2)],
        "difference of 1.5 points would have been found",
    ),
    "no control": ([GAIN, FLIPPED], "10 broken), p = 1e-09; not a claim, because no random-neuron control was run."),
    "no flip": ([GAIN, *MANY], "not a claim, because the flipped sign was not run."),
    "controls": ([GAIN, FLIPPED, *draws(0.5, 0.6)], "a control does as well, or nearly so: 1 of 2 random draws"),
    "many controls": ([GAIN, FLIPPED, *MANY, *draws(0.7)], "1 of 21 random draws (rank test p = 0.091)"),
    "flipped": ([GAIN, arm("flipped", 0.61), *MANY], "but a control does as well, the flipped sign"),
    "few draws": ([GAIN, FLIPPED, *MANY[:18]], "each of 18 random draws, which are too few"),
    "gain": ([GAIN, FLIPPED, *MANY[:19]], "steering helps: +10.0 points"),
    "its figures": (
        [GAIN, FLIPPED, *MANY],
        "20 of 20 draws of random neurons of the same norm reach less (rank test p =",
    ),
    "gated leads": ([arm("gated", 0.5), GAIN, FLIPPED, *MANY], "no gain shown: +0.0 points (0 fixed, 0 broken)"),
    "corrected": (
        [arm("gated", 0.52, 40, 20, 0.03), arm("always", 0.5, p_value=0.9), FLIPPED, *MANY],
        "no gain shown: +2.0 points (40 fixed, 20 broken), p = 0.06 (Holm-adjusted for 2 ways",
    ),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_the_conclusion_claims_no_more_than_the_arms_show(case):
    arms, expected = SENTENCES[case]
    assert expected in conclusion([OFF, *arms])
    assert conclusion([OFF, *arms]).endswith(".")


def test_controls_that_were_steered_like_another_way_are_none():
    arms = [OFF, arm("gated", 0.55, 60, 10, 1e-6), GAIN, FLIPPED, *MANY]
    assert judge(arms, "always").outcome == "uncontrolled"
    assert "no control was steered in the same way" in judge(arms, "always").sentence()
    assert judge(arms).outcome == "gain"
