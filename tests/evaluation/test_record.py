"""The evaluation record: what is written is read, and what contradicts itself is refused in one line."""

import copy
import json

import cards
import evaluations
import pytest

from adaras_export.core.intervals import Estimate
from adaras_export.errors import ArtifactError
from adaras_export.evaluation.record import LARGEST, Comparison, Gap, evaluation_from_record, read_evaluation

pytest.importorskip("scipy")

RECORDS = {
    "one answer": evaluations.GAIN,
    "several answers": evaluations.SAMPLED,
    "a comparison, an example and a dataset": {**cards.COMPARED, "example": "1 + 1", "dataset": "a/b", "task": "c"},
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_what_is_read_is_written_as_it_was(record, tmp_path):
    path = tmp_path / "e.json"
    path.write_text(json.dumps(record))
    read_evaluation(path).save(path)
    assert path.read_text() == json.dumps(record, indent=1, sort_keys=True) + "\n"


def test_answers_are_tables_of_questions_by_answers_in_the_order_of_the_arms():
    read = evaluation_from_record(evaluations.SAMPLED)
    assert (read.questions, read.samples, read.primary) == (60, 8, "always")
    assert list(read.verdicts) == [arm["name"] for arm in evaluations.SAMPLED["arms"]]
    assert read.verdicts["off"].dtype == bool
    assert read.tokens["off"][0].tolist() == list(range(10, 18))
    assert evaluation_from_record(evaluations.GAIN).verdicts["off"].shape == (200, 1)


def changed(place, value, record=RECORDS["a comparison, an example and a dataset"]):
    """The record with something else at a path like verdicts/off/0; with "gone", without what is there."""
    record = copy.deepcopy(record)
    *path, last = [int(part) if part.isdigit() else part for part in place.split("/")]
    inner = record
    for part in path:
        inner = inner[part]
    inner[last] = value
    if value == "gone":
        del inner[last]
    return record


def sampled(place, value):
    return changed(place, value, evaluations.SAMPLED)


DAMAGE = {
    "no JSON": ("{", "is not JSON"),
    "a list": ([1], "holds a list"),
    "no version": (changed("version", "gone"), "has version None"),
    "version 1": (changed("version", 1), "has version 1; expected .* version 2"),
    "a later version": (changed("version", 3), "has version 3"),
    "a truth value for a version": (changed("version", True), "has version True"),
    "an unknown key": (changed("more", 1), "has the unknown key 'more' in it"),
    "no seen": (changed("seen", "gone"), "has no seen in it"),
    "more seen than there are": (changed("seen", 501), "has 501 for 'seen'"),
    "a number for the rule": (changed("rule", 7), "has 7 for rule, where there should be text"),
    "a truth value for a count": (changed("arms/0/fixed", True), "has True for 'fixed'"),
    "a share of 2": (changed("steered_share", 2), "has 2 for 'steered_share'"),
    "text for a share": (changed("steered_share", "2"), "has '2' for 'steered_share'"),
    "NaN": (json.dumps(changed("steered_share", float("nan"))), "holds NaN"),
    "infinity": (json.dumps(changed("steered_share", 7)).replace(": 7,", ": 1e999,"), "holds 1e999"),
    "a number of a thousand digits": (
        json.dumps(changed("seen", 7)).replace(": 7,", f": {'7' * 1000},"),
        "1000 digits",
    ),
    "a key twice": ('{"version": 2, "version": 2}', "has the key 'version' twice"),
    "nested a thousand deep": ("[" * 1000 + "]" * 1000, "nested"),
    "nested settings": (changed("sampling/a", {}), "for sampling, where there should be an object of plain values"),
    "no temperature": (changed("sampling", {}), "has None for 'temperature'"),
    "a list of settings": (changed("model", []), r"has \[\] for model"),
    "a dataset of no Hub": (changed("dataset", "[x](y)"), "which is no Hub id"),
    "a long example": (changed("example", "x" * 999), "for example, where there should be a short question"),
    "an example that is none": (changed("example", 7), "for example, where there should be a short question"),
    "no arms": (changed("arms", []), "where there should be off and one of gated, always, everywhere"),
    "a thousand arms": (changed("arms", [cards.arm("off", 3)] * 1001), "more than 1000"),
    "no off": (changed("arms/0/name", "other"), "where there should be off and one of"),
    "an arm twice": (changed("arms/1/name", "off"), "where there should be off and one of"),
    "an arm that is none": (changed("arms/0", 7), "has 7 for an arm, where there should be an object"),
    "an arm without figures": (changed("arms/0", {"name": "off"}), "has no questions in an arm"),
    "an arm without verdicts": (changed("verdicts/gated", "gone"), "has the arm 'gated' in one of arms and verdicts"),
    "verdicts without an arm": (changed("verdicts/magic", [1] * 500), "has the arm 'magic' in one of arms and verd"),
    "another accuracy": (changed("arms/1/accuracy", 0.99), r"has 0.99 for accuracy of 'gated'; its verdicts give 0.5"),
    "another count of fixed ones": (
        changed("arms/1/fixed", 30),
        r"has \(500, 30, 5\) for questions, fixed and broken of 'gated'; its verdicts give \(500, 29, 5\)",
    ),
    "another verdict": (changed("verdicts/gated/0", 1), "fixed and broken of 'gated'; its verdicts give"),
    "other questions": (changed("questions", 499), r"has \(499, 1\) for questions and samples"),
    "no ids": (changed("verdicts/id", []), "has no ids of questions"),
    "a question twice": (changed("verdicts/id/1", "q0"), "has one question twice"),
    "no answer": (sampled("verdicts/off/0", []), "has no answer to its first question"),
    "a short arm": (sampled("verdicts/always", [[1] * 8]), "another number of values for 'always'"),
    "a short row": (sampled("verdicts/always/4", [1]), "rows of different lengths for 'always'"),
    "neither right nor wrong": (sampled("verdicts/off/0/0", 2), "has 2 for 'off', .* a count from 0 to 1"),
    "a negative length": (sampled("tokens/off/0/0", -1), "has -1 for 'off'"),
    "an unknown arm's length": (sampled("tokens/other", []), "has tokens of 'other', which has no verdicts"),
    "an arm without lengths": (sampled("tokens/off", "gone"), "has no tokens of 'off'"),
    "a list of lengths": (sampled("tokens", []), r"has \[\] for tokens"),
    "negative seconds": (sampled("seconds/off", -1.0), "has -1.0 for 'off'"),
    "half a comparison": (changed("comparison", {"reference": "gated"}), "has no tokens in comparison"),
    "no gaps": (changed("comparison/gaps", []), "has no gaps in its comparison"),
    "a gap without an interval": (changed("comparison/gaps/0/difference", 0.1), "has 0.1 for difference"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(damage, tmp_path):
    record, reason = DAMAGE[damage]
    (tmp_path / "e.json").write_text(record if isinstance(record, str) else json.dumps(record))
    with pytest.raises(ArtifactError, match=rf"e.json: .*{reason}") as caught:
        read_evaluation(tmp_path / "e.json")
    assert str(caught.value).endswith("; expected a file of adaras-export eval, version 2; run eval again")
    assert "\n" not in str(caught.value)


def test_a_file_of_gigabytes_is_not_read(tmp_path):
    with (tmp_path / "e.json").open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(ArtifactError, match=f"has {LARGEST + 1} bytes; at most {LARGEST} are read; expected"):
        read_evaluation(tmp_path / "e.json")


def gap(name, value=0.0, low=0.0, high=0.0, p_value=1.0):
    nats = Estimate(0.125, 0.1, 0.2)
    return Gap(name, Estimate(value, low, high), 12, 40, p_value, nats, nats, nats, nats)


def comparison(*gaps):
    return Comparison("gated", 64, 20.5, (gap("gated"), *gaps))


def test_a_difference_is_told_with_its_interval_and_its_test():
    found = comparison(gap("always"), gap("everywhere", -0.028, -0.044, -0.013, 1e-4)).sentence()
    assert found == (
        "everywhere against gated: -2.8 points (95 % interval -4.4 to -1.3; 12 fixed, 40 broken, p = 0.0001), "
        "next-token KL 0.12 nats."
    )


def test_a_difference_that_is_not_shown_is_not_called_equality():
    found = comparison(gap("everywhere", -0.003, -0.012, 0.006, 0.6)).sentence()
    assert "-0.3 points (95 % interval -1.2 to +0.6" in found
    assert found.endswith(
        "The test shows no difference, which is no proof of equality: the interval says how large it may be."
    )


def test_without_another_arm_there_is_no_sentence():
    assert comparison().sentence() == ""


def test_the_gaps_are_a_table_in_which_the_reference_has_no_difference():
    lines = comparison(gap("everywhere", -0.028, -0.044, -0.013, 1e-4)).table().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["gated", *["0.125"] * 4]
    assert lines[2].split() == ["everywhere", "-2.8", "-4.4", "to", "-1.3", "12", "40", "0.0001", *["0.125"] * 4]
