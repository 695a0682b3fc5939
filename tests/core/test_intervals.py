"""Estimators against brute force, against another library, and on simulated questions of known difference."""

import itertools

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
    mean_at_n,
    paired_difference,
    pass_at_k,
    per_question,
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


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_the_interval_is_the_bca_one_of_scipy(shift):
    values = np.random.default_rng(2).choice([-1.0, 0.0, 0.0, 0.5, 1.0], size=80) * (1 - shift) + shift
    theirs = stats.bootstrap((values,), np.mean, method="BCa", rng=np.random.default_rng(5)).confidence_interval
    found = bootstrap_mean(values)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.012)
    assert found == bootstrap_mean(values) != bootstrap_mean(values, seed=1)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_the_interval_of_a_difference_holds_it_and_has_a_width(pairs):
    found = difference(*(np.array(column) for column in zip(*pairs, strict=True)))
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high


def test_where_no_verdict_changes_the_interval_is_tangos():
    same = np.array([True] * 30 + [False] * 20)
    found, tango = difference(same, same), paired_difference(same, same)
    assert (found.low, found.high) == pytest.approx((tango.low, tango.high), abs=1e-6)


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


def simulated(draw, gain, questions=250, answers=4):
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
