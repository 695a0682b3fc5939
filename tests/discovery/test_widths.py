"""From traces to a rule, on each family; and on a model whose MLPs differ in width no neuron is made up."""

import json
from dataclasses import replace

import numpy as np
import oracle
import pytest
import tiny
from pairwise import in_turn

from adaras_export.core.base_model import BaseModel
from adaras_export.core.neuron_stats import NeuronStats
from adaras_export.core.neurons import NeuronSet
from adaras_export.core.rule import SteeringRule
from adaras_export.core.traces import Trace
from adaras_export.discovery.gate_features import PromptReader
from adaras_export.discovery.gate_training import GateOptions, train_gate
from adaras_export.discovery.identify import IdentifyOptions, identify
from adaras_export.discovery.rankings import RANKINGS, Refinement, paired_t, rank, require_room
from adaras_export.errors import RuleError
from adaras_export.evaluation.controls import random_control
from adaras_export.modeling.activations import Reading

pytest.importorskip("scipy.stats")
RAGGED, WIDTHS = "gemma4_text", (48, 48, 96, 96)
EVERY = [(layer, index) for layer, width in enumerate(WIDTHS) for index in range(width)]
TRACES = [
    Trace("a1", "a", "1+1=", " 2", True),
    Trace("a2", "a", "1+1=", " it is 3", False),
    Trace("b1", "b", "what is 12+30?", " 42", True),
    Trace("b2", "b", "what is 12+30?", "4", False),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranking"), in_turn((), tiny.MORE, ["paper", "attribution"]))
def test_each_family_is_identified_on(name, ranking, stock, tokenizer, bases):
    """Sums against the oracle's means; which neurons are best, given the sums, is the business of test_rankings."""
    found = identify(stock[name], tokenizer, TRACES, bases[name], IdentifyOptions(ranking, keep=7))
    assert len(found.neurons) == 7
    assert {*found.neurons.layer.tolist()} <= {2, 3}
    for layer in range(tiny.LAYERS):
        expected = sum(mean_by_hand(stock[name], tokenizer, trace, layer) for trace in TRACES if trace.correct)
        sums = found.stats.correct_sum[layer]
        np.testing.assert_allclose(sums[: len(expected)], expected, **LOOSE.get(name, {"atol": 5e-5, "rtol": 1e-4}))
        assert not sums[len(expected) :].any()


LOOSE = {"qwen3_5_text": {"atol": 1e-3, "rtol": 2e-3}}  # its linear attention reads padding, too


def mean_by_hand(model, tokenizer, trace, layer):
    ids = tokenizer(trace.prompt)["input_ids"] + tokenizer(trace.completion, add_special_tokens=False)["input_ids"]
    return np.mean(oracle.activations_of(model, ids)[layer], axis=0)


@pytest.fixture(scope="module")
def stats(bases):
    """Two questions in which no neuron tells right from wrong but (3, 90): all others tie, those that are not too."""
    stats = NeuronStats.empty(bases[RAGGED])
    for number in range(2):
        correct = np.zeros((1, 4, 96), np.float32)
        correct[0, 3, 90] = 1 + number
        stats = stats.update(f"{number:064x}", correct, np.zeros_like(correct))
    return stats


@pytest.mark.parametrize("ranking", [one for one in RANKINGS if one not in ("attribution", "t")])
def test_all_neurons_are_all_that_there_are(ranking, stats):
    found = rank(stats, None, ranking=ranking, keep=len(EVERY))
    assert places(found)[0] == (3, 90)
    assert places(found)[1:] == [place for place in EVERY if place != (3, 90)]
    with pytest.raises(RuleError, match=r"neurons: 289 wanted from layer 0 on; .* 4 layers of \(48, 48, 96, 96\)"):
        rank(stats, None, ranking=ranking, keep=len(EVERY) + 1)


def test_a_budget_per_layer_counts_neurons_that_there_are(stats, bases):
    refinement = Refinement(per_layer=60)
    found = rank(stats, None, ranking="absolute", keep=216, refinement=refinement)
    assert np.bincount(found.layer).tolist() == [48, 48, 60, 60]
    with pytest.raises(RuleError, match="217 wanted"):
        require_room(bases[RAGGED], 217, 0, 60)


def test_the_false_discovery_rate_is_one_among_neurons_that_there_are(bases):
    draw, stats = np.random.default_rng(0), NeuronStats.empty(bases[RAGGED])
    for number in range(6):
        parts = [np.pad(draw.normal(size=(1, width)), ((0, 0), (0, 96 - width))) for width in WIDTHS]
        correct = np.stack(parts, axis=1).astype(np.float32)
        correct[:, 2, :9] += 1 + 0.25 * np.arange(9)
        stats = stats.update(f"{number:064x}", correct, np.zeros_like(correct))
    import scipy.stats

    t = paired_t(stats)
    p = [2 * scipy.stats.t.sf(abs(t[place]), 5) for place in EVERY]
    least, count = min((value * len(EVERY) / (n + 1), n + 1) for n, value in enumerate(sorted(p)))
    found = rank(stats, None, ranking="t", keep=200, refinement=Refinement(fdr=1.01 * least))
    assert len(found) == count
    with pytest.raises(RuleError, match="none of 288 neurons passes"):  # of 4 * 96, none would pass the rate above
        rank(stats, None, ranking="t", keep=200, refinement=Refinement(fdr=0.99 * least))


def test_sums_and_neurons_that_a_layer_does_not_have_are_not_born(bases):
    empty, more = NeuronStats.empty(bases[RAGGED]), np.zeros((4, 96))
    more[1, 48] = 1
    with pytest.raises(RuleError, match=r"trace_sum holds values of neurons that gemma4_text.* does not have"):
        replace(empty, trace_sum=more)
    fitting = {"layer": [1, 2], "index": [47, 95], "delta": [1.0, 1.0], "base": bases[RAGGED]}
    assert len(NeuronSet(**fitting)) == 2
    with pytest.raises(RuleError, match=r"1:48, but that layer of .* has 48 neurons; expected an index below"):
        NeuronSet(**{**fitting, "index": [48, 95]})


def test_a_gate_may_read_all_that_there_is_and_nothing_else(stock, tokenizer, bases, tmp_path):
    model, base = stock[RAGGED], bases[RAGGED]
    rows = tiny.PROMPTS[2:]
    means = PromptReader(model, base, rows, Reading(), tmp_path / "means").means(3)
    for row, mean in zip(rows, means, strict=True):
        by_layer = [np.mean(layer, axis=0) for layer in oracle.activations_of(model, row)[:3]]
        np.testing.assert_allclose(mean, np.concatenate(by_layer), atol=2e-5, rtol=1e-4)
    traces = [Trace(str(n), str(n), f"what is {n}+{n * n}?", "x", n % 2 == 0) for n in range(20)]
    gate = train_gate(model, tokenizer, traces, base, GateOptions(below_layer=3, features=192)).gate
    assert sorted(zip(gate.layer.tolist(), gate.index.tolist(), strict=True)) == EVERY[:192]
    with pytest.raises(RuleError, match=r"193 features wanted; .* have 192 neurons"):
        train_gate(model, tokenizer, traces, base, GateOptions(below_layer=3, features=193))


def test_a_random_control_draws_from_the_width_of_its_layer(stock, bases):
    neurons = NeuronSet(
        layer=[1] * 40 + [3] * 40, index=[*range(40), *range(40)], delta=np.ones(80), base=bases[RAGGED]
    )
    rule = SteeringRule(neurons=neurons, strength=1.0, base=bases[RAGGED])
    control = random_control(stock[RAGGED], rule, 0)
    narrow, wide = (control.neurons_of(layer)[0] for layer in (1, 3))
    assert sorted(narrow) == [*range(40, 48)]
    assert len(wide) == 40
    assert max(wide) > 47


def test_a_record_has_a_list_only_where_layers_differ(bases):
    ragged, plain = bases[RAGGED].as_record(), bases["lfm2"].as_record()
    assert json.loads(json.dumps(ragged))["mlp_size"] == [48, 48, 96, 96]
    assert plain["mlp_size"] == 48
    assert BaseModel.from_record(json.loads(json.dumps(ragged)), "x") == bases[RAGGED]
    assert BaseModel.from_record({**plain, "mlp_size": [48] * 4}, "x") == bases["lfm2"]
    for widths in ([48, 48], [], [48, 48, 0, 96], [48, 48, True, 96], "48"):
        with pytest.raises(RuleError, match="mlp_size"):
            BaseModel.from_record({**ragged, "mlp_size": widths}, "x")


def places(neurons):
    return list(zip(neurons.layer.tolist(), neurons.index.tolist(), strict=True))
