"""Target onnx in ONNX Runtime: every family equals the oracle, in one batch and row by row."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import oracle
import pytest
import tiny
import torch
from onnx.reference import ReferenceEvaluator
from pairwise import in_turn
from tiny import PROMPTS

from adaras_export.core import base_model, folding
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.delivery.verifier import verify
from adaras_export.delivery.writer import export
from adaras_export.errors import ExportError
from adaras_export.exporters.base import ExportContext
from adaras_export.exporters.checkpoint import companions
from adaras_export.exporters.onnx import functions, genai
from adaras_export.exporters.onnx import graph as onnx_graph
from adaras_export.exporters.onnx.exporter import EXPORTER, GRAPH
from adaras_export.exporters.onnx.genai import BUILDER_FAMILIES
from adaras_export.exporters.parity import compare, rehearse

DEEP = "llama"  # runs every rule, on four layers
CAUSAL, LATER = ("causal", "last_prompt_token"), ("later", "first_generated_token")
RULES = [CAUSAL, LATER, (None, "last_prompt_token"), (None, "first_generated_token"), ("causal", LATER[1])]
LEVELS = onnxruntime.GraphOptimizationLevel
EVERY_LEVEL = [LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_BASIC, LEVELS.ORT_ENABLE_EXTENDED, LEVELS.ORT_ENABLE_ALL]

# How far ONNX Runtime's logits may be from PyTorch's, in limits of `tiny`: its kernels sum in other orders, which
# Granite's sharp softmax magnifies. Measured: 1.3 for Granite, 0.4 for all others; one negated delta: 1000 and more.
LIMITS = 4

pytestmark = pytest.mark.onnx


@pytest.fixture(scope="session")
def steered(plain, rules, folders):
    """The path of a steered graph, beside the weights of the plain one, by the keys of ``rules``."""

    def make(key):
        rule, model = rules[key], ir.load(plain[key[0]])
        onnx_graph.steer(model, rule, vectors_of(rule, folders[key[0]]))
        path = plain[key[0]].with_name("-".join(map(str, key)) + ".onnx")
        ir.save(model, path)
        return path

    return tiny.Lazy(make)


def vectors_of(rule, folder):

    return folding.vectors(rule, Checkpoint(folder))


def quiet(level=LEVELS.ORT_ENABLE_ALL):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = level
    return options


def session(path, level=LEVELS.ORT_ENABLE_ALL):
    return onnxruntime.InferenceSession(path, quiet(level), providers=["CPUExecutionProvider"])


class Runner:
    """A greedy loop in NumPy, that knows the names of inputs and outputs and nothing else."""

    def __init__(self, opened, **dials):
        self.opened = opened
        self.dials = {f"steering_{name}": np.asarray(value, np.float32) for name, value in dials.items()}

    def empty(self, batch):
        pasts = [one for one in self.opened.get_inputs() if one.name.startswith("past")]
        return {one.name: np.zeros((batch, one.shape[1], 0, one.shape[3]), np.float32) for one in pasts}

    def call(self, ids, mask, past):
        positions = np.clip(mask.cumsum(1) - 1, 0, None)[:, -ids.shape[1] :]
        tokens = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        if "position_ids" not in {one.name for one in self.opened.get_inputs()}:  # GenAI's builder counts them itself
            del tokens["position_ids"]
        names = [one.name for one in self.opened.get_outputs()]
        found = dict(zip(names, self.opened.run(None, {**tokens, **past, **self.dials}), strict=True))
        logits = found.pop("logits")
        return logits, {name.replace("present", "past_key_values"): value for name, value in found.items()}

    def respond(self, rows=PROMPTS, steps=6):
        """Logits (B, S, V), greedy tokens (B, S), and the KV cache behind them."""
        inputs = tiny.left_padded(rows)
        ids, mask, past = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy(), self.empty(len(rows))
        logits = []
        for _ in range(steps):
            found, past = self.call(ids, mask, past)
            logits.append(found[:, -1])
            ids = found[:, -1].argmax(-1)[:, None]
            mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        logits = np.stack(logits, axis=1)
        return logits, logits.argmax(-1), past


def distance(logits, answers):
    """The largest distance of logits from the oracle's, in limits; infinite where a greedy token differs."""
    worst = 0.0
    for row, answer in zip(logits, answers, strict=True):
        count = len(answer["ids"])
        if row[:count].argmax(-1).tolist() != answer["ids"]:
            return float("inf")
        expected = answer["logits"].numpy()
        worst = max(worst, float(np.abs(row[:count] - expected).max()) / tiny.logit_limit(answer["logits"]))
    return worst


def require_oracle(logits, answers):
    assert distance(logits, answers) <= LIMITS


def state(past, part):
    """What the layer of the gate's state, the last one, holds for each row: (B, heads, columns, size)."""
    return past[f"past_key_values.{len(past) // 2 - 1}.{part}"]


KEYS = [(name, *rule) for name, rule in in_turn((), tiny.SHALLOW, RULES[:2])] + [(DEEP, *rule) for rule in RULES]


@pytest.mark.parametrize("key", tiny.mostly_slow(KEYS, (DEEP,)), ids=tiny.key_id)
def test_a_graph_equals_the_oracle_in_a_batch_and_row_by_row(key, steered, told):
    runner = Runner(session(steered[key]))
    logits, _, past = runner.respond()
    require_oracle(logits, told[key])
    for row, answer in zip(PROMPTS, told[key], strict=True):
        require_oracle(runner.respond([row])[0], [answer])
    if key[1] is None:
        assert len(past) == 2 * tiny.LAYERS
        return
    for row, answer in enumerate(told[key]):
        keys, values = state(past, "key")[row], state(past, "value")[row]
        assert (keys == answer["steered"]).all()
        assert values[0, 0, 0] == pytest.approx(answer["probability"], abs=1e-5)
        assert (values == values[:, :1]).all(), "every column holds the same"


GATED = (DEEP, *CAUSAL)
FOUR = [(DEEP, *rule) for rule in RULES if rule[0] != "later"]


@pytest.mark.parametrize("level", EVERY_LEVEL, ids=lambda level: level.name)
@pytest.mark.parametrize("key", FOUR, ids=lambda key: "-".join(map(str, key[1:])))
def test_each_optimisation_level_computes_the_same(key, level, steered, told):
    require_oracle(Runner(session(steered[key], level)).respond()[0], told[key])


@pytest.mark.parametrize("suffix", [".onnx", ".ort"])
def test_a_model_that_onnx_runtime_optimised_and_saved_computes_the_same(suffix, steered, told):
    options = quiet(LEVELS.ORT_ENABLE_EXTENDED)
    optimised = steered[GATED].with_name(f"optimised{suffix}")  # beside the weights, which .onnx goes on sharing
    options.optimized_model_filepath = str(optimised)
    onnxruntime.InferenceSession(steered[GATED], options, providers=["CPUExecutionProvider"])
    require_oracle(Runner(session(optimised)).respond()[0], told[GATED])


def test_the_reference_implementation_of_onnx_computes_the_same(steered, told):
    """It knows no optimisation and none of ONNX Runtime's kernels."""
    reference = ReferenceEvaluator(str(steered[GATED]))
    runner = Runner(session(steered[GATED]))
    inputs = tiny.left_padded(PROMPTS)
    ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()
    positions = np.clip(mask.cumsum(1) - 1, 0, None)
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **runner.empty(len(PROMPTS))}
    logits = reference.run(["logits"], feeds)[0][:, -1:]
    first = [{"ids": answer["ids"][:1], "logits": answer["logits"][:1]} for answer in told[GATED]]
    require_oracle(logits, first)


@pytest.mark.parametrize("key", FOUR, ids=lambda key: "-".join(map(str, key[1:])))
def test_strength_0_is_the_plain_graph_bit_for_bit(key, steered, plain):
    logits, _, past = Runner(session(steered[key]), strength=0).respond()
    expected, _, expected_past = Runner(session(plain[DEEP])).respond()
    assert np.array_equal(logits, expected)
    for name, value in expected_past.items():
        assert np.array_equal(past[name], value), name


def test_the_strength_can_be_dialled_without_another_export(steered, rules, stock):
    rule = rules[GATED].with_strength(-1.5)
    answers = tiny.answers(stock[DEEP], rule)
    require_oracle(Runner(session(steered[GATED]), strength=-1.5).respond()[0], answers)


@pytest.mark.parametrize(("threshold", "other"), [(2, (None, CAUSAL[1])), (0, None)])
def test_the_threshold_can_be_dialled_too(threshold, other, steered, told, plain):
    logits, _, _ = Runner(session(steered[GATED]), threshold=threshold).respond()
    if other is None:
        assert np.array_equal(logits, Runner(session(plain[DEEP])).respond()[0])
    else:
        require_oracle(logits, told[(DEEP, *other)])


def test_in_a_conversation_the_gate_judges_each_turn_by_all_that_was_prompt(steered, rules, stock):
    """Several tokens behind a KV cache are the next turn; the oracle reads the cache's tokens as they were."""
    for key in (GATED, (DEEP, *LATER)):
        turns = [PROMPTS[0], PROMPTS[2], PROMPTS[3]]
        expected = oracle.converse(stock[DEEP], turns, tiny.plain_rule(rules[key]), 4)
        runner, answers = Runner(session(steered[key])), []
        past, mask, unread = runner.empty(1), np.zeros((1, 0), np.int64), []
        for turn, answer in zip(turns, expected, strict=True):
            ids, logits = np.array([[*unread, *turn]]), []
            for _ in range(4):
                mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
                found, past = runner.call(ids, mask, past)
                logits.append(found[:, -1])
                ids = found[:, -1].argmax(-1)[:, None]
            unread = ids[0].tolist()
            answers.append(np.stack(logits, axis=1)[0])
            assert state(past, "value")[0, 0, 0, 0] == pytest.approx(answer["probability"], abs=1e-5)
        require_oracle(answers, expected)


def test_the_comparison_fails_for_a_wrong_sign_and_for_a_shifted_layer(steered, rules, folders, plain, told, tmp_path):
    rule = rules[GATED]
    vectors = vectors_of(rule, folders[DEEP])
    layers = sorted(vectors)
    wrong = {
        "sign": {**vectors, layers[0]: -vectors[layers[0]]},
        "layer": dict(zip(layers, [vectors[layers[-1]], *(vectors[layer] for layer in layers[:-1])], strict=True)),
    }
    for kind, changed in wrong.items():
        model = ir.load(plain[DEEP])
        onnx_graph.steer(model, rule, changed)
        path = plain[DEEP].with_name(f"wrong-{kind}.onnx")
        ir.save(model, path)
        logits, _, _ = Runner(session(path)).respond()
        steered_rows = [row for row, answer in enumerate(told[GATED]) if answer["steered"]]
        assert distance(logits, told[GATED]) > 100 * LIMITS, kind
        assert steered_rows


def test_it_computes_what_the_hugging_face_export_computes(steered, opened):
    logits, _, _ = Runner(session(steered[GATED])).respond()
    out = tiny.greedy(opened[GATED], eos_token_id=None)
    expected = torch.stack(out.logits, dim=1)
    assert float((torch.from_numpy(logits) - expected).abs().max()) <= LIMITS * tiny.logit_limit(expected)


# The graph as a document


def test_checker_and_shape_inference_pass_through_the_functions(steered):
    path = steered[GATED]
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*inferred.graph.value_info, *inferred.graph.output)
    }
    steps = [name for name in shapes if name.endswith("adaras.steered")]
    assert [shapes[name][-1] for name in steps] == [tiny.HIDDEN_SIZE] * 2
    assert shapes["logits"][-1] == tiny.VOCABULARY


def test_names_in_the_graph_say_the_layer(steered, rules):
    model = ir.load(steered[GATED])
    nodes = {node.name for node in model.graph}
    for layer in rules[GATED].layers():
        assert f"/model/layers.{layer}/mlp/adaras/AdaptiveSteer" in nodes
        assert f"/model/layers.{layer}/mlp/down_proj/MatMul" in nodes
        assert f"model.layers.{layer}.mlp.steering_vector" in model.graph.initializers
    assert {name for _, name, _ in model.functions} == set(functions.functions()) - {"PastDecision"}
    assert model.opset_imports[functions.DOMAIN] == functions.VERSION


def test_an_ungated_graph_has_no_gate_and_no_more_layers_than_its_base(steered):
    model = ir.load(steered[(DEEP, None, "last_prompt_token")])
    assert {name for _, name, _ in model.functions} == {"AdaptiveSteer", "SteeredTokens"}
    assert not any("gate" in name for name in model.graph.initializers if "steering" in name)


def test_a_gate_that_is_too_wide_for_the_kv_cache_is_refused(plain, rules, folders):
    rule = rules[(DEEP, *CAUSAL)]
    wide = tiny.make_gate()
    hidden = 64
    gate = type(wide)(
        wide.layer, wide.index, wide.attention_weight, 0.0, np.ones((hidden, len(wide.layer))), np.ones(hidden),
        np.ones(hidden), 0.0, threshold=0.5,
    )  # fmt: skip
    wide_rule = tiny.make_rule(rule.base, gate=gate)
    with pytest.raises(ExportError, match="a gate of 64 hidden units; expected at most 14"):
        onnx_graph.steer(ir.load(plain[DEEP]), wide_rule, vectors_of(wide_rule, folders[DEEP]))


# The artifact


@pytest.fixture(scope="session")
def delivered(rules, folders, tmp_path_factory):
    """A whole export, verified. Read only."""
    out = tmp_path_factory.mktemp("onnx") / "steered"
    return export(rules[GATED], base=folders[DEEP], to="onnx", out=out)


@pytest.fixture
def folder(delivered, tmp_path):
    return shutil.copytree(delivered.path, tmp_path / "copy")


def failed(report):
    return {check.name for check in report.failed()}


@pytest.mark.slow
def test_an_export_has_what_the_runtimes_need(delivered, folders):
    names = {str(path.relative_to(delivered.path)) for path in delivered.path.rglob("*") if path.is_file()}
    own = {"README.md", "config.json", "genai_config.json", GRAPH, f"{GRAPH}_data", "receipt.json", "rule.safetensors"}
    assert names == own | companions(folders[DEEP]).keys()
    assert {"chat_template.jinja", "generation_config.json", "tokenizer.json"} <= names
    config = json.loads((delivered.path / "config.json").read_text())
    assert config["num_hidden_layers"] == tiny.LAYERS + 1
    assert config["adaras"]["gate"]["layers"] == [0, 1]
    genai = json.loads((delivered.path / "genai_config.json").read_text())
    assert genai["model"]["decoder"]["num_hidden_layers"] == tiny.LAYERS + 1
    assert genai["model"]["eos_token_id"] == tiny.EOS
    assert delivered.parity.ok
    assert base_model.BaseModel.of(folders[DEEP]).layers == tiny.LAYERS  # the base is as it was


@pytest.mark.slow
def test_weights_stay_beside_the_graph_and_steering_tensors_in_it(delivered):
    model = ir.load(delivered.path / GRAPH)
    places = {
        name: isinstance(value.const_value, ir.ExternalTensor)
        for name, value in model.graph.initializers.items()
        if value.const_value.nbytes > 1024 or "steering" in name
    }
    assert all(outside != ("steering" in name) for name, outside in places.items())


@pytest.mark.slow
def test_an_inlined_export_has_no_functions_and_computes_the_same(rules, folders, told, tmp_path):
    out = tmp_path / "inlined"
    export(rules[GATED], base=folders[DEEP], to="onnx", out=out, inline=True)
    model = onnx.load(out / GRAPH, load_external_data=False)
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    require_oracle(Runner(session(out / GRAPH)).respond()[0], told[GATED])
    assert verify(out).ok


def edit(folder, change):
    """Change the graph of an export, and its receipt with it, as someone who hides it would."""
    from adaras_export.files import atomic

    model = ir.load(folder / GRAPH)
    change(model)
    ir.save(model, folder / GRAPH)
    path = folder / "receipt.json"
    receipt = json.loads(path.read_text())
    receipt["files"] |= {name: atomic.sha256_file(folder / name) for name in (GRAPH, f"{GRAPH}_data")}
    path.write_text(json.dumps(receipt))


def node(graph, op, inputs, name, **attributes):
    made = ir.node(op, inputs, attributes=attributes, name=f"evil/{name}")
    made.outputs[0].name = f"evil.{name}"
    graph.append(made)
    return made.outputs[0]


def say_one_token_far_into_a_prompt(model):
    """1000 more on one logit wherever the position is above 80, which no prompt of the comparison reaches."""
    graph, logits = model.graph, model.graph.outputs[0]
    [positions] = [value for value in graph.inputs if value.name == "position_ids"]
    chosen = np.zeros(tiny.VOCABULARY, np.float32)
    chosen[7] = 1000
    limit, axis, vector = (
        ir.Value(name=f"evil.{name}", const_value=ir.tensor(value, name=f"evil.{name}"))
        for name, value in {"limit": np.int64(80), "axis": np.array([-1]), "vector": chosen}.items()
    )
    for value in (limit, axis, vector):
        graph.register_initializer(value)
    far = node(graph, "Cast", [node(graph, "Greater", [positions, limit], "far")], "number", to=1)
    added = node(graph, "Mul", [node(graph, "Unsqueeze", [far, axis], "wide"), vector], "added")
    logits.name, name = "evil.logits", logits.name
    backdoor = node(graph, "Add", [logits, added], "backdoor")
    backdoor.name, backdoor.type, backdoor.shape = name, logits.type, logits.shape
    graph.outputs[0] = backdoor


def swap_two_numbers_of_a_weight(model):
    """In the data file, and of a token that no prompt of the comparison has."""
    tensor = model.graph.initializers["model.embed_tokens.weight"].const_value
    with Path(tensor.path).open("r+b") as file:
        file.seek(tensor.offset)
        two = file.read(8)
        file.seek(tensor.offset)
        file.write(two[4:] + two[:4])


ANEW = "operators or weights other than a fresh export's"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [(say_one_token_far_into_a_prompt, "evil/backdoor"), (swap_two_numbers_of_a_weight, "onnx/model.onnx_data")],
)
def test_a_graph_that_computes_the_same_on_the_prompts_of_the_comparison_only_is_found(change, named, folder):
    edit(folder, change)
    found = {check.name: check.detail for check in verify(folder).failed()}
    assert named in found[ANEW].split()
    assert not any(name.endswith("logits") for name in found), found


def another_operator(model):
    next(one for one in model.graph if one.op_type == "AdaptiveSteer").domain = "somebody"


def another_function(model):
    function = next(one for (_, name, _), one in model.functions.items() if name == "AdaptiveSteer")
    next(node for node in function if node.op_type == "Add").op_type = "Sub"


def weights_from_elsewhere(model):
    value = next(one for one in model.graph.initializers.values() if isinstance(one.const_value, ir.ExternalTensor))
    old = value.const_value
    where = {"shape": old.shape, "name": old.name}
    value.const_value = ir.ExternalTensor("../../outside", old.offset, old.length, old.dtype, **where)


@pytest.mark.slow
@pytest.mark.parametrize("change", [another_operator, another_function, weights_from_elsewhere])
def test_what_the_library_would_not_write_is_found_and_not_run(change, folder, monkeypatch):
    (folder.parent / "outside").write_bytes((folder / "onnx" / "model.onnx_data").read_bytes())
    edit(folder, change)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("was opened"))
    assert "operators or files that are not the library's" in failed(verify(folder))


@pytest.mark.slow
def test_a_graph_that_does_not_open_is_one_failed_check(folder):
    def raise_opset(model):
        model.opset_imports[""] = 99

    edit(folder, raise_opset)
    [found] = [check for check in verify(folder).failed() if check.name == "it does not open or run"]
    assert "cannot open this graph" in found.detail


# What is refused


def test_options_that_a_target_does_not_have_are_refused(rules, folders, tmp_path):
    with pytest.raises(ExportError, match="hf: has no option precision; expected of: none"):
        export(rules[GATED], base=folders[DEEP], to="hf", out=tmp_path / "out", precision="int4")
    with pytest.raises(ExportError, match="onnx: precision fp7; expected one of: fp32"):
        export(rules[GATED], base=folders[DEEP], to="onnx", out=tmp_path / "out", precision="fp7")


def test_a_base_without_a_fast_tokenizer_is_refused_before_any_work(rules, folders, tmp_path):
    base = shutil.copytree(folders[DEEP], tmp_path / "base")
    (base / "tokenizer.json").unlink()
    with pytest.raises(ExportError, match=r"base: no tokenizer\.json; expected a fast tokenizer"):
        export(rules[GATED], base=base, to="onnx", out=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_frequencies_that_change_with_the_length_are_refused(kind, tmp_path):
    sizes = {"factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = tiny.build_model(DEEP)
    model.config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0, **sizes}
    with pytest.raises(ExportError, match=f"rotary frequencies of type {kind} change with the length"):
        onnx_graph.plain_graph(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_torch_cannot_export_is_one_line_and_nothing_is_left(rules, folders, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.onnx.errors.OnnxExporterError("no such operator\nand forty more lines")

    monkeypatch.setattr(onnx_graph, "plain_graph", onnx_graph.plain_graph.__wrapped__)
    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ExportError, match=r"torch cannot export it to ONNX \(no such operator\)$"):
        export(rules[GATED], base=folders[DEEP], to="onnx", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_behind(rules, folders, tmp_path, monkeypatch):
    import errno

    def fill(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ir, "save", fill)
    with pytest.raises(ExportError, match=r"out: cannot be written \(the disk is full: .*\); nothing was left behind"):
        export(rules[GATED], base=folders[DEEP], to="onnx", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_of_another_form_is_refused(plain, rules, folders):
    model = ir.load(plain[DEEP])
    for node in model.graph:
        node.name = (node.name or "").replace("down_proj", "elsewhere")
    with pytest.raises(ExportError, match=r"layer 0: 0 values enter and 0 leave /model/layers\.0/mlp/down_proj/"):
        onnx_graph.steer(model, rules[GATED], vectors_of(rules[GATED], folders[DEEP]))


# The graph of GenAI's builder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "granite", "phi3"])  # norms of heads, multipliers, and fused projections
def test_the_builders_graph_equals_the_oracle_too(name, tmp_path):
    """Rows one by one: GroupQueryAttention takes padding on the right only."""
    pytest.importorskip("onnxruntime_genai")
    assert name in BUILDER_FAMILIES
    sizes = {
        "head_dim": 16,
        "num_hidden_layers": 2,
        **({"original_max_position_embeddings": 128} if name == "phi3" else {}),
    }
    base = tiny.save_base(name, tmp_path / "base", **sizes)
    model = tiny.build_model(name, **sizes)
    rule = tiny.make_rule(base_model.BaseModel.of(base), gate=tiny.calibrated_gate(model, "causal"))
    (tmp_path / "out").mkdir()
    exporter = EXPORTER.with_context(ExportContext("base", options={"genai": True}))
    exporter.write(rule, Checkpoint(base), tmp_path / "out")
    assert not onnx.load(
        tmp_path / "out" / GRAPH, load_external_data=False
    ).producer_version  # a commit of any repository
    runner = Runner(session(tmp_path / "out" / GRAPH))
    for row, answer in zip(PROMPTS, tiny.answers(model, rule), strict=True):
        require_oracle(runner.respond([row])[0], [answer])
    script = rehearse(exporter.reference(tmp_path / "out", rule, Checkpoint(base)))
    assert [check.name for check in compare(script, exporter.load(tmp_path / "out")) if not check.ok] == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gpt2", "builder is no help with gpt2; expected one of: llama"),
        ("llama", "heads of 8; GroupQueryAttention expects"),
    ],
)
def test_what_the_builder_cannot_build_is_refused_by_name(name, says, rules, folders, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime_genai")
    monkeypatch.setattr(genai.subprocess, "run", lambda *_, **__: pytest.fail("the builder was started"))
    with pytest.raises(ExportError, match=says):
        export(rules[(name, *CAUSAL)], base=folders[name], to="onnx", out=tmp_path / "out", genai=True)
    assert list(tmp_path.iterdir()) == []
