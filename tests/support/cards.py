"""Cards from fixed values: no versions, no folders, nothing that differs from machine to machine."""

import evaluations
import numpy as np
import pytest

from adaras_export import exporters
from adaras_export.core.base_model import BaseModel
from adaras_export.core.gate import Gate
from adaras_export.core.neurons import NeuronSet
from adaras_export.core.rule import SteeringRule
from adaras_export.delivery.card import Card
from adaras_export.delivery.receipt import Receipt
from adaras_export.evaluation.record import evaluation_from_record
from adaras_export.exporters.base import ExportContext
from adaras_export.exporters.checks import Check, ParityReport
from adaras_export.exporters.manifest import Disclosed

BASE = BaseModel("somebody/tiny", "llama", 8, 48, 32, revision="c0ffee")
GATE = Gate([0, 1], [3, 4], [0.5, -0.5], 0.25, [[1.0, 0.0]], [0.5], [2.0], -0.5, threshold=0.25)
NEURONS = NeuronSet([4, 5, 6, 7, 7], [1, 2, 3, 4, 5], [1.0, -1.0, 0.5, 0.25, 2.0], ranking="attribution")
RULE = SteeringRule(NEURONS, 0.3, BASE, gate=GATE)
PARITY = ParityReport((Check("by the rule, prefill logits", 1.5e-6, 3e-5), Check("effect", 2.5, None)))
BASE_CARD = {"license": "other", "license_name": "tiny", "license_link": "LICENSE", "language": ["en", "no"]}

# Name -> target and options of an export.
TARGETS = {
    "hf": ("hf", {}),
    "hf-thin": ("hf-thin", {}),
    "onnx": ("onnx", {}),
    "onnx-int4-page": ("onnx", {"precision": "int4", "page": True}),
    "peft": ("peft", {}),
    "peft-start-at": ("peft", {"start_at": "<assistant>\n"}),
    "peft-adaptive": ("peft", {"adaptive": True}),
    "peft-merge": ("peft", {"merge": True}),
    "stock": ("stock", {}),
    "stock-switchable": ("stock", {"switchable": True}),
    "gguf": ("gguf", {}),
    "gguf-into": ("gguf", {"into": {"file": "tiny-q4.gguf", "content": "0" * 64}}),
    "gguf-switchable": ("gguf", {"into": {"file": "tiny-q4.gguf", "content": "0" * 64}, "switchable": True}),
}


_NEEDS = {"onnx": "onnx_ir", "gguf": "gguf", "peft": "peft", "stock": "peft"}


def parameters(cases):
    """Cases for pytest, of which those that need the extra onnx are marked."""
    wants = {case for case in cases if "onnx" in f"{case} {CASES.get(case, {}).get('name', '')}"}
    return [pytest.param(case, marks=[pytest.mark.onnx] if case in wants else []) for case in cases]


def exporter_of(name):
    target, options = TARGETS[name]
    if target in _NEEDS:
        pytest.importorskip(_NEEDS[target])
    return exporters.load(target).with_context(ExportContext("somebody/tiny", "c0ffee", options=options))


def vector(layer, name="model.layers.{}.mlp.steering_vector", what="added", values=None):
    """The entry of a tensor of a layer."""
    values = np.full(32, layer, np.float32) if values is None else values
    return Disclosed(name.format(layer), "model-steering.safetensors", "F32", values.shape, sha(values), what)


def sha(values):
    from adaras_export.files.atomic import sha256

    return sha256(values.tobytes())


def card(name="hf", rule=RULE, measured=None, **changes):
    """The card of a target; ``changes`` are of the receipt."""
    target = exporter_of(name).spec
    needed = {"start", "dial", *(["gate"] if rule.gate is not None else [])}
    values = {
        "target": target.name,
        "options": target.recorded(),
        "repository": "someone/tiny-steered",
        "drops": tuple(sorted(target.drops & needed)),
        "rule": rule.fingerprint,
        "given_rule": rule.fingerprint,
        "base": BASE,
        "source": BASE.id,
        "base_tensors": {},
        "base_card": BASE_CARD,
        "parity": PARITY,
        "files": {},
        "tensors": tuple(map(vector, (4, 5, 6, 7))),
    }
    return Card(rule, Receipt(**{**values, **changes}), target, measured)


def text(name="hf", rule=RULE, evaluation=None, **changes):
    """The text of a card; ``evaluation`` is a record of `adaras-export eval`."""
    measured = None if evaluation is None else evaluation_from_record(evaluation)
    return card(name, rule, measured, **changes).text()


def arm(name, right, fixed=0, broken=0, p_value=1.0):
    """The record of an arm of 500 questions; the interval is three points wide on either side."""
    return {
        "name": name,
        "questions": 500,
        "accuracy": right / 500,
        "low": right / 500 - 0.03,
        "high": right / 500 + 0.03,
        "fixed": fixed,
        "broken": broken,
        "p_value": p_value,
    }


def moved(name, right, fixed, p_value):
    """An arm that has ``right`` of 500, and fixes as many as that or more."""
    fixed = max(fixed, right - 257)
    return arm(name, right, fixed, 265 + fixed - right, p_value)


def answers(figures):
    """Verdicts, (500, 1), of an arm with these figures; no steering has the first 265 right."""
    right = np.arange(500) < 265 + figures["fixed"]
    right[: figures["broken"]] = False
    return right[:, None]


def evaluation(*arms, controls=(255, 262, 259), flipped=240, **more):
    """The record of an evaluation; 265 of 500 are right without steering."""
    random = [moved(f"random {seed}", right, 5, 0.6) for seed, right in enumerate(controls)]
    listed = [arm("off", 265), *arms, moved("flipped", flipped, 10, 0.0003), *random]
    verdicts = {figures["name"]: answers(figures) for figures in listed}
    about = {"rule": RULE.fingerprint, "steered_share": 0.447, **more}
    return evaluations.record(verdicts, figures=listed, **about)


def nats(value):
    return {"value": value, "low": value / 2, "high": value * 2}


def gap(name, value=0.0, p_value=1.0):
    """The record of a gap whose interval is two points wide on either side."""
    difference = {"value": value, "low": value - 0.02, "high": value + 0.02}
    divergences = ("kl_reference", "kl_reference_first", "kl_off", "kl_off_first")
    kls = dict(zip(divergences, map(nats, (value**2, 0.5, 1.5, 2.0)), strict=True))
    return {"name": name, "difference": difference, "fixed": 3, "broken": 8, "p_value": p_value, **kls}


COMPARISON = {
    "reference": "gated",
    "tokens": 64,
    "mean_tokens": 20.25,
    "gaps": [gap("gated"), gap("everywhere", -0.01, 0.23)],
}
CHATTING = ("hf", "onnx", "peft", "stock-switchable", "gguf", "gguf-switchable")  # whose code is of different kinds
ASKED = [{"role": "user", "content": "785+963"}]
DRAWS = (*range(245, 263), 262, 259)  # as many as a rank test needs
GAIN = evaluation(
    arm("gated", 289, 29, 5, 4e-5), controls=DRAWS, dataset="someone/sums", task="two_digits", example=ASKED
)
NULL = evaluation(arm("gated", 267, 4, 2, 0.69), example="785 + 963 =\n")
HARM = evaluation(arm("gated", 240, 5, 30, 3e-5))
CONTROL = evaluation(arm("gated", 289, 29, 5, 4e-5), controls=(255, 290, 259))
FEW = evaluation(arm("gated", 289, 29, 5, 4e-5))
NO_CONTROL = evaluation(arm("gated", 289, 29, 5, 4e-5), controls=())
SEEN = {**GAIN, "seen": 3}
COMPARED = evaluation(arm("gated", 289, 29, 5, 4e-5), arm("everywhere", 284, 26, 7, 0.0013), comparison=COMPARISON)

# Name -> the arguments of `text`.
CASES = {
    **{f"target-{name}": {"name": name} for name in TARGETS},
    **{f"chat-{name}": {"name": name, "chat_template": True} for name in CHATTING},
    "state-gain": {"evaluation": GAIN, "datasets": ("someone/traces",)},
    "state-null": {"evaluation": NULL},
    "state-harm": {"evaluation": HARM},
    "state-control-as-well": {"evaluation": CONTROL},
    "state-few-controls": {"evaluation": FEW},
    "state-no-control": {"evaluation": NO_CONTROL},
    "state-seen": {"evaluation": SEEN},
    "state-static-compared": {"name": "stock", "evaluation": COMPARED},
    "state-static-not-evaluated": {"name": "peft", "evaluation": GAIN},
    "state-rounded": {"name": "onnx-int4-page", "evaluation": GAIN},
    "state-ungated-local-base": {
        "rule": SteeringRule(NEURONS, -2.0, BaseModel("tiny", "llama", 8, 48, 32), start="first_generated_token"),
        "base": BaseModel("tiny", "llama", 8, 48, 32),
        "base_card": {},
    },
}
# Those with golden files: each kind of code, with a chat template or without, and each form of what effects are said.
GOLDEN = (
    *("chat-hf", "target-hf-thin", "target-peft", "target-peft-adaptive", "target-peft-merge", "target-stock"),
    *("target-peft-start-at", "chat-stock-switchable", "chat-onnx", "target-onnx-int4-page", "target-gguf"),
    *("target-gguf-into", "chat-gguf-switchable"),
    *("state-gain", "state-static-compared", "state-ungated-local-base"),
)
