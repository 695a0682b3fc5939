"""Drawings: scales that hold all values, shapes that differ, piles and names that keep clear of each other."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaras_export.core.intervals import Estimate
from adaras_export.evaluation.report.charts import Row, _axis, curves, intervals, strip

SHARES = st.floats(-1, 1)


@given(st.lists(SHARES, min_size=1, max_size=20))
def test_an_axis_holds_all_values_and_three_to_twelve_round_ticks(values):
    axis = _axis(values, 100, 600, lowest=-1.0)
    assert all(100 <= axis.at(one) <= 600 for one in values)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 12
    assert all(axis.low - 1e-6 <= tick <= axis.high + 1e-6 for tick in ticks)
    assert all(abs(1000 * tick - round(1000 * tick)) < 1e-6 for tick in ticks)


def test_a_row_is_a_mark_on_its_interval_with_a_note():
    rows = [Row("off", "off", Estimate(0.5, 0.45, 0.55), "50.0%"), Row("x", "rule", Estimate(0.7, 0.6, 0.8), "70.0%")]
    svg = intervals(rows, 0.5, "said", signed=False).svg
    assert 'role="img" aria-label="said"' in svg
    assert svg.count('class="whisker') == 2
    assert svg.count(">50.0%</text>") == svg.count(">70.0%</text>") == 1
    assert 'class="mark off"' in svg
    assert 'class="mark rule"' in svg


def test_signed_scales_have_signs():
    svg = intervals([Row("a", "rule", Estimate(0.0, -0.1, 0.1), "0")], 0.0, "", signed=True).svg
    ticks = re.findall(r'class="tick">([^<]+)', svg)
    assert ticks == ["-10", "-5", "0", "+5", "+10"]


def test_equal_draws_are_piled_and_not_hidden():
    svg = strip([(f"random {one}", 0.5) for one in range(5)], [("off", "off", 0.5)], "").svg
    heights = re.findall(r'cy="([\d.]+)" r="4"', svg)
    assert len({*heights}) == 5


@pytest.mark.parametrize("count", [2, 8, 40])
def test_curves_have_a_mark_at_every_k_and_names_that_keep_clear(count):
    points = [(k, k / (count + 1)) for k in range(1, count + 1)]
    svg = curves([("off", "off", points), ("always", "rule", points)], "").svg
    assert svg.count("<polyline") == 2
    assert svg.count('class="mark') == 2 * count
    places = [float(one) for one in re.findall(r'y="([\d.]+)" text-anchor="start" class="name', svg)]
    assert abs(places[0] - places[1]) >= 15


def test_names_are_escaped_and_cut():
    svg = strip([("<b>" * 20, 0.5)], [("<i>" * 20, "rule", 0.6)], '"&').svg
    assert "<b>" not in svg
    assert "<i>" not in svg
    assert 'aria-label="&quot;&amp;"' in svg
