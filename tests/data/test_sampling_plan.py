"""Plans of attempts: batches, early stops, and that they follow from verdicts alone."""

from itertools import chain

import pytest

from adaras_export.core.traces import Question
from adaras_export.data.sampling_plan import Goal, SamplingPlan
from adaras_export.errors import TraceError

QUESTIONS = [Question(f"q{n}", f"{n}", "1") for n in range(5)]


def planned(goal, verdict, rows=4, whole=False, questions=QUESTIONS):
    """The plan when it is done, and ids of its batches, given the verdict on every id."""
    plan, batches = SamplingPlan(questions, goal, rows, whole), []
    for batch in plan.batches():
        batches.append([attempt.id for attempt in batch])
        for attempt in batch:
            plan.count(attempt.question.id, correct=verdict(attempt.id))
    return plan, batches


def even(key):
    return int(key[-1]) % 2 == 0


def never(key):
    return False


def test_without_a_stop_attempts_at_a_question_are_together_and_all_are_planned():
    plan, batches = planned(Goal(3), even)
    assert batches[:2] == [["q0#0", "q0#1", "q0#2", "q1#0"], ["q1#1", "q1#2", "q2#0", "q2#1"]]
    assert [*chain(*batches)] == [f"q{n}#{m}" for n in range(5) for m in range(3)]
    assert plan.total == 15


def test_a_backend_that_streams_gets_the_whole_plan_unless_a_verdict_could_end_it():
    assert [len(batch) for batch in planned(Goal(3), even, whole=True)[1]] == [15]
    assert [len(batch) for batch in planned(Goal(3, wanted=5), even, whole=True)[1]] == [4, 4, 4, 3]


def test_a_question_with_both_classes_full_is_spared_its_other_attempts():
    plan, batches = planned(Goal(8, per_class=2), even)
    assert [*chain(*batches)] == [f"q{n}#{m}" for n in range(5) for m in range(4)]
    assert plan.total == 20
    assert plan.full == {question.id for question in QUESTIONS}


def test_a_question_that_never_fills_a_class_gets_every_attempt_in_rounds():
    plan, batches = planned(Goal(5, per_class=1), lambda key: even(key) and key[:2] != "q1", rows=2)
    asked = [key for key in chain(*batches) if key.startswith("q1#")]
    assert asked == [f"q1#{m}" for m in range(5)]
    assert plan.total == sum(map(len, batches)) == 4 * 2 + 5
    assert batches[:3] == [["q0#0", "q0#1"], ["q1#0", "q1#1"], ["q1#2"]]


def test_classes_count_what_is_wanted_of_them():
    goal = Goal(8, wanted=2, per_class=2)
    _, batches = planned(goal, even, rows=2)
    assert [*chain(*batches)] == [f"q{n}#{m}" for n in range(2) for m in range(4)]


def test_questions_are_over_when_nothing_more_comes():
    plan = SamplingPlan(QUESTIONS[:2], Goal(3, per_class=1), 2)
    over = []
    for batch in plan.batches():
        for attempt in batch:
            plan.count(attempt.question.id, correct=attempt.question.id == "q0" and even(attempt.id))
        over.append(plan.over(batch))
    # Batches are q0#0 q0#1, q1#0 q1#1 and q1#2; that q0 is full is looked at when its round is over.
    assert over == [set(), set(), {"q0", "q1"}]


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({"attempts": 0}, "attempts is 0; expected 1 or more"),
        ({"attempts": 4, "wanted": 0}, "wanted is 0"),
        ({"attempts": 4, "per_class": 0}, "per_class is 0"),
        ({"attempts": 4, "per_class": 3}, "expected 6 attempts or more"),
    ],
)
def test_goals_that_cannot_be_reached_are_refused(goal, message):
    with pytest.raises(TraceError, match=message):
        Goal(**goal)
