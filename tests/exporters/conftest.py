"""Exports that several test files open."""

import elsewhere
import pytest
import tiny
import torch
import transformers

from adaras_export.exporters.hf import EXPORTER


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
