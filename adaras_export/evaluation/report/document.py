"""The document of a report: figures put into the templates, as Markdown. Claims nothing that `conclusions` does not.

The templates escape every value except the Markdown that functions here return. Knows no HTML.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from adaras_export.core.intervals import Estimate, in_points
from adaras_export.core.markdown import Markdown, code, render
from adaras_export.errors import printable
from adaras_export.evaluation.claims import ENOUGH_DRAWS, LEVEL, Outcome
from adaras_export.evaluation.report.figures import (
    ArmResult,
    Result,
    Transfer,
    TransferCell,
    about,
    given_name,
    sentence,
)
from adaras_export.evaluation.report.reading import GateSummary, TuningSummary

_LABELS: dict[Outcome, str] = {
    "gain": "Gain shown",
    "harm": "Harm shown",
    "unchanged": "No effect shown",
    "uncontrolled": "More right, but no claim: controls are missing",
    "flipped": "More right, but no claim: the flipped sign does as well",
    "controls": "More right, but no claim: random neurons do as well",
    "few draws": "More right, but no claim: too few random draws",
}
_LONGEST = 80


Draw = Callable[[str, Any], str]
"""Draws the chart of that kind (transfer, arms, draws, passes) for a result or a transfer, and gives its address."""


def title_of(results: Sequence[Result]) -> str:
    """The title of a report."""
    return "Evaluation of a steering rule" if len(results) == 1 else "Steering rules across questions"


def document(
    results: Sequence[Result],
    transfer: Transfer | None,
    summaries: Sequence[TuningSummary | GateSummary],
    draw: Draw | None = None,
) -> str:
    """The report as Markdown, in the order in which a reader doubts it.

    Args:
        results: one evaluation each.
        transfer: rules across question sets, for several evaluations.
        summaries: how rules and gates were made.
        draw: draws the charts, which are left out by default: their numbers are in the tables.
    """

    def chart(kind: str, subject: Result | Transfer) -> Markdown:
        return Markdown("" if draw is None else f"![]({draw(kind, subject)})")

    values = {
        "title": title_of(results),
        "results": results,
        "transfer": transfer,
        "tunings": [summary for summary in summaries if isinstance(summary, TuningSummary)],
        "gates": [summary for summary in summaries if isinstance(summary, GateSummary)],
        "several": any(result.evaluation.samples > 1 for result in results),
        "heading": Markdown("##" if transfer is None else "###"),
        "level": LEVEL,
        "enough_draws": ENOUGH_DRAWS,
        "tables": _Tables(),
        "chart": chart,
        "zip": zip,
        **{function.__name__: function for function in (name, names, label, sentence, letter, points, chance)},
    }
    text = render("evaluation/report/templates/report.md", values)
    paragraphs = (paragraph.strip("\n") for paragraph in text.split("\n\n"))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def shortened(text: str) -> str:
    """A name or a hash on one line, with what cannot be seen escaped, and cut in the middle where it is long."""
    shown = printable(text)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST // 2]}…{shown[-_LONGEST // 2 :]}"


def name(text: str) -> Markdown:
    """A name of somebody else's, as a span of code."""
    return code(shortened(text))


def names(texts: Iterable[str]) -> Markdown:
    """Names one after the other."""
    return Markdown(", ".join(map(name, texts)))


def share(value: float) -> str:
    """A share in per cent, with one decimal."""
    return f"{value:.1%}"


def chance(value: float) -> str:
    """A p-value, with two digits."""
    return f"{value:.2g}"


def points(figure: Estimate) -> Markdown:
    """A difference within a sentence."""
    low, high = in_points(figure.low), in_points(figure.high)
    return Markdown(f"{in_points(figure.value)} points (95 % interval {low} to {high})")


def label(result: Result) -> str:
    """What is shown, in a few words."""
    return "No test" if result.evaluation.seen else _LABELS[result.judgement.outcome]


def letter(place: int) -> str:
    """A, B, ... Z, A1, B1, ... for the question sets of the chart."""
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[place % 26] + (str(place // 26) if place >= 26 else "")


class _Tables:
    """The tables of a report; cells are Markdown already."""

    def compared(self, result: Result) -> Markdown:
        evaluation = result.evaluation
        named = f" of {name(given_name(evaluation))}" if given_name(evaluation) else ""
        rows = [
            ("rule", name(evaluation.rule)),
            (
                "questions",
                f"{evaluation.questions}{named}, digest of their ids {evaluation.questions_digest[:12]}",
            ),
            ("of these, used to make the rule", str(evaluation.seen or "none")),
            ("answers to each question", f"{evaluation.samples}{', averaged' if evaluation.samples > 1 else ''}"),
            ("questions that the gate steers", share(evaluation.steered_share)),
            *((key, name(words)) for key, words in about(evaluation).items()),
            ("file", name(result.file)),
        ]
        return _table(("what", "value"), rows, edge="---")

    def arms(self, result: Result) -> Markdown:
        tests = (_AGAINST_OFF, "fixed", "broken", "p", "p, Holm")
        heads = ("arm", "accuracy (95 %)", *tests, "tokens", "cut off", "seconds")
        rows = [
            (
                *(name(arm.name), _accuracy(arm.accuracy), *_against_off(arm)),
                "" if arm.adjusted is None else chance(arm.adjusted),
                *(f"{arm.tokens:.1f}", share(arm.cut), "" if arm.seconds is None else f"{arm.seconds:.3g}"),
            )
            for arm in result.arms
            if arm.role != "random"
        ]
        return _table(heads, rows)

    def draws(self, result: Result) -> Markdown:
        rows = [(name(arm.name), share(arm.accuracy.value), *_against_off(arm)) for arm in result.random]
        return _table(("draw", "accuracy", _AGAINST_OFF, "fixed", "broken", "p"), rows)

    def passes(self, result: Result) -> Markdown:
        rows = [(str(k), _accuracy(off), _accuracy(primary)) for k, off, primary in result.passes]
        return _table(("k", "off (95 %)", f"{result.primary.name} (95 %)"), rows)

    def transfer(self, transfer: Transfer) -> Markdown:
        rows = [
            (name(rule[:12]), *map(_transfer_cell, cells))
            for rule, cells in zip(transfer.rules, transfer.cells, strict=True)
        ]
        return _table(("rule", *map(name, transfer.sets)), rows)

    def settings(self, tuning: TuningSummary) -> Markdown:
        rows = [(name(setting), str(count), share(right)) for setting, count, right in tuning.settings]
        return _table(("setting", "questions", "accuracy"), rows)

    def gate(self, gate: GateSummary) -> Markdown:
        rows = [(name(key), name(value)) for key, value in gate.figures.items()]
        return _table(("what", "value"), rows, edge="---")


_AGAINST_OFF = "points against off (95 %)"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], edge: str = "---:") -> Markdown:
    """The first column names the row; columns of numbers stand on their right edge."""
    lines = [f"| {' | '.join(row)} |" for row in (heads, *rows)]
    return Markdown("\n".join([lines[0], f"|{'|'.join(['---', *[edge] * (len(heads) - 1)])}|", *lines[1:]]))


def _accuracy(figure: Estimate) -> str:
    return f"{share(figure.value)} ({100 * figure.low:.1f} to {100 * figure.high:.1f})"


def _against_off(arm: ArmResult) -> tuple[str, str, str, str]:
    if arm.change is None:
        return ("",) * 4
    return _with_interval(arm.change), str(arm.fixed), str(arm.broken), chance(arm.p_value)


def _with_interval(figure: Estimate) -> str:
    return f"{in_points(figure.value)} ({in_points(figure.low)} to {in_points(figure.high)})"


def _transfer_cell(evaluated: TransferCell | None) -> str:
    if evaluated is None:
        return "not evaluated"
    figures = _with_interval(evaluated.change) + (" ◆" if evaluated.own else "")
    if seen := evaluated.result.evaluation.seen:
        return f"{figures}, no test: {seen} seen"
    mark = ("▲ " if evaluated.change.value > 0 else "▼ ") if evaluated.is_significant else ""
    return f"{mark}{figures}, p = {chance(evaluated.adjusted)}"
