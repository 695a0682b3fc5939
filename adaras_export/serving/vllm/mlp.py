"""MLPs of vLLM's decoders that read features and add the steering vector behind their down projection.

The vector is added behind the module's down projection, not in it: LoRA wraps linear layers and calls their
quantisation method, not their `forward`, and under tensor parallelism the sum of the ranks is made in the projection.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from adaras_export.serving.vllm.dials import gates_of
from adaras_export.serving.vllm.gate import Steering, features_of, parameter


class SteeredMLP:
    """Mix-in for an MLP; `steer` sets its attributes."""

    steering: tuple[Steering]  # in a tuple it is no submodule of the MLP
    steering_vector: Tensor | None  # (R, D)
    steering_index: Tensor | None  # (F of this layer,), 0-based neurons
    # Beside them: a tensor of a module takes Python ten times as long to look up.
    steering_rules: int  # R; 0: nothing is added here
    steering_reads: bool  # a gate has features here
    steering_begins: bool  # the first steered MLP: the gates have seen all features
    steering_ends: bool  # the last one

    def steered_down(self, hidden: Tensor, down: Callable[[Tensor], Any]) -> Tensor:
        """The down projection of h, steered."""
        # Linear layers of vLLM's own give a tuple; tensors of the Transformers backend have a leading dimension of 1.
        given = down(hidden)
        output: Tensor = given[0] if isinstance(given, tuple) else given
        [steering] = self.steering
        if self.steering_reads:
            assert self.steering_index is not None
            steering.read(hidden, self.steering_index)
        if not self.steering_rules:
            return output
        if self.steering_begins:
            steering.settle(hidden.shape[-2])
        vector, [amount] = self.steering_vector, steering.amounts
        assert vector is not None
        if self.steering_rules > 1:
            vector = vector[steering.rule[: amount.shape[0]]]
        if self.steering_ends:
            steering.amounts.clear()
        if output.dtype == vector.dtype:  # one operation; decoding is made of small ones
            return torch.addcmul(output, amount, vector)
        return output + (amount * vector).to(output.dtype)


class _GateUp(SteeredMLP):
    """An activated gate projection times an up projection, both in one matrix: most families, in both backends."""

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self
        gate_up = own.gate_up_proj(x)
        gate_up = gate_up[0] if isinstance(gate_up, tuple) else gate_up
        activation = own.act_fn if hasattr(own, "act_fn") else own.activation_fn
        return self.steered_down(activation(gate_up), own.down_proj)


class _GPT2(SteeredMLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        own: Any = self
        return self.steered_down(own.act(own.c_fc(hidden_states)[0]), own.c_proj)


class _GPTNeoX(SteeredMLP):
    """In the Transformers backend."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        own: Any = self
        return self.steered_down(own.act(own.dense_h_to_4h(hidden_states)), own.dense_4h_to_h)


_KINDS = {"gate_up_proj": _GateUp, "c_fc": _GPT2, "dense_h_to_4h": _GPTNeoX}
"""By the first projection of the MLP."""


@cache
def _steered(native: type[nn.Module], mixin: type[SteeredMLP]) -> type[nn.Module]:
    return type(f"Steered{native.__name__}", (mixin, native), {})


def steer(decoder_layers: nn.ModuleList, steering: Steering, settings: dict[str, Any], hidden_size: int) -> None:
    """Turn the MLPs of the rules' and the gates' layers into steered ones.

    Raises:
        NotImplementedError: vLLM computes an MLP in a way that is not known here.
    """
    features, steered = features_of(gates_of(settings)), settings["layers"]
    for layer in sorted({*features, *steered}):
        mlp: Any = decoder_layers[layer].mlp
        mixin = next((mixin for name, mixin in _KINDS.items() if hasattr(mlp, name)), None)
        if mixin is None:
            raise NotImplementedError(
                f"{type(mlp).__name__}: an MLP that is not known here; expected one of its own: {', '.join(_KINDS)}"
            )
        mlp.__class__ = _steered(mlp.__class__, mixin)
        mlp.__dict__.pop("forward", None)  # the Transformers backend binds a fused one to the instance
        mlp.__dict__["steering"] = (steering,)
        mlp.steering_begins, mlp.steering_ends = layer == min(steered), layer == max(steered)
        mlp.steering_rules = rules = len(steering.rules) if layer in steered else 0
        mlp.steering_reads = layer in features
        mlp.register_parameter("steering_vector", parameter(rules, hidden_size) if rules else None)
        index = parameter(features[layer], dtype=torch.int64) if layer in features else None
        mlp.register_parameter("steering_index", index)
