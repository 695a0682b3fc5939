"""A report as a file: Markdown, a page of HTML, or JSON, as its name says.

The page has no script and fetches nothing; a policy in the page forbids both. It follows the reader's light or dark
setting, prints, and can be read aloud.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from adaras_export.core.intervals import in_points, require_statistics
from adaras_export.errors import ArtifactError, require, visible
from adaras_export.evaluation.record import Evaluation
from adaras_export.evaluation.report import charts
from adaras_export.evaluation.report.document import document, letter, points, share, title_of
from adaras_export.evaluation.report.figures import Result, Transfer, result_of, sentence, transfer_of
from adaras_export.evaluation.report.reading import GateSummary, TuningSummary, read
from adaras_export.files.atomic import replace_file

SUFFIXES = (".html", ".md", ".json")
_VERSION = 1


@dataclass(frozen=True)
class Report:
    """Everything that a report says, in figures."""

    results: tuple[Result, ...]
    transfer: Transfer | None
    summaries: tuple[TuningSummary | GateSummary, ...]

    def as_record(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "version": _VERSION,
            "evaluations": [result.as_record() for result in self.results],
            **({} if self.transfer is None else {"transfer": self.transfer.as_record()}),
            "made": [vars(summary) for summary in self.summaries],
        }

    def lines(self) -> list[str]:
        """A line for every evaluation."""
        return [f"{result.file}, {result.primary.name}: {sentence(result)}" for result in self.results]

    def markdown(self) -> str:
        """The text, without charts: their numbers are in its tables."""
        return document(self.results, self.transfer, self.summaries)

    def page(self) -> str:
        """The text and the charts as one page of HTML.

        Raises:
            MissingExtraError: matplotlib or markdown-it-py is not installed.
        """
        svgs: dict[str, str] = {}

        def draw(kind: str, subject: Any) -> str:  # noqa: ANN401 - a result or a transfer
            address = f"chart:{len(svgs)}"
            svgs[address] = _CHARTS[kind](subject)
            return address

        body = html(document(self.results, self.transfer, self.summaries, draw), svgs)
        loader = PackageLoader("adaras_export", "evaluation/report/templates")
        environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
        style = loader.get_source(environment, "page.css")[0]
        whole = environment.get_template("page.html").render(
            title=title_of(self.results), style=Markup(style), body=Markup(body)
        )
        return "\n".join(map(visible, whole.split("\n"))) + "\n"  # names stand in attributes of charts, too


def report(files: Sequence[str | Path], out: str | Path | None = None) -> Report:
    """What evaluations show, on one page; of several, rules across question sets.

    Args:
        files: JSON files of evaluations; also what `adaras-export tune` and `gate` print with ``--json``, which tell
            how the rule was made.
        out: file to write: a page (.html), a text (.md) or data (.json).

    Returns:
        all figures of the report; its ``markdown()`` and ``page()`` are the texts.

    Raises:
        ArtifactError: a file cannot be read, none is an evaluation, two are of the same rule and questions, or ``out``
            names no format or cannot be written.
        MissingExtraError: SciPy is not installed; or for a page, matplotlib or markdown-it-py.

    Example:
        evaluate(model, tokenizer, rule, task, out="evaluation.json")
        made = report(["evaluation.json"], "report.html")
        print(*made.lines())
    """
    place = None if out is None else Path(out)
    if place is not None:
        require_format(place)  # before the work, not after it
    made = report_of([Path(file) for file in files])
    if place is not None:
        write(made, place)
    return made


def report_of(paths: Sequence[Path]) -> Report:
    """The report of these files.

    Raises:
        ArtifactError: a file cannot be read, none is an evaluation, or two are of the same rule and questions.
        MissingExtraError: SciPy is not installed.
    """
    require_statistics()
    results, summaries = [], []
    for path in paths:
        source = read(path)
        if isinstance(source, Evaluation):
            results.append(result_of(path.name, source))
        else:
            summaries.append(source)
    if not results:
        raise ArtifactError(f"{', '.join(map(str, paths))}: no evaluation; expected a file of adaras-export eval")
    return Report(tuple(results), transfer_of(results) if len(results) > 1 else None, tuple(summaries))


def require_format(path: Path) -> None:
    """Refuse a file name that ends with none of the formats.

    Raises:
        ArtifactError: it ends with none.
    """
    if path.suffix not in SUFFIXES:
        raise ArtifactError(
            f"{path}: names no format of a report; expected a name that ends with {', '.join(SUFFIXES)}"
        )


def write(report: Report, path: Path) -> None:
    """Write the format that the file name ends with; see `require_format`.

    Raises:
        ArtifactError: the file cannot be written.
        MissingExtraError: a page is to be written, and matplotlib or markdown-it-py is not installed.
    """
    if path.suffix == ".json":
        text = json.dumps(report.as_record(), indent=1, sort_keys=True, allow_nan=False) + "\n"
    else:
        text = report.markdown() if path.suffix == ".md" else report.page()
    replace_file(path, text.encode())


def _transfer_chart(transfer: Transfer) -> str:
    rows = [
        charts.Row(
            f"{rule[:12]} {letter(place)}",
            "rule" if cell.is_significant else "off",
            cell.change,
            in_points(cell.change.value) + (" ◆" if cell.own else ""),
        )
        for rule, cells in zip(transfer.rules, transfer.cells, strict=True)
        for place, cell in enumerate(cells)
        if cell is not None
    ]
    values = "; ".join(f"{row.name} {points(row.estimate)}" for row in rows)
    return charts.intervals(rows, 0.0, f"Points against no steering: {values}.", signed=True)


def _arms_chart(result: Result) -> str:
    rows = [
        charts.Row(arm.name, arm.role, arm.accuracy, share(arm.accuracy.value))
        for arm in result.arms
        if arm.role != "random"
    ]
    values = "; ".join(f"{row.name[:20]} {row.note}" for row in rows)
    off = result.judgement.off.accuracy
    return charts.intervals(rows, off, f"Accuracy with 95 % intervals: {values}.", signed=False)


def _draws_chart(result: Result) -> str:
    draws = [(arm.name, arm.accuracy.value) for arm in result.random]
    compared = [arm for arm in result.arms if arm.name in ("off", result.primary.name, "flipped")]
    lines = [(arm.name, arm.role, arm.accuracy.value) for arm in compared]
    lowest, highest = (share(end(accuracy for _, accuracy in draws)) for end in (min, max))
    values = ", ".join(f"{name} {share(accuracy)}" for name, _, accuracy in lines)
    label = f"Accuracy of {len(draws)} random draws, {lowest} to {highest}, beside {values}."
    return charts.strip(draws, lines, label)


def _passes_chart(result: Result) -> str:
    name = result.primary.name
    series = [
        ("off", "off", [(k, off.value) for k, off, _ in result.passes]),
        (name, "rule", [(k, primary.value) for k, _, primary in result.passes]),
    ]
    k, off, primary = result.passes[-1]
    label = f"pass@k from k = 1 to {k}: off reaches {share(off.value)}, {name} {share(primary.value)}."
    return charts.curves(series, label)


_CHARTS: dict[str, Callable[[Any], str]] = {
    "transfer": _transfer_chart,
    "arms": _arms_chart,
    "draws": _draws_chart,
    "passes": _passes_chart,
}


def html(markdown: str, svgs: Mapping[str, str]) -> str:
    """Our Markdown as HTML, with charts where it refers to them by their address.

    Only the marks that reports use are known: nothing becomes HTML, a link or an image, even if an escape is forgotten.

    Raises:
        MissingExtraError: markdown-it-py is not installed.
    """
    parser = require("markdown_it", "report", "a page of HTML").MarkdownIt("zero", {"html": False}).enable(_KNOWN_MARKS)
    parser.add_render_rule("image", lambda _, tokens, place, *__: svgs.get(tokens[place].attrs["src"], ""))
    parser.add_render_rule("table_open", _table_open)
    parser.add_render_rule("table_close", lambda *_: "</table>\n</div>\n")
    tokens = parser.parse(markdown)
    _dress(tokens)
    text: str = parser.renderer.render(tokens, parser.options, {})
    return text


_KNOWN_MARKS = ["table", "blockquote", "list", "heading", "escape", "backticks", "emphasis", "image", "balance_pairs"]
_TONES = {"**Gain shown": "good", "**Harm shown": "bad", "▲": "good", "▼": "bad"}


def _dress(tokens: Sequence[Any]) -> None:
    """Give tables the heading above them as a caption, charts a figure, and quoted sentences a tone."""
    caption = ""
    for before, token, inner, after in zip([None, *tokens], tokens, tokens[1:], tokens[2:], strict=False):
        if token.type == "heading_open":
            caption = "".join(part.content for part in inner.children)
        elif token.type == "table_open":
            token.meta["caption"] = caption
        elif token.type in ("th_open", "td_open"):
            _dress_cell(token, inner, after, names_row=before.type == "tr_open")
        elif token.type == "paragraph_open" and inner.content.startswith("![]"):
            token.tag = after.tag = "figure"
        elif token.type == "blockquote_open":
            token.attrs["class"] = _tone(after) or "quiet"


def _dress_cell(token: Any, inner: Any, after: Any, *, names_row: bool) -> None:  # noqa: ANN401 - markdown-it's tokens
    """Row heads and classes; a class takes the place of the style."""
    classes = "number" if token.attrs.pop("style", None) else ""
    if token.type == "th_open" or names_row:
        token.tag = after.tag = "th"
        token.attrs["scope"] = "col" if token.type == "th_open" else "row"
    if classes := f"{classes} {_tone(inner)}".strip():
        token.attrs["class"] = classes


def _tone(inner: Any) -> str:  # noqa: ANN401 - a token of markdown-it
    return next((tone for start, tone in _TONES.items() if inner.content.startswith(start)), "")


def _table_open(renderer: Any, tokens: Sequence[Any], place: int, options: Any, environment: Any) -> str:  # noqa: ANN401
    """A wide table scrolls by itself, also with the keyboard."""
    caption = escape(tokens[place].meta["caption"])
    start = renderer.renderToken(tokens, place, options, environment)
    region = f'<div class="table" tabindex="0" role="region" aria-label="{caption}">'
    return f"{region}\n{start}<caption>{caption}</caption>\n"
