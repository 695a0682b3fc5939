"""Intervals and paired tests against brute force and published figures."""

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaras_export.core.intervals import mean_interval, paired_difference, paired_test
from adaras_export.evaluation.arms import Arm, arms_table, compare

pytest.importorskip("scipy.stats")


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_interval_is_wilsons(verdicts):
    arm, off = (np.array(column) for column in zip(*verdicts, strict=True))
    found, n, z = compare("a", arm, off), len(verdicts), 1.959963984540054
    p = arm.mean()
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=1e-9)


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 5))
def test_the_paired_test_is_mcnemars_exact_one(fixed, broken, unchanged):
    """By counting all outcomes of as many coins as there are changed verdicts."""
    off = np.array([False] * fixed + [True] * (broken + unchanged + 1))
    arm = np.array([True] * fixed + [False] * broken + [True] * (unchanged + 1))
    coins = [abs(2 * heads - fixed - broken) for heads in map(sum, itertools.product((0, 1), repeat=fixed + broken))]
    expected = sum(distance >= abs(fixed - broken) for distance in coins) / len(coins)
    found = compare("a", arm, off)
    assert (found.fixed, found.broken) == (fixed, broken)
    assert found.p_value == pytest.approx(expected)


def arm(name, accuracy, fixed=0, broken=0, p_value=1.0):
    return Arm(name, 1000, accuracy, 0.0, 1.0, fixed, broken, p_value)


OFF, FLIPPED = arm("off", 0.5), arm("flipped", 0.45)
GAIN = arm("always", 0.6, 110, 10, 1e-9)


def test_the_table_has_a_line_for_every_arm():
    lines = arms_table([OFF, GAIN, FLIPPED]).splitlines()
    assert len(lines) == 4
    assert lines[2].split() == ["always", "60.0%", "0.0%", "-", "100.0%", "110", "10", "1e-09"]
    assert len({len(line) for line in lines[1:]}) == 1


def test_several_random_draws_have_a_line_together():
    draws = [arm(f"random {seed}", accuracy) for seed, accuracy in enumerate((0.52, 0.47, 0.55))]
    assert arms_table([OFF, GAIN, *draws]).splitlines()[3].split() == ["3", "random", "47.0%", "to", "55.0%"]
    assert "random 0" in arms_table([OFF, GAIN, draws[0]])


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
def test_the_interval_of_a_mean_does_not_depend_on_the_unit_or_on_the_order_of_a_sum(scale):
    """Thirds, whose sums round: a mean counts as equal to that of the sample in whatever order it is summed."""
    thirds, whole = (np.array([-1, 0, 1, 2, 0, 0, 3] * 9) / unit for unit in (3, 1))
    found, expected = mean_interval(thirds * scale), mean_interval(whole)
    assert (found.low, found.high) == pytest.approx((expected.low * scale / 3, expected.high * scale / 3), rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 1 / 3, -1e-12])
def test_the_interval_of_equal_values_has_no_width(value):
    found = mean_interval(np.full(9, value))
    assert found.low == found.value == found.high == pytest.approx(value)
