"""A rule folded with the weights of its base: what it adds to the output of each steered down projection.

D model width, K chosen neurons of a layer.
"""

import numpy as np

from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.rule import SteeringRule
from adaras_export.files.safetensors_record import Array


def vectors(rule: SteeringRule, base: Checkpoint) -> dict[int, Array]:
    """W_down[:, idx] @ delta of each steered layer, (D,) float32: computed in float64 from the stored weights.

    The strength is not included; it stays a dial.

    Raises:
        ArtifactError: the checkpoint lacks a tensor.
    """
    import torch

    folded = {}
    for layer in rule.layers():
        index, delta = rule.neurons_of(layer)
        columns_DK = base.down_columns(layer, torch.tensor(index))
        folded[layer] = (columns_DK.double().numpy() @ delta.astype(np.float64)).astype(np.float32)
    return folded
