"""Rankings against their formulas written out in loops, and what refinements let pass."""

import math

import numpy as np
import pytest
import tiny

from adaras_export.core.neuron_stats import AttributionStats, NeuronStats
from adaras_export.discovery.rankings import Refinement, paired_t, rank
from adaras_export.errors import RuleError

scipy_stats = pytest.importorskip("scipy.stats")
QUESTIONS = 8


@pytest.fixture(scope="module")
def means():
    """Trace means by question, (N, L, M) of either class; neuron (2, 5) differs in every question."""
    random = np.random.default_rng(0)
    shape = (3, tiny.LAYERS, tiny.MLP_SIZE)
    found = [(random.normal(size=shape), random.normal(size=shape)) for _ in range(QUESTIONS)]
    for correct, _ in found:
        correct[:, 2, 5] += 8
    return found


@pytest.fixture(scope="module")
def stats(means, bases):
    stats = NeuronStats.empty(bases["qwen3"])
    for number, (correct, incorrect) in enumerate(means):
        stats = stats.update(f"{number:064x}", correct.astype(np.float32), incorrect.astype(np.float32))
    return stats


@pytest.fixture(scope="module")
def attribution(bases):
    random, stats = np.random.default_rng(1), AttributionStats.empty(bases["qwen3"])
    for number in range(QUESTIONS):
        gradient = random.normal(size=(tiny.LAYERS, tiny.MLP_SIZE))
        stats = stats.update(f"{number:064x}", gradient + 0.5 * np.sign(np.arange(tiny.MLP_SIZE) % 3 - 0.5))
    return stats


def differences(means, layer, index):
    """Of every question, in plain numbers."""
    return [float(c[:, layer, index].mean() - i[:, layer, index].mean()) for c, i in means]


def formula(ranking, means, layer, index):
    found = differences(means, layer, index)
    mean = sum(found) / len(found)
    if ranking == "absolute":
        return abs(mean)
    if ranking == "t":
        spread = math.sqrt(sum((one - mean) ** 2 for one in found) / (len(found) - 1))
        return abs(mean) / (spread / math.sqrt(len(found)))
    every = [float(x) for pair in means for part in pair for x in part[:, layer, index]]
    centre = sum(every) / len(every)
    return abs(mean) / math.sqrt(sum((x - centre) ** 2 for x in every) / len(every))


@pytest.mark.parametrize("ranking", ["absolute", "cohen_d", "t"])
def test_scores_are_those_of_the_formula_and_the_best_come_first(ranking, means, stats):
    found = rank(stats, None, ranking=ranking, keep=6, refinement=Refinement(fdr=1.0))
    places = list(zip(found.layer.tolist(), found.index.tolist(), strict=True))
    assert places[0] == (2, 5)
    for place, score, delta in zip(places, found.score, found.delta, strict=True):
        assert score == pytest.approx(formula(ranking, means, *place), rel=1e-4)
        assert delta == pytest.approx(np.mean(differences(means, *place)), rel=1e-4)
    every = [formula(ranking, means, *place) for place in np.ndindex(tiny.LAYERS, tiny.MLP_SIZE)]
    assert found.score.tolist() == pytest.approx(sorted(every, reverse=True)[:6], rel=1e-4)


def test_t_keeps_what_passes_the_false_discovery_rate_only(stats):
    found = rank(stats, None, ranking="t", keep=50, refinement=Refinement(fdr=0.05))
    assert (found.layer.tolist(), found.index.tolist()) == ([2], [5])
    with pytest.raises(RuleError, match=r"ranking t: none of .* passes a false discovery rate of 0.05 \(least p = "):
        rank(stats, None, ranking="t", keep=50, min_layer=3)


def test_t_wants_questions_that_were_contrasted(stats, bases, means):
    unpaired = NeuronStats.empty(bases["qwen3"], contrast="unpaired")
    for number, (correct, incorrect) in enumerate(means):
        unpaired = unpaired.update(f"{number:064x}", correct.astype(np.float32), incorrect.astype(np.float32))
    with pytest.raises(RuleError, match="contrasted unpaired; expected two or more, within questions"):
        paired_t(unpaired)


def test_a_budget_per_layer_leaves_the_best_of_each(stats, attribution):
    free = rank(stats, attribution, ranking="attribution", keep=tiny.LAYERS * 2)
    bound = rank(stats, attribution, ranking="attribution", keep=tiny.LAYERS * 2, refinement=Refinement(per_layer=2))
    assert np.bincount(bound.layer).tolist() == [2] * tiny.LAYERS
    assert np.bincount(free.layer, minlength=tiny.LAYERS).tolist() != [2] * tiny.LAYERS
    every = rank(stats, attribution, ranking="attribution", keep=tiny.LAYERS * tiny.MLP_SIZE)
    for layer in range(tiny.LAYERS):
        assert bound.index[bound.layer == layer].tolist() == every.index[every.layer == layer][:2].tolist()
    with pytest.raises(RuleError, match="and 2 of one are allowed"):
        rank(stats, attribution, ranking="paper", keep=tiny.LAYERS * 2 + 1, refinement=Refinement(per_layer=2))


def test_shrinkage_takes_what_the_standard_error_explains(stats, attribution):
    found = rank(stats, attribution, ranking="attribution", keep=5, refinement=Refinement(shrink=True))
    a, error, sigma = attribution.mean(), attribution.standard_error(), stats.deviation()
    for layer, index, score in zip(found.layer, found.index, found.score, strict=True):
        one, noise = float(a[layer, index]), float(error[layer, index])
        assert score == pytest.approx(abs(one) * sigma[layer, index] * one**2 / (one**2 + noise**2))
    assert found.score[0] < rank(stats, attribution, ranking="attribution", keep=1).score[0]


def test_agreeing_neurons_are_more_active_in_the_class_that_they_push_to(stats, attribution):
    agreeing = rank(stats, attribution, ranking="attribution", keep=40, refinement=Refinement(agree=True))
    both = (np.sign(agreeing.delta), np.sign(agreeing.mean_correct - agreeing.mean_incorrect))
    assert both[0].tolist() == both[1].tolist()
    free = rank(stats, attribution, ranking="attribution", keep=40)
    assert (np.sign(free.delta) != np.sign(free.mean_correct - free.mean_incorrect)).any()


@pytest.mark.parametrize(
    ("ranking", "refinement", "message"),
    [
        ("paper", {"shrink": True}, "paper is not shrunk"),
        ("t", {"agree": True}, "agrees with itself; expected attribution"),
        ("paper", {"per_layer": 0}, "0 neurons a layer"),
        ("t", {"fdr": 0.0}, "false discovery rate 0.0; expected"),
        ("attribution", {}, "attribution needs gradients, which were not read"),
    ],
)
def test_what_makes_no_sense_is_refused(ranking, refinement, message, stats):
    with pytest.raises(RuleError, match=message):
        rank(stats, None, ranking=ranking, keep=5, refinement=Refinement(**refinement))
