"""Sentences that claim no more than the arms show, and the corrections behind them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaras_export.core.intervals import holm, rank_p_value
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


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.001, 0.2))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values, level):
    """In a loop, as it is told: the smallest against level / m, the next against level / (m - 1), until one fails."""
    left, rejected = sorted(range(len(p_values)), key=p_values.__getitem__), set()
    while left and p_values[left[0]] * len(left) <= level:
        rejected.add(left.pop(0))
    assert {place for place, p_value in enumerate(holm(p_values)) if p_value <= level} == rejected


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_lies_between_no_correction_and_bonferronis(p_values):
    found = holm(p_values)
    for p_value, adjusted in zip(p_values, found, strict=True):
        assert p_value <= adjusted <= min(1.0, len(p_values) * p_value)
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert [found[one] for one in order] == sorted(found)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(0, 99))
def test_a_rule_that_is_itself_a_random_draw_seldom_has_a_good_rank(accuracies, level):
    """Over all draws that could have been the rule, p <= x is so for at most a share x: it is valid, ties or not."""
    p_values = [rank_p_value(own, accuracies[:at] + accuracies[at + 1 :]) for at, own in enumerate(accuracies)]
    assert sum(100 * p <= level for p in p_values) * 100 <= level * len(p_values)
