"""Settings and rungs: a grid holds each setting once, halving ends on all questions, sampling is repeatable."""

import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaras_export.errors import MissingExtraError, RuleError
from adaras_export.evaluation.tune_search import Search, Setting, Space, Span, proposer, rungs

SPACE = Space(("a", "b"), (10, 50), (-1.0, 1.0), ("last_prompt_token",))
WIDE = Space(("a", "b"), (10, 50, 200), Span(0.1, 10), ("last_prompt_token", "first_generated_token"))


def played(space, search, gain):
    """Every round of settings, each told what it gains."""
    proposals, rounds = proposer(space, search), []
    while asked := proposals.ask():
        rounds.append(asked)
        for setting in asked:
            proposals.tell(setting, gain(setting), 100, complete=True)
    return rounds


def near(setting):
    """Best at 2, of ranking b."""
    return (setting.ranking == "b") - abs(setting.strength - 2) / 10


def test_a_grid_is_every_combination_once_and_in_one_round():
    doubled = Space(("a", "b"), (10, 50, 10), (-1, 1, 1.0), ("last_prompt_token",))
    assert doubled.grid() == SPACE.grid()
    assert played(doubled, Search(), near) == [SPACE.grid()]
    assert len(SPACE.grid()) == 8


def test_as_many_trials_as_settings_are_the_grid():
    assert played(SPACE, Search(trials=8), near) == [SPACE.grid()]


@given(st.integers(1, 300), st.integers(1, 2000), st.integers(0, 2500), st.integers(2, 5))
def test_rungs_hold_fewer_settings_on_more_questions_and_end_on_all(settings, questions, first, divisor):
    found = rungs(settings, questions, Search(first=first, divisor=divisor))
    kept, asked = zip(*found, strict=True)
    assert (kept[0], asked[-1]) == (settings, questions)
    assert all(one > two for one, two in pairwise(kept))
    assert all(one < two for one, two in pairwise(asked))
    assert kept[-1] >= 1


def test_rungs_of_an_example():
    assert rungs(120, 300, Search(first=30)) == [(120, 30), (40, 90), (14, 270), (5, 300)]
    assert rungs(120, 300, Search()) == [(120, 300)]


def test_sampled_settings_are_distinct_inside_the_space_and_of_both_signs():
    pytest.importorskip("optuna")
    rounds = played(WIDE, Search(trials=30), near)
    settings = [one for asked in rounds for one in asked]
    assert [len(asked) for asked in rounds] == [12, 12, 6]
    assert len({*settings}) == 30
    assert all(0.1 <= abs(one.strength) <= 10 and one.count in WIDE.counts for one in settings)
    assert {one.strength > 0 for one in settings} == {True, False}
    assert {one.start for one in settings} == {*WIDE.starts}


def test_the_sampler_learns_from_gains_and_repeats_itself():
    pytest.importorskip("optuna")
    rounds = played(WIDE, Search(trials=60), near)
    assert rounds == played(WIDE, Search(trials=60), near)
    assert rounds != played(WIDE, Search(trials=60, seed=1), near)
    assert sum(map(near, rounds[-1])) > sum(map(near, rounds[0])) + 1


def test_sampling_from_a_list_does_not_ask_twice():
    pytest.importorskip("optuna")
    settings = [one for asked in played(SPACE, Search(trials=7), near) for one in asked]
    assert len({*settings}) == len(settings) <= 7


def test_the_sampler_is_told_of_stopped_settings():
    pytest.importorskip("optuna")
    proposals = proposer(WIDE, Search(trials=13))
    for setting in proposals.ask():
        proposals.tell(setting, near(setting), 30, complete=setting.strength > 0)
    assert len(proposals.ask()) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Span(0, 1), r"strengths 0:1: no range; expected two numbers, 0 < low < high"),
        (lambda: Span(2, 1), r"strengths 2:1: no range"),
        (lambda: Space((), (1,), (1.0,), ("last_prompt_token",)), "no ranking or no start"),
        (lambda: Search(trials=0), "search: 0 trials"),
        (lambda: Search(first=-1), "first -1"),
        (lambda: Search(divisor=1), "divisor 1"),
        (lambda: proposer(WIDE, Search()), "a range of strengths is no grid; expected a number of trials"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(RuleError, match=message):
        make()


def test_without_optuna_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'optuna>=4'"):
        proposer(WIDE, Search(trials=3))
    assert proposer(SPACE, Search()).ask()[0] == Setting("a", 10, -1.0, "last_prompt_token")
