"""Drawings: marks that differ in shape, scales that hold all values, names that stay text, the same bytes each time."""

import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaras_export.core.intervals import Estimate
from adaras_export.evaluation.report.charts import Row, curves, intervals, strip

pytest.importorskip("matplotlib")

ROWS = [Row("off", "off", Estimate(0.5, 0.45, 0.55), "50.0%"), Row("x", "rule", Estimate(0.7, 0.6, 0.8), "70.0%")]
POINTS = [(k, k / 10) for k in range(1, 9)]
DRAWINGS = {
    "intervals": lambda name: intervals(
        [*ROWS, Row(name, "other", Estimate(0.6, 0.6, 0.6), "60.0%")], 0.5, name, signed=False
    ),
    "strip": lambda name: strip([(name, 0.5)] * 5, [(name, "rule", 0.6)], name),
    "curves": lambda name: curves([(name, "off", POINTS), ("always", "rule", POINTS)], name),
}
each = pytest.mark.parametrize("drawing", DRAWINGS)


def words(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_a_row_has_its_name_its_note_and_a_mark_of_its_own_shape():
    svg = intervals(ROWS, 0.5, "label", signed=False)
    assert {"off", "x", "50.0%", "70.0%"} <= {*words(svg)}
    assert len({*re.findall(r'<use xlink:href="(#\w+)"[^>]*var\(--paper\)', svg)}) == 2


def test_signed_scales_have_signs():
    svg = intervals([Row("a", "rule", Estimate(0.0, -0.1, 0.1), "0")], 0.0, "", signed=True)
    assert {"-10", "0", "+10"} <= {*words(svg)}


@given(st.floats(-1, 1))
@settings(max_examples=3)
def test_a_value_alone_has_a_scale_of_four_points(value):
    svg = intervals([Row("a", "rule", Estimate(value, value, value), "")], value, "", signed=True)
    assert 3 <= len(words(svg)) <= 13


def test_equal_draws_are_piled_and_not_hidden():
    svg = DRAWINGS["strip"]("off")
    assert len({*re.findall(r'<use xlink:href="#\w+" x="[\d.]+" y="([\d.]+)" style="fill: var\(--random', svg)}) == 5


@pytest.mark.parametrize("count", [2, 8, 40])
def test_curves_have_a_mark_at_every_k(count):
    points = [(k, k / (count + 1)) for k in range(1, count + 1)]
    svg = curves([("off", "off", points), ("always", "rule", points)], "")
    assert len(re.findall(r"<use [^>]*var\(--paper\)", svg)) == 2 * count


NAMES = ["<script>", '"&', "$x^2", "$", "漢字", "\u202e\x1b", "x" * 90, ""]


@each
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_text_whatever_it_is(drawing, name):
    svg = DRAWINGS[drawing](name)
    assert svg.startswith('<svg viewBox="0 0 ')
    assert not re.search(r"<script|<style|<metadata|<!--|<a |http|font-family", svg)
    assert {*re.findall(r"<(\w+)", svg)} <= {"svg", "g", "path", "use", "defs", "text", "clipPath", "rect"}
    assert all(len(shown) < 40 for shown in words(svg))


@each
def test_colours_are_the_pages(drawing):
    assert not re.search(r"#[0-9a-f]{6}\b(?!\")", re.sub(r'"#\w+"|url\(#\w+\)', "", DRAWINGS[drawing]("x")))


def test_the_same_figures_give_the_same_bytes_in_another_process():
    code = (
        "from adaras_export.evaluation.report.charts import *\n"
        "print(strip([('random 0', 0.5)], [('off', 'off', 0.4)], 'label'), end='')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == strip([("random 0", 0.5)], [("off", "off", 0.4)], "label")
