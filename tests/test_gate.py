"""Training and calibrating a gate, against scikit-learn, brute force and the oracle."""

import copy
import math
import sys
from dataclasses import replace

import numpy as np
import oracle
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaras_export import gate as gate_file
from adaras_export.errors import MissingExtraError, RuleError, TraceError
from adaras_export.gate import (
    agreeing_threshold,
    auc_interval,
    f_scores,
    gate_probabilities,
    train_gate,
    youden_threshold,
)
from adaras_export.neurons import Reading
from adaras_export.traces import Trace, digest, split

sklearn_metrics = pytest.importorskip("sklearn.metrics")
sklearn_selection = pytest.importorskip("sklearn.feature_selection")

POOLINGS = ["logistic", "attention"]
COUNT = 60  # questions of the planted signal
CHAT = [{"role": "user", "content": "4+4"}]

# (p(correct), whether it was correct), at least two of either kind; few values, so that ties are common.
outcomes = st.integers(0, 2**32 - 1).map(lambda seed: draw_outcomes(np.random.default_rng(seed)))


def draw_outcomes(draw):
    """Scores of 4 to 40 prompts with ties, neighbours in float32 among them, and labels of both kinds."""
    count = int(draw.integers(4, 41))
    grid = np.linspace(0, 1, 7, dtype=np.float32)
    p_correct = np.nextafter(draw.choice(grid, count), draw.choice(np.float32([0, 1]), count), dtype=np.float32)
    correct = draw.permutation(np.arange(count) < draw.integers(2, count - 1))
    return p_correct, correct


def planted(count=COUNT, seed=0):
    """Questions in random letters: right exactly where there is no z. Three traces each, one of them mislabelled."""
    draw = np.random.default_rng(seed)
    traces = []
    for number in range(count):
        hard = number % 2 == 0
        letters = draw.choice(list("abcd"), draw.integers(6, 10)).tolist() + 3 * ["z" if hard else "d"]
        prompt = "".join(draw.permutation(letters).tolist()) + f" {number}"
        traces += [Trace(f"{number}#{at}", str(number), prompt, "x", (at == 0) == hard) for at in range(3)]
    return traces


def labels_of(traces):
    """Prompt -> whether two of its three traces are correct."""
    return {trace.prompt: sum(one.correct for one in traces if one.prompt == trace.prompt) >= 2 for trace in traces}


def parts_of(traces, seed=0):
    """Prompts of the training and of the validation questions, by the split's own rule."""
    prompts = list(dict.fromkeys(trace.prompt for trace in traces))
    parts = split([str(row) for row in range(len(prompts))], {"train": 0.6, "validation": 0.4}, seed)
    return {name: [prompts[int(row)] for row in rows] for name, rows in parts.items()}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a busy machine the threads of scikit-learn's libraries wait for each other ten times as long as they work."""
    with pytest.importorskip("threadpoolctl").threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def train(stock, tokenizer, bases):
    """`train_gate` on the tiny qwen3 below layer 2, with changes."""

    def go(traces, **changes):
        settings = {"below_layer": 2, "features": 12} | changes
        return train_gate(stock["qwen3"], tokenizer, traces, bases["qwen3"], **settings)

    return go


@pytest.fixture(scope="module")
def trained(train):
    """A report for the planted signal by pooling."""
    return {pooling: train(planted(), pooling=pooling) for pooling in POOLINGS}


@pytest.fixture(scope="module")
def by_hand(stock, tokenizer):
    """h of a prompt by the oracle, (layer, token, neuron)."""
    seen = {}

    def look(prompt):
        if prompt not in seen:
            seen[prompt] = np.array(oracle.activations_of(stock["qwen3"], tokenizer(prompt)["input_ids"]))
        return seen[prompt]

    return look


def features_of(h, gate):
    """(T, F) from (L, T, M)."""
    return h[gate.layer, :, gate.index].T


@pytest.mark.parametrize("shape", [(4, 1), (9, 30), (50, (1 << 14) + 3)])
def test_f_scores_are_those_of_scikit_learn(shape):
    draw = np.random.default_rng(1)
    values = draw.normal(5, 2, shape).astype(np.float32)
    correct = draw.permutation(np.arange(shape[0]) < 2)
    expected, _ = sklearn_selection.f_classif(values.astype(np.float64), correct)
    np.testing.assert_allclose(f_scores(values, correct), expected, rtol=1e-9, atol=1e-12)


def test_a_constant_column_scores_nothing_and_a_perfect_one_best():
    """Symptom: a neuron that told the classes apart without an exception scored 0. Cause: division by a variance of 0
    was answered with 0, which is right only for a neuron that never varies. Both are exact; no false alarm."""
    correct = np.array([True] * 3 + [False] * 4)
    values = np.stack([np.full(7, 0.1), np.where(correct, 0.1, 0.2), np.arange(7)], axis=1)
    scores = f_scores(values, correct)
    assert scores[0] == 0
    assert scores[1] == math.inf
    assert 0 < scores[2] < math.inf


@given(outcomes)
def test_the_threshold_is_the_lowest_that_maximises_youdens_j(drawn):
    p_correct, correct = drawn
    wrong, right = p_correct[~correct], p_correct[correct]

    def j(threshold):  # as runtimes compare: in float32
        below = np.float32(threshold)
        return int((wrong < below).sum()) * len(right) - int((right < below).sum()) * len(wrong)

    threshold = youden_threshold(p_correct, correct)
    best = max(j(cut) for cut in [0.0, *p_correct.tolist(), 1.0])
    assert j(threshold) == best
    lower = p_correct[p_correct < np.float32(threshold)]
    assert all(j(cut) < best for cut in lower), "a lower threshold steers less and separates as well"


def test_the_threshold_of_two_clear_groups_lies_between_them():
    assert youden_threshold(np.array([0.1, 0.2, 0.6, 0.8]), np.array([False, False, True, True])) == pytest.approx(0.4)


@given(outcomes)
def test_the_agreeing_threshold_is_the_lowest_that_decides_most_prompts_alike(drawn):
    p_correct, is_steered = drawn

    def alike(threshold):
        return int(((p_correct < np.float32(threshold)) == is_steered).sum())

    threshold = agreeing_threshold(p_correct, is_steered)
    # Above all scores every prompt is steered, whatever it is: no threshold is fitted there.
    assert alike(threshold) == max(alike(cut) for cut in [0.0, *p_correct.tolist()])
    lower = p_correct[p_correct < np.float32(threshold)]
    assert all(alike(cut) < alike(threshold) for cut in lower)


def test_a_threshold_that_agrees_with_a_monotonous_change_of_all_scores_decides_every_prompt_alike():
    before = np.array([0.2, 0.9, 0.4, 0.5, 0.7])
    threshold = agreeing_threshold(before**3, before < 0.45)
    assert threshold == pytest.approx((0.4**3 + 0.5**3) / 2)


@given(outcomes)
def test_the_auc_is_that_of_scikit_learn(drawn):
    auc, low, high = auc_interval(*drawn)
    assert auc == pytest.approx(sklearn_metrics.roc_auc_score(drawn[1], drawn[0]), abs=1e-12)
    assert 0 <= low <= auc <= high <= 1


@pytest.mark.slow
@pytest.mark.parametrize("step", [1e-6, 0.25], ids=["distinct", "ties"])
def test_the_auc_interval_is_that_of_a_bootstrap(step):
    """DeLong's and the bootstrap's standard errors agree to 1/sqrt(2 * 1000) = 2 % beside what 200 prompts leave."""
    draw = np.random.default_rng(0)
    correct = np.arange(200) < 120
    scores = np.round(1 / (1 + np.exp(-draw.normal(correct * 1.2))) / step) * step
    auc, low, high = auc_interval(scores, correct)
    sides = [np.flatnonzero(correct), np.flatnonzero(~correct)]
    resampled = []
    for _ in range(1000):
        rows = np.concatenate([draw.choice(side, len(side)) for side in sides])
        resampled.append(sklearn_metrics.roc_auc_score(correct[rows], scores[rows]))
    assert high - low == pytest.approx(2 * 1.959964 * np.std(resampled), rel=0.15)
    assert high - auc == pytest.approx(auc - low)


# Worst distance of p(correct) measured: 2e-7, with means of up to 2.6 deviations; 1e-4 would do for any decision.
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_folded_gate_equals_the_classifier_on_standardised_features(
    pooling, train, by_hand, stock, tokenizer, monkeypatch
):
    kept = {}
    original = getattr(gate_file, f"_{pooling}")
    monkeypatch.setattr(gate_file, f"_{pooling}", lambda *args: kept.setdefault("weights", original(*args)))
    gate = train(planted(), pooling=pooling).gate
    parts = parts_of(planted())
    means = np.array([features_of(by_hand(prompt), gate).mean(0) for prompt in parts["train"]])
    classifier = {**tiny.plain_gate(gate), **{name: value.tolist() for name, value in kept["weights"].items()}}
    found = gate_probabilities(stock["qwen3"], tokenizer, gate, parts["validation"])
    for p_correct, prompt in zip(found, parts["validation"], strict=True):
        standardised = (features_of(by_hand(prompt), gate) - means.mean(0)) / means.std(0)
        assert p_correct == pytest.approx(classify(standardised, classifier), abs=1e-5)


def classify(features, weights):
    """The paper's classifier by loops, on features (T, F)."""
    pooled, total = [0.0] * len(features[0]), 0.0
    for x in features:
        share = math.exp(math.tanh(dot(weights["attention_weight"], x) + weights["attention_bias"]))
        pooled, total = [old + share * one for old, one in zip(pooled, x, strict=True)], total + share
    z = weights["output_bias"]
    for row, bias, out in zip(weights["hidden_weight"], weights["hidden_bias"], weights["output_weight"], strict=True):
        z += out * max(0.0, dot(row, [one / total for one in pooled]) + bias)
    return 1 / (1 + math.exp(-z))


def dot(one, other):
    return sum(a * b for a, b in zip(one, other, strict=True))


def test_the_logistic_gate_is_scikit_learns_regression_on_standardised_means(trained, by_hand, stock, tokenizer):
    linear = pytest.importorskip("sklearn.linear_model")
    selection = pytest.importorskip("sklearn.model_selection")
    gate, parts, labels = trained["logistic"].gate, parts_of(planted()), labels_of(planted())
    means = {
        name: np.array([features_of(by_hand(prompt), gate).mean(0) for prompt in prompts])
        for name, prompts in parts.items()
    }
    x, y = means["train"], [labels[prompt] for prompt in parts["train"]]
    scale = {"C": np.logspace(-4, 0, 9)}
    search = selection.GridSearchCV(linear.LogisticRegression(max_iter=1000), scale, cv=5, scoring="neg_log_loss")
    fitted = search.fit((x - x.mean(0)) / x.std(0), y)
    expected = fitted.predict_proba((means["validation"] - x.mean(0)) / x.std(0))[:, 1]
    found = gate_probabilities(stock["qwen3"], tokenizer, gate, parts["validation"])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_logistic_form_is_a_sigmoid_of_the_mean_without_attention(trained, by_hand, stock, tokenizer):
    gate = trained["logistic"].gate
    w, b = gate.hidden_weight[0].astype(np.float64), float(gate.hidden_bias[0])
    assert gate.attention_weight.tolist() == [0] * 12
    assert gate.hidden_weight.tolist() == [w.tolist(), (-w).tolist()]
    assert gate.output_weight.tolist() == [1, -1]
    prompts = parts_of(planted())["validation"]
    expected = [1 / (1 + math.exp(-(w @ features_of(by_hand(prompt), gate).mean(0) + b))) for prompt in prompts]
    np.testing.assert_allclose(gate_probabilities(stock["qwen3"], tokenizer, gate, prompts), expected, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_planted_signal_is_learned(pooling, trained):
    report = trained[pooling]
    assert report.auc > 0.9
    assert report.sensitivity > 0.8
    assert report.specificity > 0.8
    assert (report.train_questions, report.validation_questions) == (36, 24)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_report_judges_the_validation_questions_only(pooling, trained, stock, tokenizer):
    report, prompts, labels = trained[pooling], parts_of(planted())["validation"], labels_of(planted())
    p_correct = gate_probabilities(stock["qwen3"], tokenizer, report.gate, prompts)
    correct = np.array([labels[prompt] for prompt in prompts])
    assert (report.auc, report.auc_low, report.auc_high) == auc_interval(p_correct, correct)
    assert report.gate.threshold == youden_threshold(p_correct, correct)
    assert report.sensitivity == (p_correct[~correct] < report.gate.threshold).mean()
    assert report.specificity == (p_correct[correct] >= report.gate.threshold).mean()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_nothing_is_fitted_on_validation_questions(pooling, train, trained):
    held_out = parts_of(planted())["validation"]
    swapped = [replace(t, correct=not t.correct) if t.prompt in held_out else t for t in planted()]
    found, expected = train(swapped, pooling=pooling).gate, trained[pooling].gate
    assert replace(found, threshold=0.5) == replace(expected, threshold=0.5)
    assert train(swapped, pooling=pooling).auc == pytest.approx(1 - trained[pooling].auc)


def test_the_gate_reads_no_layer_at_or_above_the_given_one(train, trained):
    assert max(trained["logistic"].gate.layer) <= 1
    assert set(train(planted(), below_layer=1, pooling="attention").gate.layer.tolist()) == {0}
    assert train(planted(), below_layer=4, features=192, pooling="attention").gate.layer.max() == 3


def test_features_are_the_highest_f_scores_of_the_training_prompts(trained, by_hand):
    parts, labels, gate = parts_of(planted()), labels_of(planted()), trained["logistic"].gate
    means = np.array([by_hand(prompt)[:2].mean(1).ravel() for prompt in parts["train"]])
    scores = sklearn_selection.f_classif(means, [labels[prompt] for prompt in parts["train"]])[0]
    expected = sorted(np.argsort(-scores)[:12].tolist())
    assert (gate.layer * tiny.MLP_SIZE + gate.index).tolist() == expected


def test_a_tie_between_the_traces_of_a_question_counts_as_wrong(train):
    one_of_either = [trace for trace in planted() if not trace.id.endswith("#2")]
    with pytest.raises(TraceError, match=r"traces: 0 of 36 training questions are answered correctly"):
        train(one_of_either)


def test_two_ids_of_one_prompt_are_one_question(train, trained):
    """Symptom: a prompt that the data held under two ids was fitted on and validated on. Cause: splits by id."""
    doubled = planted() + [replace(t, id=f"again {t.id}", question_id=f"again {t.question_id}") for t in planted()]
    report = train(doubled, pooling="attention")
    assert report.train_questions + report.validation_questions == COUNT
    assert report.gate == trained["attention"].gate


def test_the_gate_remembers_all_its_questions_and_its_base(trained, bases):
    gate = trained["logistic"].gate
    assert gate.questions == tuple(sorted({digest(trace.prompt) for trace in planted()}))
    assert gate.base == bases["qwen3"]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(pooling, train, trained):
    assert train(planted(), pooling=pooling).gate.to_bytes() == trained[pooling].gate.to_bytes()
    assert train(planted(), pooling=pooling, seed=1).gate != trained[pooling].gate


@pytest.mark.parametrize("label", [True, False])
def test_traces_of_one_label_are_refused(label, train):
    one_label = [replace(trace, correct=label) for trace in planted()]
    with pytest.raises(TraceError, match=r"of 36 training questions are answered correctly; expected two or more of"):
        train(one_label)


def test_a_validation_part_of_one_label_is_refused(train):
    held_out = parts_of(planted())["validation"]
    traces = [replace(trace, correct=True) if trace.prompt in held_out else trace for trace in planted()]
    with pytest.raises(TraceError, match=r"traces: 24 of 24 validation questions are answered correctly"):
        train(traces)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": 97}, "gate: 97 features wanted; the layers that it may read have 96 neurons"),
        ({"features": 0}, "gate: 0 features below layer 2; expected one or more"),
        ({"below_layer": 0}, "gate: 12 features below layer 0; expected one or more, below layer 1 to 4"),
        ({"below_layer": 5}, "gate: 12 features below layer 5"),
    ],
)
def test_an_impossible_choice_of_features_is_refused(changes, message, train):
    with pytest.raises(RuleError, match=message):
        train(planted(), **changes)


def test_a_share_that_is_none_is_refused(train):
    with pytest.raises(TraceError, match="expected positive numbers that sum to 1"):
        train(planted(), validation_share=1.5)


def test_a_model_with_a_nan_weight_is_refused_by_layer(stock, tokenizer, bases):
    broken = copy.deepcopy(stock["qwen3"])
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(TraceError, match=r"prompts: activations of layers \[1\] are NaN or infinite"):
        train_gate(broken, tokenizer, planted(), bases["qwen3"], below_layer=2, features=4)


def test_four_training_questions_are_enough_for_the_attention_gate(train):
    """Symptom: a KeyError from torch. Cause: a fifth of four questions is none, so that no epoch was ever the best."""
    report = train(planted(8), pooling="attention", validation_share=0.5, seed=0)
    assert report.train_questions == 4


def test_probabilities_are_the_oracles(stock, tokenizer):
    gate = tiny.make_gate()
    prompts = ["Hi!", "1", "what is 12+30?", "zzzzz and a longer one", CHAT]
    rows = [*(tokenizer(one)["input_ids"] for one in prompts[:4]), tokenizer("<user>4+4<eos><assistant>")["input_ids"]]
    expected = [oracle.p_correct(stock["qwen3"], row, tiny.plain_gate(gate)) for row in rows]
    found = gate_probabilities(stock["qwen3"], tokenizer, gate, prompts)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(found) > 0.05


@pytest.mark.parametrize("token_budget", [1, 20])
def test_a_probability_does_not_depend_on_the_batch(token_budget, stock, tokenizer):
    prompts = ["Hi!", "1", "what is 12+30?", "zzzzz and a longer one"]
    together = gate_probabilities(stock["qwen3"], tokenizer, tiny.make_gate(), prompts)
    apart = gate_probabilities(stock["qwen3"], tokenizer, tiny.make_gate(), prompts, Reading(token_budget))
    np.testing.assert_allclose(together, apart, atol=1e-6)


def test_progress_reaches_the_number_of_questions(train):
    told = []
    train(planted(), pooling="attention", reading=Reading(64, lambda done, total: told.append((done, total))))
    assert told[-1] == (COUNT, COUNT)
    assert len(told) > 3


def test_the_report_is_one_line_and_plain_values(trained):
    report = trained["logistic"]
    assert f"12 features of layers 0 to 1, AUC {report.auc:.3f}" in report.line()
    assert "\n" not in report.line()
    assert report.as_record()["threshold"] == report.gate.threshold
    assert all(isinstance(value, int | float) for value in report.as_record().values())


def test_without_scikit_learn_the_error_names_the_extra(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(
        MissingExtraError, match=r"training a gate needs sklearn.*pip install 'adaras-export\[identify\]'"
    ):
        train(planted())
