"""The charts of a report, drawn by matplotlib as SVG: intervals in rows, a strip of random draws, curves over k.

The SVG has no script, no font, no id but those of its marks, and the colours of the page, light or dark. Marks differ
in shape as well. The same figures give the same bytes. Knows no evaluation.
"""

import io
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from adaras_export.core.intervals import Estimate
from adaras_export.errors import printable, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS = {"off": "o", "rule": "D", "flipped": "v", "random": "o", "other": "s"}
# Stand-ins, which are replaced by the variables of the page: matplotlib takes no CSS.
_COLOURS = {name: f"#0000f{place}" for place, name in enumerate([*_MARKS, "ink", "soft", "line", "paper"])}
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "adaras-export",  # ids are random without
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold dollars
    "font.size": 9.5,
    "text.color": _COLOURS["ink"],
    "axes.edgecolor": _COLOURS["line"],
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "grid.color": _COLOURS["line"],
    "xtick.color": _COLOURS["soft"],
    "ytick.color": _COLOURS["soft"],
    "ytick.major.size": 0,
}
_WIDTH = 7.2  # inches
_LEAST = 4.0  # points of accuracy that an axis spans
_BINS = 75


@dataclass(frozen=True)
class Row:
    """An estimate with a name, drawn as ``kind``: off, rule, flipped, random or other."""

    name: str
    kind: str
    estimate: Estimate
    note: str


def intervals(rows: Sequence[Row], zero: float, label: str, *, signed: bool) -> str:
    """One row for each estimate, with its interval and a note; a line where nothing would change."""
    ends = [end for row in rows for end in (row.estimate.low, row.estimate.high)]
    with _drawing(0.3 * len(rows) + 0.4) as (figure, axes):
        for place, row in enumerate(rows):
            low, value, high = (100 * share for share in (row.estimate.low, row.estimate.value, row.estimate.high))
            colour = _COLOURS[row.kind]
            axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="round")
            _mark(axes, value, place, row.kind)
            axes.annotate(row.note, (1.02, place), xycoords=("axes fraction", "data"), va="center")
        axes.axvline(100 * zero, color=_COLOURS["off"], linestyle="--", linewidth=1)
        axes.set_yticks(range(len(rows)), [_short(row.name) for row in rows], color=_COLOURS["ink"])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        _share_axis(axes, [*ends, zero], signed=signed)
        return _svg(figure, label)


def strip(draws: Sequence[tuple[str, float]], lines: Sequence[tuple[str, str, float]], label: str) -> str:
    """A dot for each random draw, piled where they are alike; what they are compared with as (name, kind, share)."""
    shares = [share for _, share in draws] + [share for _, _, share in lines]
    step = max(max(shares) - min(shares), _LEAST / 100) / _BINS
    piles: Counter[int] = Counter()
    with _drawing(0.16 * len(draws) ** 0.5 + 0.25 * len(lines) + 0.6) as (figure, axes):
        for _, share in sorted(draws, key=lambda draw: (draw[1], draw[0])):
            _mark(axes, 100 * share, piles[round(share / step)], "random")
            piles[round(share / step)] += 1
        top = max(piles.values()) + 2 * len(lines)
        for place, (name, kind, share) in enumerate(lines):
            height = top - 2 * place
            axes.plot([100 * share] * 2, [-0.5, height], color=_COLOURS[kind], linestyle=":", linewidth=1.4)
            _mark(axes, 100 * share, height, kind)
            _name(axes, 100 * share, height, kind, f"{_short(name)} {share:.1%}")
        axes.set_yticks([])
        axes.set_ylim(-1, top + 1)
        _share_axis(axes, shares, signed=False)
        return _svg(figure, label)


def curves(series: Sequence[tuple[str, str, Sequence[tuple[int, float]]]], label: str) -> str:
    """Shares over whole numbers k, one line for each series (name, kind, points)."""
    with _drawing(2.6) as (figure, axes):
        for name, kind, points in series:
            ks, shares = zip(*points, strict=True)
            axes.plot(ks, [100 * share for share in shares], color=_COLOURS[kind], linewidth=2)
            for k, share in points:
                _mark(axes, k, 100 * share, kind)
            _name(axes, ks[-1], 100 * shares[-1], kind, f"{_short(name)} {shares[-1]:.1%}")
        axes.grid(axis="y")
        axes.set_xticks([k for k in ks if len(ks) <= 8 or k in (1, ks[-1]) or k % 4 == 0])
        axes.xaxis.set_major_formatter(lambda k, _: f"k = {k:g}" if k == 1 else f"{k:g}")
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:g}%")
        return _svg(figure, label)


@contextmanager
def _drawing(height: float) -> Iterator[tuple["Figure", "Axes"]]:
    matplotlib, figures = (require(name, "report", "a chart") for name in ("matplotlib", "matplotlib.figure"))
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The page's fonts have the letters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = figures.Figure(figsize=(_WIDTH, height), layout="constrained", frameon=False)
        axes = figure.add_subplot(frameon=True, facecolor="none")
        yield figure, axes


def _mark(axes: "Axes", x: float, y: float, kind: str) -> None:
    size = 6 if kind == "random" else 7
    axes.plot([x], [y], marker=_MARKS[kind], color=_COLOURS[kind], markersize=size, markeredgecolor=_COLOURS["paper"])


def _name(axes: "Axes", x: float, y: float, kind: str, words: str) -> None:
    colour = _COLOURS["rule" if kind == "rule" else "ink"]
    axes.annotate(words, (x, y), xytext=(8, 0), textcoords="offset points", va="center", color=colour)


def _share_axis(axes: "Axes", shares: Sequence[float], *, signed: bool) -> None:
    """Wide enough for the shares, and not narrower than four points."""
    low, high = 100 * min(shares), 100 * max(shares)
    half = max(0.54 * (high - low), _LEAST / 2)
    axes.set_xlim((low + high) / 2 - half, (low + high) / 2 + half)
    axes.grid(axis="x")
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:+g}" if signed and share else f"{share:g}" + _UNIT[signed])


_UNIT = {False: "%", True: ""}


def _svg(figure: "Figure", label: str) -> str:
    """The SVG element alone, with the label as its text alternative and the page's colours."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    box = re.search(r'viewBox="[\d. -]+"', text)
    assert box
    start = f'<svg {box[0]} role="img" aria-label="{escape(label)}">'
    body = text[text.index(">", box.end()) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[\w.]+"', "<g", body)
    # One property, or two in later versions.
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", re.sub(r"font-family: [^;\"]*; ", "", body))
    for name, colour in _COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    return start + re.sub(r"\n\s*", "\n", body).strip()


def _short(name: str) -> str:
    shown = printable(name)
    return shown if len(shown) <= 18 else f"{shown[:16]}…"
