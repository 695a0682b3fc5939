"""The choice of count and strength: the planted best wins, ties go to the weaker, and misuse is refused."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny

from adaras_export.core.question_identity import identity
from adaras_export.core.rule import SteeringRule
from adaras_export.core.traces import Question, digest
from adaras_export.data.checkers import exact
from adaras_export.errors import ArtifactError, MissingExtraError, RuleError, TraceError
from adaras_export.evaluation import answer_cache
from adaras_export.evaluation.task import EvaluationTask
from adaras_export.evaluation.tune import TuneOptions, tune
from adaras_export.evaluation.tune_search import Search, Span
from adaras_export.files.append_log import SealedLog
from adaras_export.modeling.gate import gate_probabilities
from adaras_export.modeling.generation import Sampling, complete, encode_prompt
from adaras_export.modeling.steering import steered

pytest.importorskip("scipy.stats")

GREEDY = Sampling(5)
PROMPTS = [f"{n * 37} and {'so ' * (n % 4)}on" for n in range(10)]
COUNTS, STRENGTHS = (3, 6), (-2.0, -1.0, 1.0, 2.0)
FEW = {"counts": (3,), "strengths": (1.0, 2.0)}


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
        options = TuneOptions(**{"counts": COUNTS, "strengths": STRENGTHS} | changes)
        neurons = tiny.make_neurons() if neurons is None else neurons
        task = EvaluationTask(questions, check, GREEDY)
        return tune(stock["qwen3"], tokenizer, neurons, gate, task, bases["qwen3"], options)

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
    assert report.rule == replace(best, questions=tuple(identity(prompt) for prompt in PROMPTS))


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
    seen = (digest(PROMPTS[2]), identity(f"Question: {PROMPTS[7]}\nThinking process:"))
    parts = {"neurons": tiny.make_neurons(), "gate": gate}
    parts[part] = replace(parts[part], questions=seen)
    with pytest.raises(TraceError, match=r"questions: 2 of 10 were used before.*first: q2.*; give others$"):
        run(["x"] * 10, **parts)


def test_the_rule_remembers_the_questions_of_every_stage(run, gate):
    neurons = replace(tiny.make_neurons(), questions=("a" * 16,))
    rule = run(["x"] * 10, neurons=neurons, gate=replace(gate, questions=("b" * 16,))).rule
    assert set(rule.questions) == {"a" * 16, "b" * 16, *map(identity, PROMPTS)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strengths": (0.0, 1.0)}, r"tune: counts \[3, 6\] and strengths \[0.0, 1.0\]; expected numbers other than 0"),
        ({"strengths": ()}, r"strengths \[\]; expected"),
        ({"counts": ()}, r"tune: counts \[\]"),
        ({"counts": (0, 3)}, r"tune: counts \[0, 3\]"),
        ({"counts": (7,)}, "neurons: 7 requested; the set has 6"),
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
    with pytest.raises(MissingExtraError, match=r"pip install 'scikit-learn>=1.5' 'scipy>=1.13'"):
        run(["x"] * 10)


def halved(run, completions, bases, **changes):
    """Tuning where 3 neurons at 2 are right, with two questions first."""
    best = SteeringRule(tiny.make_neurons().top(3), 2.0, bases["qwen3"])
    return run([text or "nothing" for text in completions(best)], search=Search(first=3), **changes)


def test_halving_stops_settings_early_and_finishes_the_best(run, completions, bases):
    report = halved(run, completions, bases)
    assert [trial.arm.questions for trial in report.trials].count(3) == 5  # of 8: 3 go on to 9, 1 to all 10
    assert [trial.arm.questions for trial in report.trials].count(9) == 2
    assert [trial.stopped for trial in report.trials].count(False) == 1
    assert (report.chosen.count, report.chosen.strength, report.chosen.arm.accuracy) == (3, 2.0, 1)
    assert (report.off.questions, report.chosen.arm.questions, report.bias.settings) == (10, 10, 8)


def test_a_stopped_setting_is_compared_on_the_questions_that_it_answered(run, completions, bases):
    whole = {(t.count, t.strength): t for t in run([x or "nothing" for x in completions(None)]).trials}
    for trial in run([x or "nothing" for x in completions(None)], search=Search(first=3)).trials:
        assert trial.arm.accuracy <= 1 - trial.arm.broken / trial.arm.questions
        assert trial.arm.broken <= whole[trial.count, trial.strength].arm.broken


def test_the_order_of_questions_is_the_seeds(run, completions, bases):
    ranked = [text or "nothing" for text in completions(None)]
    one, same, other = (run(ranked, search=Search(first=3, seed=seed)).as_record()["trials"] for seed in (0, 0, 3))
    assert one == same
    assert one != other


def test_rankings_and_starts_are_chosen_among(run, completions, bases):
    wrong = tiny.make_neurons()
    right = replace(wrong, delta=-2.5 * np.asarray(wrong.delta), questions=("a" * 16,))
    best = SteeringRule(right.top(3), 2.0, bases["qwen3"], start="first_generated_token")
    report = run(
        [text or "nothing" for text in completions(best)],
        neurons={"wrong": wrong, "right": right},
        start=("last_prompt_token", "first_generated_token"),
    )
    assert report.chosen.arm.accuracy == 1
    assert report.chosen.arm.name == "3 neurons of right at 2 from first_generated_token"
    assert (len(report.trials), report.as_record()["ranking"], report.rule.start) == (32, "right", best.start)
    assert "a" * 16 in report.rule.questions


def test_questions_that_found_any_of_the_rankings_are_refused(run):
    seen = replace(tiny.make_neurons(), questions=(digest(PROMPTS[2]),))
    with pytest.raises(TraceError, match="questions: 1 of 10 were used before"):
        run(["x"] * 10, neurons={"one": tiny.make_neurons(), "other": seen})


def test_strengths_are_sampled_from_a_span(run, completions):
    pytest.importorskip("optuna")
    span = Span(0.5, 4)
    first, again = (run(completions(None), strengths=span, search=Search(trials=5, first=3)) for _ in range(2))
    assert first.as_record() == again.as_record()
    assert len({(trial.count, trial.strength) for trial in first.trials}) == 5
    assert all(0.5 <= abs(trial.strength) <= 4 for trial in first.trials)


def test_a_gain_that_luck_explains_is_called_so(run, completions, bases):
    plain = completions(None)
    best = completions(SteeringRule(tiny.make_neurons().top(3), 2.0, bases["qwen3"]))
    one = next(n for n, text in enumerate(best) if text != plain[n])
    answers = [best[n] if n == one else "nobody says this" for n in range(10)]
    report = run(answers)
    assert (report.chosen.arm.fixed, report.beats_off, report.distinguishable) == (1, True, False)
    assert "NOT DISTINGUISHABLE FROM LUCK: the best of 8 settings gains as much by chance" in report.line()
    assert report.line().endswith(" points on fresh questions")


@pytest.mark.parametrize("gated", [True, False])
def test_a_journal_replays_without_the_model(gated, run, gate, completions, tmp_path, monkeypatch):
    given = {"gate": gate if gated else None, "journal": tmp_path / "j.jsonl", "search": Search(first=3), **FEW}
    whole = run(completions(None), **given)
    content = (tmp_path / "j.jsonl").read_bytes()
    monkeypatch.setattr(answer_cache, "prefill", None)
    assert run(completions(None), **given).as_record() == whole.as_record()
    assert (tmp_path / "j.jsonl").read_bytes() == content
    assert whole.as_record() == run_without_journal(run, completions, given, monkeypatch)


def run_without_journal(run, completions, given, monkeypatch):
    monkeypatch.undo()
    return run(completions(None), **{**given, "journal": None}).as_record()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_journal_that_was_cut_anywhere_ends_as_the_whole_one(share, run, completions, tmp_path):
    path = tmp_path / "j.jsonl"
    whole, content = run(completions(None), journal=path, **FEW), path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert run(completions(None), journal=path, **FEW).as_record() == whole.as_record()
    assert untimed(path.read_bytes()) == untimed(content)


def untimed(content):
    """A journal without the seconds that each batch took, and the seals over them."""
    return [json.loads(line) | {"seconds": 0, "seal": ""} for line in content.splitlines()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"my notes", r"j.jsonl:1: is not JSON.*expected the journal of an earlier run"),
        (b'{"kind": "traces"}\n', "was written with other questions, another checker or other generation"),
        (b"{head}[1, 2]\n", "j.jsonl:2: is not as it was written"),
    ],
)
def test_a_file_that_is_no_journal_of_this_run_is_refused_and_left_alone(content, message, run, tmp_path):
    path = tmp_path / "j.jsonl"
    run(["x"] * 10, journal=path, **FEW)
    content = content.replace(b"{head}", path.read_bytes().splitlines(keepends=True)[0])
    path.write_bytes(content)
    with pytest.raises(TraceError, match=message):
        run(["x"] * 10, journal=path, **FEW)
    assert path.read_bytes() == content


@pytest.mark.parametrize("changes", [{"questions": [99]}, {"correct": [["yes"]]}, {"seconds": -1}, {"condition": 1}])
def test_a_whole_line_that_is_no_batch_of_answers_is_refused(changes, run, tmp_path):
    run(["x"] * 10, journal=tmp_path / "j.jsonl", **FEW)
    head = json.loads((tmp_path / "j.jsonl").read_bytes().splitlines()[0])
    line = {"condition": "off", "questions": [1], "correct": [[1]], "tokens": [[1]], "seconds": 0}
    other = SealedLog(tmp_path / "other", head["of"])
    other.append(line | changes)
    other.close()
    with pytest.raises(TraceError, match="other:2: holds a line that is no batch of answers"):
        run(["x"] * 10, journal=tmp_path / "other", **FEW)


def test_a_journal_of_other_answers_is_refused(run, tmp_path):
    run(["x"] * 10, journal=tmp_path / "j.jsonl", **FEW)
    with pytest.raises(TraceError, match="delete it to begin again"):
        run(["y"] * 10, journal=tmp_path / "j.jsonl", **FEW)


def test_every_trial_is_reported_in_both_formats(run, completions, bases, tmp_path):
    report = halved(run, completions, bases, neurons={"a|b": tiny.make_neurons()})
    report.save(tmp_path / "r.json")
    trials = json.loads((tmp_path / "r.json").read_text())["trials"]
    assert [trial["chosen"] for trial in trials].count(True) == 1
    assert {trial["arm"]["questions"] for trial in trials} == {3, 9, 10}
    report.save(tmp_path / "r.md")
    lines = (tmp_path / "r.md").read_text().splitlines()
    assert sum(line.startswith("| stopped |") for line in lines) == 7
    assert sum(line.startswith("| chosen | 3 neurons at 2 | 10 | 100.0% |") for line in lines) == 1
    assert "(stopped at 3)" in report.table()
    with pytest.raises(ArtifactError, match=r"no format is called '.csv'; expected .json or .md"):
        report.save(tmp_path / "r.csv")
