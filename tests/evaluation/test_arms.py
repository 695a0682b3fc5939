"""Arms: their intervals and tests against brute force, and their tables."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
