"""Target onnx with fewer bits: what it computes, what a damaged one is called, and where the gate's threshold goes."""

import json
import logging
import re
import shutil
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import oracle
import pytest
import tiny
import torch
from pairwise import in_turn
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaras_export.core import folding
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.question_identity import identity
from adaras_export.core.rule import SteeringRule
from adaras_export.core.trace_files import write_questions, write_traces
from adaras_export.core.traces import Question, Trace
from adaras_export.delivery.verifier import verify
from adaras_export.delivery.writer import export
from adaras_export.errors import ExportError, TraceError
from adaras_export.exporters.base import ExportContext
from adaras_export.exporters.onnx import calibration, functions, quantize
from adaras_export.exporters.onnx import graph as onnx_graph
from adaras_export.exporters.onnx.exporter import EXPORTER, GRAPH
from adaras_export.exporters.parity import compare, rehearse
from adaras_export.modeling.gate import agreeing_threshold, gate_probabilities, youden_threshold

CAUSAL, LATER = ("causal", "last_prompt_token"), ("later", "first_generated_token")
DEEP = "llama"
GATED, TIED = (DEEP, *CAUSAL), ("qwen2-shallow", *CAUSAL)
BITS = {"int8": 8, "int4": 4}
each_precision = pytest.mark.parametrize("precision", BITS)

pytestmark = pytest.mark.onnx


@pytest.fixture(autouse=True)
def from_float32(monkeypatch, request):
    """In a test, integers are made of the exact weights."""
    if "half" in request.fixturenames:
        return
    make = onnx_graph.plain_graph

    def checked(model, out):
        assert model.dtype == torch.float32
        make(model, out)

    monkeypatch.setattr(onnx_graph, "plain_graph", checked)


def exporter(precision, **options):
    return EXPORTER.with_context(ExportContext("base", options={"precision": precision, **options}))


def written(precision, rule, base, out):
    """An exporter that has written into the new folder ``out``."""
    out.mkdir()
    chosen = exporter(precision)
    chosen.write(rule, Checkpoint(base), out)
    return chosen


def checks_of(chosen, rule, base, out):
    return compare(rehearse(chosen.reference(out, rule, Checkpoint(base))), chosen.load(out))


def failed(checks):
    return {check.name for check in checks if not check.ok}


def projections(graph):
    return [node for node in graph.graph if node.op_type == "MatMulNBits"]


# What it computes

# Each kind of projection once: transposed, fused, with biases, tied. What lies between them is not rounded.
KINDS = ("gpt2-shallow", "phi3-shallow", "gpt_neox-shallow", "qwen2-shallow")
CASES = [((name, *CAUSAL), precision) for name, precision in in_turn((), KINDS, BITS)] + [
    ((DEEP, *CAUSAL), "int4"), ((DEEP, *LATER), "int8"), ((DEEP, None, CAUSAL[1]), "int4")
]  # fmt: skip


@pytest.mark.parametrize(("key", "precision"), CASES, ids=tiny.key_id)
@pytest.mark.slow
def test_it_equals_the_base_with_the_rounded_weights_and_the_vectors_of_the_exact_ones(
    key, precision, rules, folders, tmp_path
):
    """Measured over all of these: at most 59 of the 256 units that are allowed; the effect of steering: 10^6 units."""
    rule, base = rules[key], folders[key[0]]
    chosen = written(precision, rule, base, tmp_path / "out")
    checks = checks_of(chosen, rule, base, tmp_path / "out")
    assert failed(checks) == set()
    logits = [check for check in checks if check.name.endswith("logits") and check.limit]
    assert max(check.figure / check.limit for check in logits) < 0.5
    assert next(check for check in checks if check.name.startswith("effect")).figure > 1000 * logits[0].limit
    model = tiny.build_model(key[0])
    modules = [one for one in model.modules() if isinstance(one, nn.Linear | Conv1D)]
    assert len(projections(ir.load(tmp_path / "out" / GRAPH))) == len(modules) - model.config.tie_word_embeddings


@each_precision
def test_a_wrong_sign_a_shifted_layer_and_vectors_of_the_rounded_weights_fail(precision, rules, folders, tmp_path):
    rule, base = rules[GATED], folders[DEEP]
    chosen = written(precision, rule, base, tmp_path / "out")
    script = rehearse(chosen.reference(tmp_path / "out", rule, Checkpoint(base)))
    vectors = folding.vectors(rule, Checkpoint(base))
    two, three = sorted(vectors)
    rounded = {
        int(one.module.split(".")[2]): one.weight_NK
        for one in quantize._projections(ir.load(tmp_path / "out" / GRAPH))
        if one.module.endswith("down_proj")
    }
    folded = {}
    for layer in vectors:
        index, delta = rule.neurons_of(layer)
        folded[layer] = (rounded[layer][:, index] @ delta).astype(np.float32)
    wrong = {"sign": {**vectors, two: -vectors[two]}, "layer": {two: vectors[three], three: vectors[two]}}
    for kind, changed in {**wrong, "rounded": folded}.items():
        model = ir.load(tmp_path / "out" / GRAPH)
        for layer, vector in changed.items():
            name = f"model.layers.{layer}.mlp.steering_vector"
            model.graph.initializers[name].const_value = ir.tensor(vector, name=name)
        ir.save(model, tmp_path / "out" / GRAPH)
        found = {check.name: check for check in compare(script, chosen.load(tmp_path / "out"))}
        prefill = found["steered always, prefill logits"]
        assert prefill.figure > (10 if kind == "rounded" else 100) * prefill.limit, kind
        assert found["off, prefill logits"].ok


@each_precision
def test_p_correct_is_the_oracles_on_the_rounded_weights(precision, rules, folders, tmp_path):
    rule = rules[GATED]
    chosen = written(precision, rule, folders[DEEP], tmp_path / "out")
    model = tiny.build_model(DEEP)
    quantize.overwrite(model, ir.load(tmp_path / "out" / GRAPH))
    expected = [oracle.p_correct(model, prompt, tiny.plain_gate(rule.gate)) for prompt in tiny.PROMPTS]
    found = chosen.load(tmp_path / "out").p_correct(tiny.PROMPTS)
    assert found == pytest.approx(expected, abs=1e-5)
    exact = [oracle.p_correct(tiny.build_model(DEEP), prompt, tiny.plain_gate(rule.gate)) for prompt in tiny.PROMPTS]
    assert np.abs(found - exact).max() > 1e-4, "rounding moves it, or this tests nothing"


# What is stored


@each_precision
def test_the_integers_are_those_of_onnx_runtimes_own_tool(precision, plain):
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    tool = MatMulNBitsQuantizer(onnx.load(plain[DEEP]), BITS[precision], 32, is_symmetric=True, accuracy_level=1)
    tool.process()
    theirs = {one.name: onnx.numpy_helper.to_array(one) for one in tool.model.model.graph.initializer}
    nodes = {one.output[0]: one for one in tool.model.model.graph.node if one.op_type == "MatMulNBits"}
    model = ir.load(plain[DEEP])
    quantize.quantise(model, BITS[precision])
    found = projections(model)
    assert len(found) == len(nodes) == 7 * tiny.LAYERS + 1
    for node in found:
        other = nodes[node.outputs[0].name]
        assert all(node.attributes[one.name].value == one.i for one in other.attribute)
        assert node.attributes.keys() == {one.name for one in other.attribute}
        for value, name in zip(node.inputs[1:], other.input[1:], strict=True):
            assert np.array_equal(value.const_value.numpy(), theirs[name])


def test_only_projections_are_rounded_and_nothing_is_left_of_the_exact_ones(plain, rules, folders, tmp_path):
    written("int4", rules[TIED], folders[TIED[0]], tmp_path / "out")
    model, exact = ir.load(tmp_path / "out" / GRAPH), ir.load(plain[TIED[0]])
    assert {path.name for path in (tmp_path / "out/onnx").iterdir()} == {"model.onnx", "model.onnx_data"}
    sizes = [path.with_name("model.onnx_data").stat().st_size for path in (tmp_path / "out" / GRAPH, plain[TIED[0]])]
    assert sizes[0] < 0.6 * sizes[1]  # most of what is left are the embeddings
    assert {name for _, name, _ in model.functions} == set(functions.functions()) - {"PastDecision"}
    assert {"steering_strength", "steering_threshold"} <= {value.name for value in model.graph.inputs}
    stored, before = model.graph.initializers, exact.graph.initializers
    wanted = onnx_graph.tensors(rules[TIED], folding.vectors(rules[TIED], Checkpoint(folders[TIED[0]])))
    assert all(np.array_equal(stored[name].const_value.numpy(), value) for name, value in wanted.items())
    kept = stored.keys() & before.keys()
    assert "lm_head.weight" in kept  # tied: it has to stay, for the embeddings
    assert all(np.array_equal(stored[name].const_value.numpy(), before[name].const_value.numpy()) for name in kept)
    gone = {value.name for node in exact.graph if node.op_type == "MatMul" for value in node.inputs} & before.keys()
    assert len(gone) == 7 * 2
    assert not gone & kept


def test_loading_the_quantiser_leaves_everybodys_logging_alone(plain):
    """The library's module calls logging.basicConfig when it is imported."""
    root = logging.getLogger()
    handlers, level = [*root.handlers], root.level
    root.handlers.clear()  # else basicConfig would do nothing
    try:
        quantize.quantise(ir.load(plain[DEEP]), 8)
        assert (root.handlers, root.level) == ([], level)
    finally:
        root.handlers[:] = handlers


# A whole export, and what damage is called


@pytest.fixture(scope="module")
def delivered(rules, folders, tmp_path_factory):
    """One export with 4 bits from end to end. Read only."""
    out = tmp_path_factory.mktemp("onnx") / "int4"
    return export(rules[GATED], base=folders[DEEP], to="onnx", out=out, precision="int4")


@pytest.fixture
def folder(delivered, tmp_path):
    return shutil.copytree(delivered.path, tmp_path / "copy")


@pytest.mark.slow
def test_an_export_is_delivered_and_verifies_after_it_was_moved(delivered, folder, rules):
    assert delivered.parity.ok
    receipt = json.loads((folder / "receipt.json").read_text())
    assert receipt["options"]["precision"] == "int4"
    assert receipt["rule"] == receipt["given_rule"] == rules[GATED].fingerprint
    assert calibration.AGREEMENT in (folder / "README.md").read_text()
    assert verify(folder).ok


def test_inlined_it_computes_the_same(rules, folders, tmp_path):
    report = export(rules[GATED], base=folders[DEEP], to="onnx", out=tmp_path / "out", precision="int8", inline=True)
    model = ir.load(report.path / GRAPH)
    assert not model.functions
    assert len(projections(model)) == 7 * tiny.LAYERS + 1
    assert report.parity.ok


def scale(model):
    """One scale of one weight is doubled."""
    value = projections(model)[3].inputs[2]
    scales = value.const_value.numpy().copy()
    scales[5, 0] *= 2
    value.const_value = ir.tensor(scales, name=value.name)


def exchange(model):
    """Two layers have each other's weight."""
    first, second, *_ = [node for node in projections(model) if "down_proj" in node.name]
    values = (first.inputs[1], second.inputs[1])
    first.replace_input_with(1, values[1])
    second.replace_input_with(1, values[0])


def rename(model):
    projections(model)[3].name = "/model/layers.0/self_attn/qkv_proj/MatMulNBits"


def repeat(model):
    first, second, *_ = projections(model)
    second.name = first.name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (scale, r"/o_proj/MatMulNBits: does not hold the base's model\.layers\.0\.self_attn\.o_proj\.weight"),
        (exchange, r"/mlp/down_proj/MatMulNBits: does not hold the base's"),
        (rename, r"/qkv_proj/MatMulNBits: expected one MatMulNBits for a projection of the base"),
        (repeat, r"/q_proj/MatMulNBits: expected one MatMulNBits for a projection of the base"),
    ],
)
@pytest.mark.slow
def test_rounded_weights_that_are_not_the_bases_are_named(change, says, folder):
    model = ir.load(folder / GRAPH)
    change(model)
    ir.save(model, folder / GRAPH)
    [found] = [check for check in verify(folder).failed() if check.name == "it does not open or run"]
    assert re.search(says, found.detail)


@pytest.mark.slow
def test_weights_that_are_cut_off_are_one_failed_check(folder):
    path = folder / "onnx" / onnx_graph.DATA_FILE
    path.write_bytes(path.read_bytes()[:1000])
    found = {check.name: check.detail for check in verify(folder).failed()}
    assert re.search("MatMulNBits: its weight cannot be read", found["it does not open or run"])


@pytest.mark.slow
def test_weights_that_are_missing_are_named(folder):
    (folder / "onnx" / onnx_graph.DATA_FILE).unlink()
    found = {check.name: check.detail for check in verify(folder).failed()}
    assert found["files missing"] == f"onnx/{onnx_graph.DATA_FILE}"
    assert "not run, because its code or its settings differ" in found


# Half precision


@pytest.fixture(scope="module")
def half(rules, folders, tmp_path_factory):
    """A whole export in float16. Gemma 3 multiplies its norms in float32. Read only."""
    out = tmp_path_factory.mktemp("onnx") / "fp16"
    return export(rules[HALF], base=folders[HALF[0]], to="onnx", out=out, precision="fp16")


HALF = ("gemma3_text-shallow", *CAUSAL)


@pytest.mark.slow
def test_in_half_precision_it_is_close_to_the_base_with_halved_weights_and_to_the_base(half, rules, stock):
    """Measured: 0.007 from the first and 0.008 from the second; steering moves the logits by 9."""
    assert half.parity.ok
    opened = EXPORTER.load(half.path)
    assert {past.data_type() for past in opened.session._empty_cache(1).values()} == {"tensor(float16)"}
    play = opened.play(tiny.PROMPTS, "rule", None)
    answers = tiny.answers(stock[HALF[0]], rules[HALF])
    for row, answer in enumerate(answers):
        count = len(answer["ids"])
        assert play.tokens_BS[row, :count].tolist() == answer["ids"]
        assert float((play.logits_BSV[row, :count] - answer["logits"]).abs().max()) < 0.05
        assert float(play.probability_B[row]) == pytest.approx(answer["probability"], abs=2e-3)
    steering = {check.name: check for check in half.parity.checks}["effect of steering on logits"]
    assert steering.figure > 5
    assert verify(half.path).ok


@pytest.mark.slow
def test_sums_over_4096_tokens_survive_in_half_precision(half):
    """The next turn goes on from the sums in the KV cache as if all had been one prompt."""
    session = EXPORTER.load(half.path).session
    ids = np.random.default_rng(0).integers(256, size=(1, 4100))
    empty = session._empty_cache(1)
    whole = after(session, ids, 4100, empty)
    turns = after(session, ids[:, 4096:], 4100, after(session, ids[:, :4096], 4096, empty))
    for cache in (whole, turns):
        slot = cache["past_key_values.2.value"].numpy()
        assert np.isfinite(slot).all()
        assert 4100 / np.e < 1024 * float(slot[0, 0, 0, 1]) < 4100 * np.e  # a token weighs exp(tanh(s))
    found, expected = (float(session._state(cache)[1].numpy()[0, 0, 0, 0]) for cache in (turns, whole))
    assert found == pytest.approx(expected, abs=1e-3)
    assert 0.01 < expected < 0.99


def after(session, ids, total, cache):
    """The KV cache after a call with these ids, the last of ``total``."""
    return session._call(ids, np.ones((1, total), np.int64), cache)[1]


# The gate's threshold


PROMPTS = [f"{one} + {2 * one} =" for one in range(24)]


@pytest.fixture
def judged(rules, folders, stock, tokenizer, tmp_path):
    """p(correct) of `PROMPTS` on the base and in an export with 4 bits."""
    rule = rules[GATED]
    chosen = written("int4", rule, folders[DEEP], tmp_path / "judged")
    before = gate_probabilities(stock[DEEP], tokenizer, rule.gate, PROMPTS)
    after = chosen.load(tmp_path / "judged").p_correct([tokenizer(prompt)["input_ids"] for prompt in PROMPTS])
    assert 1e-4 < np.abs(before - after).max() < 0.5
    return before, after


def with_threshold(rule, threshold):
    return replace(rule, gate=replace(rule.gate, threshold=float(threshold)))


def calibrated(rule, folders, out, path, precision="int4"):
    return export(rule, base=folders[DEEP], to="onnx", out=out, precision=precision, calibration=path)


@pytest.mark.slow
def test_labelled_prompts_give_the_threshold_of_youdens_j_on_the_rounded_model(judged, rules, folders, tmp_path):
    labels = np.random.default_rng(0).random(len(PROMPTS)) < 0.5
    attempts = [(row, attempt) for row in range(len(PROMPTS)) for attempt in range(3)]
    traces = [
        Trace(f"{row}#{attempt}", str(row), PROMPTS[row], "x", bool(labels[row] != (attempt == 2)))
        for row, attempt in attempts
    ]
    write_traces(tmp_path / "traces.jsonl", traces)
    report = calibrated(rules[GATED], folders, tmp_path / "out", tmp_path / "traces.jsonl")
    rule = SteeringRule.load(report.path / "rule.safetensors")
    assert rule.gate.threshold == youden_threshold(judged[1], labels) != rules[GATED].gate.threshold
    assert {identity(prompt) for prompt in PROMPTS} <= set(rule.questions), "an evaluation must not use them"
    require_delivered(report, rule, rules[GATED])


def require_delivered(report, rule, given):
    """The threshold is in rule, graph, config, card and receipt; all else of the rule is as it was given."""
    assert replace(rule.gate, threshold=0.5, questions=()) == replace(given.gate, threshold=0.5, questions=())
    stored = ir.load(report.path / GRAPH).graph.initializers["steering_threshold"].const_value.numpy()
    assert stored == np.float32(rule.gate.threshold)
    config = json.loads((report.path / "config.json").read_text())
    assert config["adaras"]["threshold"] == rule.gate.threshold
    receipt = json.loads((report.path / "receipt.json").read_text())
    assert (receipt["rule"], receipt["given_rule"]) == (rule.fingerprint, given.fingerprint)
    assert "calibration" not in receipt["options"]
    assert f"{rule.gate.threshold:.4f}" in (report.path / "README.md").read_text()
    assert verify(report.path).ok


@pytest.mark.slow
def test_prompts_alone_give_the_threshold_that_decides_as_the_base_did(judged, rules, folders, tmp_path, caplog):
    before, after = judged
    rule = with_threshold(rules[GATED], np.median(before))
    questions = [Question(str(row), prompt, "x") for row, prompt in enumerate(PROMPTS)]
    write_questions(tmp_path / "questions.jsonl", questions)
    report = calibrated(rule, folders, tmp_path / "out", tmp_path / "questions.jsonl")
    found = SteeringRule.load(report.path / "rule.safetensors")
    was_steered = before < np.float32(rule.gate.threshold)
    assert found.gate.threshold == agreeing_threshold(after, was_steered) != rule.gate.threshold
    note = report.parity.checks[0]
    assert (note.name, note.figure) == (
        calibration.AGREEMENT, ((after < np.float32(found.gate.threshold)) == was_steered).mean()
    )  # fmt: skip
    assert note.figure >= ((after < np.float32(rule.gate.threshold)) == was_steered).mean()
    require_delivered(report, found, rule)
    assert caplog.messages == []


def test_without_prompts_it_measures_and_warns_where_a_decision_changes(rules, folders, tokenizer, tmp_path, caplog):
    rule = rules[GATED]
    chosen = written("int4", rule, folders[DEEP], tmp_path / "first")
    asked = calibration.Prompts.of(None).prompts
    assert len(set(asked)) == 64
    before = gate_probabilities(tiny.build_model(DEEP), tokenizer, rule.gate, asked)
    after = chosen.load(tmp_path / "first").p_correct([tokenizer(prompt)["input_ids"] for prompt in asked])
    between = with_threshold(rule, (float(before[7]) + float(after[7])) / 2)
    caplog.clear()
    (tmp_path / "second").mkdir()
    result = chosen.write(between, Checkpoint(folders[DEEP]), tmp_path / "second")
    threshold = np.float32(between.gate.threshold)
    share = ((before < threshold) == (after < threshold)).mean()
    assert share < 1
    assert result.rule == between, "nothing is fitted to prompts that are not the user's"
    assert [note.figure for note in result.notes] == [share]
    [message] = caplog.messages
    assert message.startswith(f"warning: the gate decides {100 * share:.0f} % of 64 arithmetic word questions")


def test_it_does_not_warn_where_all_decisions_are_the_same(rules, folders, tmp_path, caplog):
    (tmp_path / "out").mkdir()
    result = exporter("int8").write(with_threshold(rules[GATED], 0), Checkpoint(folders[DEEP]), tmp_path / "out")
    assert [note.figure for note in result.notes] == [1]
    assert caplog.messages == []


# What is refused


def refused(rules, folders, out, key=GATED, **options):
    """The message of an export that is refused and leaves nothing, before torch exports anything."""
    with pytest.raises((ExportError, TraceError)) as caught:
        export(rules[key], base=folders[key[0]], to="onnx", out=out, **options)
    assert not out.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def no_export(monkeypatch):
    monkeypatch.setattr(onnx_graph, "plain_graph", lambda *_: pytest.fail("torch exported it"))


def test_a_calibration_that_nothing_would_use_is_refused(no_export, rules, folders, tmp_path):
    path, out = tmp_path / "x.jsonl", tmp_path / "out"
    assert "calibration with fp32" in refused(rules, folders, out, calibration=path)
    ungated = (DEEP, None, CAUSAL[1])
    assert "a rule without a gate" in refused(rules, folders, out, key=ungated, precision="int4", calibration=path)


def test_calibration_files_that_cannot_be_used_are_refused_by_name(no_export, rules, folders, tmp_path):
    path, out = tmp_path / "x.jsonl", tmp_path / "out"
    how = {"precision": "int4", "calibration": path}
    assert f"{path}: cannot be read" in refused(rules, folders, out, **how)
    write_traces(path, [Trace(f"{row}", f"{row}", f"{row}+1", "x", row > 0) for row in range(5)])
    assert "4 of 5 calibration questions are answered correctly" in refused(rules, folders, out, **how)


def test_prompts_that_the_gate_decides_alike_are_refused(rules, folders, tmp_path):
    write_questions(tmp_path / "x.jsonl", [Question(str(row), PROMPTS[row], "x") for row in range(5)])
    rule = with_threshold(rules[GATED], 0)
    with pytest.raises(TraceError, match="the gate steers 0 of 5 prompts; expected 2 or more of either kind"):
        calibrated(rule, folders, tmp_path / "out", tmp_path / "x.jsonl")
    assert not (tmp_path / "out").exists()


def test_the_builders_graph_with_fewer_bits_is_refused(no_export, rules, folders, tmp_path):
    said = refused(rules, folders, tmp_path / "out", precision="int4", genai=True)
    assert said == "onnx: --genai with int4: its builder fuses weights; leave out --genai"


def test_a_graph_without_projections_is_refused(plain):
    model = ir.load(plain[DEEP])
    for node in model.graph:
        node.name = ""
    with pytest.raises(ExportError, match="no MatMul with a weight of its own"):
        quantize.quantise(model, 4)
