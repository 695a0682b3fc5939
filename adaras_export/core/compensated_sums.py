"""Sums of float64 arrays whose bits do not depend on the order and grouping of the additions.

Every addend is rounded once, to a multiple of 2^-60 (9e-19). A sum of such multiples is a pair: the nearest float64,
and the rest. The pair is exact as long as sums stay below 2^40 (1e12).
"""

import numpy as np

from adaras_export.files.safetensors_record import Array

_STEPS = 2.0**60


def on_grid(values: Array) -> Array:
    """Round to the nearest multiples of 2^-60; a float64 of 2^-8 or more is already one."""
    small = np.abs(values) < 2.0**-8
    rounded = np.round(np.where(small, values, 0.0) * _STEPS) / _STEPS
    return np.where(small, rounded, values) + 0.0  # turns -0.0 into 0.0, which has other bytes


def add(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    """The sum of two (nearest, rest) pairs, as such a pair."""
    total, error = _two_sum(one[0], other[0])
    return _two_sum(total, error + (one[1] + other[1]))


def _two_sum(one: Array, other: Array) -> tuple[Array, Array]:
    """The float64 sum and its rounding error (Knuth)."""
    total = one + other
    second = total - one
    return total + 0.0, (one - (total - second)) + (other - second) + 0.0
