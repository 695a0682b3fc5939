"""Exports that several test files open."""

import elsewhere
import pytest
import tiny
import torch
import transformers

from adaras_export.exporters.hf.exporter import EXPORTER


@pytest.fixture(scope="session")
def written(rules, folders, tmp_path_factory):
    """The folder of an export to `hf`, by the keys of ``rules``."""
    return elsewhere.exports(EXPORTER, rules, folders, tmp_path_factory)


@pytest.fixture(scope="module")
def opened(written):
    """The model of an export in this process, by the keys of ``rules``; not under the guard's eyes."""

    def load(key):
        return transformers.AutoModelForCausalLM.from_pretrained(
            written[key], trust_remote_code=True, dtype=torch.float32
        ).eval()

    return tiny.Lazy(load)


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """The plain ONNX graph of a base, by name."""
    from adaras_export.exporters.onnx import graph

    def make(name):
        out = tmp_path_factory.mktemp("plain") / "model.onnx"
        graph.plain_graph(tiny.build_model(name), out)
        return out

    return tiny.Lazy(make)
