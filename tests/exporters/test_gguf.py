"""Target gguf: what is in the files, and what a player of them computes. llama.cpp itself: tests/system."""

import json
import shutil
from dataclasses import replace

import gguf
import numpy as np
import pytest
import tiny
import tiny_gguf
import torch
import transformers
from gguf import GGUFReader, GGUFValueType
from tiny import greedy, require_answers

from adaras_export.core import families
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.delivery.verifier import verify
from adaras_export.delivery.writer import export
from adaras_export.errors import ArtifactError, ExportError, ParityError
from adaras_export.exporters.base import ExportContext
from adaras_export.exporters.gguf import files, reader
from adaras_export.exporters.gguf.exporter import _ARCHITECTURES, EXPORTER
from adaras_export.exporters.parity import compare, rehearse

CAUSAL = ("causal", "last_prompt_token")
REFUSED = ("gemma2", "gemma3_text", "olmo2")
NAMES = [name for name in tiny.NAMES if name not in REFUSED]
HINTS = {"mistral": "llama", "mistral-window": "llama", "llama-biased": "llama", "qwen3-sharded": "qwen3",
         "gpt_neox": "gptneox"}  # fmt: skip
STATIC = ("gate", "start")


def exporter(folder, **options):
    return EXPORTER.with_context(ExportContext(str(folder), options=options))


@pytest.fixture(scope="module")
def vectors(rules, folders, tmp_path_factory):
    """The folder of a control vector, by name of a base."""

    def write(name):
        out = tmp_path_factory.mktemp(name)
        EXPORTER.write(rules[(name, *CAUSAL)], Checkpoint(folders[name]), out)
        return out

    return tiny.Lazy(write)


@pytest.fixture(scope="module")
def sources(stock, tokenizer, tmp_path_factory):
    """A base as a GGUF model, by name."""
    folder = tmp_path_factory.mktemp("gguf")
    return tiny.Lazy(lambda name: tiny_gguf.write_model(stock[name], tokenizer, folder / f"{name}.gguf"))


@pytest.fixture(scope="module")
def low(rules):
    """A rule that steers layer 0, too."""
    return replace(rules[("llama", None, CAUSAL[1])], neurons=tiny.make_neurons(layers=(0, 3)))


@pytest.fixture(scope="module")
def delivered(low, folders, sources, tmp_path_factory):
    """An export with `into`, with card and receipt; the model that it was written from is gone since."""
    folder = tmp_path_factory.mktemp("into")
    source = shutil.copyfile(sources["llama"], folder / "source.gguf")
    export(low, base=folders["llama"], to="gguf", out=folder / "out", accept_loss=["start", "dial"], into=source)
    source.unlink()
    return folder / "out"


def failed(checks):
    return {check.name for check in checks if not check.ok}


def tensors_of(path):
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def edited(path, name):
    """Negate one number of a tensor in a file."""
    place = tensors_of(path)[name].data_offset
    content = bytearray(path.read_bytes())
    content[place + 3] ^= 0x80
    path.write_bytes(content)


# The control vector: the file


@pytest.mark.parametrize("name", NAMES)
def test_a_direction_is_the_folded_vector_of_its_layer_without_the_strength(name, vectors, rules, stock):
    rule, found = rules[(name, *CAUSAL)], tensors_of(vectors[name] / "control-vector.gguf")
    assert list(found) == ["direction.2", "direction.3"]
    for layer in rule.layers():
        weight = families.down_projection(stock[name], layer).weight.detach().double()
        weight = weight.T if name == "gpt2" else weight
        index, delta = rule.neurons_of(layer)
        factor = 0.7 if name == "granite" else 1.0
        expected = factor * sum(weight[:, i] * d for i, d in zip(index.tolist(), delta.tolist(), strict=True))
        tensor = found[f"direction.{layer}"]
        assert (tensor.tensor_type, tensor.shape.tolist()) == (gguf.GGMLQuantizationType.F32, [tiny.HIDDEN_SIZE])
        np.testing.assert_allclose(tensor.data, expected.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_the_metadata_is_what_llama_cpp_expects_and_names_the_rule(name, vectors, rules):
    rule = rules[(name, *CAUSAL)]
    assert reader.opened(vectors[name] / "control-vector.gguf").entries == {
        "general.architecture": (GGUFValueType.STRING, "controlvector"),
        "controlvector.model_hint": (GGUFValueType.STRING, HINTS.get(name, name)),
        "controlvector.layer_count": (GGUFValueType.INT32, 2),
        "adaras.rule": (GGUFValueType.STRING, rule.fingerprint),
        "adaras.strength": (GGUFValueType.FLOAT64, rule.strength),
    }


def test_only_families_that_a_vector_behind_the_block_can_steer_have_a_name_in_llama_cpp():
    assert {*_ARCHITECTURES} <= {name for name, family in families.FAMILIES.items() if family.behind != "norm"}


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_with_a_norm_behind_its_mlp_is_refused(name, rules, folders, tmp_path):
    with pytest.raises(ExportError, match=rf"gguf: {tiny.SPECS[name][0]} normalises what leaves its MLP"):
        EXPORTER.write(rules[(name, *CAUSAL)], Checkpoint(folders[name]), tmp_path)


def test_layer_0_is_refused_with_two_ways_out(low, folders, tmp_path):
    with pytest.raises(ExportError, match=r"layer 0, where .* no control vector; .*--min-layer 1, or .* with --into"):
        EXPORTER.write(low, Checkpoint(folders["llama"]), tmp_path)


def test_a_rule_without_neurons_is_refused(bases, folders, tmp_path):
    rule = tiny.make_rule(bases["llama"], neurons=tiny.make_neurons().top(0))
    with pytest.raises(ExportError, match="gguf: the rule has no neurons"):
        EXPORTER.write(rule, Checkpoint(folders["llama"]), tmp_path)


def test_gate_and_start_are_lost_by_name_and_with_into_the_dial(rules, folders, sources, tmp_path):
    rule, common = rules[("llama", *CAUSAL)], {"base": folders["llama"], "to": "gguf", "out": tmp_path / "out"}
    with pytest.raises(ExportError, match=r"gguf: cannot express gate, start; .* --accept-loss gate,start"):
        export(rule, **common)
    with pytest.raises(ExportError, match="gguf: cannot express dial"):
        export(rule, **common, accept_loss=STATIC, into=sources["llama"])


# The control vector: what it does


@pytest.mark.parametrize("name", NAMES)
def test_the_player_gives_what_the_oracle_gives_with_every_token_steered(name, vectors, folders, told_everywhere):
    player = exporter(folders[name]).load(vectors[name])
    with player.steered():
        require_answers(greedy(player.model), told_everywhere[(name, *CAUSAL)])


SOME = ("llama", "granite", "gpt_neox")
EACH = [pytest.param(name, marks=() if name in SOME else pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", EACH)
def test_an_export_passes_and_passes_again(name, rules, folders, tmp_path):
    out = tmp_path / "out"
    report = export(rules[(name, *CAUSAL)], base=folders[name], to="gguf", out=out, accept_loss=STATIC)
    assert report.drops == ("gate", "start")
    assert sorted(report.files) == ["README.md", "control-vector.gguf", "rule.safetensors"]
    assert verify(out).ok
    effect = next(check for check in report.parity.checks if check.name == "effect of steering on logits")
    limit = next(check for check in report.parity.checks if check.name == "by the rule, decode logits").limit
    assert effect.figure > 1000 * limit


def negated(rule):
    delta = rule.neurons.delta.copy()
    delta[0] = -delta[0]
    return replace(rule, neurons=replace(rule.neurons, delta=delta))


def shifted(rule):
    """One layer off, as a reader would be that counts from 1; a gate could not be below any more."""
    return replace(rule.ungated(), neurons=replace(rule.neurons, layer=rule.neurons.layer - 1))


def weaker(rule):
    return rule.with_strength(rule.strength * 0.999)


@pytest.mark.parametrize("tamper", [negated, shifted, weaker])
@pytest.mark.parametrize("name", ["llama", "granite", "gpt_neox", "gpt2"])
def test_a_control_vector_of_another_rule_fails_on_entries_and_logits(name, tamper, rules, folders, tmp_path):
    rule, its = rules[(name, *CAUSAL)], exporter(folders[name])
    its.write(tamper(rule), Checkpoint(folders[name]), tmp_path)
    assert {"metadata entries or tensors that differ"} <= failed(
        its.inspect(tmp_path, rule, Checkpoint(folders[name])).checks
    )
    script = rehearse(its.reference(tmp_path, rule, Checkpoint(folders[name])))
    assert "by the rule, prefill logits" in failed(compare(script, its.load(tmp_path)))


@pytest.mark.parametrize("name", ["direction.1", "foo"])
def test_an_extra_tensor_is_found_and_nothing_is_played(name, vectors, rules, folders, tmp_path):
    out = tmp_path / "out"
    export(rules[("llama", *CAUSAL)], base=folders["llama"], to="gguf", out=out, accept_loss=STATIC)
    more = {name: np.ones(tiny.HIDDEN_SIZE + 1, np.float32)}
    files.copy_with(vectors["llama"] / "control-vector.gguf", out / "control-vector.gguf", more)
    found = failed(verify(out).checks)
    assert "metadata entries or tensors that differ" in found
    assert "not run, because its code or its settings differ" in found


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + 200 * b"\xff", b"PK" + 100 * b"\0"])
def test_a_damaged_file_is_an_error_of_one_line(content, rules, folders, tmp_path):
    (tmp_path / "control-vector.gguf").write_bytes(content)
    with pytest.raises(ArtifactError, match="expected a GGUF file"):
        EXPORTER.inspect(tmp_path, rules[("llama", *CAUSAL)], Checkpoint(folders["llama"]))


def test_the_card_prints_command_lines_with_the_strength_as_the_scale(rules, folders, tmp_path):
    out = tmp_path / "steered"
    rule = rules[("llama", *CAUSAL)]
    export(rule, base=folders["llama"], to="gguf", out=out, accept_loss=STATIC, strength=-0.25)
    card = (out / "README.md").read_text()
    assert "llama-server -m model.gguf --control-vector-scaled steered/control-vector.gguf:-0.25\n" in card
    assert "library_name: llama.cpp\n" in card
    assert "\n- gguf\n" in card
    assert verify(out).ok


# With `into`: a GGUF model


def test_only_biases_are_new_in_the_model(delivered, low, sources, stock):
    found, source = tensors_of(delivered / "model-steered.gguf"), tensors_of(sources["llama"])
    assert [*found] == [*source, "blk.0.ffn_down.bias", "blk.3.ffn_down.bias"]
    for name, tensor in source.items():
        assert found[name].data.tobytes() == tensor.data.tobytes()
        assert (found[name].tensor_type, found[name].shape.tolist()) == (tensor.tensor_type, tensor.shape.tolist())
    for layer in low.layers():
        weight = families.down_projection(stock["llama"], layer).weight.detach().double().numpy()
        index, delta = low.neurons_of(layer)
        bias = found[f"blk.{layer}.ffn_down.bias"].data
        np.testing.assert_allclose(bias, low.strength * weight[:, index] @ delta, rtol=1e-5, atol=1e-7)


def test_the_metadata_of_the_model_is_kept_byte_for_byte(delivered, sources):
    one, other = sources["llama"].read_bytes(), (delivered / "model-steered.gguf").read_bytes()
    end = min(tensor.field.offset for tensor in GGUFReader(sources["llama"]).tensors)
    assert one[24:end] == other[24:end]


def test_a_steered_model_passes_again_without_the_one_that_it_was_written_from(delivered):
    report = verify(delivered)
    assert report.ok
    assert "off, prefill logits" not in {check.name for check in report.checks}
    receipt = json.loads((delivered / "receipt.json").read_text())
    assert receipt["options"]["into"]["file"] == "source.gguf"
    assert "`source.gguf` is here with biases" in (delivered / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("blk.1.attn_q.weight", "metadata or tensors of the GGUF model that differ"),
        ("blk.3.ffn_down.bias", "biases that differ"),
    ],
)
def test_a_changed_tensor_of_the_model_is_found(name, check, delivered, tmp_path):
    folder = shutil.copytree(delivered, tmp_path / "copy")
    edited(folder / "model-steered.gguf", name)
    assert check in failed(verify(folder).checks)


def test_transformers_plays_the_model_only_if_it_is_told_of_the_biases(delivered, low, stock):
    config = transformers.AutoConfig.from_pretrained(delivered, gguf_file="model-steered.gguf")
    expected = tiny.answers_everywhere(stock["llama"], low)
    for config.mlp_bias in (True, False):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            delivered, gguf_file="model-steered.gguf", config=config, dtype=torch.float32
        )
        if config.mlp_bias:
            require_answers(greedy(model), expected)
        else:
            require_answers(greedy(model), tiny.answers(stock["llama"], low.with_strength(0.0)))


@pytest.mark.parametrize(
    ("base", "source", "message"),
    [
        ("llama", "qwen2", r"is of architecture qwen2, and the base of llama; expected the same, of: llama, granite"),
        ("qwen2", "qwen2", r"is of architecture qwen2, and the base of qwen2; expected the same, of: llama, granite"),
        ("llama", "vector", "is of architecture controlvector"),
        ("llama", "llama-biased", r"has blk.0.ffn_down.bias already; expected a model without"),
        ("llama", "smaller", r"has 4 down projections \[64, 32\]; expected 4 of \[48, 32\], a GGUF of"),
        ("llama", "steered", r"has blk.0.ffn_down.bias already"),
    ],
)
def test_a_model_that_cannot_carry_the_biases_is_refused(base, source, message, request, folders, tmp_path):
    path = request.getfixturevalue("carriers")[source]
    rule = request.getfixturevalue("rules")[(base, None, CAUSAL[1])]
    with pytest.raises(ExportError, match=message):
        exporter(folders[base], into=path).write(rule, Checkpoint(folders[base]), tmp_path)


@pytest.fixture
def carriers(sources, vectors, delivered, tokenizer, tmp_path):
    """What `into` refuses, by name."""

    def make(name):
        special = {
            "vector": vectors["llama"] / "control-vector.gguf",
            "steered": delivered / "model-steered.gguf",
        }
        if name == "smaller":
            model = tiny.build_model("llama", intermediate_size=64)
            return tiny_gguf.write_model(model, tokenizer, tmp_path / "smaller.gguf")
        return special.get(name) or sources[name]

    return tiny.Lazy(make)


def test_a_file_that_is_not_there_or_no_gguf_is_refused(low, folders, tmp_path):
    with pytest.raises(ExportError, match=r"--into .*no.gguf: no such file; expected a GGUF model"):
        exporter(folders["llama"], into=tmp_path / "no.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"bad")
    with pytest.raises(ArtifactError, match="expected a GGUF file"):
        exporter(folders["llama"], into=tmp_path / "bad.gguf").write(low, Checkpoint(folders["llama"]), tmp_path)


def test_strength_0_is_refused(low, folders, sources, tmp_path):
    with pytest.raises(ExportError, match="gguf: the rule has strength 0"):
        exporter(folders["llama"], into=sources["llama"]).write(
            low.with_strength(0.0), Checkpoint(folders["llama"]), tmp_path
        )


def test_a_damaged_receipt_is_an_error_of_one_line(delivered, tmp_path):
    folder = shutil.copytree(delivered, tmp_path / "copy")
    receipt = json.loads((folder / "receipt.json").read_text())
    (folder / "receipt.json").write_text(json.dumps(receipt | {"options": {"into": {"file": "x"}}}))
    with pytest.raises(ArtifactError, match=r"receipt: says of --into \['file'\]; expected content and file"):
        verify(folder)


def test_a_copy_with_nothing_more_has_the_content_of_its_source(sources, tmp_path):
    files.copy_with(sources["llama"], tmp_path / "copy.gguf", {})
    assert files.content_digest(tmp_path / "copy.gguf") == files.content_digest(sources["llama"])
    assert (tmp_path / "copy.gguf").read_bytes() == sources["llama"].read_bytes()


@pytest.mark.parametrize("name", ["mistral", "granite"])
def test_other_families_that_llama_cpp_gives_biases_pass_too(name, rules, folders, sources, tmp_path):
    rule = replace(rules[(name, None, CAUSAL[1])], neurons=tiny.make_neurons(layers=(0, 3)))
    accepted = ["start", "dial"]
    export(rule, base=folders[name], to="gguf", out=tmp_path / "out", accept_loss=accepted, into=sources[name])
    assert verify(tmp_path / "out").ok


def test_biases_of_another_rule_fail_on_their_logits(low, folders, sources, tmp_path):
    its = exporter(folders["llama"], into=sources["llama"])
    its.write(negated(low), Checkpoint(folders["llama"]), tmp_path)
    script = rehearse(its.reference(tmp_path, low, Checkpoint(folders["llama"])))
    assert "by the rule, prefill logits" in failed(compare(script, its.load(tmp_path)))


def test_an_artifact_that_was_exchanged_is_not_delivered(low, folders, sources, tmp_path, monkeypatch):
    """The comparison stands between writing and the final name."""
    whole = files.copy_with
    monkeypatch.setattr(files, "copy_with", lambda *args: whole(*args[:2], {}))
    with pytest.raises(ParityError, match="biases that differ"):
        export(low, base=folders["llama"], to="gguf", out=tmp_path / "out", accept_loss=["start", "dial"],
               into=sources["llama"])  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("alignment", [32, 128])
def test_a_copy_keeps_the_alignment_that_its_source_names_also_of_a_file_that_ends_early(alignment, tmp_path):
    """A tensor that begins elsewhere is a damaged file to llama.cpp."""
    values = {name: np.arange(size, dtype=np.float32) for name, size in (("a", 3), ("b", 33), ("c", 5))}
    source, copy = tmp_path / "source.gguf", tmp_path / "copy.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_custom_alignment(alignment)
    for name in "ab":
        writer.add_tensor(name, values[name])
    tiny_gguf.finish(writer)
    end = max(tensor.data_offset + tensor.n_bytes for tensor in GGUFReader(source).tensors)
    source.write_bytes(source.read_bytes()[:end])  # without the padding at its end
    files.copy_with(source, copy, {"c": values["c"]})
    found = tensors_of(copy)
    assert {name: tensor.data.tolist() for name, tensor in found.items()} == {n: v.tolist() for n, v in values.items()}
    assert all(tensor.data_offset % alignment == 0 for tensor in found.values())
    assert files.content_digest(copy, without={"c"}) == files.content_digest(source)
