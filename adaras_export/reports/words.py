"""Figures as words: shares in per cent, differences in points, chances with two digits."""

from adaras_export.verdicts import Estimate


def share(value: float) -> str:
    """With one decimal."""
    return f"{value:.1%}"


def chance(value: float) -> str:
    """A p-value."""
    return f"{value:.2g}"


def with_interval(figure: Estimate) -> str:
    """A difference for a cell of a table, in points."""
    return f"{100 * figure.value:+.1f} ({100 * figure.low:+.1f} to {100 * figure.high:+.1f})"


def points(figure: Estimate) -> str:
    """A difference within a sentence."""
    return f"{100 * figure.value:+.1f} points (95 % interval {100 * figure.low:+.1f} to {100 * figure.high:+.1f})"
