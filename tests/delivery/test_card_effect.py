"""What a card says of an evaluation: no more than the paired test and the controls allow."""

import cards
import evaluations
import pytest
from cards import text
from hypothesis import given
from hypothesis import strategies as st

CLAIM = "**More are right, and more than by chance among random neurons"


def effect(**how):
    return text(**how).split("## Effect")[1].split("## Limits")[0]


def test_a_gain_is_claimed_where_it_is_significant_and_above_every_control():
    found = effect(evaluation=cards.GAIN)
    assert "**This artifact computes the arm `gated`:** 57.8% right (95 % interval 54.8% to 60.8%)" in found
    assert f"{CLAIM} (rank test p = 0.048).**" in found
    assert "Of 20 draws of random neurons of the same norm 20 stay below it: they reach 49.0% to 52.4%" in found


NO_CLAIMS = {
    "null": (cards.NULL, "No effect on accuracy is shown, which is no proof that there is none."),
    "harm": (cards.HARM, "**Steering harms here.**"),
    "a random control as well": (cards.CONTROL, "2 stay below it: they reach 51.0% to 58.0%"),
    "too few random controls": (cards.FEW, "**so few draws are no claim**. Of 3 draws"),
    "the flipped sign as well": (
        cards.evaluation(cards.arm("gated", 289, 29, 5, 4e-5), controls=cards.DRAWS, flipped=290),
        "the flipped sign 58.0%",
    ),
    "no control": (cards.NO_CONTROL, "No random-neuron control was run."),
    "seen questions": (cards.SEEN, "**No test:** the rule was made with 3 of these questions."),
    "as many broken": (cards.evaluation(cards.arm("gated", 265, 9, 9, 0.01)), "Steering harms"),
}


@pytest.mark.parametrize("case", NO_CLAIMS)
def test_no_gain_is_claimed_where(case):
    evaluation, said = NO_CLAIMS[case]
    found = effect(evaluation=evaluation)
    assert CLAIM not in found
    assert said in found


def test_a_static_artifact_is_not_credited_with_controls_of_the_gated_rule():
    found = effect(name="stock", evaluation=cards.COMPARED)
    assert "**This artifact computes the arm `everywhere`:** 56.8% right" in found
    assert CLAIM not in found
    assert "steered like `gated` and not like this artifact" in found


def test_a_static_artifact_with_controls_of_its_own_may_gain():
    own = cards.evaluation(cards.arm("everywhere", 289, 29, 5, 4e-5), controls=cards.DRAWS)
    assert CLAIM in effect(name="stock", evaluation=own)


def test_an_artifact_with_a_start_and_no_gate_is_credited_with_the_arm_always_only():
    found = effect(name="peft-start-at", evaluation=cards.GAIN)
    assert "**This artifact's own behaviour was not evaluated.**" in found
    assert "`adaras-export eval --compare gated,always`" in found
    own = cards.evaluation(cards.arm("always", 289, 29, 5, 4e-5), controls=cards.DRAWS)
    assert CLAIM in effect(name="peft-start-at", evaluation=own)


def test_the_sentence_of_the_file_is_not_repeated():
    assert "believe" not in text(evaluation=cards.NULL | {"verdict": "believe me: steering helps."})


@given(st.integers(200, 330), st.floats(0, 0.1), st.lists(st.integers(230, 330), max_size=50), st.integers(200, 300))
def test_a_claim_implies_significance_a_gain_a_rank_among_random_draws_and_a_worse_flip(right, p, controls, flipped):
    evaluation = cards.evaluation(cards.arm("gated", right, right - 200, 65, p), controls=controls, flipped=flipped)
    claimed = CLAIM in effect(evaluation=evaluation)
    as_good = sum(one >= right for one in controls)
    ranked = 20 * (1 + as_good) <= 1 + len(controls)
    assert claimed == bool(p < 0.05 and right > max(265, flipped) and ranked)


def test_the_p_value_is_corrected_for_the_ways_to_run_the_rule_that_were_tested():
    found = effect(
        evaluation=cards.evaluation(cards.arm("gated", 280, 40, 25, 0.03), cards.arm("always", 281, 42, 26, 0.04))
    )
    assert "McNemar p = 0.06 (Holm-adjusted for 2 ways to run the rule: gated, always)" in found
    assert "No effect on accuracy is shown" in found


def test_what_was_not_evaluated_is_said_and_how_it_can_be():
    assert "Not evaluated. Steering often does not help" in effect()
    command = "`adaras-export eval --compare gated,always,everywhere`"
    assert command in effect(name="stock")
    found = effect(name="stock", evaluation=cards.GAIN)
    assert found.startswith("\n\n**This artifact's own behaviour was not evaluated.**")
    assert command in found


def test_a_comparison_is_told_with_its_intervals():
    found = effect(evaluation=cards.COMPARED)
    assert "Compared with `gated`" in found
    assert "| `gated` | | | | | 0 (0 to 0) | 0.5 (0.25 to 1) | 1.5 (0.75 to 3) | 2 (1 to 4) |" in found
    assert "| `everywhere` | -1.0 (-3.0 to +1.0) | 3 | 8 | 0.23 | 0.0001 (5e-05 to 0.0002) | 0.5 " in found


def test_sampled_answers_are_not_called_greedy_and_have_the_intervals_of_their_test():
    found = effect(evaluation={**evaluations.SAMPLED, "rule": cards.RULE.fingerprint}, rule=cards.RULE.ungated())
    assert "60 questions that the rule was not made with, with 8 answers each at temperature 0.7, by" in found
    assert "| arm | accuracy | 95 % bootstrap interval | fixed | broken | exact paired p |" in found
    assert "Wilson" not in found
    assert "McNemar" not in found
