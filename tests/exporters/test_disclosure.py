"""What each target says that it added or changed, against what a plain reading of its files finds."""

import shutil

import numpy as np
import pytest
import tiny
import tiny_gguf
from safetensors.numpy import load_file, save_file

from adaras_export import exporters
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.errors import ArtifactError
from adaras_export.exporters import manifest
from adaras_export.exporters.base import ExportContext
from adaras_export.files import atomic

START = "last_prompt_token"
# Name -> base, gate, target and options.
CASES = {
    "hf": ("llama", "causal", "hf", {}),
    "hf-sharded": ("qwen3-sharded", "causal", "hf", {}),
    "hf-thin": ("qwen3-sharded", "causal", "hf-thin", {}),
    "peft": ("llama", "causal", "peft", {}),
    "peft-adaptive": ("gpt2", "causal", "peft", {"adaptive": True}),
    "peft-merge": ("llama-biased", None, "peft", {"merge": True}),
    "stock": ("llama", "causal", "stock", {}),
    "stock-biased": ("gpt2", None, "stock", {}),
    "stock-tied": ("qwen2", None, "stock", {}),
    "stock-switchable": ("qwen2", None, "stock", {"switchable": True}),
}
slow_ones = [pytest.param(name, marks=[] if name in ("hf", "stock") else [pytest.mark.slow]) for name in CASES]
each_case = pytest.mark.parametrize("name", slow_ones)


@pytest.fixture(scope="module")
def written(rules, folders, tmp_path_factory):
    """Exporter, folder of an artifact, and that of its base, by name. Read only."""

    def make(name):
        base, gate, target, options = CASES[name]
        out = tmp_path_factory.mktemp("disclosed") / name
        out.mkdir()
        exporter = exporters.load(target).with_context(ExportContext(str(folders[base]), options=options))
        exporter.write(rules[base, gate, START], Checkpoint(folders[base]), out)
        return exporter, out, folders[base]

    return tiny.Lazy(make)


def read(folder):
    """Every tensor below a folder, by name and file."""
    return {
        (name, path.relative_to(folder).as_posix()): values
        for path in folder.rglob("*.safetensors")
        for name, values in load_file(path).items()
    }


@each_case
def test_the_list_has_every_tensor_that_the_base_lacks_or_has_otherwise_and_no_other(name, written):
    exporter, folder, base = written[name]
    before = {tensor: values for (tensor, _), values in read(base).items()}
    expected = {
        (tensor, file, values.shape, "changed" if tensor in before else "added", not values.any())
        for (tensor, file), values in read(folder).items()
        if tensor not in before or not np.array_equal(before[tensor], values)
    }
    told = exporter.spec.entries(folder, Checkpoint(base).hashes)
    assert {(one.name, one.file, one.shape, one.what, one.only_zeros) for one in told} == expected
    assert len(told) == len(expected) > 0


@each_case
def test_the_hashes_are_those_of_the_values(name, written):
    exporter, folder, base = written[name]
    found = read(folder)
    for one in exporter.spec.entries(folder, Checkpoint(base).hashes):
        assert one.sha256 == atomic.sha256(found[one.name, one.file].tobytes())


def test_the_biases_that_an_architecture_wants_besides_are_told_as_zeros(written):
    exporter, folder, base = written["stock"]
    told = exporter.spec.entries(folder, Checkpoint(base).hashes)
    zeros = {one.name for one in told if one.only_zeros}
    assert zeros == {one.name for one in told} - {f"model.layers.{layer}.mlp.down_proj.bias" for layer in (2, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stock-biased", "peft-merge"])
def test_biases_that_the_base_has_are_told_as_changed(name, written):
    exporter, folder, base = written[name]
    told = exporter.spec.entries(folder, Checkpoint(base).hashes)
    assert {one.what for one in told} == {"changed"}
    assert len(told) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_one_changed_number_of_any_tensor_is_named(name, written, tmp_path):
    """One of each file; of a base's own tensor, too, which then is no longer the base's."""
    exporter, folder, base = written[name]
    hashes, copy = Checkpoint(base).hashes, shutil.copytree(folder, tmp_path / "copy")
    told = exporter.spec.entries(copy, hashes)
    for path in sorted(copy.rglob("*.safetensors")):
        tensors = load_file(path)
        victim = sorted(tensors)[-1]
        tensors[victim] = tensors[victim] + 1
        path.unlink()  # it may be a second name of the base's file
        save_file(tensors, path)
        assert victim in manifest.differing(exporter.spec.entries(copy, hashes), told)


@pytest.fixture(scope="module")
def graph(rules, folders, plain, tmp_path_factory):
    """An exported graph, without the rest of the artifact."""
    import onnx_ir as ir

    from adaras_export.core.folding import vectors
    from adaras_export.exporters.onnx import graph as onnx_graph

    rule = rules["llama", "causal", START]
    model = ir.load(plain["llama"])
    onnx_graph.steer(model, rule, vectors(rule, Checkpoint(folders["llama"])))
    out = tmp_path_factory.mktemp("graph") / "onnx"
    shutil.copytree(plain["llama"].parent, out)
    ir.save(model, out / "model.onnx")
    return out.parent, dict(onnx_graph.tensors(rule, vectors(rule, Checkpoint(folders["llama"]))).items())


@pytest.mark.slow
@pytest.mark.onnx
def test_a_graph_discloses_what_was_put_into_it_and_its_functions(graph):
    folder, added = graph
    told = exporters.load("onnx").spec.entries(folder, {})
    assert {one.name: one.sha256 for one in told if one.dtype != "function"} == {
        name: atomic.sha256(values.tobytes()) for name, values in added.items()
    }
    functions = {one.name for one in told if one.dtype == "function"}
    assert functions == {"adaras.AdaptiveSteer", "adaras.ReasoningGate", "adaras.SteeredTokens"}


@pytest.mark.onnx
def test_steering_tensors_in_another_file_are_refused_and_that_file_is_not_read(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    away = TensorProto(name="steering_vector", data_type=TensorProto.FLOAT, dims=[2])
    away.data_location = TensorProto.EXTERNAL
    away.external_data.add(key="location", value="secret")
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    node = helper.make_node("Identity", ["steering_vector"], ["y"])
    (tmp_path / "onnx").mkdir()
    onnx.save(helper.make_model(helper.make_graph([node], "g", [], [y], [away])), tmp_path / "onnx" / "model.onnx")
    (tmp_path / "onnx" / "secret").write_bytes(bytes(8))
    with pytest.raises(ArtifactError, match="steering_vector has no values that can be read; expected them in the gr"):
        exporters.load("onnx").spec.entries(tmp_path, {})


@pytest.mark.slow
@pytest.mark.onnx
def test_the_second_graph_of_a_page_is_disclosed_too_but_for_the_dials_that_it_is_fed(graph, tmp_path):
    from adaras_export.exporters.onnx import web_page

    folder = shutil.copytree(graph[0], tmp_path / "copy")
    web_page.write_graph(folder / "onnx" / "model.onnx", folder)
    exporter = exporters.load("onnx").with_context(ExportContext("base", options={"page": True}))
    files = {file: set() for file in ("onnx/model.onnx", web_page.GRAPH)}
    for one in exporter.spec.entries(folder, {}):
        files[one.file].add((one.name, one.sha256))
    gone = files["onnx/model.onnx"] - files[web_page.GRAPH]
    assert {name for name, _ in gone} == {"steering_strength", "steering_threshold"}
    assert files[web_page.GRAPH] < files["onnx/model.onnx"]


@pytest.mark.slow
@pytest.mark.onnx
@pytest.mark.parametrize("what", ["initialiser", "number", "function"])
def test_what_is_put_into_a_graph_afterwards_is_named(what, graph, tmp_path):
    import onnx

    folder = shutil.copytree(graph[0], tmp_path / "copy")
    told = exporters.load("onnx").spec.entries(folder, {})
    model = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False)
    if what == "initialiser":
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(2, np.float32), "more.steering_vector"))
    elif what == "number":
        [strength] = [one for one in model.graph.initializer if one.name == "steering_strength"]
        strength.CopyFrom(onnx.numpy_helper.from_array(np.asarray(9, np.float32), "steering_strength"))
    else:
        model.functions[0].node[0].op_type = "Sub"
    onnx.save(model, folder / "onnx" / "model.onnx")
    [name] = manifest.differing(exporters.load("onnx").spec.entries(folder, {}), told)
    assert name.startswith({"initialiser": "more.", "number": "steering_strength", "function": "adaras."}[what])


@pytest.mark.slow
@pytest.mark.parametrize("into", [False, True], ids=["vector", "into"])
def test_a_gguf_file_discloses_its_vectors(into, rules, folders, stock, tokenizer, tmp_path):
    gguf = pytest.importorskip("gguf")
    options = {"into": tiny_gguf.write_model(stock["llama"], tokenizer, tmp_path / "model.gguf")} if into else {}
    exporter = exporters.load("gguf").with_context(ExportContext(str(folders["llama"]), options=options))
    out = tmp_path / "out"
    out.mkdir()
    exporter.write(rules["llama", None, START], Checkpoint(folders["llama"]), out)
    [path] = out.glob("*.gguf")
    before = set() if not into else {tensor.name for tensor in gguf.GGUFReader(options["into"]).tensors}
    added = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name not in before}
    told = exporter.spec.entries(out, {})
    assert {(one.name, one.dtype, one.shape, one.sha256) for one in told} == {
        (name, "F32", (tiny.HIDDEN_SIZE,), atomic.sha256(tensor.data.tobytes())) for name, tensor in added.items()
    }
    assert len(told) == 2
