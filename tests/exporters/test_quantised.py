"""Bases that are quantised on disk: what is read of them, what exports of them do, and what is refused.

FP8 runs here; the other formats need their quantisers, and run in `make test-matrix`.
"""

import importlib.util
from types import SimpleNamespace

import oracle
import pytest
import quantised
import tiny
import torch
from tiny import PROMPTS, greedy

from adaras_export.core.base_model import BaseModel
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.exporters.hf.exporter import EXPORTER
from adaras_export.exporters.hf.thin import EXPORTER as THIN
from adaras_export.exporters.peft.adaptive import AdaptiveExporter
from adaras_export.exporters.peft.lora import PeftExporter
from adaras_export.exporters.stock.exporter import EXPORTER as STOCK

TARGETS = {"hf-thin": THIN, "peft": PeftExporter(), "peft-adaptive": AdaptiveExporter(), "stock": STOCK}


def is_there(library):
    return importlib.util.find_spec(library) is not None


def each(names=quantised.FORMATS):
    """Parameters, marked: to skip inside a test would be after the fixtures."""
    libraries = [(name, quantised.FORMATS[name][1]) for name in names]
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
def exports(bases_of, tmp_path_factory):
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


def first_logits(model):
    """Logits (B, 3, V) and tokens of a padded batch."""
    found = greedy(model, PROMPTS, max_new_tokens=3)
    return torch.stack(found.logits, 1).float(), found.sequences[:, -3:].tolist()


@pytest.mark.parametrize("name", each())
def test_an_export_is_the_base_when_off_and_the_oracle_when_on(name, bases_of, exports):
    """The oracle runs on the dequantised weights; where kernels round more, which steering has no part in, on the base.

    Measured: at most 0.02 of the largest logit there (FP8 with rounded activations); steering moves logits by 0.05.
    """
    found, rounds = bases_of[name, "llama"], quantised.FORMATS[name][2]
    ours, report = quantised.opened(exports[name], trust_remote_code=True)
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
        print(
            name,
            float((logits_SV - expected).abs().max()) / float(expected.abs().max()),
            float((expected - unsteered).abs().max()) / float(expected.abs().max()),
        )
        assert float((expected - unsteered).abs().max()) > limit
