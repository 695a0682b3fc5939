"""Adds a constant neuron to every gated MLP, so that an ordinary rank-1 LoRA can add a steering vector.

The neuron's activation is exactly 1 and its column of the down projection is zero, so the model's output does not
change. A LoRA adds the steering vector: its A selects the neuron, and its B is the vector. A server that
applies LoRA per request can steer per request.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from adaras_export.core.checkpoint import Checkpoint
from adaras_export.errors import ExportError
from adaras_export.exporters.checkpoint import stored
from adaras_export.exporters.stock.families import Form
from adaras_export.files.safetensors_record import Array

# One neuron is enough; 32 keep the MLP width divisible by the number of GPUs and by the block size of kernels.
NEURONS = 32
# In float32, bfloat16 and float16, silu(32) is 32 and 1/32 is exact, so their product is exactly 1.
GATE, UP = 32.0, 1 / 32

_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def wider(config: Mapping[str, Any], form: Form, subject: str) -> dict[str, Any]:
    """The config entries that the new neurons change.

    Raises:
        ExportError: the MLP is not gated, or its activation is not SiLU.
    """
    if form.biased != _GATED:
        raise ExportError(
            f"{subject}: {form.model_type} has no gated MLP, which a constant neuron needs; expected another family, "
            "or no --switchable"
        )
    act = config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise ExportError(f"{subject}: its MLP is gated by {act}; expected silu, or no --switchable")
    return {"intermediate_size": config["intermediate_size"] + NEURONS}


def weights(base: Checkpoint, count: int) -> dict[str, int]:
    """The weights of ``count`` layers that the new neurons widen, and the axis of each."""
    axes = zip(_GATED, (0, 0, 1), strict=True)
    return {f"{base.layers_key}.{layer}.{path}.weight": axis for path, axis in axes for layer in range(count)}


def constants(base: Checkpoint, count: int, zeros: Mapping[str, Array]) -> dict[str, Array]:
    """The gate and up biases of ``count`` layers: those of the base, or zeros, and those of the new neurons."""
    biases = {}
    for layer in range(count):
        for path, value in zip(_GATED[:2], (GATE, UP), strict=True):
            name, new = f"{base.layers_key}.{layer}.{path}.bias", np.zeros(NEURONS)
            new[0] = value
            before = zeros[name] if name in zeros else stored(base.files, name)
            biases[name] = np.concatenate([before, new]).astype(np.float32)
    return biases


def picking(mlp_size: int) -> Array:
    """The A of the LoRA, (1, M): selects the constant neuron of an MLP that had ``mlp_size`` neurons."""
    row = np.zeros((1, mlp_size + NEURONS), np.float32)
    row[0, mlp_size] = 1
    return row
