"""Small drawings as SVG: intervals in rows, a strip of random draws, curves over k. No script, no font, no colour.

Colours and letters are the page's: elements have classes. Marks differ in shape as well. The same figures give the
same bytes. Knows no evaluation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from adaras_export.core.intervals import Estimate
from adaras_export.evaluation.report.blocks import Chart, Code

_WIDTH = 720
_ROW = 30
_TICKS = 6
_NARROWEST = 0.04


@dataclass(frozen=True)
class Row:
    """An estimate with a name, drawn as ``kind``: off, rule, flipped, random or other."""

    name: str
    kind: str
    estimate: Estimate
    note: str


@dataclass(frozen=True)
class _Axis:
    """Shares on a horizontal line."""

    low: float
    high: float
    left: float
    right: float

    def at(self, share: float) -> float:
        """Where a share stands."""
        return round(self.left + (share - self.low) / (self.high - self.low) * (self.right - self.left), 1)

    def ticks(self) -> list[float]:
        """Round figures, some six of them."""
        step = _step(self.high - self.low)
        return [round(index * step, 6) for index in range(math.ceil(self.low / step - 1e-9), _count(self.high, step))]


def _step(span: float) -> float:
    """A step of 1, 2 or 5 that divides a range into about six."""
    power: float = 10 ** math.floor(math.log10(span / _TICKS))
    return next(power * one for one in (1, 2, 5, 10) if power * one * _TICKS >= span - 1e-9)


def _count(high: float, step: float) -> int:
    return math.floor(high / step + 1e-9) + 1


def _axis(values: Sequence[float], left: float, right: float, *, lowest: float = 0.0) -> _Axis:
    """Wide enough for the values with some air, not narrower than four points, and from ``lowest`` to 1 at most."""
    low, high = min(values), max(values)
    middle, half = (low + high) / 2, max((high - low) * 0.54, _NARROWEST / 2)
    return _Axis(max(middle - half, lowest), min(middle + half, 1.0), left, right)


def intervals(rows: Sequence[Row], zero: float | None, label: str, *, signed: bool) -> Chart:
    """One row an estimate: a mark with its interval and a note on the right; a line where nothing would change."""
    ends = [end for row in rows for end in (row.estimate.low, row.estimate.high)]
    axis = _axis([*ends, *([] if zero is None else [zero])], 132, _WIDTH - 118, lowest=-1.0 if signed else 0.0)
    bottom = _ROW * len(rows) + 8
    parts = _scale(axis, 8, bottom, signed=signed)
    if zero is not None:
        parts.append(_line(axis.at(zero), 4, axis.at(zero), bottom, "zero"))
    for place, row in enumerate(rows):
        y = 8 + _ROW * place + _ROW / 2
        low, mid, high = (axis.at(one) for one in (row.estimate.low, row.estimate.value, row.estimate.high))
        parts += [
            _text(122, y + 4, _short(row.name), "end", "name"),
            _line(low, y, high, y, f"whisker {row.kind}"),
            _mark(row.kind, mid, y, f"{row.name}: {row.note}"),
            _text(_WIDTH - 110, y + 4, row.note, "start", "note"),
        ]
    return _chart(parts, bottom + 26, label)


def strip(draws: Sequence[tuple[str, float]], lines: Sequence[tuple[str, str, float]], label: str) -> Chart:
    """A dot a random draw, piled where they are alike; what they are compared with as (name, kind, share)."""
    values = [share for _, share in draws] + [share for _, _, share in lines]
    axis = _axis(values, 24, _WIDTH - 24)
    pile: dict[int, int] = {}
    dots = []
    for name, share in sorted(draws, key=lambda one: (one[1], one[0])):
        column = round(axis.at(share) / 9)
        pile[column] = pile.get(column, 0) + 1
        dots.append((axis.at(share), pile[column] - 1, f"{name}: {share:.1%}"))
    top = 20 * len(lines) + 8
    bottom = top + 12 + 10 * max(pile.values(), default=1) + 10
    parts = _scale(axis, top, bottom, signed=False)
    for place, (name, kind, share) in enumerate(lines):
        x, y = axis.at(share), 14 + 20 * place
        side = "end" if x > _WIDTH * 0.6 else "start"
        parts += [
            _line(x, y, x, bottom, f"drop {kind}"),
            _mark(kind, x, y, f"{name}: {share:.1%}"),
            _text(x + (-10 if side == "end" else 10), y + 4, f"{_short(name)} {share:.1%}", side, f"name {kind}"),
        ]
    parts += [_mark("random", x, bottom - 8 - 10 * height, title) for x, height, title in dots]
    return _chart(parts, bottom + 26, label)


def curves(series: Sequence[tuple[str, str, Sequence[tuple[int, float]]]], label: str) -> Chart:
    """Shares over whole numbers k, one line each (name, kind, points)."""
    left, right, top, bottom = 52, _WIDTH - 120, 12, 232
    most = max(k for _, _, points in series for k, _ in points)
    axis = _axis([share for _, _, points in series for _, share in points], bottom, top)

    def x_of(k: int) -> float:
        return round(left + (k - 1) / max(most - 1, 1) * (right - left), 1)

    parts = []
    for tick in axis.ticks():
        parts += [_line(left, axis.at(tick), right, axis.at(tick), "grid")]
        parts += [_text(left - 8, axis.at(tick) + 4, f"{tick:.0%}", "end", "tick")]
    ks = [k for k, _ in series[0][2]]
    shown = ks if len(ks) <= 8 else [k for k in ks if k == 1 or k == most or k % 4 == 0]
    parts += [_text(x_of(k), bottom + 18, f"k = {k}" if k == 1 else str(k), "middle", "tick") for k in shown]
    parts += _named_lines(series, axis, x_of)
    return _chart(parts, bottom + 28, label)


def _named_lines(
    series: Sequence[tuple[str, str, Sequence[tuple[int, float]]]], axis: _Axis, x_of: Callable[[int], float]
) -> list[str]:
    """The lines, with names at their right ends that keep clear of each other."""
    parts, taken = [], -math.inf
    for name, kind, points in sorted(series, key=lambda one: -one[2][-1][1]):
        places = [(x_of(k), axis.at(share), f"{name}, k = {k}: {share:.1%}") for k, share in points]
        path = " ".join(f"{x:g},{y:g}" for x, y, _ in places)
        parts.append(f'<polyline class="curve {kind}" points="{path}"/>')
        parts += [_mark(kind, x, y, title) for x, y, title in places]
        taken = max(places[-1][1] + 4, taken + 15)
        parts.append(_text(places[-1][0] + 12, taken, f"{_short(name)} {points[-1][1]:.1%}", "start", f"name {kind}"))
    return parts


def _scale(axis: _Axis, top: float, bottom: float, *, signed: bool) -> list[str]:
    parts = []
    step = _step(axis.high - axis.low)
    digits = 0 if step >= 0.0099 else 1
    for tick in axis.ticks():
        words = f"{100 * tick:+.{digits}f}" if signed and tick else f"{100 * tick:.{digits}f}"
        parts.append(_line(axis.at(tick), top, axis.at(tick), bottom, "grid"))
        parts.append(_text(axis.at(tick), bottom + 18, words + ("" if signed else "%"), "middle", "tick"))
    return parts


def _mark(kind: str, x: float, y: float, title: str) -> str:
    """A shape of its own for every kind: circle, diamond, triangle, small ring, square."""
    shapes = {
        "off": f'<circle cx="{x:g}" cy="{y:g}" r="5" class="mark off">',
        "rule": f'<path d="M{x:g} {y - 7:g}l7 7-7 7-7-7z" class="mark rule">',
        "flipped": f'<path d="M{x:g} {y + 6:g}l-6.5-11h13z" class="mark flipped">',
        "random": f'<circle cx="{x:g}" cy="{y:g}" r="4" class="mark random">',
    }
    other = f'<path d="M{x - 5:g} {y - 5:g}h10v10h-10z" class="mark other">'
    start = shapes.get(kind, other)
    return f"{start}<title>{escape(Code(title).shown)}</title></{start[1:].partition(' ')[0]}>"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{kind}"/>'


def _text(x: float, y: float, words: str, anchor: str, kind: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def _short(name: str) -> str:
    seen = Code(name).shown
    return seen if len(seen) <= 18 else f"{seen[:16]}…"


def _chart(parts: Sequence[str], height: float, label: str) -> Chart:
    start = f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(label)}">'
    return Chart("\n".join([start, *parts, "</svg>"]), label)
