"""docs/gate.md names options that `gate` has, and all that are its own."""

import inspect
import re

from places import DOCS

from adaras_export.cli.gate import gate

PAGE = (DOCS / "gate.md").read_text()


def test_the_page_names_options_of_gate_and_all_that_are_its_own():
    named = {one.replace("-", "_") for one in re.findall(r"--([a-z][a-z-]+)", PAGE)} - {"json"}
    own = {"below_layer", "features", "pooling", "threshold", "cost_missed", "cost_needless", "seed", "token_budget"}
    assert own <= named <= {*inspect.signature(gate).parameters}
