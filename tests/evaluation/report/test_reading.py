"""Files of evaluations: both versions are read, and what contradicts itself is refused in one line."""

import copy
import json

import evaluations
import numpy as np
import pytest

from adaras_export.errors import ArtifactError
from adaras_export.evaluation.report.reading import Gated, Recorded, Tried, read

pytest.importorskip("scipy")


@pytest.fixture
def reads(tmp_path):
    """What is read of a record."""

    def go(record):
        (tmp_path / "file.json").write_text(record if isinstance(record, str) else json.dumps(record))
        return read(tmp_path / "file.json")

    return go


def test_a_file_of_version_1_has_one_answer_to_a_question(reads):
    found = reads(evaluations.NULL)
    assert isinstance(found, Recorded)
    assert (found.answers, len(found.ids), found.seen, found.set_name) == (1, 200, 0, "somebody/sums: two_digits")
    assert list(found.verdicts)[:5] == ["off", "gated", "flipped", "random 0", "random 1"]
    assert found.verdicts["off"].dtype == bool
    assert (found.about, found.tokens) == ({}, {})


def test_a_file_of_version_2_has_several_and_says_how_they_came_about(reads):
    found = reads(evaluations.SAMPLED)
    assert (found.answers, found.set_name, found.trained_on) == (8, "sums", "sums")
    assert found.about["model"] == "name somebody/tiny, revision c0ffee"
    assert found.about["sampling"] == "temperature 0.7, top_p 0.95, max_new_tokens 60, seed 1"
    assert np.array_equal(found.verdicts["off"], evaluations.SAMPLED["verdicts"]["off"])
    assert found.tokens["off"][0].tolist() == list(range(10, 18))
    assert (found.cut["off"].mean(), found.seconds["off"]) == (pytest.approx(0.04, abs=0.01), 12.5)


def test_a_file_of_the_library_is_read(reads):
    from adaras_export.evaluation.arms import compare
    from adaras_export.evaluation.evaluate import Evaluation

    off, on = np.array([True, False, True]), np.array([True, True, True])
    arms = (compare("off", off, off), compare("always", on, off))
    made = Evaluation("ab", arms, 1.0, "", ("a", "b", "c"), {"off": off, "always": on}, seen=1)
    found = reads(made.as_record())
    assert (found.rule, found.ids, found.seen) == ("ab", ("a", "b", "c"), 1)
    assert found.verdicts["always"].tolist() == [[True], [True], [True]]


def test_what_tune_and_gate_print_is_read(reads):
    tried, gated = reads(evaluations.TUNED), reads(evaluations.GATE)
    assert isinstance(tried, Tried)
    assert tried.settings[1] == ("50 neurons at 1", 300, 0.77)
    assert isinstance(gated, Gated)
    assert gated.figures["auc_low"] == "0.73"


def changed(place, value):
    """The file of version 2 with something else at a path like verdicts/off/0."""
    record = copy.deepcopy(evaluations.SAMPLED)
    *path, last = [int(one) if one.isdigit() else one for one in place.split("/")]
    inner = record
    for one in path:
        inner = inner[one]
    inner[last] = value
    return record


DAMAGE = {
    "no JSON": ("{", "is not JSON"),
    "a list": ("[1]", "holds a list"),
    "something else": ({"a": 1}, "has no verdicts"),
    "a later version": (changed("version", 3), "is of version 3, and 1 and 2 are known"),
    "no rule": (changed("rule", None), "has no rule"),
    "a number for the rule": (changed("rule", 7), "says '7' of rule, where there should be a str"),
    "no ids": (changed("verdicts/id", []), "has no ids of questions"),
    "a question twice": (changed("verdicts/id/1", "q0"), "has one question twice"),
    "no off": ({**evaluations.GAIN, "verdicts": {"id": ["a"], "gated": [1]}}, "has 1 arms, and needs off"),
    "no rule arm": ({**evaluations.GAIN, "verdicts": {"id": ["a"], "off": [1]}}, "has 1 arms, and needs off"),
    "no answer": (changed("verdicts/off/0", []), "has no answer to its first question"),
    "a short arm": (changed("verdicts/always", [[1] * 8]), "another number of values for 'always'"),
    "a short row": (changed("verdicts/always/4", [1]), "rows of different lengths for 'always'"),
    "neither right nor wrong": (changed("verdicts/off/0/0", 2), "says 2 of 'off', where there should be 0 to 1"),
    "a negative length": (changed("tokens/off/0/0", -1), "says -1 of 'off'"),
    "an unknown arm's length": (changed("tokens/other", []), "has tokens of 'other', which has no verdicts"),
    "a share of 2": (changed("steered_share", 2), "says 2 of steered_share"),
    "a truth value": (changed("seen", True), "says 'True' of seen"),
    "negative seconds": (changed("seconds/off", -1.0), "says '-1.0' of off"),
    "an arm without verdicts": ({**evaluations.GAIN, "arms": [{"name": "magic"}]}, "has an arm 'magic' without"),
    "an arm that is none": ({**evaluations.GAIN, "arms": [7]}, "has an arm None without"),
    "figures of others": (
        {**evaluations.GAIN, "arms": [{"name": "gated", "accuracy": 0.99}]},
        "says 0.99 right of 'gated'; its verdicts say 0.6",
    ),
    "a setting that is none": ({**evaluations.TUNED, "arms": [7]}, "has a setting that is no object"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(damage, reads):
    record, said = DAMAGE[damage]
    with pytest.raises(ArtifactError, match=r"file.json: .*; expected JSON of adaras-export eval, tune or") as caught:
        reads(record)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
