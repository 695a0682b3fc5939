"""No reader hangs on what is no file, and none takes much memory for what says that it is huge."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("bounded.py")
# Where there is no file of these names, and none but a file counts, the settings are the default ones, or a check says
# what is missing.
OPTIONAL = ("adapter: ", "adapter config: ", "tokenizer config: ", "generation config: ")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What became of each case, by its name."""
    command = [sys.executable, SCRIPT, tmp_path_factory.mktemp("bounded")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.slow
def test_huge_and_special_files_cost_a_line(outcomes):
    assert len(outcomes) > 100
    wrong = {case: said for case, said in outcomes.items() if "Error " not in said}
    assert set(wrong.values()) == {"taken"}
    assert all(case.startswith(OPTIONAL) for case in wrong)
