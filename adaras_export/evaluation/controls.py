"""Random controls: rules of the same size and strength on other neurons. Measures nothing."""

from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel

from adaras_export.core import families
from adaras_export.core.base_model import BaseModel
from adaras_export.core.rule import SteeringRule
from adaras_export.errors import RuleError
from adaras_export.files.safetensors_record import Array


def random_control(model: PreTrainedModel, rule: SteeringRule, seed: int) -> SteeringRule:
    """The rule with other neurons of the same layers, drawn at random, and with random signs.

    A layer has as many neurons as in the rule (fewer where it has not so many others), none of them the rule's own,
    and the vector that they add to the output of the down projection has the same norm.

    Raises:
        RuleError: a layer has no other neuron that adds anything.
    """
    random = np.random.default_rng(seed)
    layers, indices, deltas = [], [], []
    for layer in rule.layers():
        own, delta = rule.neurons_of(layer)
        others = np.setdiff1d(np.arange(rule.base.width(layer)), own)
        drawn = random.choice(others, size=min(len(own), len(others)), replace=False)
        signed = random.permutation(np.abs(delta))[: len(drawn)] * random.choice([-1.0, 1.0], size=len(drawn))
        own_norm, drawn_norm = (
            _norm(model, rule.base, layer, index, change) for index, change in ((own, delta), (drawn, signed))
        )
        if own_norm > 0 and drawn_norm == 0:
            raise RuleError(f"random control: no neuron of layer {layer} beside the rule's adds anything; expected one")
        scale = own_norm / drawn_norm if drawn_norm else 0.0
        layers += [layer] * len(drawn)
        indices += drawn.tolist()
        deltas += (signed * scale).tolist()
    neurons = replace(
        rule.neurons,
        layer=np.array(layers, dtype=np.int64),
        index=np.array(indices, dtype=np.int64),
        delta=np.array(deltas),
        mean_correct=None,
        mean_incorrect=None,
        score=None,
        ranking="given",
    )
    return replace(rule, neurons=neurons)


@torch.no_grad()
def _norm(model: PreTrainedModel, base: BaseModel, layer: int, index: Array, delta: Array) -> float:
    """Norm of what these neurons add to the output of the down projection, which may be quantised."""
    down = families.down_projection(model, layer)
    parameter = next(model.parameters())
    h_2M = torch.zeros(2, base.width(layer), dtype=parameter.dtype, device=parameter.device)
    h_2M[1, torch.tensor(index)] = torch.tensor(delta).to(h_2M)
    without, with_them = down(h_2M).float()
    return float((with_them - without).norm())
