"""One constant neuron in every gated MLP, which makes of a vector behind the down projection an ordinary rank-1 LoRA.

The neuron's activation is exactly 1 and its column of the down projection is zero, so that the model's output is what
it was. A LoRA whose A picks that neuron and whose B is the steering vector adds the vector, per request if the server
can. Knows no files.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from adaras_export.core.checkpoint import Checkpoint
from adaras_export.errors import ExportError
from adaras_export.exporters.checkpoint import stored
from adaras_export.exporters.stock.families import Form
from adaras_export.files.safetensors_record import Array

# One neuron would do; with 32 the width of the MLP still divides among the cards of a server, and by a kernel's block.
NEURONS = 32
# silu(32) is 32 and 1/32 is itself, in float32, bfloat16 and float16: their product is exactly 1 in all three.
_GATE, _UP = 32.0, 1 / 32

_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def wider(config: Mapping[str, Any], form: Form, subject: str) -> dict[str, Any]:
    """The entries of an artifact's config that the new neurons change.

    Raises:
        ExportError: the MLP is not gated, or not by SiLU.
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
    """The weights of ``count`` layers that the new neurons widen, and along which axis."""
    axes = zip(_GATED, (0, 0, 1), strict=True)
    return {f"{base.layers_key}.{layer}.{path}.weight": axis for path, axis in axes for layer in range(count)}


def constants(base: Checkpoint, count: int, zeros: Mapping[str, Array]) -> dict[str, Array]:
    """The biases of gate and up projection in ``count`` layers: the base's, or zeros, then those of the new neurons."""
    biases = {}
    for layer in range(count):
        for path, value in zip(_GATED[:2], (_GATE, _UP), strict=True):
            name, new = f"{base.layers_key}.{layer}.{path}.bias", np.zeros(NEURONS)
            new[0] = value
            before = zeros[name] if name in zeros else stored(base.files, name)
            biases[name] = np.concatenate([before, new]).astype(np.float32)
    return biases


def picking(mlp_size: int) -> Array:
    """The A of the LoRA, (1, M): it picks the constant neuron of an MLP that had ``mlp_size`` neurons."""
    row = np.zeros((1, mlp_size + NEURONS), np.float32)
    row[0, mlp_size] = 1
    return row
