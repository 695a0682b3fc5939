"""Blocks as one page of HTML: no script, nothing fetched, light and dark, fit for print and for reading aloud.

Knows no evaluation. Everything that is not of this file is escaped, and a policy in the page forbids the rest.
"""

from collections.abc import Sequence
from functools import singledispatch
from html import escape
from importlib.resources import files

from adaras_export.errors import visible
from adaras_export.evaluation.report.blocks import (
    Beside,
    Block,
    Cell,
    Chart,
    Code,
    Heading,
    Items,
    Paragraph,
    Report,
    Span,
    Strong,
    Table,
    Verdict,
)


def page(report: Report) -> str:
    """The whole page."""
    style = files("adaras_export.evaluation.report").joinpath("page.css").read_text()
    body = "\n".join(_block(block) for block in report.blocks)
    whole = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(report.title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{escape(report.title)}</h1>
{body}
</main>
</body>
</html>
"""
    return "\n".join(map(visible, whole.split("\n")))  # foreign names stand in attributes, too


@singledispatch
def _block(block: Block) -> str:
    raise TypeError(type(block).__name__)


@_block.register
def _(block: Heading) -> str:
    return f"<h{block.level}>{_inline(block.spans)}</h{block.level}>"


@_block.register
def _(block: Paragraph) -> str:
    return f"<p>{_inline(block.spans)}</p>"


@_block.register
def _(block: Items) -> str:
    return "\n".join(["<ul>", *(f"<li>{_inline(spans)}</li>" for spans in block.items), "</ul>"])


@_block.register
def _(block: Verdict) -> str:
    label = f"<strong>{escape(block.label)}</strong>"
    return f'<div class="verdict {block.tone}" role="note">{label}<p>{_inline(block.spans)}</p></div>'


@_block.register
def _(block: Table) -> str:
    kind = "numbers" if block.numeric else "words"
    heads = "".join(f'<th scope="col">{_span(head)}</th>' for head in block.heads)
    rows = "\n".join(f"<tr>{_first(row[0])}{''.join(map(_cell, row[1:]))}</tr>" for row in block.rows)
    # A wide table scrolls by itself, also with the keyboard.
    return f"""<div class="table" tabindex="0" role="region" aria-label="{escape(block.caption)}">
<table class="{kind}">
<caption>{escape(block.caption)}</caption>
<thead><tr>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>"""


@_block.register
def _(block: Chart) -> str:
    return f"<figure>\n{block.svg}\n</figure>"


@_block.register
def _(block: Beside) -> str:
    return f"{_block(block.chart)}\n{_block(block.table)}"


def _first(one: Cell) -> str:
    return f'<th scope="row"{_tone(one)}>{_lines(one)}</th>'


def _cell(one: Cell) -> str:
    return f"<td{_tone(one)}>{_lines(one)}</td>"


def _tone(one: Cell) -> str:
    return "" if one.tone == "plain" else f' class="{one.tone}"'


def _lines(one: Cell) -> str:
    return "<br>".join(map(_inline, one.lines))


def _inline(spans: Sequence[Span]) -> str:
    return "".join(map(_span, spans))


def _span(span: Span) -> str:
    if isinstance(span, Code):
        return f"<code>{escape(span.shown)}</code>"
    return f"<strong>{escape(span.text)}</strong>" if isinstance(span, Strong) else escape(span)
