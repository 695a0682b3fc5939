"""The text of reports: as many cells in every line, and names that stay names."""

import re

import evaluations
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaras_export.evaluation.record import evaluation_from_record
from adaras_export.evaluation.report.document import _table, document, letter, name
from adaras_export.evaluation.report.figures import result_of

pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def hostile():
    return document([result_of("e.json", evaluation_from_record(evaluations.HOSTILE))], None, [])


def bars(line):
    return len(re.findall(r"(?<!\\)\|", line))


def test_the_tables_have_as_many_cells_in_every_line(hostile):
    tables = [block.splitlines() for block in hostile.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert {bars(line) for line in table} == {bars(table[0])}


def test_every_name_of_a_file_is_escaped(hostile):
    assert hostile.count(r"\<script\>") > 10
    assert not re.search(r"(?<!\\)[<\[\u202e]", hostile)


@given(st.text(max_size=200))
def test_a_name_is_one_line_of_bearable_length_whatever_it_is(text):
    shown = name(text)
    assert shown.isprintable()
    assert len(shown) < 260


def test_the_first_column_names_the_row_and_numbers_stand_right():
    assert _table(("a", "b"), [("x", "1")]) == "| a | b |\n|---|---:|\n| x | 1 |"


def test_question_sets_have_letters():
    assert [letter(place) for place in (0, 25, 26, 52)] == ["A", "Z", "A1", "A2"]
