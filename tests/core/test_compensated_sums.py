"""Sums that do not depend on the order, against fractions."""

from fractions import Fraction
from functools import reduce

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from adaras_export.core import compensated_sums

# What sums of activations, of their squares, and of differences of classes are made of.
NUMBERS = st.one_of(st.floats(-1e9, 1e9), st.floats(-1e-3, 1e-3), st.sampled_from([0.0, -0.0, 1e-19, 2.0**-61]))


def pair(number):
    """An addend as `exact.add` takes it."""
    return compensated_sums.on_grid(np.array([number])), np.zeros(1)


def total(numbers):
    return reduce(compensated_sums.add, map(pair, numbers))


def bits(found):
    return [part.tobytes() for part in found]


@given(st.lists(NUMBERS, min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_a_sum_has_the_same_bits_in_any_order_and_grouping(numbers, random):
    shuffled = random.sample(numbers, len(numbers))
    cut = random.randrange(len(numbers))
    grouped = [total(part) for part in (shuffled[:cut], shuffled[cut:]) if part]
    assert bits(total(numbers)) == bits(total(shuffled)) == bits(reduce(compensated_sums.add, grouped))


@given(st.lists(NUMBERS, min_size=1, max_size=30))
def test_a_sum_is_exact_but_for_the_grid(numbers):
    nearest, rest = total(numbers)
    found = Fraction(float(nearest[0])) + Fraction(float(rest[0]))
    assert found == sum(Fraction(float(pair(number)[0][0])) for number in numbers)
    assert abs(found - sum(map(Fraction, numbers))) <= len(numbers) * Fraction(1, 2**61)
    assert float(found) == nearest[0]  # the nearest float64


@given(st.lists(NUMBERS, min_size=1, max_size=9))
def test_what_was_added_can_be_taken_away_again(numbers):
    one, all_ = total(numbers[:1]), total(numbers)
    back = compensated_sums.add(all_, (-one[0], -one[1]))
    others = total([0.0, *numbers[1:]])
    assert [part.tolist() for part in back] == [part.tolist() for part in others]
