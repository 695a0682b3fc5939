"""Bases that are quantised on disk: what is read of them, what exports of them do, and what is refused.

FP8 runs here; the other formats need their quantisers, and run in `make test-matrix`.
"""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import quantised
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import PROMPTS, greedy
from transformers import AutoModelForCausalLM

from adaras_export import exporters
from adaras_export.core.base_model import BaseModel
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.traces import Trace
from adaras_export.delivery.verifier import verified, verify
from adaras_export.delivery.writer import export
from adaras_export.discovery.identify import IdentifyOptions, identify
from adaras_export.errors import BrokenInstallationError, ExportError, MissingExtraError
from adaras_export.exporters.base import stock_reference
from adaras_export.exporters.hf.exporter import EXPORTER
from adaras_export.exporters.hf.thin import EXPORTER as THIN
from adaras_export.exporters.peft.adaptive import AdaptiveExporter
from adaras_export.exporters.peft.lora import PeftExporter
from adaras_export.exporters.stock.exporter import EXPORTER as STOCK
from adaras_export.modeling.loading import load_model
from adaras_export.modeling.steering import steered

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="Transformers 4 opens no FP8 on a CPU")
TARGETS = {"hf-thin": THIN, "peft": PeftExporter(), "peft-adaptive": AdaptiveExporter(), "stock": STOCK}


def is_there(library):
    return importlib.util.find_spec(library) is not None


def each(names=quantised.FORMATS, besides=None):
    """Parameters, marked: to skip inside a test would be after the fixtures. ``besides`` is needed for all of them."""
    libraries = [(name, besides or quantised.FORMATS[name][1]) for name in names]
    skips = [(name, pytest.mark.skipif(not is_there(one), reason=f"needs {one}")) for name, one in libraries]
    return [pytest.param(name, marks=skip) for name, skip in skips]


@pytest.fixture(scope="module")
def bases_of(tmp_path_factory):
    """By format and family: the quantised folder, the plain one, and a rule that steers both kinds of layers."""
    root = tmp_path_factory.mktemp("quantised")

    def make(key):
        name, family = key
        plain = quantised.base(root / family, family)
        folder = quantised.FORMATS[name][0](plain, root / f"{family}-{name}")
        base = BaseModel.of(folder)
        return SimpleNamespace(folder=folder, plain=plain, base=base, rule=tiny.make_rule(base, strength=8.0))

    return tiny.Lazy(make)


@pytest.fixture(scope="module")
def exported(bases_of, tmp_path_factory):
    """Exports to hf, by format."""

    def make(name):
        out = tmp_path_factory.mktemp("out") / f"steered-{name}"
        out.mkdir()
        EXPORTER.write(bases_of[name, "llama"].rule, Checkpoint(bases_of[name, "llama"].folder), out)
        return out

    return tiny.Lazy(make)


@pytest.mark.parametrize("name", each())
def test_columns_are_those_of_the_library(name, bases_of):
    found = bases_of[name, "llama"]
    model, report = quantised.opened(found.folder)
    assert report == {}
    index = torch.tensor([5, 0, 127, 64, 47, 5])
    for layer in range(tiny.LAYERS):
        expected = quantised.weight_of(model.model.layers[layer].mlp.down_proj)[:, index]
        assert torch.equal(Checkpoint(found.folder).down_columns(layer, index).float(), expected)


@pytest.mark.parametrize("name", each())
def test_columns_of_a_base_in_half_precision_are_those_of_the_library(name, bases_of, tmp_path):
    """Scales, and what is dequantised into, are bfloat16 then."""
    plain = shutil.copytree(bases_of["fp8", "llama"].plain, tmp_path / "plain")
    AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).save_pretrained(plain)
    folder, index = quantised.FORMATS[name][0](plain, tmp_path / "base"), torch.tensor([5, 0, 127])
    linear = quantised.opened(folder)[0].model.layers[2].mlp.down_proj
    assert torch.equal(Checkpoint(folder).down_columns(2, index), quantised.weight_of(linear)[:, index])


def first_logits(model):
    """Logits (B, 3, V) and tokens of a padded batch."""
    found = greedy(model, PROMPTS, max_new_tokens=3)
    return torch.stack(found.logits, 1).float(), found.sequences[:, -3:].tolist()


@pytest.mark.parametrize("name", each())
def test_an_export_is_the_base_when_off_and_the_oracle_when_on(name, bases_of, exported):
    """The oracle runs on the dequantised weights; where kernels round more, which steering has no part in, on the base.

    Measured there: at most 0.024 of the largest logit, and 0.055 with bitsandbytes int8, whose base alone differs as
    much from itself without padding; steering moves logits by 0.25 and more.
    """
    found, rounds = bases_of[name, "llama"], quantised.FORMATS[name][2]
    ours, report = quantised.opened(exported[name], trust_remote_code=True)
    assert report == {}
    base = quantised.opened(found.folder)[0]
    with ours.steering.off():
        off, _ = first_logits(ours)
    assert torch.equal(off, first_logits(base)[0])
    logits_BSV, ids = first_logits(ours)
    judge, rule = base if rounds else quantised.dequantised(found.folder, found.plain), tiny.plain_rule(found.rule)
    for prompt, logits_SV, follow in zip(PROMPTS, logits_BSV, ids, strict=True):
        expected, unsteered = (
            oracle.respond(judge, prompt, one, 3, follow=follow)["logits"] for one in (rule, {**rule, "strength": 0.0})
        )
        limit = 0.1 * float(expected.abs().max()) if rounds else tiny.logit_limit(expected)
        assert float((logits_SV - expected).abs().max()) <= limit
        assert float((expected - unsteered).abs().max()) > limit


@pytest.mark.parametrize("name", each())
def test_verify_passes_and_notices_negated_vectors_in_the_outputs(name, bases_of, exported, tmp_path):
    found = bases_of[name, "llama"]
    report = verified(EXPORTER, exported[name], found.rule, Checkpoint(found.folder))
    assert report.ok, report.verdict()
    (note,) = [check for check in report.checks if check.name.startswith("base in ")]
    assert ("whose kernels round" in note.name) == quantised.FORMATS[name][2]
    assert note.figure == pytest.approx(0.05 if quantised.FORMATS[name][2] else 7.6e-6, rel=0.01)
    out = shutil.copytree(exported[name], tmp_path / "negated")
    tensors = load_file(out / "model-steering.safetensors")
    save_file({key: -value for key, value in tensors.items()}, out / "model-steering.safetensors", {"format": "pt"})
    failed = [check.name for check in verified(EXPORTER, out, found.rule, Checkpoint(found.folder)).failed()]
    assert {"steering tensors that differ", "by the rule, prefill logits", "one row alone, logits"} <= {*failed}
    assert not {"off, prefill logits", "off, decode logits"} & {*failed}


CARDS = {
    "fp8": "FP8 in blocks. The comparison below ran it as Transformers does on a CPU and allows 7.6e-06 of the largest",
    "int8": "bitsandbytes int8, whose kernels round activations. The comparison below ran it as Transformers does on a "
    "CPU and allows 0.05 of the largest",
}


@pytest.mark.parametrize("name", each(CARDS))
def test_the_card_of_a_delivered_export_names_the_format_and_the_tolerance(name, bases_of, tmp_path):
    export(bases_of[name, "llama"].rule, base=bases_of[name, "llama"].folder, to="hf", out=tmp_path / "steered")
    assert f"* The base is quantised: {CARDS[name]} logit." in (tmp_path / "steered" / "README.md").read_text()
    assert verify(tmp_path / "steered").ok


@pytest.mark.parametrize("name", each([name for name in quantised.FORMATS if name.startswith("compressed")]))
def test_a_saved_export_is_the_same_when_it_is_opened_again(name, exported, tmp_path):
    """Transformers 5.23 saves the other formats in no form that it opens again, with the base alone neither."""
    ours = quantised.opened(exported[name], run=False, trust_remote_code=True)[0]
    ours.save_pretrained(tmp_path / "again")
    again, report = quantised.opened(tmp_path / "again", trust_remote_code=True)
    assert report == {}
    assert torch.equal(first_logits(again)[0], first_logits(ours)[0])


REFUSED = {
    ("peft", "compressed-int4"),
    ("peft-adaptive", "compressed-int4"),
    ("peft", "compressed-int8-packed"),
    ("peft-adaptive", "compressed-int8-packed"),
    ("peft", "torchao"),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", each(besides="compressed_tensors"))  # in that environment only: they take a minute
def test_other_targets_take_a_quantised_base_or_refuse_it_by_name(name, target, bases_of, tmp_path):
    found = bases_of[name, "llama"]
    if (target, name) in REFUSED:
        with pytest.raises(ExportError, match=r"is stored in .*PEFT does not open this adapter; .*: choose target hf"):
            TARGETS[target].write(found.rule, Checkpoint(found.folder), tmp_path)
        return
    TARGETS[target].write(found.rule, Checkpoint(found.folder), tmp_path)
    report = verified(TARGETS[target], tmp_path, found.rule, Checkpoint(found.folder))
    assert report.ok, report.verdict()


@pytest.mark.parametrize("name", each(["fp8", "nf4", "int8"], besides="bitsandbytes"))
def test_stock_keeps_the_quantisation_where_it_changes_the_architecture(name, bases_of, tmp_path):
    found = bases_of[name, "qwen3"]
    STOCK.write(found.rule, Checkpoint(found.folder), tmp_path)
    written, base = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, found.folder))
    assert written["model_type"] == "hy_v3"
    assert written["quantization_config"] == base["quantization_config"]
    report = verified(STOCK, tmp_path, found.rule, Checkpoint(found.folder))
    assert report.ok, report.verdict()


def test_what_must_widen_or_convert_weights_refuses_a_quantised_base(bases_of, tmp_path):
    found = bases_of["fp8", "llama"]
    for exporter in (replace(STOCK, switchable=True), exporters.load("gguf")):  # and onnx, with the same line
        with pytest.raises(
            ExportError, match="is quantised; expected plain weights here; choose target hf, hf-thin or"
        ):
            exporter.write(found.rule, Checkpoint(found.folder), tmp_path)


def test_stock_needs_the_dtype_in_the_config_of_a_quantised_base(bases_of, tmp_path):
    found = bases_of["fp8", "llama"]
    base = shutil.copytree(found.folder, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "dtype"}))
    with pytest.raises(ExportError, match=r"is quantised, and its config.json has no dtype; expected the type to"):
        STOCK.write(found.rule, Checkpoint(base), tmp_path / "out")


@pytest.mark.parametrize("name", each(["torchao"]))
def test_stock_does_not_write_files_anew_whose_headers_hold_settings(name, bases_of, tmp_path):
    found = bases_of[name, "llama-biased"]
    with pytest.raises(ExportError, match="with settings in the headers of the files that would be written anew"):
        STOCK.write(found.rule, Checkpoint(found.folder), tmp_path)


@pytest.mark.parametrize("name", each(["nf4", "int8"]))
def test_transposed_weights_are_stored_turned(name, bases_of, tmp_path):
    """bitsandbytes turns the weights of GPT-2's Conv1D; its layer 3 here has them plain, and so as GPT-2 has them."""
    found = bases_of[name, "gpt2"]
    rule = replace(found.rule, strength=40.0)
    EXPORTER.write(rule, Checkpoint(found.folder), tmp_path)
    report = verified(EXPORTER, tmp_path, rule, Checkpoint(found.folder))
    assert report.ok, report.verdict()


@pytest.mark.parametrize("name", each(["fp8", "nf4", "int8", "compressed-int4"]))
def test_a_quantised_model_is_loaded_read_and_steered_in_memory(name, bases_of, exported):
    found = bases_of[name, "llama"]
    model, tokenizer = load_model(found.folder)
    neurons = identify(model, tokenizer, TRACES, found.base, IdentifyOptions(keep=5)).neurons
    assert len(neurons) == 5
    assert all(np.isfinite(neurons.delta))
    ours = quantised.opened(exported[name], trust_remote_code=True)[0]
    unsteered = first_logits(model)[0]
    with steered(model, found.rule):
        expected = first_logits(model)[0]
    limit = 0.05 * float(expected.abs().max()) if quantised.FORMATS[name][2] else tiny.logit_limit(expected)
    assert float((first_logits(ours)[0] - expected)[:, 0].abs().max()) <= limit
    assert float((expected - unsteered)[:, 0].abs().max()) > limit


TRACES = [
    Trace("a1", "a", "1+1=", "2", True),
    Trace("a2", "a", "1+1=", "33", False),
    Trace("b1", "b", "12+30=", "42", True),
    Trace("b2", "b", "12+30=", "4", False),
]


def test_what_opens_a_format_is_named_if_it_is_missing(bases_of, monkeypatch):
    found = bases_of["fp8", "llama"]
    monkeypatch.setitem(sys.modules, "accelerate", None)
    for call in (lambda: load_model(found.folder), lambda: stock_reference(found.rule, Checkpoint(found.folder))):
        with pytest.raises(
            (MissingExtraError, BrokenInstallationError), match="a base in FP8 in blocks needs accelerate"
        ):
            call()
