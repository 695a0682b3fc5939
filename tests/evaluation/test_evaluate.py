"""Paired arms, their statistics and their controls, against real generation and brute force."""

import copy
import json
import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from adaras_export.core import families
from adaras_export.core.markdown import Example
from adaras_export.core.neurons import NeuronSet
from adaras_export.core.question_identity import BOXED, identity
from adaras_export.core.traces import Question, digest
from adaras_export.errors import MissingExtraError, RuleError, TraceError
from adaras_export.evaluation.answer_cache import AnswerCache
from adaras_export.evaluation.answers_by_arm import EvaluationOptions, _example
from adaras_export.evaluation.arms import compare
from adaras_export.evaluation.claims import conclusion
from adaras_export.evaluation.controls import random_control
from adaras_export.evaluation.evaluate import evaluate
from adaras_export.evaluation.record import read_evaluation
from adaras_export.evaluation.task import EvaluationTask
from adaras_export.modeling.gate import gate_probabilities
from adaras_export.modeling.generation import Sampling, complete, complete_ids, decode, encode_prompt
from adaras_export.modeling.steering import steered

pytest.importorskip("scipy.stats")

GREEDY = Sampling(5)
QUESTIONS = [Question(f"q{n}", f"{n * 37} and {'so ' * (n % 4)}on", "x") for n in range(14)]
QUESTIONS.append(Question("chat", [{"role": "user", "content": "4+4"}], "x"))
STARTS = ["last_prompt_token", "first_generated_token"]


def has_even_sum(completion, answer):
    """A verdict that random text gets right about every second time."""
    return sum(completion.encode()) % 2 == 0


@pytest.fixture(scope="module")
def task():
    return EvaluationTask(QUESTIONS, has_even_sum, GREEDY, max_rows=4)


@pytest.fixture(scope="module")
def rule(stock, tokenizer, bases):
    """A rule for qwen3 by (gated, start), whose gate steers about half of the questions."""
    gate = tiny.make_gate()
    found = np.sort(gate_probabilities(stock["qwen3"], tokenizer, gate, [q.prompt for q in QUESTIONS]))
    gate = replace(gate, threshold=float(found[6:8].mean()))

    def make(*, gated=True, start="last_prompt_token", **fields):
        return tiny.make_rule(bases["qwen3"], gate=gate if gated else None, start=start, **fields)

    return make


@pytest.fixture(scope="module")
def run(stock, tokenizer, task):
    """`evaluate` on the tiny qwen3 with two random controls."""

    def go(rule, task=task, **changes):
        return evaluate(
            stock["qwen3"], tokenizer, rule, task, EvaluationOptions(**({"random_seeds": (0, 1)} | changes))
        )

    return go


@pytest.fixture(scope="module")
def evaluation(rule, run):
    """That of the gated rule. Read only."""
    return run(rule())


def verdicts_of(model, tokenizer, rule):
    """Question by question, alone in its batch, from the prompt on; ``rule`` None is plain."""
    right = []
    for question in QUESTIONS:
        row = encode_prompt(tokenizer, question.prompt)
        with nullcontext() if rule is None else steered(model, rule):
            (text,) = complete(model, tokenizer, [row], GREEDY, [question.id])
        right.append([has_even_sum(text, "")])
    return right


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_every_arm_is_what_really_generating_under_its_rule_gives(start, rule, run, evaluation, stock, tokenizer):
    one = rule(start=start)
    found = evaluation if start == "last_prompt_token" else run(one)
    rules = {"off": None, "gated": one, "always": one.ungated(), "flipped": one.with_strength(-one.strength)}
    rules |= {f"random {seed}": random_control(stock["qwen3"], one, seed) for seed in (0, 1)}
    for name, by_hand in rules.items():
        assert found.verdicts[name].tolist() == verdicts_of(stock["qwen3"], tokenizer, by_hand), name
    assert 0 < found.steered_share < 1
    assert found.verdicts["gated"].tolist() not in (found.verdicts["always"].tolist(), found.verdicts["off"].tolist())


def test_without_a_gate_every_question_is_steered(rule, run, stock, tokenizer):
    one = rule(gated=False)
    found = run(one)
    assert [arm.name for arm in found.arms] == ["off", "always", "flipped", "random 0", "random 1"]
    assert found.steered_share == 1
    assert found.verdicts["always"].tolist() == verdicts_of(stock["qwen3"], tokenizer, one)


def test_arms_come_in_a_fixed_order_and_count_their_verdicts(evaluation):
    found = evaluation
    assert [arm.name for arm in found.arms] == ["off", "always", "gated", "flipped", "random 0", "random 1"]
    for arm in found.arms:
        verdicts, off = found.verdicts[arm.name], found.verdicts["off"]
        assert arm == compare(arm.name, verdicts[:, 0], off[:, 0])
        assert (arm.questions, arm.accuracy) == (15, verdicts.mean())
        assert (arm.fixed, arm.broken) == ((verdicts & ~off).sum(), (off & ~verdicts).sum())
    assert found.arm("gated") is found.arms[2]
    assert found.conclusion == conclusion(found.arms)


def test_strength_0_changes_no_verdict(rule, run):
    found = run(rule(strength=0.0))
    assert all(verdicts.tolist() == found.verdicts["off"].tolist() for verdicts in found.verdicts.values())
    assert all((arm.fixed, arm.broken, arm.p_value) == (0, 0, 1) for arm in found.arms)


@pytest.mark.slow
def test_the_batch_size_changes_no_verdict(rule, run, evaluation, task):
    """Symptom that this would show: arms that differ by rounding. The tiny model's logits lie far apart."""
    one, other = evaluation, run(rule(), replace(task, max_rows=1, token_budget=1))
    assert {name: v.tolist() for name, v in one.verdicts.items()} == {n: v.tolist() for n, v in other.verdicts.items()}


def test_the_example_of_a_record_is_a_question_that_was_set_right_and_that_a_card_can_ask():
    long, first, chat = Question("l", "x" * 999, "x"), Question("f", "1 + 1", "x"), QUESTIONS[-1]
    rows = {"off": np.array([[0], [0], [0]], bool), "always": np.array([[1], [0], [1]], bool)}
    assert _example([long, first, chat], rows) == Example("4+4", chat=True)
    assert _example([long, first, chat], {**rows, "always": rows["off"]}) == Example("1 + 1", chat=False)
    assert _example([long], {name: values[:1] for name, values in rows.items()}) is None


def test_two_runs_give_the_same_record(rule, run, evaluation):
    one, other = evaluation.as_record(), run(rule()).as_record()
    assert one.pop("seconds").keys() == other.pop("seconds").keys()
    assert one == other


def test_the_record_holds_every_verdict_by_question(rule, evaluation):
    found, one = evaluation, rule()
    record = found.as_record()
    assert record["rule"] == one.fingerprint
    assert record["verdicts"]["id"] == [question.id for question in QUESTIONS]
    assert record["verdicts"]["gated"] == [int(right) for (right,) in found.verdicts["gated"]]
    assert record["questions"] == 15
    won = [one.prompt for one, right, off in zip(QUESTIONS, *map(found.verdicts.get, ("gated", "off")), strict=True)
           if right > off]  # fmt: skip
    assert record["example"] in [*won, QUESTIONS[0].prompt][:1]
    assert [arm["name"] for arm in record["arms"]] == [arm.name for arm in found.arms]


def test_progress_reaches_every_answer_of_every_arm(rule, task, stock, tokenizer):
    told = []
    watched = replace(task, progress=lambda done, total: told.append((done, total)))
    AnswerCache(stock["qwen3"], tokenizer, watched).ask([None, rule()])
    assert told[-1] == (30, 30)
    assert len(told) == 8


@pytest.mark.parametrize("part", ["rule", "neurons", "gate"])
def test_questions_that_were_used_before_are_refused_in_whatever_form(part, rule, run):
    """Of one the rule has the prompt's digest alone, as earlier versions wrote it, of the other another prompt."""
    asked = [{"role": "user", "content": f"{QUESTIONS[8].prompt}\n\n{BOXED}"}]
    seen, one = (digest(QUESTIONS[3].prompt), identity(asked)), rule()
    held = one if part == "rule" else getattr(one, part)
    used = replace(held, questions=seen)
    used = used if part == "rule" else replace(one, **{part: used})
    with pytest.raises(TraceError, match=r"questions: 2 of 15 were used before.*first: q3.*--allow-seen"):
        run(used)
    found = run(used, allow_seen=True, random_seeds=())
    assert (found.ids[3], found.seen) == ("q3", 2)
    assert found.as_record()["seen"] == 2


def test_an_exam_that_makes_no_sense_is_refused():
    with pytest.raises(TraceError, match="questions: there are none"):
        EvaluationTask([], has_even_sum, GREEDY)
    with pytest.raises(TraceError, match="samples: 0 answers to each question"):
        EvaluationTask(QUESTIONS, has_even_sum, GREEDY, samples=0)
    with pytest.raises(TraceError, match="samples: 3 answers at temperature 0 are equal"):
        EvaluationTask(QUESTIONS, has_even_sum, GREEDY, samples=3)


def test_a_rule_for_another_model_is_refused(rule, stock, tokenizer, task):
    with pytest.raises(RuleError, match="is not the model that this was made for"):
        evaluate(stock["llama"], tokenizer, rule(gated=False), task)


@pytest.mark.parametrize("seed", range(4))
def test_a_random_control_has_other_neurons_of_the_same_layers_and_the_same_norm(seed, rule, stock):
    one, model = rule(), stock["qwen3"]
    control = random_control(model, one, seed)
    assert control.layers() == one.layers()
    assert (control.strength, control.start, control.gate) == (one.strength, one.start, one.gate)
    for layer in one.layers():
        (own, delta), (drawn, other) = one.neurons_of(layer), control.neurons_of(layer)
        assert len(drawn) == len(own)
        assert not set(drawn.tolist()) & set(own.tolist())
        weight = families.down_projection(model, layer).weight.detach().double()
        norms = [float((weight[:, at] @ torch.tensor(d).double()).norm()) for at, d in ((own, delta), (drawn, other))]
        assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_a_biased_down_projection_does_not_count_in_the_norm(stock, bases):
    one = tiny.make_rule(bases["llama-biased"])
    control = random_control(stock["llama-biased"], one, 0)
    weight = families.down_projection(stock["llama-biased"], 2).weight.detach()
    norms = [float((weight[:, at] @ torch.tensor(d)).norm()) for at, d in (one.neurons_of(2), control.neurons_of(2))]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_a_random_control_depends_on_its_seed_only(rule, stock):
    control = random_control(stock["qwen3"], rule(), 3)
    assert control == random_control(stock["qwen3"], rule(), 3)
    assert control != random_control(stock["qwen3"], rule(), 4)


def test_signs_of_the_random_controls_are_drawn(rule, stock):
    """Of 4 seeds with 6 neurons each; all of one sign by chance: 2 * 2**-24."""
    deltas = np.concatenate([random_control(stock["qwen3"], rule(), seed).neurons.delta for seed in range(4)])
    assert (deltas > 0).any()
    assert (deltas < 0).any()


def test_a_control_of_a_layer_that_adds_nothing_adds_nothing(bases, stock):
    """Symptom: ZeroDivisionError on a rule whose neurons of a layer all had delta 0."""
    neurons = NeuronSet(layer=[2, 2, 3], index=[0, 1, 2], delta=[0.0, 0.0, 1.0])
    control = random_control(stock["qwen3"], tiny.make_rule(bases["qwen3"], neurons=neurons), 0)
    assert control.neurons_of(2)[1].tolist() == [0, 0]
    assert control.neurons_of(3)[1].tolist() != [0]


def test_a_rule_of_a_whole_layer_has_no_random_control(bases, stock):
    whole = NeuronSet(layer=[2] * tiny.MLP_SIZE, index=range(tiny.MLP_SIZE), delta=[1.0] * tiny.MLP_SIZE)
    with pytest.raises(RuleError, match="random control: no neuron of layer 2 beside the rule's adds anything"):
        random_control(stock["qwen3"], tiny.make_rule(bases["qwen3"], neurons=whole), 0)


def test_without_scipy_the_error_names_the_extra_before_anything_is_answered(rule, run, task, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    watched = replace(task, progress=lambda done, total: pytest.fail("answered"))
    with pytest.raises(MissingExtraError, match=r"comparing verdicts needs scipy.*install .*'scipy>=1.13'$"):
        run(rule(), watched)


# Several answers, their lengths, and going on after a crash

SAMPLED = replace(GREEDY, temperature=1.0, seed=4)


@pytest.fixture(scope="module")
def sampled(task):
    return replace(task, sampling=SAMPLED, samples=3)


def by_hand(model, tokenizer, rule, samples=3):
    """Ids of every answer, each alone in its batch, with the keys of traces."""
    found = []
    for question in QUESTIONS:
        row = encode_prompt(tokenizer, question.prompt)
        keys = [f"{question.id}#{answer}" for answer in range(samples)]
        with nullcontext() if rule is None else steered(model, rule):
            found.append([complete_ids(model, tokenizer, [row], SAMPLED, [key])[0] for key in keys])
    return found


def test_sampled_answers_are_those_of_their_keys_under_every_arm(rule, run, sampled, stock, tokenizer):
    one = rule(gated=False)
    found = run(one, sampled, random_seeds=(0,))
    rules = {"off": None, "always": one, "random 0": random_control(stock["qwen3"], one, 0)}
    for name, steering in rules.items():
        ids = by_hand(stock["qwen3"], tokenizer, steering)
        right = [[has_even_sum(decode(tokenizer, row), "") for row in rows] for rows in ids]
        assert found.verdicts[name].tolist() == right, name
        assert found.tokens[name].tolist() == [[len(row) for row in rows] for rows in ids]
        assert found.cut[name].tolist() == [[len(row) == 5 for row in rows] for rows in ids]
    assert found.verdicts["off"].any(1).sum() > found.verdicts["off"].all(1).sum()


def test_arms_of_several_answers_count_questions(rule, run, sampled):
    found = run(rule(), sampled, random_seeds=())
    off, gated = found.verdicts["off"], found.verdicts["gated"]
    arm = found.arm("gated")
    assert (arm.questions, arm.accuracy) == (15, pytest.approx(gated.mean()))
    assert (arm.fixed, arm.broken) == ((gated.sum(1) > off.sum(1)).sum(), (gated.sum(1) < off.sum(1)).sum())
    assert found.as_record()["samples"] == 3


def test_gated_answers_are_steered_ones_where_the_gate_fires(rule, run, stock, tokenizer):
    one = rule()
    found = run(one, random_seeds=())
    is_steered = (
        gate_probabilities(stock["qwen3"], tokenizer, one.gate, [q.prompt for q in QUESTIONS]) < one.gate.threshold
    )
    for column in (found.tokens, found.cut, found.verdicts):
        assert column["gated"].tolist() == np.where(is_steered[:, None], column["always"], column["off"]).tolist()
    assert set(found.seconds) == {"off", "always"}  # the gated arm took no time of its own
    assert min(found.seconds.values()) > 0


def test_what_is_saved_is_read_as_it_was(evaluation, tmp_path):
    evaluation.save(tmp_path / "e.json")
    assert read_evaluation(tmp_path / "e.json").as_record() == evaluation.as_record()


@pytest.fixture(scope="module")
def whole(rule, run, sampled, tmp_path_factory):
    """The record of a run of several answers that nobody killed, and its journal."""
    path = tmp_path_factory.mktemp("whole") / "journal"
    return run(rule(), sampled, journal=path).as_record(), path.read_bytes()


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_killed_run_goes_on_and_ends_as_a_whole_one(share, whole, rule, run, sampled, tmp_path):
    path, (record, content) = tmp_path / "journal", whole
    path.write_bytes(content[: int(share * len(content))])
    told = []
    again = run(rule(), replace(sampled, progress=lambda done, _: told.append(done)), journal=path).as_record()
    assert record | {"seconds": 0} == again | {"seconds": 0}
    assert path.read_bytes().count(b"\n") == content.count(b"\n")
    assert 0 < told[-1] < 15 * 3 * 5  # the answers that were there are not asked for again


def test_a_journal_of_another_model_is_refused(rule, run, task, stock, tokenizer, tmp_path):
    """Symptom that this would show: a fine-tuned model of the same shape takes over the base's answers."""
    run(rule(), journal=tmp_path / "journal")
    cache = AnswerCache(stock["qwen3"], tokenizer, task, tmp_path / "journal")
    assert not cache.missing([None], range(15))
    cache.close()
    other = copy.deepcopy(stock["qwen3"])
    next(other.parameters()).data[0] += 1
    with pytest.raises(TraceError, match="delete it to begin again"):
        AnswerCache(other, tokenizer, task, tmp_path / "journal")
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = f"{tokenizer.chat_template}!"
    with pytest.raises(TraceError, match="delete it to begin again"):
        AnswerCache(stock["qwen3"], templated, task, tmp_path / "journal")


def test_the_gates_pass_is_not_run_again(rule, run, tmp_path, monkeypatch):
    whole = run(rule(), random_seeds=(), journal=tmp_path / "journal").as_record()
    monkeypatch.setattr("adaras_export.evaluation.answers_by_arm.gate_probabilities", lambda *_: pytest.fail("read"))
    assert run(rule(), random_seeds=(), journal=tmp_path / "journal").as_record() == whole


def test_a_resumed_run_decides_on_the_edge_of_the_threshold_as_the_fresh_one_did(rule, run, tmp_path):
    """Fresh, p and the threshold were compared in float32; from a journal, in float64: the edge went to the other side.

    The threshold here is the next float64 above some p, and as a float32 equal to it: that question is not steered.
    """
    run(rule(), random_seeds=(), journal=tmp_path / "first")
    lines = [json.loads(line) for line in (tmp_path / "first").read_bytes().splitlines()]
    found = np.sort([value for line in lines if "figures" in line for (value,) in line["values"]])
    gate = replace(rule().gate, threshold=float(np.nextafter(found[5], 1)))
    edge = replace(rule(), gate=gate)
    for _ in ("fresh", "resumed"):
        assert run(edge, random_seeds=(), journal=tmp_path / "second").steered_share == 5 / 15
