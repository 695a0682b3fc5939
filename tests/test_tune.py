"""The choice of count and strength: the planted best wins, ties go to the weaker, and misuse is refused."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny

from adaras_export.checkers import exact
from adaras_export.errors import MissingExtraError, RuleError, TraceError
from adaras_export.evaluate import Exam
from adaras_export.gate import gate_probabilities
from adaras_export.generation import Sampling, complete, encode_prompt
from adaras_export.rule import SteeringRule
from adaras_export.steering import steered
from adaras_export.traces import Question, digest
from adaras_export.tune import tune

pytest.importorskip("scipy.stats")

GREEDY = Sampling(5)
PROMPTS = [f"{n * 37} and {'so ' * (n % 4)}on" for n in range(10)]
COUNTS, STRENGTHS = (3, 6), (-2.0, -1.0, 1.0, 2.0)


@pytest.fixture(scope="module")
def completions(stock, tokenizer):
    """What the tiny qwen3 says to every prompt, steered or plain."""

    def say(rule):
        rows = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
        if rule is None:
            return complete(stock["qwen3"], tokenizer, rows, GREEDY, PROMPTS)
        with steered(stock["qwen3"], rule):
            return complete(stock["qwen3"], tokenizer, rows, GREEDY, PROMPTS)

    return say


@pytest.fixture
def run(stock, tokenizer, bases):
    """`tune` over the grid above on questions with these answers, with changes."""

    def go(answers, gate=None, neurons=None, check=exact, **changes):
        questions = [
            Question(f"q{n}", prompt, one) for n, (prompt, one) in enumerate(zip(PROMPTS, answers, strict=True))
        ]
        settings = {"base": bases["qwen3"], "counts": COUNTS, "strengths": STRENGTHS} | changes
        neurons = tiny.make_neurons() if neurons is None else neurons
        return tune(stock["qwen3"], tokenizer, neurons, gate, Exam(questions, check, GREEDY), **settings)

    return go


@pytest.fixture(scope="module")
def gate(stock, tokenizer):
    """A gate that steers half of the prompts."""
    gate = tiny.make_gate()
    found = np.sort(gate_probabilities(stock["qwen3"], tokenizer, gate, PROMPTS))
    return replace(gate, threshold=float(found[4:6].mean()))


@pytest.mark.parametrize("start", ["last_prompt_token", "first_generated_token"])
@pytest.mark.parametrize(("count", "strength"), [(3, 2.0), (6, -2.0), (6, 1.0)])
def test_the_planted_best_setting_wins(count, strength, start, run, completions, bases):
    best = SteeringRule(tiny.make_neurons().top(count), strength, bases["qwen3"], start=start)
    report = run([text or "nothing" for text in completions(best)], start=start)
    assert (report.chosen.count, report.chosen.strength, report.chosen.arm.accuracy) == (count, strength, 1)
    assert report.beats_off
    assert report.rule == replace(best, questions=tuple(digest(prompt) for prompt in PROMPTS))


def test_every_setting_is_tried_and_compared_with_no_steering(run, completions, bases):
    plain = completions(None)
    report = run(plain)
    assert [(trial.count, trial.strength) for trial in report.trials] == [(c, s) for c in COUNTS for s in STRENGTHS]
    assert report.off.accuracy == 1
    for trial in report.trials:
        rule = SteeringRule(tiny.make_neurons().top(trial.count), trial.strength, bases["qwen3"])
        changed = sum(text != before for text, before in zip(completions(rule), plain, strict=True))
        assert (trial.arm.fixed, trial.arm.broken) == (0, changed)
    assert max(trial.arm.broken for trial in report.trials) > 0


def test_settings_are_judged_as_they_would_be_deployed_with_their_gate(run, gate, completions, bases):
    always = SteeringRule(tiny.make_neurons(), 2.0, bases["qwen3"])
    plain, gated = completions(None), completions(replace(always, gate=gate))
    assert plain != gated != completions(always)
    report = run(gated, gate=gate)
    assert (report.chosen.count, report.chosen.strength, report.chosen.arm.accuracy) == (6, 2.0, 1)
    assert report.rule.gate == replace(gate, base=bases["qwen3"])


@pytest.mark.parametrize("order", [1, -1])
def test_ties_go_to_the_weaker_then_the_fewer_then_the_positive(order, run):
    """Symptom: where no setting changed anything, which sign won hung on the order in which signs were given."""
    report = run(["x"] * 10, check=lambda text, answer: True, counts=COUNTS[::order], strengths=STRENGTHS[::order])
    assert (report.chosen.strength, report.chosen.count) == (1.0, 3)


def test_the_weaker_of_two_equals_wins_over_the_fewer_neurons(run, completions, bases):
    settings = [SteeringRule(tiny.make_neurons().top(c), s, bases["qwen3"]) for c, s in ((3, 2.0), (6, 1.0))]
    answers = [json.dumps(both) for both in zip(*map(completions, settings), strict=True)]
    report = run(answers, check=lambda text, answer: text in json.loads(answer))
    best = [(trial.count, trial.strength) for trial in report.trials if trial.arm.accuracy == 1]
    assert best == [(3, 2.0), (6, 1.0)]
    assert (report.chosen.count, report.chosen.strength) == (6, 1.0)


def test_a_grid_that_beats_nothing_says_so(run, completions):
    report = run(completions(None))
    assert not report.beats_off
    assert report.as_record()["beats_off"] is False
    assert "NO SETTING BEATS NO STEERING, this is the least bad one" in report.line()


def test_the_report_tells_every_arm_and_the_rule(run, completions, bases):
    best = SteeringRule(tiny.make_neurons().top(3), 2.0, bases["qwen3"])
    report = run(completions(best))
    record = report.as_record()
    assert report.line().startswith("3 neurons at 2: ")
    assert report.line().endswith(" -> 100.0% on 10 validation questions")
    assert [line.split("  ")[0] for line in report.table().splitlines()[1:3]] == ["off", "3 neurons at -2"]
    assert (record["rule"], record["count"], record["strength"]) == (report.rule.fingerprint, 3, 2.0)
    assert len(record["arms"]) == 9


@pytest.mark.parametrize("part", ["neurons", "gate"])
def test_validation_questions_that_found_neurons_or_gate_are_refused(part, run, gate):
    seen = (digest(PROMPTS[2]), digest(PROMPTS[7]))
    parts = {"neurons": tiny.make_neurons(), "gate": gate}
    parts[part] = replace(parts[part], questions=seen)
    with pytest.raises(TraceError, match=r"questions: 2 of 10 were used before.*first: q2"):
        run(["x"] * 10, **parts)


def test_the_rule_remembers_the_questions_of_every_stage(run, gate):
    neurons = replace(tiny.make_neurons(), questions=("a" * 16,))
    rule = run(["x"] * 10, neurons=neurons, gate=replace(gate, questions=("b" * 16,))).rule
    assert set(rule.questions) == {"a" * 16, "b" * 16, *map(digest, PROMPTS)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strengths": (0.0, 1.0)}, r"tune: counts \[3, 6\] and strengths \[0.0, 1.0\]; expected numbers other than 0"),
        ({"strengths": ()}, r"strengths \[\]; expected"),
        ({"counts": ()}, r"tune: counts \[\]"),
        ({"counts": (0, 3)}, r"tune: counts \[0, 3\]"),
        ({"counts": (7,)}, "neurons: 7 wanted; the set has 6"),
        ({"strengths": (float("nan"),)}, "strength is nan; expected a finite number"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(changes, message, run):
    with pytest.raises(RuleError, match=message):
        run(["x"] * 10, **changes)


def test_a_gate_that_reads_steered_layers_is_refused_at_the_last_prompt_token(run):
    with pytest.raises(RuleError, match="the gate reads layer 3, steering begins in layer 2"):
        run(["x"] * 10, gate=tiny.make_gate(layers=(0, 3)))


def test_neurons_of_another_model_are_refused(run, bases):
    other = replace(tiny.make_neurons(), base=replace(bases["qwen3"], fingerprint="0" * 64))
    with pytest.raises(RuleError, match="is not the model that this was made for"):
        run(["x"] * 10, neurons=other)


def test_without_scipy_the_error_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'adaras-export\[identify\]'"):
        run(["x"] * 10)
