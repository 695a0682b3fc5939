"""What a report is made of: evaluations, and what `tune` and `gate` print."""

import json

import evaluations
import pytest

from adaras_export.errors import ArtifactError
from adaras_export.evaluation.record import Evaluation
from adaras_export.evaluation.report.reading import GateSummary, TuningSummary, in_words, read

pytest.importorskip("scipy")


@pytest.fixture
def reads(tmp_path):
    """What is read of a record."""

    def go(record):
        (tmp_path / "file.json").write_text(record if isinstance(record, str) else json.dumps(record))
        return read(tmp_path / "file.json")

    return go


def test_evaluations_tunings_and_gates_are_told_apart(reads):
    assert isinstance(reads(evaluations.GAIN), Evaluation)
    tuning, gate = reads(evaluations.TUNED), reads(evaluations.GATE)
    assert isinstance(tuning, TuningSummary)
    assert tuning.settings[1] == ("50 neurons at 1", 300, 0.77)
    assert isinstance(gate, GateSummary)
    assert gate.figures["auc_low"] == "0.73"


def test_a_value_is_one_line_of_words():
    sampling = {"temperature": 0.70, "seed": 1, "stop": None, "more": ["a", 2]}
    assert in_words(sampling) == "temperature 0.7, seed 1, more a, 2"


DAMAGE = {
    "no JSON": ("{", "is not JSON"),
    "a list": ("[1]", "holds a list"),
    "something else": ({"a": 1}, "has no verdicts"),
    "a damaged evaluation": ({**evaluations.GAIN, "rule": 7}, "has 7 for rule"),
    "a setting that is none": ({**evaluations.TUNED, "arms": [7]}, "has a setting that is no object"),
    "a setting of twice as many": ({**evaluations.TUNED, "arms": [{"name": "x", "accuracy": 2}]}, "has 2 for accuracy"),
    "settings without a rule": ({**evaluations.TUNED, "rule": None}, "has 'None' for rule"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(damage, reads):
    record, reason = DAMAGE[damage]
    with pytest.raises(ArtifactError, match=r"file.json: .*; expected JSON of adaras-export eval, tune or") as caught:
        reads(record)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
