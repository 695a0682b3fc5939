"""Rules across question sets, in words: a matrix of differences, each with its interval, and a chart of the same.

Knows no single evaluation's arms but the one that is judged.
"""

from adaras_export.core.intervals import in_points
from adaras_export.evaluation.claims import LEVEL
from adaras_export.evaluation.report import charts
from adaras_export.evaluation.report.blocks import (
    Block,
    Cell,
    Chart,
    Code,
    Heading,
    Items,
    Paragraph,
    Span,
    Table,
    Tone,
)
from adaras_export.evaluation.report.figures import Cell as Figure
from adaras_export.evaluation.report.figures import Transfer
from adaras_export.evaluation.report.words import chance, points, with_interval

_STEPS = (0.02, 0.1)
_HASH = 12


def across(transfer: Transfer) -> list[Block]:
    """What stands above the single evaluations."""
    count = sum(cell is not None for row in transfer.cells for cell in row)
    missing = len(transfer.rules) * len(transfer.sets) - count
    gaps = f" {missing} of {len(transfer.rules) * len(transfer.sets)} cells were not evaluated." if missing else ""
    return [
        Heading(2, ("Rules across question sets",)),
        Paragraph(
            (
                "Points of accuracy against no steering on the same questions, with 95 % intervals, of each rule run "
                f"as its controls are. p is Holm-adjusted for the {count} evaluations; a cell is coloured where it is "
                "below 0.05, which is no claim without the controls below. ◆ marks questions of the set that the rule "
                f"was made with.{gaps}",
            )
        ),
        _matrix(transfer),
        _chart(transfer),
        Items(tuple(_legend(transfer))),
    ]


def _matrix(transfer: Transfer) -> Table:
    heads: tuple[Span, ...] = ("rule", *(Code(name) for name in transfer.sets))
    rows = tuple(
        (Cell.of(Code(rule[:_HASH])), *(_cell(cell) for cell in row))
        for rule, row in zip(transfer.rules, transfer.cells, strict=True)
    )
    return Table("Rules across question sets", heads, rows)


def _cell(cell: Figure | None) -> Cell:
    if cell is None:
        return Cell.of("not evaluated", tone="quiet")
    mark = " ◆" if cell.own else ""
    if seen := cell.result.recorded.seen:
        return Cell(((f"{with_interval(cell.change)}{mark}",), (f"no test: {seen} seen",)), "quiet")
    lines = (f"{with_interval(cell.change)}{mark}",), (f"p = {chance(cell.adjusted)}",)
    return Cell(lines, _tone(cell))


def _tone(cell: Figure) -> Tone:
    if cell.adjusted >= LEVEL:
        return "plain"
    size = 1 + sum(abs(cell.change.value) >= step for step in _STEPS)
    tones: dict[bool, tuple[Tone, Tone, Tone]] = {
        True: ("good-1", "good-2", "good-3"),
        False: ("bad-1", "bad-2", "bad-3"),
    }
    return tones[cell.change.value > 0][size - 1]


def _chart(transfer: Transfer) -> Chart:
    rows = [
        charts.Row(f"{rule[:_HASH]} {letter}", "rule" if cell.adjusted < LEVEL else "off", cell.change, _note(cell))
        for rule, row in zip(transfer.rules, transfer.cells, strict=True)
        for letter, cell in zip(map(_letter, range(len(row))), row, strict=True)
        if cell is not None
    ]
    told = "; ".join(f"{row.name} {points(row.estimate)}" for row in rows)
    return charts.intervals(rows, 0.0, f"Points against no steering: {told}.", signed=True)


def _note(cell: Figure) -> str:
    return in_points(cell.change.value) + (" ◆" if cell.own else "")


def _letter(place: int) -> str:
    """A, B, ... Z, A1, B1, ... for the question sets of the chart."""
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[place % 26] + (str(place // 26) if place >= 26 else "")


def _legend(transfer: Transfer) -> list[tuple[Span, ...]]:
    """Question sets by their letters in the chart, then the files of every rule."""
    found: list[tuple[Span, ...]] = [(f"{_letter(place)}: ", Code(name)) for place, name in enumerate(transfer.sets)]
    for rule, row in zip(transfer.rules, transfer.cells, strict=True):
        files = [part for cell in row if cell is not None for part in (", ", Code(cell.result.recorded.file))]
        found.append((Code(rule[:_HASH]), ": ", *files[1:]))
    return found
