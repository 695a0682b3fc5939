"""docs/gate.md names options and figures that `gate` has, and all options that are its own."""

import inspect
import re

from places import DOCS

from adaras_export.cli.gate import gate
from adaras_export.discovery.gate_report import GateReport
from adaras_export.discovery.gate_selection import CANDIDATES

PAGE = (DOCS / "gate.md").read_text()


def test_the_page_names_options_of_gate_and_all_that_are_its_own():
    named = {one.replace("-", "_") for one in re.findall(r"--([a-z][a-z-]+)", PAGE)} - {"json"}
    own = {"below_layer", "features", "pooling", "threshold", "cost_missed", "cost_needless", "seed", "token_budget"}
    assert own <= named <= {*inspect.signature(gate).parameters}


def test_the_page_says_what_is_tried_and_doubted():
    *others, last = map(str, CANDIDATES)
    assert f"{', '.join(others)} or {last} neurons" in PAGE
    told = inspect.getsource(GateReport.doubts)
    for doubt in re.findall(r"`(NOT DISTINGUISHABLE[A-Z ]+)`", PAGE):
        assert f'"{doubt}"' in told
