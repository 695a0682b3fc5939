"""Target gguf with --into and --switchable: what is in the files. llama.cpp itself: tests/system/runtimes."""

import json
import shutil

import artifacts
import gguf
import numpy as np
import pytest
import tiny
import tiny_gguf
from gguf import GGUFReader

from adaras_export.core.checkpoint import Checkpoint
from adaras_export.delivery.verifier import verify
from adaras_export.delivery.writer import export
from adaras_export.errors import ArtifactError, ExportError
from adaras_export.exporters.base import ExportContext
from adaras_export.exporters.gguf import reader, switchable
from adaras_export.exporters.gguf.content import Content, Part
from adaras_export.exporters.gguf.exporter import EXPORTER
from adaras_export.exporters.gguf.switchable import NEURONS

CAUSAL = ("causal", "last_prompt_token")
LOSS = ("gate", "start")
NAMES = ("llama", "mistral", "granite", "qwen2")
DIFFER = "metadata or tensors of the GGUF files that differ"
NOT_RUN = "not run, because its code or its settings differ"


@pytest.fixture(scope="module")
def sources(stock, tokenizer, tmp_path_factory):
    """A base as a GGUF model, by name."""
    folder = tmp_path_factory.mktemp("gguf")
    return tiny.Lazy(lambda name: tiny_gguf.write_model(stock[name], tokenizer, folder / f"{name}.gguf"))


@pytest.fixture(scope="module")
def delivered(rules, folders, sources, tmp_path_factory):
    """The report of an export, by name of a base; the model that it was written from is gone since."""

    def write(name):
        folder = tmp_path_factory.mktemp(name)
        source = shutil.copyfile(sources[name], folder / "source.gguf")
        how = {"to": "gguf", "accept_loss": LOSS, "into": source, "switchable": True}
        report = export(rules[(name, *CAUSAL)], base=folders[name], out=folder / "out", **how)
        source.unlink()
        return report

    return tiny.Lazy(write)


def tensors_of(path):
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def side_by_side(values, heads):
    """Rows of each head in the order of llama.cpp's `llama`: the first of each half, the second of each half, ..."""
    half = len(values) // heads // 2
    starts = range(0, len(values), 2 * half)
    return values[[start + at + part for start in starts for at in range(half) for part in (0, half)]]


def expected_of(name, source):
    """The tensors of the model, from those of its source."""
    found = {one: tensor.data for one, tensor in tensors_of(source).items()}
    for one, values in found.items():
        if one.endswith(("ffn_gate.weight", "ffn_up.weight")):
            found[one] = np.pad(values, ((0, NEURONS), (0, 0)))
        if one.endswith("ffn_down.weight"):
            found[one] = np.pad(values, ((0, 0), (0, NEURONS)))
        if name == "qwen2" and ("attn_q" in one or "attn_k" in one):
            found[one] = side_by_side(values, 4 if "attn_q" in one else 2)
    for layer in range(tiny.LAYERS):
        for part, value in (("gate", 32), ("up", 1 / 32)):
            bias = found[f"blk.{layer}.ffn_{part}.bias"] = np.zeros(tiny.MLP_SIZE + NEURONS, np.float32)
            bias[tiny.MLP_SIZE] = value
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_its_source_with_a_constant_neuron_in_every_layer(name, delivered, sources):
    path = delivered[name].path / "model-switchable.gguf"
    expected, found = expected_of(name, sources[name]), tensors_of(path)
    assert [*found] == [*expected]
    assert all(np.array_equal(found[one].data, values) for one, values in expected.items())
    files = (GGUFReader(one).fields for one in (path, sources[name]))
    entries, before = ({key: field.contents() for key, field in fields.items()} for fields in files)
    if name == "qwen2":
        before = {key.replace("qwen2.", "llama."): value for key, value in before.items()}
        before["general.architecture"] = "llama"
    changed = {key for key in entries.keys() | before.keys() if entries.get(key) != before.get(key)}
    prefix = "granite" if name == "granite" else "llama"
    assert changed == {"GGUF.tensor_count", f"{prefix}.feed_forward_length"}
    assert entries[f"{prefix}.feed_forward_length"] == tiny.MLP_SIZE + NEURONS


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_lora_is_what_llama_cpp_expects_and_gives_the_vector_times_the_strength(name, delivered, rules, stock):
    path, rule = delivered[name].path / "steering-lora.gguf", rules[(name, *CAUSAL)]
    entries = {key: value for key, (_, value) in reader.opened(path).entries.items()}
    assert entries.pop("adaras.rule") == rule.fingerprint
    assert entries == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 1.0,
        "adaras.source_architecture": name,
    }
    found = tensors_of(path)
    assert [*found] == [f"blk.{layer}.ffn_down.weight.lora_{part}" for layer in rule.layers() for part in "ab"]
    for layer in rule.layers():
        a, b = (found[f"blk.{layer}.ffn_down.weight.lora_{part}"] for part in "ab")
        assert (a.shape.tolist(), b.shape.tolist()) == ([tiny.MLP_SIZE + NEURONS, 1], [1, tiny.HIDDEN_SIZE])
        assert np.flatnonzero(a.data).tolist() == [tiny.MLP_SIZE]
        weight = stock[name].model.layers[layer].mlp.down_proj.weight.detach().double().numpy()
        index, delta = rule.neurons_of(layer)
        np.testing.assert_allclose(b.data[:, 0], rule.strength * weight[:, index] @ delta, rtol=1e-5, atol=1e-7)


def decodes(kind):
    try:
        gguf.quants.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8), kind)
    except NotImplementedError:
        return False
    return True


KINDS = [kind for kind in gguf.GGML_QUANT_SIZES if decodes(kind)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("part", ["down", "gate"])
def test_weights_of_every_type_keep_their_bits_and_what_is_added_is_zero(part, kind):
    """Whole blocks of zero bytes; with 32 neurons more, types with blocks of 256 would have none."""
    rows, columns = 3, 512
    block, size = gguf.GGML_QUANT_SIZES[kind]
    stored = np.random.default_rng(0).integers(0, 60, (rows, columns // block * size), np.uint8)
    before = Part(f"blk.0.ffn_{part}.weight", kind, (columns, rows), lambda: iter([stored.tobytes()]))
    after = switchable._wider(before)
    width, height = after.shape
    values = np.frombuffer(b"".join(after.pieces()), np.uint8).reshape(height, width // block * size)
    assert (width, height) == ((columns + NEURONS, rows) if part == "down" else (columns, rows + NEURONS))
    assert values[:rows, : stored.shape[1]].tobytes() == stored.tobytes()
    found = gguf.quants.dequantize(values, kind).astype(np.float64)
    assert not found[rows:].any()
    assert not found[:, columns:].any()
    assert b"".join(switchable._narrower(after).pieces()) == stored.tobytes()


@pytest.mark.parametrize("name", ["llama", pytest.param("granite", marks=pytest.mark.slow), "qwen2"])
def test_a_delivered_export_passes_again_without_the_model_that_it_was_written_from(name, delivered):
    report, folder = delivered[name], delivered[name].path
    assert report.drops == LOSS
    assert sorted(report.files) == ["README.md", "model-switchable.gguf", "rule.safetensors", "steering-lora.gguf"]
    checks = {check.name: check for check in verify(folder).checks}
    assert all(check.ok for check in checks.values())
    assert checks["off, prefill logits"].figure == 0
    receipt = json.loads((folder / "receipt.json").read_text())
    assert receipt["options"]["switchable"] is True
    card = (folder / "README.md").read_text()
    assert "`model-switchable.gguf` computes what `source.gguf` does" in card
    assert "--lora-scaled steered/steering-lora.gguf:0 --cache-ram 0\n" in card


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_receipt_has_every_tensor_that_the_source_has_not(name, delivered, sources):
    told = json.loads((delivered[name].path / "receipt.json").read_text())["tensors"]
    before = {one: tensor.data.tobytes() for one, tensor in tensors_of(sources[name]).items()}
    expected = set()
    for file in ("model-switchable.gguf", "steering-lora.gguf"):
        for one, tensor in tensors_of(delivered[name].path / file).items():
            if tensor.data.tobytes() != before.get(one):
                expected.add((file, one, "changed" if one in before else "added"))
    assert {(one["file"], one["name"], one["what"]) for one in told} == expected


# What was tampered with, with a receipt that fits


def edit(path, name, place, value):
    """Give one number of a tensor another value."""
    [tensor] = [tensor for tensor in GGUFReader(path, "r+").tensors if tensor.name == name]
    tensor.data.reshape(-1)[place] = value


def replaced(path, entry, new):
    """Give a number of the metadata, of four bytes, which stands behind ``entry``, another value."""
    content = path.read_bytes()
    place = content.index(entry) + len(entry)
    path.write_bytes(content[:place] + new + content[place + 4 :])


M = tiny.MLP_SIZE
MODEL, LORA = "model-switchable.gguf", "steering-lora.gguf"
SIZE, ALPHA = b"feed_forward_length\x04\0\0\0", b"adapter.lora.alpha\x06\0\0\0"
PICKS = "blk.2.ffn_down.weight.lora_a"

# What is changed, in a file by a function, and what of it is named.
TAMPERED = {
    "constant": (MODEL, lambda path: edit(path, "blk.2.ffn_gate.bias", M, 16), "blk.2.ffn_gate.bias"),
    "bias": (MODEL, lambda path: edit(path, "blk.2.ffn_up.bias", 0, 1), "blk.2.ffn_up.bias"),
    "column": (MODEL, lambda path: edit(path, "blk.0.ffn_down.weight", M, 1), "blk.0.ffn_down.weight"),
    "row": (MODEL, lambda path: edit(path, "blk.1.ffn_up.weight", M * tiny.HIDDEN_SIZE, 1), "blk.1.ffn_up.weight"),
    "weight": (MODEL, lambda path: edit(path, "blk.1.attn_v.weight", 0, 1), "the model"),
    "neuron": (MODEL, lambda path: edit(path, "blk.1.ffn_up.weight", 0, 1), "the model"),
    "size": (MODEL, lambda path: replaced(path, SIZE, bytes(4)), "metadata"),
    "alpha": (LORA, lambda path: replaced(path, ALPHA, b"\0\0\0\x40"), "adapter.lora.alpha"),
    "longer": (LORA, lambda path: path.write_bytes(path.read_bytes() + bytes(32)), "32 bytes behind the last tensor"),
    "picks": (LORA, lambda path: edit(path, PICKS, 0, 1), PICKS),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_what_was_tampered_with_is_named(how, delivered, tmp_path):
    folder = shutil.copytree(delivered["qwen2"].path, tmp_path / "copy")
    file, tamper, detail = TAMPERED[how]
    tamper(folder / file)
    found = {check.name: check.detail for check in verify(artifacts.refit(folder)).failed()}
    assert detail in found["LoRA tensors that differ" if how == "picks" else DIFFER]
    assert (NOT_RUN in found) == (how != "picks")


def test_a_model_without_its_mlps_is_an_error_of_one_line(delivered, sources, tmp_path):
    folder = shutil.copytree(delivered["llama"].path, tmp_path / "copy")
    shutil.copyfile(sources["gpt2"], folder / MODEL)
    found = {check.name: check.detail for check in verify(artifacts.refit(folder)).failed()}
    assert "its MLPs, or its counts of heads or neurons, are not as in" in found["what it stores cannot be read"]


# What is refused


def exporter(folder, source):
    return EXPORTER.with_context(ExportContext(str(folder), options={"into": source, "switchable": True}))


def test_without_a_model_it_is_refused(rules, folders, tmp_path):
    with pytest.raises(
        ExportError, match=r"--switchable needs --into, too: a GGUF model of the base, .* quantised or not"
    ):
        export(rules[("llama", *CAUSAL)], base=folders["llama"], to="gguf", out=tmp_path / "out", switchable=True)


@pytest.mark.parametrize("name", ["smollm3", "qwen3", "phi3", "gpt2", "gpt_neox"])
def test_a_family_whose_biases_llama_cpp_does_not_load_is_refused_by_name(name, rules, folders, sources, tmp_path):
    architecture = name.replace("_", "")
    with pytest.raises(
        ExportError, match=rf"no biases of gate and up in its {architecture}, .*: llama, granite, qwen2;"
    ):
        exporter(folders[name], sources[name]).write(rules[(name, *CAUSAL)], Checkpoint(folders[name]), tmp_path)


REFUSED = {
    "qwen2": "is of architecture qwen2, and the base of llama; expected the same, of: llama, granite, qwen2",
    "llama-biased": "has blk.0.ffn_down.bias already; expected a model without",
}


@pytest.mark.parametrize("source", REFUSED)
def test_another_model_is_refused(source, rules, folders, sources, tmp_path):
    base = folders["llama"]
    with pytest.raises(ExportError, match=REFUSED[source]):
        exporter(base, sources[source]).write(rules[("llama", *CAUSAL)], Checkpoint(base), tmp_path)


def test_a_size_for_each_layer_is_refused(rules, folders, sources, tmp_path):
    """Such an array is read by nobody here, and would keep its old numbers."""
    source = tmp_path / "source.gguf"
    content, key = Content.of(sources["llama"]), "llama.feed_forward_length"
    sizes = (4).to_bytes(4, "little") + (tiny.LAYERS).to_bytes(8, "little") + tiny.LAYERS * (M).to_bytes(4, "little")
    content.entries[key] = gguf_entry(key, 9, sizes)
    content.write(source)
    assert reader.opened(source).entries[key] == (gguf.GGUFValueType.ARRAY, None)
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match="one count for all layers"):
        exporter(folders["llama"], source).write(
            rules[("llama", *CAUSAL)], Checkpoint(folders["llama"]), tmp_path / "out"
        )


def gguf_entry(key, kind, value):
    return len(key).to_bytes(8, "little") + key.encode() + kind.to_bytes(4, "little") + value
