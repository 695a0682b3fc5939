"""Thresholds, areas and calibration, against scikit-learn and brute force."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaras_export.core.intervals import auc_difference, auc_interval
from adaras_export.discovery.gate_metrics import Costs, cross_fitted, held_out, rates, reliability
from adaras_export.errors import RuleError
from adaras_export.modeling.gate import agreeing_threshold, is_below, youden_threshold

sklearn_calibration = pytest.importorskip("sklearn.calibration")
sklearn_metrics = pytest.importorskip("sklearn.metrics")

# (p(correct), whether it was correct), at least two of either kind; few values, so that ties are common.
outcomes = st.integers(0, 2**32 - 1).map(lambda seed: draw_outcomes(np.random.default_rng(seed)))


def draw_outcomes(draw):
    """Scores of 4 to 40 prompts with ties, neighbours in float32 among them, and labels of both kinds."""
    count = int(draw.integers(4, 41))
    grid = np.linspace(0, 1, 7, dtype=np.float32)
    p_correct = np.nextafter(draw.choice(grid, count), draw.choice(np.float32([0, 1]), count), dtype=np.float32)
    correct = draw.permutation(np.arange(count) < draw.integers(2, count - 1))
    return p_correct, correct


@given(outcomes)
def test_the_threshold_is_the_lowest_that_maximises_youdens_j(drawn):
    p_correct, correct = drawn
    wrong, right = p_correct[~correct], p_correct[correct]

    def j(threshold):  # as runtimes compare: in float32
        below = np.float32(threshold)
        return int((wrong < below).sum()) * len(right) - int((right < below).sum()) * len(wrong)

    threshold = youden_threshold(p_correct, correct)
    best = max(j(cut) for cut in [0.0, *p_correct.tolist(), 1.0])
    assert j(threshold) == best
    lower = p_correct[p_correct < np.float32(threshold)]
    assert all(j(cut) < best for cut in lower), "a lower threshold steers less and separates as well"


def test_the_threshold_of_two_clear_groups_lies_between_them():
    assert youden_threshold(np.array([0.1, 0.2, 0.6, 0.8]), np.array([False, False, True, True])) == pytest.approx(0.4)


@given(outcomes)
def test_the_agreeing_threshold_is_the_lowest_that_decides_most_prompts_alike(drawn):
    p_correct, is_steered = drawn

    def alike(threshold):
        return int(((p_correct < np.float32(threshold)) == is_steered).sum())

    threshold = agreeing_threshold(p_correct, is_steered)
    # Above all scores every prompt is steered, whatever it is: no threshold is fitted there.
    assert alike(threshold) == max(alike(cut) for cut in [0.0, *p_correct.tolist()])
    lower = p_correct[p_correct < np.float32(threshold)]
    assert all(alike(cut) < alike(threshold) for cut in lower)


def test_a_threshold_that_agrees_with_a_monotonous_change_of_all_scores_decides_every_prompt_alike():
    before = np.array([0.2, 0.9, 0.4, 0.5, 0.7])
    threshold = agreeing_threshold(before**3, before < 0.45)
    assert threshold == pytest.approx((0.4**3 + 0.5**3) / 2)


def wins(p_correct, correct):
    """Of each right answer over each wrong one: 1, or a half where they tie."""
    return 0.5 * (np.sign(p_correct[correct][:, None] - p_correct[~correct]).astype(float) + 1)


@given(outcomes)
def test_the_auc_is_that_of_scikit_learn_and_its_interval_delongs(drawn):
    p_correct, correct = drawn
    auc, low, high = auc_interval(p_correct, correct)
    assert auc == pytest.approx(sklearn_metrics.roc_auc_score(correct, p_correct), abs=1e-12)
    error = math.sqrt(sum(wins(*drawn).mean(axis).var(ddof=1) / count
                          for axis, count in ((1, correct.sum()), (0, (~correct).sum()))))  # fmt: skip
    expected = max(0, auc - 1.959963984540054 * error), min(1, auc + 1.959963984540054 * error)
    assert (low, high) == pytest.approx(expected, abs=1e-9)


@given(outcomes, st.sampled_from([(1.0, 1.0), (5.0, 1.0), (1.0, 7.5), (1e6, 1.0), (1.0, 1e6)]))
def test_the_threshold_by_cost_is_the_lowest_that_costs_least(drawn, each):
    (p_correct, correct), costs = drawn, Costs(*each)

    def cost(threshold):
        return costs.of(p_correct < np.float32(threshold), correct)

    threshold = costs.threshold(p_correct, correct)
    assert cost(threshold) == min(cost(cut) for cut in [0.0, *p_correct.tolist(), 1.0])
    lower = p_correct[p_correct < np.float32(threshold)]
    assert all(cost(cut) > cost(threshold) for cut in lower)


def test_a_threshold_by_cost_may_steer_all_or_none():
    p_correct, correct = np.float32([0.2, 0.4, 0.6, 0.8]), np.array([False, True, False, True])
    assert Costs(100, 1).threshold(p_correct, correct) == pytest.approx(0.7)
    assert Costs(1, 100).threshold(p_correct, correct) == pytest.approx(0.3)
    assert Costs(1, 100).threshold(p_correct, ~correct) == 0
    assert Costs(100, 1).threshold(p_correct, ~correct) == 1


@pytest.mark.parametrize("each", [(0, 1), (1, -2), (math.inf, 1), (1, math.nan)])
def test_costs_that_are_no_positive_numbers_are_refused(each):
    with pytest.raises(RuleError, match=r"costs: .* of a right one steered; expected positive numbers"):
        Costs(*each)


@given(outcomes, st.integers(-1, 9))
def test_every_question_is_held_out_once_and_folds_have_their_share_of_every_label(drawn, seed):
    correct = drawn[1]
    folds = held_out(correct, 5, seed)
    assert len(folds) == min(5, int(correct.sum()), int((~correct).sum()))
    assert np.sum(folds, axis=0).tolist() == [1] * len(correct)
    for which in (correct, ~correct, correct | True):
        sizes = [int((held & which).sum()) for held in folds]
        assert max(sizes) - min(sizes) <= 1


@given(outcomes)
def test_a_cross_fitted_decision_uses_a_threshold_of_the_other_folds(drawn):
    p_correct, correct = drawn
    found = cross_fitted(p_correct, correct, youden_threshold, 3)
    for held in held_out(correct, 10, 3):
        threshold = np.float32(youden_threshold(p_correct[~held], correct[~held]))
        assert found[held].tolist() == (p_correct[held] < threshold).tolist()


def test_where_nothing_is_known_only_the_apparent_rates_look_good():
    """Symptom: sensitivity and specificity of noise summed up to more than 1. Cause: they were told on the questions
    that had chosen the threshold. Seeded; no false alarm."""
    draw, apparent, honest = np.random.default_rng(0), [], []
    for seed in range(60):
        p_correct, correct = draw.random(40), np.arange(40) % 2 == 0
        threshold = youden_threshold(p_correct, correct)
        apparent.append(sum(rates(is_below(p_correct, threshold), correct)) - 1)
        honest.append(sum(rates(cross_fitted(p_correct, correct, youden_threshold, seed), correct)) - 1)
    assert np.mean(apparent) > 0.15
    assert abs(np.mean(honest)) < 0.05


@given(outcomes, st.integers(0, 2**32 - 1))
def test_the_difference_of_areas_is_delongs_for_pairs(drawn, seed):
    p_correct, correct = drawn
    other = np.random.default_rng(seed).choice(p_correct, len(correct))
    found = auc_difference(p_correct, other, correct)
    both = [wins(scores, correct) for scores in (p_correct, other)]
    covariance = np.cov([won.mean(1) for won in both]) / correct.sum()
    covariance += np.cov([won.mean(0) for won in both]) / (~correct).sum()
    error = math.sqrt(max(0.0, covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]))
    assert found.value == pytest.approx(auc_interval(p_correct, correct)[0] - auc_interval(other, correct)[0])
    assert found.low == pytest.approx(max(-1, found.value - 1.959963984540054 * error), abs=1e-9)
    assert found.high == pytest.approx(min(1, found.value + 1.959963984540054 * error), abs=1e-9)


@pytest.mark.parametrize("count", [12, 40, 500])
def test_the_calibration_curve_is_that_of_scikit_learn(count):
    draw = np.random.default_rng(count)
    p_correct = draw.random(count).astype(np.float32)
    correct = draw.random(count) < p_correct
    bins = reliability(p_correct, correct)
    expected = sklearn_calibration.calibration_curve(
        correct, p_correct.astype(float), n_bins={12: 2, 40: 4, 500: 10}[count], strategy="quantile"
    )
    np.testing.assert_allclose([[one.correct for one in bins], [one.predicted for one in bins]], expected)
    assert sum(one.questions for one in bins) == count
    assert all(one.low <= one.correct <= one.high for one in bins)


def test_the_calibration_curve_of_one_probability_is_one_bin():
    [only] = reliability(np.full(30, 0.25), np.arange(30) < 10)
    assert (only.questions, only.predicted) == (30, 0.25)
    assert only.correct == pytest.approx(1 / 3)
