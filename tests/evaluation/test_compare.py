"""Ways to run one rule, against real generation and the oracle's plain loops."""

import json
import math
from dataclasses import replace

import numpy as np
import oracle
import pytest
import tiny

from adaras_export.core.intervals import Estimate
from adaras_export.core.traces import Question, digest
from adaras_export.errors import RuleError, TraceError
from adaras_export.evaluation import compare
from adaras_export.evaluation.answers_by_arm import EvaluationOptions
from adaras_export.evaluation.arms import RULE_ARMS
from adaras_export.evaluation.claims import arms_of, conclusion
from adaras_export.evaluation.compare import compare_arms
from adaras_export.evaluation.controls import random_control
from adaras_export.evaluation.evaluate import evaluate
from adaras_export.evaluation.task import EvaluationTask
from adaras_export.modeling.gate import gate_probabilities
from adaras_export.modeling.generation import Sampling, complete, complete_ids, encode_prompt
from adaras_export.modeling.steering import steered, steered_everywhere

pytest.importorskip("scipy.stats")

STEPS = 4
QUESTIONS = [Question(f"q{n}", f"{n * 37} and {'so ' * (n % 4)}on", "x") for n in range(8)]
QUESTIONS.append(Question("chat", [{"role": "user", "content": "4+4"}], "x"))
STARTS = ["last_prompt_token", "first_generated_token"]


def has_even_sum(completion, answer):
    """A verdict that random text gets right about every second time."""
    return sum(completion.encode()) % 2 == 0


TASK = EvaluationTask(QUESTIONS, has_even_sum, Sampling(STEPS), max_rows=4)


@pytest.fixture(scope="module")
def gate(stock, tokenizer):
    """It steers about half of the questions."""
    gate = tiny.make_gate()
    found = np.sort(gate_probabilities(stock["qwen3"], tokenizer, gate, [q.prompt for q in QUESTIONS]))
    return replace(gate, threshold=float(found[3:5].mean()))


@pytest.fixture(scope="module")
def rule(gate, bases):
    """A rule for qwen3, whose answers differ between all arms."""

    def make(*, gated=True, **fields):
        return tiny.make_rule(bases["qwen3"], gate=gate if gated else None, **({"strength": 8.0} | fields))

    return make


@pytest.fixture(scope="module")
def run(stock, tokenizer):
    """`compare_arms` on the tiny qwen3 with one random control."""

    def go(rule, arms=RULE_ARMS, task=TASK, **changes):
        return compare_arms(
            stock["qwen3"], tokenizer, rule, task, arms, EvaluationOptions(**({"random_seeds": (0,)} | changes))
        )

    return go


@pytest.fixture(scope="module")
def whole(rule, run):
    """All arms of the usual rule, once."""
    return run(rule())


def lists(evaluation):
    return {name: values.tolist() for name, values in evaluation.verdicts.items()}


def verdicts_of(model, tokenizer, context):
    """Question by question, alone in its batch, from the prompt on."""
    found = []
    for question in QUESTIONS:
        with context():
            (text,) = complete(model, tokenizer, [encode_prompt(tokenizer, question.prompt)], TASK.sampling, [""])
        found.append([has_even_sum(text, "")])
    return found


def test_everywhere_is_what_really_generating_with_every_token_steered_gives(rule, run, stock, tokenizer):
    model, one = stock["qwen3"], rule(gated=False, neurons=tiny.make_neurons(layers=(0, 1)))
    found = lists(run(one, ["everywhere", "always"], random_seeds=()))
    assert found["everywhere"] == verdicts_of(model, tokenizer, lambda: steered_everywhere(model, one))
    assert found["everywhere"] not in (found["always"], found["off"])


def test_the_other_arms_and_the_controls_are_those_of_a_plain_evaluation(whole, rule, stock, tokenizer):
    plain = evaluate(stock["qwen3"], tokenizer, rule(), TASK, EvaluationOptions((0,)))
    assert {name: values for name, values in lists(whole).items() if name != "everywhere"} == lists(plain)
    assert [arm for arm in whole.arms if arm.name != "everywhere"] == list(plain.arms)
    assert [arm.name for arm in whole.arms] == ["off", "always", "gated", "everywhere", "flipped", "random 0"]
    assert whole.steered_share == plain.steered_share
    # One way more is tested, so the correction is another one.
    assert whole.conclusion == f"gated: {conclusion(whole.arms)} {whole.comparison.sentence()}"


def test_arms_that_are_not_named_are_left_out(rule, run):
    found = run(rule(), ["everywhere", "gated"])
    assert [arm.name for arm in found.arms] == ["off", "gated", "everywhere", "flipped", "random 0"]
    assert [gap.name for gap in found.comparison.gaps] == ["gated", "everywhere"]


def test_controls_are_steered_as_the_first_arm_is(rule, run, stock, tokenizer):
    model, one = stock["qwen3"], rule()
    others = {"flipped": one.with_strength(-one.strength), "random 0": random_control(model, one, 0)}
    everywhere, always = run(one, ["everywhere"]), run(one, ["always", "everywhere"])
    for name, other in others.items():
        assert lists(everywhere)[name] == verdicts_of(model, tokenizer, lambda o=other: steered_everywhere(model, o))
        assert lists(always)[name] == verdicts_of(model, tokenizer, lambda o=other: steered(model, o.ungated()))
    assert everywhere.conclusion.startswith("everywhere: ")


@pytest.mark.parametrize("arms", [["everywhere", "gated", "always"], ["always", "everywhere", "gated", "always"]])
def test_the_order_of_the_arms_does_not_matter(arms, whole, rule, run):
    assert untimed(run(rule(), arms)) == untimed(whole)


def test_divergences_are_not_read_again(whole, rule, run, tmp_path, monkeypatch):
    journal = tmp_path / "journal"
    found = run(rule(), journal=journal)
    assert found.comparison == whole.comparison
    monkeypatch.setattr(compare, "forced_logits", lambda *_: pytest.fail("read"))
    assert run(rule(), journal=journal).as_record() == found.as_record()


def untimed(evaluation):
    return evaluation.as_record() | {"seconds": 0}


def plain_of(arm, rule):
    """An arm as the oracle takes it."""
    plain = tiny.plain_rule(rule)
    if arm == "off":
        return plain | {"strength": 0.0, "gate": None}
    return plain | {"gated": {}, "always": {"gate": None}, "everywhere": {"gate": None, "start": "everywhere"}}[arm]


def kl(one_V, other_V):
    """KL(one || other) from logits, in plain loops."""
    tops = [max(logits) for logits in (one_V, other_V)]
    totals = [sum(math.exp(x - top) for x in logits) for logits, top in zip((one_V, other_V), tops, strict=True)]
    logs = [
        [x - top - math.log(total) for x in logits]
        for logits, top, total in zip((one_V, other_V), tops, totals, strict=True)
    ]
    return sum(math.exp(p) * (p - q) for p, q in zip(*logs, strict=True))


def told(model, tokenizer, rule):
    """The four divergences of every arm from gated and off, over all questions, by the oracle."""
    figures = {arm: [] for arm in RULE_ARMS}
    for question in QUESTIONS:
        prompt = encode_prompt(tokenizer, question.prompt)
        off = oracle.respond(model, prompt, plain_of("off", rule), STEPS, ends=(tiny.EOS,))
        text, logits = off["ids"], {"off": off["logits"].tolist()}
        for arm in RULE_ARMS:
            found = oracle.respond(model, prompt, plain_of(arm, rule), len(text), follow=text)
            logits[arm] = found["logits"].tolist()
        for arm in RULE_ARMS:
            nats = [[kl(*pair) for pair in zip(logits[one], logits[arm], strict=True)] for one in ("gated", "off")]
            figures[arm].append([figure for one in nats for figure in (sum(one) / len(one), one[0])])
    return {arm: [sum(column) / len(column) for column in zip(*rows, strict=True)] for arm, rows in figures.items()}


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_divergences_are_the_oracles_and_those_of_a_rule_with_one_delta_negated_are_not(
    start, rule, run, stock, tokenizer
):
    one = rule(start=start)
    neurons = replace(one.neurons, delta=one.neurons.delta * np.where(np.arange(6) == 0, -1, 1))
    right, wrong = (told(stock["qwen3"], tokenizer, other) for other in (one, replace(one, neurons=neurons)))
    gaps = run(one, random_seeds=()).comparison.gaps
    found = [figure.value for gap in gaps for figure in gap.divergences()]
    assert found == pytest.approx([figure for gap in gaps for figure in right[gap.name]], rel=1e-4, abs=1e-9)
    assert found != pytest.approx([figure for gap in gaps for figure in wrong[gap.name]], rel=1e-2, abs=1e-9)


def test_the_reference_is_no_distance_from_itself_and_the_others_are_some(whole):
    own, *others = whole.comparison.gaps
    zero = Estimate(0, 0, 0)
    assert (own.name, own.difference, own.kl_reference, own.kl_reference_first) == ("gated", zero, zero, zero)
    assert own.kl_off.value > 0
    for gap in others:
        assert gap.kl_reference.low > 0
        assert gap.kl_reference.low <= gap.kl_reference.value <= gap.kl_reference.high


def test_paired_figures_are_held_against_the_reference(whole):
    gated = whole.verdicts["gated"]
    for gap in whole.comparison.gaps[1:]:
        own = whole.verdicts[gap.name]
        assert gap.difference.value == pytest.approx(own.mean() - gated.mean())
        assert (gap.fixed, gap.broken) == ((own & ~gated).sum(), (gated & ~own).sum())


def test_strength_0_everywhere_is_off(rule, run):
    found = run(rule(strength=0.0))
    assert lists(found)["everywhere"] == lists(found)["off"]
    for gap in found.comparison.gaps:
        assert {figure.value for figure in gap.divergences()} == {0}


def test_a_rule_without_a_gate_is_held_against_always(rule, run):
    found = run(rule(gated=False), ["everywhere", "always"])
    assert (found.comparison.reference, found.comparison.tokens) == ("always", STEPS)
    assert found.steered_share == 1
    assert "everywhere against always: " in found.conclusion


@pytest.mark.parametrize(("rows", "logits"), [(9, compare._LOGITS), (4, 1)])
def test_batches_of_another_size_give_the_same_verdicts_and_divergences(rows, logits, whole, rule, run, monkeypatch):
    monkeypatch.setattr(compare, "_LOGITS", logits)
    found = run(rule(), task=replace(TASK, max_rows=rows))
    assert lists(found) == lists(whole)
    for one, other in zip(found.comparison.gaps, whole.comparison.gaps, strict=True):
        expected = [figure.value for figure in other.divergences()]
        assert [figure.value for figure in one.divergences()] == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_the_token_that_ends_a_text_counts_and_none_behind_the_limit(rule, run, stock, tokenizer, monkeypatch):
    rows = [encode_prompt(tokenizer, question.prompt) for question in QUESTIONS]
    texts = complete_ids(stock["qwen3"], tokenizer, rows, TASK.sampling, [""] * len(rows))
    stop = next(id_ for text in texts for id_ in text[1:-1] if id_ < 94)  # printable
    task = replace(TASK, sampling=Sampling(STEPS, stop=tokenizer.decode([stop])))
    expected = [text.index(stop) + 1 if stop in text else STEPS for text in texts]
    assert run(rule(), ["gated"], task, random_seeds=()).comparison.mean_tokens == np.mean(expected) < STEPS
    monkeypatch.setattr(compare, "TOKENS", 3)
    cut = run(rule(), ["gated"], random_seeds=()).comparison
    assert (cut.tokens, cut.mean_tokens) == (3, 3)


def test_the_record_has_the_comparison_beside_what_it_always_had(whole, rule, stock, tokenizer):
    record = json.loads(json.dumps(whole.as_record(), allow_nan=False))
    plain = evaluate(stock["qwen3"], tokenizer, rule(), TASK, EvaluationOptions((0,))).as_record()
    assert record.keys() - plain.keys() == {"comparison"}
    assert (record["version"], record["rule"]) == (plain["version"], plain["rule"])
    assert [gap["name"] for gap in record["comparison"]["gaps"]] == list(RULE_ARMS)
    assert record["comparison"]["gaps"][2]["kl_off"]["value"] == whole.comparison.gaps[2].kl_off.value


def test_the_table_shows_arms_and_gaps(whole):
    above, below = whole.table().split("\n\n")
    assert len(above.splitlines()) == 7
    assert below == whole.comparison.table()


def test_arms_that_there_are_not_are_refused_by_name(rule):
    with pytest.raises(RuleError, match="compare: no arm 'all', ''; expected of: gated, always, everywhere"):
        arms_of(rule(), ["all", "gated", ""])
    with pytest.raises(RuleError, match="compare: the rule has no gate for the arm gated; expected of: always, every"):
        arms_of(rule(gated=False), ["gated", "always"])
    with pytest.raises(RuleError, match="compare: no arm is named"):
        arms_of(rule(), [])


def test_questions_that_were_used_before_are_refused(rule, run):
    used = replace(rule(), questions=(digest(QUESTIONS[3].prompt),))
    with pytest.raises(TraceError, match=r"questions: 1 of 9 were used before"):
        run(used)
    assert run(used, ["gated"], allow_seen=True).ids[3] == "q3"


def test_progress_reaches_every_question_of_the_reading(rule, run):
    counts = []
    run(rule(), task=replace(TASK, progress=lambda done, total: counts.append((done, total))))
    assert counts[-1] == (9, 9)
