"""Rankings, against the formulas of the paper written as loops over a tiny model's activations."""

import copy
import json
import math
import statistics

import numpy as np
import oracle
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaras_export.core.base_model import BaseModel
from adaras_export.core.neuron_stats import AttributionStats, NeuronStats, with_question
from adaras_export.core.question_identity import identity
from adaras_export.core.traces import Trace, by_question
from adaras_export.discovery.identify import IdentifyOptions, identify, mixed, read_attribution, read_stats
from adaras_export.discovery.rankings import rank_by_attribution, rank_by_difference
from adaras_export.errors import RuleError, TraceError
from adaras_export.modeling.activations import Reading

CHAT = [{"role": "user", "content": "4+4"}]
TRACES = [
    Trace("a1", "a", "1+1=", " 2", True),
    Trace("a2", "a", "1+1=", " it is 3", False),
    Trace("a3", "a", "1+1=", "two!", True),
    Trace("b1", "b", "what is 12+30?", " 42", True),
    Trace("b2", "b", "what is 12+30?", "4", False),
    Trace("b3", "b", "what is 12+30?", " forty", False),
    Trace("c1", "c", CHAT, "8", True),
    Trace("c2", "c", CHAT, "eight or nine", False),
    Trace("d1", "d", "easy", "yes", True),
]
PLACES = [(layer, index) for layer in range(tiny.LAYERS) for index in range(tiny.MLP_SIZE)]


def ids_of(tokenizer, trace):
    if isinstance(trace.prompt, str):
        prompt = list(trace.prompt.encode())
    else:
        prompt = tokenizer("<user>4+4<eos><assistant>")["input_ids"]
    prompt = tokenizer(trace.prompt)["input_ids"] if isinstance(trace.prompt, str) else prompt
    return prompt, tokenizer(trace.completion, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def by_hand(stock, tokenizer):
    """Mean of h over all tokens of prompt and completion, by trace id: [layer][neuron], plain floats."""
    found = {}
    for trace in TRACES:
        prompt, completion = ids_of(tokenizer, trace)
        h = oracle.activations_of(stock["qwen3"], prompt + completion)
        found[trace.id] = [[statistics.fmean(token[i] for token in layer) for i in range(tiny.MLP_SIZE)] for layer in h]
    return found


def class_means(by_hand, questions, label):
    """(layer, index) -> mean over questions of the mean over the traces with that label."""
    means = {}
    for layer, index in PLACES:
        per_question = []
        for question in questions:
            own = [t for t in TRACES if t.question_id == question and t.correct is label]
            per_question.append(sum(by_hand[t.id][layer][index] for t in own) / len(own))
        means[layer, index] = sum(per_question) / len(per_question)
    return means


def test_the_papers_ranking_equals_its_formula(stock, tokenizer, bases, by_hand):
    neurons = identify(stock["qwen3"], tokenizer, TRACES, bases["qwen3"], IdentifyOptions(keep=60, min_layer=1)).neurons
    good, bad = class_means(by_hand, "abc", True), class_means(by_hand, "abc", False)
    score = {p: abs(good[p] - bad[p]) / (abs(good[p]) + abs(bad[p]) + 1e-8) for p in PLACES}
    for place, delta, one in zip(
        zip(neurons.layer.tolist(), neurons.index.tolist(), strict=True), neurons.delta, neurons.score, strict=True
    ):
        assert delta == pytest.approx(good[place] - bad[place], abs=2e-5)
        assert one == pytest.approx(score[place], rel=1e-2, abs=1e-3)
    kept = set(zip(neurons.layer.tolist(), neurons.index.tolist(), strict=True))
    worst = min(score[place] for place in kept)
    assert all(score[place] <= worst + 1e-3 for place in PLACES if place not in kept and place[0] >= 1)
    assert neurons.layer.min() >= 1
    assert neurons.ranking == "paper"
    assert neurons.base == bases["qwen3"]
    assert neurons.questions == tuple(sorted(identity(t.prompt) for t in TRACES if t.id in ("a1", "b1", "c1")))


def test_unpaired_traces_all_weigh_the_same(stock, tokenizer, bases, by_hand):
    found = read_stats(stock["qwen3"], tokenizer, TRACES, bases["qwen3"], contrast="unpaired")
    for label, mean in zip((True, False), found.means(), strict=True):
        own = [by_hand[t.id] for t in TRACES if t.correct is label]
        np.testing.assert_allclose(mean, np.mean(own, 0), atol=2e-5)


def test_the_deviation_is_over_all_traces_of_the_contrasted_questions(stock, tokenizer, bases, by_hand):
    found = read_stats(stock["qwen3"], tokenizer, TRACES, bases["qwen3"])
    expected = np.std([by_hand[t.id] for t in TRACES if t.question_id != "d"], 0)
    np.testing.assert_allclose(found.deviation(), expected, atol=1e-4)


@pytest.mark.parametrize("token_budget", [1, 30, 4096])
def test_the_batch_size_does_not_change_what_is_read(token_budget, stock, tokenizer, bases):
    one = read_stats(stock["qwen3"], tokenizer, TRACES, bases["qwen3"])
    other = read_stats(stock["qwen3"], tokenizer, TRACES, bases["qwen3"], reading=Reading(token_budget))
    np.testing.assert_allclose(one.correct_sum, other.correct_sum, atol=2e-5)
    assert one.questions == other.questions


def test_parts_that_are_read_apart_merge_to_the_whole(stock, tokenizer, bases):
    whole = read_stats(stock["qwen3"], tokenizer, TRACES, bases["qwen3"])
    parts = [
        read_stats(stock["qwen3"], tokenizer, [t for t in TRACES if t.question_id in names], bases["qwen3"])
        for names in ("a", "bc")
    ]
    merged = parts[1].merge(parts[0])
    np.testing.assert_allclose(merged.incorrect_sum, whole.incorrect_sum, atol=2e-5)
    assert merged.questions == whole.questions


def test_progress_reaches_the_number_of_questions(stock, tokenizer, bases):
    told = []
    reading = Reading(progress=lambda done, total: told.append((done, total)))
    read_stats(stock["qwen3"], tokenizer, TRACES, bases["qwen3"], reading=reading)
    assert told[-1] == (3, 3)


@given(st.lists(st.integers(0, 3), min_size=6, max_size=6), st.integers(1, 7), st.integers(0, 1))
def test_ties_go_to_the_lower_layer_and_index(scores, keep, min_layer):
    base = BaseModel("x", "llama", 2, 3, 4)
    gradient = np.array(scores, np.float64).reshape(2, 3)
    traces = np.array([np.ones((2, 3)), -np.ones((2, 3))])  # deviation 1 everywhere
    stats = NeuronStats.empty(base).update("0", traces[:1], traces[1:])
    attribution = AttributionStats.empty(base).update("0", gradient)
    places = [(layer, index) for layer in range(min_layer, 2) for index in range(3)]
    if keep > len(places):
        with pytest.raises(RuleError, match=f"{keep} wanted from layer {min_layer} on; x has 2 layers of 3"):
            rank_by_attribution(stats, attribution, keep, min_layer)
        return
    neurons = rank_by_attribution(stats, attribution, keep, min_layer)
    expected = sorted(places, key=lambda place: (-gradient[place], place))[:keep]
    assert list(zip(neurons.layer.tolist(), neurons.index.tolist(), strict=True)) == expected


def test_equal_scores_of_the_papers_ranking_go_by_the_size_of_the_difference():
    base = BaseModel("x", "llama", 1, 4, 4)
    good = np.array([[[1.0, 3.0, 2.0, 3.0]]])  # all flip their sign: score 1 but for the 1e-8
    stats = NeuronStats.empty(base).update("0", good * 1e6, -good * 1e6)
    neurons = rank_by_difference(stats, 4)
    assert neurons.score.tolist() == [1, 1, 1, 1]
    assert neurons.index.tolist() == [1, 3, 2, 0]


@pytest.mark.parametrize(("keep", "min_layer"), [(-1, 0), (1, 4), (1, -1), (193, 0), (97, 2)])
def test_an_impossible_choice_is_refused(keep, min_layer, stock, tokenizer, bases):
    with pytest.raises(RuleError, match=f"neurons: {keep} wanted from layer {min_layer} on"):
        identify(stock["qwen3"], tokenizer, TRACES, bases["qwen3"], IdentifyOptions(keep=keep, min_layer=min_layer))


def test_the_attribution_ranking_is_gradient_times_deviation(stock, tokenizer, bases, by_hand):
    model, base = stock["qwen3"], bases["qwen3"]
    neurons = identify(model, tokenizer, TRACES, base, IdentifyOptions("attribution", 96)).neurons
    gradient = read_attribution(model, tokenizer, TRACES, base).mean()
    sigma = np.std([by_hand[t.id] for t in TRACES if t.question_id != "d"], 0)
    assert neurons.layer.min() == 2  # half of the layers is left to a causal gate
    for layer, index, delta, score in zip(neurons.layer, neurons.index, neurons.delta, neurons.score, strict=True):
        assert delta == pytest.approx(math.copysign(sigma[layer, index], gradient[layer, index]), abs=1e-4)
        assert score == pytest.approx(abs(gradient[layer, index]) * sigma[layer, index], rel=1e-2, abs=1e-5)
    assert (np.diff(neurons.score) <= 0).all()
    assert neurons.ranking == "attribution"


def test_statistics_that_were_recorded_already_are_used(stock, tokenizer, bases, by_hand):
    stats = NeuronStats.empty(bases["qwen3"])
    means = {name: np.array(mean, np.float32) for name, mean in by_hand.items()}
    for question in mixed(list(by_question(TRACES).values())):
        stats = with_question(stats, question, means)
    recorded = identify(stock["qwen3"], tokenizer, TRACES, bases["qwen3"], IdentifyOptions(keep=9), stats=stats).neurons
    read = identify(stock["qwen3"], tokenizer, TRACES, bases["qwen3"], IdentifyOptions(keep=9)).neurons
    np.testing.assert_allclose(recorded.delta, read.delta, atol=2e-5)


def test_traces_of_one_outcome_are_refused(stock, tokenizer, bases):
    for label in (True, False):
        own = [trace for trace in TRACES if trace.correct is label]
        for read in (read_stats, read_attribution):
            with pytest.raises(TraceError, match=r"none of . questions has both correct and incorrect traces"):
                read(stock["qwen3"], tokenizer, own, bases["qwen3"])
        with pytest.raises(TraceError, match=r"traces: none is (in)?correct"):
            read_stats(stock["qwen3"], tokenizer, own, bases["qwen3"], contrast="unpaired")


def test_a_model_with_a_nan_weight_is_refused_by_question_and_layer(stock, tokenizer, bases):
    broken = copy.deepcopy(stock["qwen3"])
    with torch.no_grad():
        broken.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(TraceError, match=rf"question {identity('1+1=')}: activations of layers \[2, 3\] are NaN"):
        read_stats(broken, tokenizer, TRACES, bases["qwen3"])
    with pytest.raises(TraceError, match=r"gradient is NaN or infinite; load the model in float32"):
        read_attribution(broken, tokenizer, TRACES, bases["qwen3"])


@pytest.mark.parametrize("ranking", ["paper", "attribution"])
def test_what_was_found_is_told_to_a_person_and_to_a_machine(ranking, stock, tokenizer, bases):
    found = identify(stock["qwen3"], tokenizer, TRACES, bases["qwen3"], IdentifyOptions(ranking, 9))
    assert found.line().startswith("9 neurons of layers 2 to 3 from 3 questions, by ")
    record = json.loads(json.dumps(found.as_record()))
    assert (record["neurons"], record["ranking"], record["questions"], record["traces"]) == (9, ranking, 3, 8)
    assert (record["split_half_cosine"] is None) == (ranking == "paper")


def test_statistics_of_other_traces_are_refused(stock, tokenizer, bases):
    stats = read_stats(stock["qwen3"], tokenizer, TRACES, bases["qwen3"])
    fewer = [trace for trace in TRACES if trace.question_id != TRACES[0].question_id]
    with pytest.raises(TraceError, match="1 questions are in the statistics or the traces only"):
        identify(stock["qwen3"], tokenizer, fewer, bases["qwen3"], IdentifyOptions(keep=5), stats=stats)
