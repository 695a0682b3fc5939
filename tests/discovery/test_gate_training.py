"""Training and calibrating a gate, against scikit-learn, brute force and the oracle."""

import copy
import json
import math
import os
import signal
import sys
import time
from dataclasses import replace

import numpy as np
import oracle
import pytest
import tiny
import torch
from processes import ended, forked

from adaras_export.core.intervals import Estimate, auc_interval
from adaras_export.core.question_identity import identity
from adaras_export.core.traces import Trace, split
from adaras_export.discovery import gate_fitting
from adaras_export.discovery.gate_metrics import Costs, cross_fitted, rates
from adaras_export.discovery.gate_training import GateOptions, train_gate
from adaras_export.errors import MissingExtraError, RuleError, TraceError
from adaras_export.modeling import activations
from adaras_export.modeling import gate as gate_module
from adaras_export.modeling.activations import Reading
from adaras_export.modeling.gate import gate_probabilities, youden_threshold

sklearn_selection = pytest.importorskip("sklearn.feature_selection")

POOLINGS = ["logistic", "attention"]
COUNT = 60  # questions of the planted signal
CHAT = [{"role": "user", "content": "4+4"}]


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
        how = {name: changes.pop(name) for name in ("reading", "out") if name in changes}
        options = GateOptions(**{"below_layer": 2, "features": 12} | changes)
        return train_gate(stock["qwen3"], tokenizer, traces, bases["qwen3"], options, **how)

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


# Worst distance of p(correct) measured: 2e-7, with means of up to 2.6 deviations; 1e-4 would do for any decision.
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_folded_gate_equals_the_classifier_on_standardised_features(
    pooling, train, by_hand, stock, tokenizer, monkeypatch
):
    kept = {}
    original = getattr(gate_fitting, f"_{pooling}")
    monkeypatch.setattr(gate_fitting, f"_{pooling}", lambda *args: kept.setdefault("weights", original(*args)))
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
    report, parts, labels = trained["logistic"], parts_of(planted()), labels_of(planted())
    means = {
        name: np.array([features_of(by_hand(prompt), report.gate).mean(0) for prompt in prompts])
        for name, prompts in parts.items()
    }
    x, y = means["train"], [labels[prompt] for prompt in parts["train"]]
    model = linear.LogisticRegression(C=report.chosen.regularisation, max_iter=1000)
    fitted = model.fit((x - x.mean(0)) / x.std(0), y)
    expected = fitted.predict_proba((means["validation"] - x.mean(0)) / x.std(0))[:, 1]
    found = gate_probabilities(stock["qwen3"], tokenizer, report.gate, parts["validation"])
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
    assert (report.auc, report.auc_low, report.auc_high) == pytest.approx(auc_interval(p_correct, correct))
    assert report.gate.threshold == pytest.approx(youden_threshold(p_correct, correct), abs=1e-5)
    share = np.mean([labels[prompt] for prompt in parts_of(planted())["train"]])
    assert report.brier == pytest.approx(np.mean((p_correct - correct) ** 2), abs=1e-5)
    assert report.brier_of_share == pytest.approx(np.mean((share - correct) ** 2))
    assert (report.apparent_sensitivity, report.apparent_specificity) == rates(
        p_correct < report.gate.threshold, correct
    )
    crossed = cross_fitted(p_correct, correct, youden_threshold, 0)
    assert (report.sensitivity, report.specificity) == rates(crossed, correct)


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
    assert gate.questions == tuple(sorted({identity(trace.prompt) for trace in planted()}))
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
        ({"features": 0}, "gate: 0 features wanted; expected one or more, or auto"),
        ({"below_layer": 0}, "gate: reads layers below 0; expected 1 to 4, the layers of"),
        ({"below_layer": 5}, "gate: reads layers below 5; expected 1 to 4"),
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
        train_gate(broken, tokenizer, planted(), bases["qwen3"], GateOptions(2, 4))


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


def test_the_length_of_the_prompt_stands_beside_the_gate(trained, tokenizer):
    report, parts, labels = trained["logistic"], parts_of(planted()), labels_of(planted())
    lengths, correct = (
        {part: np.array([look(prompt) for prompt in prompts]) for part, prompts in parts.items()}
        for look in (lambda prompt: len(tokenizer(prompt)["input_ids"]), labels.get)
    )
    means = [lengths["train"][correct["train"] == label].mean() for label in (True, False)]
    direction = np.sign(means[0] - means[1])  # logistic regression on one number does no more to the order
    length = {one.name: one for one in report.deciders}["length"]
    expected = auc_interval(direction * lengths["validation"], correct["validation"])
    assert (length.auc.value, length.auc.low, length.auc.high) == pytest.approx(expected)
    assert report.over_length.value == pytest.approx(report.auc - length.auc.value)


def test_the_report_is_one_line_a_table_and_json(trained):
    report = trained["logistic"]
    assert f"12 features of layers 0 to 1, AUC {report.auc:.3f}" in report.line()
    assert "\n" not in report.line()
    assert [line.split()[0] for line in report.table().splitlines()[1:]] == ["gate", "length", "always", "never"]
    record = json.loads(json.dumps(report.as_record(), allow_nan=False))
    assert (record["threshold"], record["features"]) == (report.gate.threshold, 12)
    assert sum(one["questions"] for one in record["calibration"]["bins"]) == 24
    assert len(record["selection"]["tried"]) == 9


def test_costs_choose_another_threshold_and_nothing_else(train, trained):
    report, other = train(planted(), costs=Costs(missed=1, needless=1000)), trained["logistic"]
    assert replace(report.gate, threshold=0.5) == replace(other.gate, threshold=0.5)
    cost = {one.name: one.cost for one in report.deciders}
    assert cost["never"] == pytest.approx(11 / 24)
    assert cost["always"] == pytest.approx(13000 / 24)
    assert cost["gate"] < cost["never"]
    assert report.as_record()["costs"] == {"missed": 1, "needless": 1000}


def test_what_a_gate_is_not_worth_it_for_is_said(trained):
    report = trained["logistic"]
    assert report.doubts() == []
    poor = replace(report, auc_low=0.5, over_length=Estimate(0.1, -0.1, 0.3), gate=replace(report.gate, threshold=0.0))
    assert len(poor.doubts()) == 3
    assert "NOT DISTINGUISHABLE FROM THE LENGTH OF THE PROMPT; THE THRESHOLD STEERS NO PROMPT" in poor.line()


@pytest.mark.parametrize(
    "pooling", [pytest.param(one, marks=() if one == "logistic" else pytest.mark.slow) for one in POOLINGS]
)
def test_a_killed_run_goes_on_where_it_was(pooling, train, trained, tmp_path, monkeypatch):
    """Killed for real, in a process of its own, when some batches are in the file."""
    out, partial, reading = tmp_path / "gate", tmp_path / "gate.partial", Reading(64)

    def slowly(done, _total):
        if done > 5:
            time.sleep(60)

    child = forked(lambda: train(planted(), pooling=pooling, reading=Reading(64, slowly), out=out), tmp_path / "log")
    while not partial.exists() or partial.stat().st_size < 5 * 4 * 2 * tiny.MLP_SIZE:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert ended([child]) == [-signal.SIGKILL]
    rows = counted_rows(monkeypatch)
    report = train(planted(), pooling=pooling, reading=reading, out=out)
    resumed = len(rows)
    assert report.gate.to_bytes() == train(planted(), pooling=pooling, reading=reading).gate.to_bytes()
    assert len(rows) - resumed > resumed
    assert out.read_bytes() == report.gate.to_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gate", "log"]


def counted_rows(monkeypatch):
    """The rows that are read from now on."""
    rows, read = [], activations.read

    def counted(model, batch, *args):
        rows.extend(batch)
        return read(model, batch, *args)

    monkeypatch.setattr(activations, "read", counted)
    monkeypatch.setattr(gate_module, "read", counted)
    return rows


def test_a_prompt_is_read_once_for_the_logistic_gate_and_twice_for_attention(train, trained, monkeypatch):
    rows = counted_rows(monkeypatch)
    for pooling, times in zip(POOLINGS, (1, 2), strict=True):
        rows.clear()
        train(planted(8), pooling=pooling, validation_share=0.5)
        assert len(rows) == times * 8


def test_the_number_of_features_is_chosen_among_several(train):
    report = train(planted(), features=None)
    assert {one.features for one in report.tried} == {8, 16, 32, 64}
    assert len(report.gate.layer) == report.chosen.features
    assert report.chosen.log_loss == min(one.log_loss for one in report.tried)


@pytest.mark.parametrize("chunk_tokens", [1, 3])
def test_long_prompts_are_read_in_pieces(chunk_tokens, stock, tokenizer):
    prompts, gate = ["Hi!", "what is 12+30?", "zzzzz and a longer one"], tiny.make_gate()
    whole = gate_probabilities(stock["qwen3"], tokenizer, gate, prompts)
    pieces = gate_probabilities(stock["qwen3"], tokenizer, gate, prompts, Reading(chunk_tokens=chunk_tokens))
    np.testing.assert_allclose(pieces, whole, atol=1e-6)


def test_without_scikit_learn_the_error_names_the_extra(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(
        MissingExtraError, match=r"training a gate needs sklearn.*pip install 'scikit-learn>=1.5' 'scipy>=1.13'"
    ):
        train(planted())
