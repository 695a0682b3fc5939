"""Figures as words: shares in per cent, differences in points, chances with two digits."""

from adaras_export.core.intervals import Estimate, in_points


def share(value: float) -> str:
    """With one decimal."""
    return f"{value:.1%}"


def chance(value: float) -> str:
    """A p-value."""
    return f"{value:.2g}"


def with_interval(figure: Estimate) -> str:
    """A difference for a cell of a table, in points."""
    return f"{in_points(figure.value)} ({in_points(figure.low)} to {in_points(figure.high)})"


def points(figure: Estimate) -> str:
    """A difference within a sentence."""
    return f"{in_points(figure.value)} points (95 % interval {in_points(figure.low)} to {in_points(figure.high)})"
