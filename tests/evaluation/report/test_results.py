"""Figures of evaluations: arms, controls, several answers, and rules across question sets."""

import evaluations
import pytest

from adaras_export.core.intervals import holm
from adaras_export.evaluation.record import evaluation_from_record
from adaras_export.evaluation.report.figures import result_of, sentence, transfer_of

pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def results():
    names = ("GAIN", "NULL", "HARM", "FEW", "BARE", "SEEN", "SAMPLED")
    return {name: result_of(f"{name}.json", evaluation_from_record(getattr(evaluations, name))) for name in names}


@pytest.mark.parametrize(
    ("name", "outcome"),
    [("GAIN", "gain"), ("NULL", "unchanged"), ("HARM", "harm"), ("FEW", "few draws"), ("BARE", "uncontrolled")],
)
def test_the_outcome_is_that_of_the_verdicts(name, outcome, results):
    assert results[name].judgement.outcome == outcome
    assert results[name].as_record()["outcome"] == outcome


def test_seen_questions_are_no_test_whatever_they_show(results):
    assert sentence(results["SEEN"]) == "no test: the rule was made with 3 of these 200 questions."
    assert results["SEEN"].as_record()["outcome"] == "seen"


def test_figures_of_arms_are_those_of_the_file(results):
    for found, told in zip(results["GAIN"].arms, evaluations.GAIN["arms"], strict=True):
        assert (found.name, found.fixed, found.broken, found.p_value) == tuple(
            told[key] for key in ("name", "fixed", "broken", "p_value")
        )
        assert (found.accuracy.low, found.accuracy.high) == (told["low"], told["high"])


def test_the_rule_is_held_against_the_mean_of_its_draws_and_the_flipped_sign(results):
    found = results["GAIN"]
    by_name = {arm.name: arm.accuracy.value for arm in found.arms}
    mean = sum(arm.accuracy.value for arm in found.random) / 20
    assert found.over_random.value == pytest.approx(by_name["gated"] - mean)
    assert found.over_random.low < found.over_random.value < found.over_random.high
    assert found.over_flipped[0].value == pytest.approx(by_name["gated"] - by_name["flipped"])


def test_several_answers_have_pass_at_k_lengths_and_times(results):
    found = results["SAMPLED"]
    assert [k for k, _, _ in found.passes] == list(range(1, 9))
    assert found.passes[0][2].value == pytest.approx(found.primary.accuracy.value)
    assert (found.primary.tokens, found.primary.seconds) == (pytest.approx(34.9, abs=0.5), pytest.approx(13.5 / 480))
    assert results["GAIN"].passes == ()


def test_ids_of_changed_questions_are_as_many_as_are_counted(results):
    for found in results.values():
        assert len(found.ids_of_changed(fixed=True)) == found.primary.fixed
        assert len(found.ids_of_changed(fixed=False)) == found.primary.broken


def test_cells_are_corrected_for_all_evaluations_and_missing_ones_are_none(results):
    other = result_of("o.json", evaluation_from_record({**evaluations.HARM, "rule": evaluations.OTHER}))
    given = [results["SAMPLED"], results["GAIN"], other]
    found = transfer_of(given)
    assert found.rules == (evaluations.RULE, evaluations.OTHER)
    assert [[cell is None for cell in row] for row in found.cells] == [[False, False], [True, False]]
    cells = [cell for row in found.cells for cell in row if cell is not None]
    assert [cell.adjusted for cell in cells] == holm([one.primary.p_value for one in given])
    assert [cell.own for cell in cells] == [True, False, False]
    assert found.as_record()["cells"][1][0] is None
