"""The adapter of `stock --switchable`: an ordinary rank-1 LoRA that turns the steering on, in a folder of its own.

The files are plain PEFT without biases, which servers accept. See `constant_neuron` for the neuron that it needs.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from adaras_export.core import checkpoint
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.folding import vectors
from adaras_export.core.rule import SteeringRule
from adaras_export.exporters import adapters
from adaras_export.exporters.adapters import ADAPTER_FILE, CONFIG_FILE, adapted
from adaras_export.exporters.base import SteeredModel
from adaras_export.exporters.checkpoint import opened, same_json, stores, strange_names, write_json
from adaras_export.exporters.checks import Check
from adaras_export.exporters.parity import Mode, Tolerance
from adaras_export.exporters.stock.constant_neuron import picking
from adaras_export.files import atomic
from adaras_export.files.safetensors_record import Array

FOLDER = "steering-lora"
FILES = (f"{FOLDER}/{CONFIG_FILE}", f"{FOLDER}/{ADAPTER_FILE}")


def adapter_config(rule: SteeringRule) -> dict[str, Any]:
    """The adapter_config.json, for PEFT and servers.

    Layers and modules are named separately, since some servers accept only the last part of module names. The base is
    not named: it is the parent folder, whose final path is not known yet.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": 1,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["down_proj"],
        "layers_to_transform": rule.layers(),
        "layers_pattern": "layers",
    }


def adapter_tensors(rule: SteeringRule, base: Checkpoint) -> dict[str, Array]:
    """A, which selects the constant neuron, and B = strength * vector, of each steered layer, float32."""
    tensors: dict[str, Array] = {}
    for layer, vector_D in vectors(rule, base).items():
        prefix = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        tensors[f"{prefix}.lora_A.weight"] = picking(rule.base.width(layer))
        tensors[f"{prefix}.lora_B.weight"] = (rule.strength * vector_D.astype(np.float64)).astype(np.float32)[:, None]
    return tensors


def write(rule: SteeringRule, base: Checkpoint, out: Path) -> None:
    """Write the adapter into a subfolder of ``out``."""
    (out / FOLDER).mkdir()
    write_json(out / FOLDER / CONFIG_FILE, adapter_config(rule))
    atomic.replace_file(out / FOLDER / ADAPTER_FILE, save(adapter_tensors(rule, base), metadata={"format": "pt"}))


def changed_settings(rule: SteeringRule, folder: Path) -> list[str]:
    """Unexpected or changed files of the adapter, except its tensors: PEFT follows settings and reads pickles."""
    names, path = {item.name for item in (folder / FOLDER).glob("*")}, folder / FOLDER / CONFIG_FILE
    wrong = sorted(f"{FOLDER}/{name}" for name in names ^ {CONFIG_FILE, ADAPTER_FILE})
    if path.exists() and not same_json(atomic.read_json(path), adapter_config(rule)):
        wrong.append(f"{FOLDER}/{CONFIG_FILE}")
    return wrong


def checks(rule: SteeringRule, base: Checkpoint, folder: Path) -> list[Check]:
    """Compare the tensors that `write` wrote."""
    path, expected = folder / FOLDER / ADAPTER_FILE, adapter_tensors(rule, base)
    wrong = [name for name, value in expected.items() if not stores(path, name, value)]
    strange = strange_names(path, expected)
    return [
        Check.empty("adapter tensors that differ", wrong),
        Check.empty("adapter tensors missing or unknown", strange),
    ]


class SwitchableCheckpoint(SteeredModel):
    """An opened artifact with its adapter; off disables the adapter."""

    tolerance = Tolerance(64, off=True)  # the wider matrices may be summed in other blocks
    switchable = True

    def __init__(self, folder: Path) -> None:
        from peft import get_peft_model_state_dict

        model, self.loading_report = opened(folder)
        self.model = adapted(model, folder / FOLDER)
        stored = checkpoint.header(folder / FOLDER / ADAPTER_FILE).keys()
        self.lost = sorted(stored ^ get_peft_model_state_dict(self.model).keys())

    def findings(self) -> Sequence[Check]:
        """Check the loading report and the loaded adapter keys."""
        return [
            Check.empty("keys in the loading report", self.loading_report),
            Check.empty("adapter keys that were not loaded", self.lost),
        ]

    def set_to(self, mode: Mode) -> AbstractContextManager[Any]:
        """Disable the adapter inside the context if ``mode`` is "off"."""
        return adapters.set_to(self.model, mode)
