"""Intervals and tests against brute force, published figures, and simulated questions of known difference."""

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaras_export.core.intervals import (
    _swap_p_value,
    bootstrap_mean,
    changed,
    detectable,
    difference,
    holm,
    mean_at_n,
    mean_interval,
    paired_difference,
    paired_test,
    pass_at_k,
    per_question,
    rank_p_value,
)

stats = pytest.importorskip("scipy.stats")

BITS = st.lists(st.booleans(), min_size=1, max_size=7)


@given(BITS, st.data())
def test_pass_at_k_is_the_share_of_sets_of_k_answers_that_hold_a_right_one(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    sets = list(itertools.combinations(answers, k))
    expected = sum(map(any, sets)) / len(sets)
    assert pass_at_k(np.array([answers]), k).value == pytest.approx(expected)


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=9))
def test_pass_at_1_is_the_mean_and_pass_at_k_grows_with_k(rows):
    verdicts_Nn = np.array(rows)
    found = [pass_at_k(verdicts_Nn, k).value for k in (1, 2, 3, 4)]
    assert found[0] == pytest.approx(mean_at_n(verdicts_Nn).value)
    assert found == sorted(found)
    assert found[3] == pytest.approx(verdicts_Nn.any(axis=1).mean())


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_the_test_of_several_answers_counts_all_ways_to_swap_the_arms(gained):
    sums = [abs(sum(sign * one for sign, one in zip(signs, gained, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(gained))]  # fmt: skip
    assert _swap_p_value(gained) == pytest.approx(np.mean([one >= abs(sum(gained)) for one in sums]))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_with_every_answer_given_twice_nothing_changes(pairs):
    arm, other = (np.array(column) for column in zip(*pairs, strict=True))
    twice = [np.stack([one, one], axis=1) for one in (arm, other)]
    assert changed(*twice) == pytest.approx(changed(arm, other))
    assert difference(*twice).value == pytest.approx(difference(arm, other).value)
    assert detectable(*twice) == pytest.approx(detectable(arm, other))


def test_sums_too_many_to_count_are_told_by_the_normal_distribution():
    gained = np.random.default_rng(1).integers(-40, 42, size=9000).tolist()
    fewer = gained[:900]
    spread = np.sqrt(sum(one**2 for one in fewer))
    assert _swap_p_value(gained) < 0.2
    assert _swap_p_value(fewer) == pytest.approx(2 * stats.norm.sf(abs(sum(fewer)) / spread), rel=0.05)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_the_interval_of_a_difference_holds_it_and_has_a_width(pairs):
    found = difference(*(np.array(column) for column in zip(*pairs, strict=True)))
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_where_all_values_are_equal_the_interval_is_as_wide_as_tangos_of_no_change(value):
    same = np.arange(50) < 30
    found, tango = bootstrap_mean(np.full(50, value)), paired_difference(same, same)
    expected = max(-1.0, value + tango.low), min(1.0, value + tango.high)
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-9)


def test_few_changed_verdicts_are_not_taken_for_all_that_could_change():
    """A bootstrap of three broken and none fixed never draws a fixed one, and would call this harm."""
    other = np.arange(1000) < 600
    arm = other & (np.arange(1000) >= 3)
    found, naive = difference(arm, other), bootstrap_mean(per_question(arm) - per_question(other))
    assert found == paired_difference(arm, other)
    assert naive.high < 0 < found.high
    several = difference(np.stack([arm, arm], axis=1), np.stack([other, other], axis=1))
    assert several.low <= naive.low < 0 < several.high


def test_several_answers_to_a_question_are_one_unit():
    """300 answers to 3 questions leave more open than one answer each to 300."""
    rows = np.repeat([[True], [True], [False]], 100, axis=1)
    clustered, single = mean_at_n(rows), bootstrap_mean(rows.reshape(-1).astype(float))
    assert clustered.value == pytest.approx(single.value)
    assert clustered.high - clustered.low > 4 * (single.high - single.low)
    assert per_question(rows).tolist() == [1, 1, 0]


def simulated(draw, gain, questions=100, answers=4):
    """Two arms whose questions differ in difficulty; the second is right more often by ``gain``."""
    ease = draw.uniform(0.1, 0.7, size=(questions, 1))
    return [draw.random((questions, answers)) < ease + more for more in (gain, 0)]


@pytest.mark.slow
def test_intervals_of_simulated_arms_hold_the_true_difference_nineteen_times_in_twenty():
    """Of 300 intervals 95 % +- 1.26 % (one deviation); the bounds are three of them away."""
    draw = np.random.default_rng(8)
    found = [difference(*simulated(draw, 0.07)) for _ in range(300)]
    assert 0.912 < np.mean([one.low <= 0.07 <= one.high for one in found]) < 0.988


def test_a_test_of_arms_that_do_not_differ_rejects_one_time_in_twenty():
    draw = np.random.default_rng(9)
    found = [changed(*simulated(draw, 0.0))[2] for _ in range(300)]
    assert np.mean([one < 0.05 for one in found]) < 0.05 + 3 * 0.0126


def test_the_detectable_difference_is_found_four_times_in_five():
    draw, questions = np.random.default_rng(10), 400
    other = draw.random(questions) < 0.5
    least = detectable(np.where(draw.random(questions) < 0.2, ~other, other), other)
    share = 0.2  # of verdicts that change; least more of them fix than break
    found = []
    for _ in range(300):
        fate = draw.random(questions)
        fixed, broken = fate < (share + least) / 2, fate > 1 - (share - least) / 2
        found.append(changed(fixed, broken)[2] < 0.05)
    assert 0.65 < np.mean(found) < 0.95


def verdicts(both, fixed, broken, neither):
    """Two arrays of verdicts with these counts."""
    arm = [True] * both + [True] * fixed + [False] * broken + [False] * neither
    other = [True] * both + [False] * fixed + [True] * broken + [False] * neither
    return np.array(arm), np.array(other)


COUNTS = st.tuples(*[st.integers(0, 30)] * 4).filter(any)


def test_the_paired_interval_is_tangos():
    """Figures of a published example: Altman's airway data, Tango's interval (-0.517, -0.026)."""
    found = paired_difference(*verdicts(1, 1, 7, 12))
    assert (found.value, found.low, found.high) == pytest.approx((-6 / 21, -0.517, -0.026), abs=5e-4)


def likelihood(fixed_share, difference, counts):
    """Of the two shares of changed verdicts, given their difference; the others are one class."""
    both, fixed, broken, neither = counts
    broken_share = fixed_share - difference
    rest = 1 - fixed_share - broken_share
    shares = ((fixed, fixed_share), (broken, broken_share), (both + neither, rest))
    return sum(count * np.log(np.maximum(share, 1e-300)) for count, share in shares if count)


@pytest.mark.parametrize("counts", [(50, 12, 4, 34), (5, 3, 0, 12), (0, 2, 9, 4), (80, 1, 1, 18)])
def test_the_paired_interval_ends_where_the_score_test_by_brute_force_rejects(counts):
    found = paired_difference(*verdicts(*counts))
    for end in (found.low, found.high):
        grid = np.linspace(max(0.0, end), (1 + end) / 2, 200_001)
        fixed_share = grid[np.argmax(likelihood(grid, end, counts))]
        variance = (2 * fixed_share - end - end**2) / sum(counts)
        assert abs(found.value - end) / math.sqrt(variance) == pytest.approx(1.96, abs=5e-3)


@given(COUNTS)
def test_the_paired_interval_has_a_width_holds_the_value_and_turns_round_with_the_arms(counts):
    found, other = paired_difference(*verdicts(*counts)), paired_difference(*reversed(verdicts(*counts)))
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert found.high > found.low
    assert (other.value, other.low, other.high) == pytest.approx((-found.value, -found.high, -found.low), abs=1e-9)


def test_no_changed_verdict_among_few_questions_says_less_than_among_many():
    few, many = (paired_difference(*verdicts(count, 0, 0, count)) for count in (10, 1000))
    assert few.high > 0.1 > many.high > 0.001


def test_the_paired_test_counts_from_the_other_arm():
    assert paired_test(*verdicts(5, 3, 0, 2)) == (3, 0, pytest.approx(0.25))
    assert paired_test(*verdicts(5, 0, 0, 2)) == (0, 0, 1)


def test_the_interval_of_a_mean_is_efrons_bca_bootstrap():
    """By hand, of other resamples. The percentile bootstrap is 0.2 standard errors away, the two samplings 0.03."""
    values = np.random.default_rng(3).gamma(1.0, size=30)
    means = np.sort(np.random.default_rng(4).choice(values, (40_000, 30)).mean(axis=1))
    centred, normal = values - values.mean(), NormalDist()
    skew = (centred**3).sum() / (6 * (centred**2).sum() ** 1.5)
    bias = normal.inv_cdf((means < values.mean()).mean())
    shifted = [bias + (bias + z) / (1 - skew * (bias + z)) for z in (-1.959963984540054, 1.959963984540054)]
    low, high = np.quantile(means, [normal.cdf(z) for z in shifted])
    found, error = mean_interval(values), values.std() / math.sqrt(30)
    assert found.value == values.mean()
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * error)
    assert found == mean_interval(values)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 30.0])
def test_a_resample_whose_mean_is_that_of_the_sample_counts_half(scale):
    """Symptom: an end a question too low. Cause: sums that round made equal means differ. Resamples of 30 right answers
    of 90 are binomial; the interval is 22 to 39, with no tie counted 21 to 38, and with all of them 23 to 40."""
    normal, resamples = NormalDist(), stats.binom(90, 1 / 3)
    bias, skew = normal.inv_cdf(resamples.cdf(29) + resamples.pmf(30) / 2), (1 / 3) / (6 * math.sqrt(20))
    shifted = [bias + (bias + z) / (1 - skew * (bias + z)) for z in (-1.959963984540054, 1.959963984540054)]
    expected = [scale * resamples.ppf(normal.cdf(z)) / 90 for z in shifted]
    found = mean_interval(scale * (np.arange(90) < 30))
    assert [found.low, found.high] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 1 / 3, -1e-12])
def test_the_interval_of_equal_values_has_no_width(value):
    found = mean_interval(np.full(9, value))
    assert found.low == found.value == found.high == pytest.approx(value)


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.001, 0.2))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values, level):
    """As a loop: the smallest against level / m, the next against level / (m - 1), until one fails."""
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
