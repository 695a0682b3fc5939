"""The text: as many cells in every line, names that stay names, and what the page says."""

import html
import re

import evaluations
import pytest

from adaras_export.evaluation.report.blocks import Cell, Code, Paragraph, Report, Strong, Table
from adaras_export.evaluation.report.document import report
from adaras_export.evaluation.report.figures import result_of
from adaras_export.evaluation.report.markdown import markdown
from adaras_export.evaluation.report.page import page
from adaras_export.evaluation.report.reading import _evaluation

pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def hostile():
    return report([result_of(_evaluation("e.json", evaluations.HOSTILE))], None, [])


def bars(line):
    return len(re.findall(r"(?<!\\)\|", line))


def test_the_tables_have_as_many_cells_in_every_line(hostile):
    tables = [block.splitlines() for block in markdown(hostile).split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert {bars(line) for line in table} == {bars(table[0])}


def words(text):
    """Figures and words of a text in their order, without marks."""
    return re.findall(r"\w+(?:\.\w+)*", html.unescape(text))


def test_the_text_says_what_the_page_says():
    found = report([result_of(_evaluation("e.json", evaluations.SAMPLED))], None, [])
    body = page(found).partition("<main>")[2]
    body = re.sub(r"<svg.*?</svg>|<caption>.*?</caption>|<[^>]+>", " ", body, flags=re.DOTALL)
    assert words(body) == words(markdown(found))


def test_names_are_code_in_words_and_in_cells():
    spans = ("a|b ", Code("c|`d"), " ", Strong("<e>"))
    text = markdown(
        Report(
            "t", [Paragraph(spans), Table("x", (Code("h|"), "i|"), ((Cell.of(Code("c|d")), Cell((("1",), ("2",)))),))]
        )
    )
    assert "a\\|b c\\|\\`d **\\<e\\>**" in text
    assert "| h\\| | i\\| |\n|---|---:|\n| c\\|d | 1, 2 |" in text
