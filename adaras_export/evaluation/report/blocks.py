"""What a report consists of, in no format: headings, sentences, tables, charts.

Whatever comes from a file is `Code` (names) or a number made into text, so that writers escape in one place. Knows
nothing of evaluations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from adaras_export.errors import printable

Tone = Literal["good", "bad", "plain", "quiet", "good-1", "good-2", "good-3", "bad-1", "bad-2", "bad-3"]

_LONGEST = 80


@dataclass(frozen=True)
class Code:
    """A name or a hash; what cannot be seen in it is escaped, and a long one is cut in the middle."""

    text: str

    @property
    def shown(self) -> str:
        """One line of bearable length."""
        seen = printable(self.text)
        return seen if len(seen) <= _LONGEST else f"{seen[: _LONGEST // 2]}…{seen[-_LONGEST // 2 :]}"


@dataclass(frozen=True)
class Strong:
    """Words that stand out."""

    text: str


Span = str | Code | Strong
Spans = tuple[Span, ...]


@dataclass(frozen=True)
class Heading:
    """Of a level from 1 to 3."""

    level: int
    spans: Spans


@dataclass(frozen=True)
class Paragraph:
    """Sentences."""

    spans: Spans


@dataclass(frozen=True)
class Items:
    """Short paragraphs of one kind."""

    items: tuple[Spans, ...]


@dataclass(frozen=True)
class Verdict:
    """The sentence that a reader may quote."""

    tone: Tone
    label: str
    spans: Spans


@dataclass(frozen=True)
class Cell:
    """Of a table: lines, and how it is meant."""

    lines: tuple[Spans, ...]
    tone: Tone = "plain"

    @classmethod
    def of(cls, *spans: Span, tone: Tone = "plain") -> "Cell":
        """A cell of one line."""
        return cls((spans,), tone)


@dataclass(frozen=True)
class Table:
    """Rows of cells below heads, the first column naming the row; ``numeric`` columns stand on their right edge."""

    caption: str
    heads: tuple[Span, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: bool = True

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.heads) for row in self.rows), self.caption


@dataclass(frozen=True)
class Chart:
    """A drawing that repeats what a table says; ``svg`` is whole and escaped, ``label`` says it in words."""

    svg: str
    label: str


@dataclass(frozen=True)
class Beside:
    """A chart and the table that has its numbers."""

    chart: Chart
    table: Table


Block = Heading | Paragraph | Items | Verdict | Table | Chart | Beside


@dataclass(frozen=True)
class Report:
    """A title and what stands below it."""

    title: str
    blocks: Sequence[Block]
