"""docs/tuning.md names options that `tune` has, and all of those that only `tune` has."""

import inspect
import re

from places import DOCS

from adaras_export.cli.tune import tune

PAGE = (DOCS / "tuning.md").read_text()


def test_the_page_names_options_of_tune_and_all_that_are_its_own():
    named = {one.replace("-", "_") for one in re.findall(r"--([a-z][a-z-]+)", PAGE)}
    own = {"neurons", "gate", "counts", "strengths", "start", "trials", "first", "seed", "report"}
    assert own <= named <= {*inspect.signature(tune).parameters}
