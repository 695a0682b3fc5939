"""Blocks as Markdown, for READMEs and papers: everything but the drawings, whose numbers stand in tables.

Knows no evaluation. Names stay what they are, whatever they contain.
"""

from collections.abc import Sequence
from functools import singledispatch

from adaras_export.core.markdown import code, plain
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


def markdown(report: Report) -> str:
    """The whole text."""
    parts = [f"# {plain(report.title)}", *(_block(block) for block in report.blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


@singledispatch
def _block(block: Block) -> str:
    raise TypeError(type(block).__name__)


@_block.register
def _(block: Heading) -> str:
    return f"{'#' * block.level} {_inline(block.spans)}"


@_block.register
def _(block: Paragraph) -> str:
    return _inline(block.spans)


@_block.register
def _(block: Items) -> str:
    return "\n".join(f"* {_inline(spans)}" for spans in block.items)


@_block.register
def _(block: Verdict) -> str:
    return f"> **{plain(block.label)}.** {_inline(block.spans)}"


@_block.register
def _(block: Table) -> str:
    edge = "---:" if block.numeric else "---"
    heads = " | ".join(map(_span, block.heads))
    rule = "|".join(["---", *[edge] * (len(block.heads) - 1)])
    rows = [f"| {' | '.join(map(_cell, row))} |" for row in block.rows]
    return "\n".join([f"| {heads} |", f"|{rule}|", *rows])


@_block.register
def _(block: Chart) -> str:
    del block  # a drawing repeats what a table says
    return ""


@_block.register
def _(block: Beside) -> str:
    return _block(block.table)


def _cell(one: Cell) -> str:
    return ", ".join(map(_inline, one.lines))


def _inline(spans: Sequence[Span]) -> str:
    return "".join(map(_span, spans))


def _span(span: Span) -> str:
    if isinstance(span, Code):
        return code(span.shown)
    if isinstance(span, Strong):
        return f"**{plain(span.text)}**"
    return plain(span)
