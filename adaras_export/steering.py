"""Steer a stock model in memory: the reference semantics of a rule.

Adds strength * g * delta to what enters the down projection, as the paper's equation reads, where the exported
module adds the folded vector behind it. Knows no export format; `verify` compares the two.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaras_export import models
from adaras_export.errors import RuleError
from adaras_export.models import BaseModel
from adaras_export.rule import Gate, SteeringRule
from adaras_export.runtime.steering_adaras import (
    Steering,
    SteeringGate,
    begin_step,
    current_scope,
    finish_step,
    generating,
    preview,
    prompt_width,
    running,
    running_step,
)
from adaras_export.storage import Array

_DECODER_ARGUMENTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
)


@contextmanager
def steered(model: nn.Module, rule: SteeringRule) -> Iterator[nn.Module]:
    """Steer ``model`` for as long as the context lasts; leaves no hook behind, whatever happens in it.

    ``generate`` works as without it, cached or not, with left-padded batches; a bare forward treats several
    tokens as a prompt and one token behind a KV cache as a generated one.

    Raises:
        RuleError: the rule belongs to another model, or the model is steered already.
        UnsupportedModelError: the architecture is not in the table.
    """
    _check(model, rule)
    decoder = models.decoder(model)
    with ExitStack() as undo:
        hooks = _Hooks(decoder, rule, next(model.parameters()).device)
        handle = decoder.register_forward_pre_hook(hooks.begin, with_kwargs=True)
        undo.callback(handle.remove)
        undo.callback(decoder.register_forward_hook(hooks.end, with_kwargs=True, always_call=True).remove)
        for layer in hooks.layers:
            down = models.down_projection(model, layer)
            undo.callback(down.register_forward_pre_hook(partial(hooks.at_down, layer)).remove)
        undo.callback(setattr, model, "__class__", type(model))
        model.__class__ = _announcing(type(model), decoder)
        yield model


@contextmanager
def steered_everywhere(model: nn.Module, rule: SteeringRule) -> Iterator[nn.Module]:
    """Steer every token of every sequence, prompts too, whatever the rule says of start and gate.

    What a static artifact computes, whose format knows neither. Leaves no hook behind.

    Raises:
        RuleError: the rule belongs to another model, or the model is steered already.
        UnsupportedModelError: the architecture is not in the table.
    """
    _check(model, rule)
    with ExitStack() as undo:
        for layer in rule.layers():
            down = models.down_projection(model, layer)
            index, delta = (
                torch.tensor(values, device=next(down.parameters()).device) for values in rule.neurons_of(layer)
            )
            undo.callback(down.register_forward_pre_hook(partial(_add, index, rule.strength * delta)).remove)
        yield model


def _add(index_K: Tensor, change_K: Tensor, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    h_BTM, *rest = args
    return (h_BTM.index_add(-1, index_K, change_K.to(h_BTM.dtype).expand(*h_BTM.shape[:-1], -1)), *rest)


def gate_module(gate: Gate) -> SteeringGate:
    """The classifier of a gate, with its float32 weights."""
    module = SteeringGate(len(gate.layer), len(gate.hidden_bias))
    module.load_state_dict({name: torch.tensor(value) for name, value in gate.weights().items()})
    return module


class _Hooks:
    """The hooks of one `steered` context. The running step is thread-local, so threads may share the model."""

    def __init__(self, decoder: nn.Module, rule: SteeringRule, device: torch.device) -> None:
        gate = rule.gate
        self.decoder = decoder
        self.causal = rule.causal
        self.gate = None if gate is None else gate_module(gate).to(device)
        threshold = 0.0 if gate is None else gate.threshold
        self.dials = Steering({"strength": rule.strength, "threshold": threshold, "start": rule.start})
        self.features = {} if gate is None else _by_layer(gate.layer, gate.index, device)
        self.indices = _by_layer(rule.neurons.layer, rule.neurons.index, device)
        self.deltas = {layer: torch.tensor(rule.neurons_of(layer)[1], device=device) for layer in self.indices}
        self.layers = sorted({*self.features, *self.indices})
        self._local = threading.local()

    def begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(_DECODER_ARGUMENTS, args, strict=False))
        arguments = {**dict.fromkeys(_DECODER_ARGUMENTS), **given, **kwargs}
        step = begin_step(self.decoder, self.gate, self.dials, arguments, self._start(arguments))
        if not self.causal:
            preview(step, self.decoder.forward, arguments)
        self._local.cache = arguments["past_key_values"]
        self._local.forward = ExitStack()
        self._local.forward.enter_context(running(step))

    def end(self, _module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], outputs: Any) -> None:  # noqa: ANN401
        forward: ExitStack | None = self._local.__dict__.pop("forward", None)
        if forward is None:  # begin() refused the call
            return
        with forward:
            if outputs is not None:  # the forward pass succeeded
                finish_step(running_step(), self._local.cache, outputs)

    def at_down(self, layer: int, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (h_BTM, *rest), step = args, running_step()
        if layer in self.features:
            step.read(h_BTM.index_select(-1, self.features[layer]))
        if layer in self.indices and (scale := step.scale(h_BTM)) is not None:
            change = (scale * self.deltas[layer]).to(h_BTM.dtype).expand(*h_BTM.shape[:2], -1)
            h_BTM = h_BTM.index_add(-1, self.indices[layer], change)
        return (h_BTM, *rest)

    def _start(self, arguments: dict[str, Any]) -> int | None:
        """Where the prompt ends in this call, during generate(); None leaves it to the shape of the call."""
        scope = current_scope(self.decoder)
        if scope is None:
            return None
        cache = arguments["past_key_values"]
        return scope.prompt_width - (0 if cache is None else int(cache.get_seq_length()))


def _announcing(original: Any, decoder: nn.Module) -> Any:  # noqa: ANN401 - a model class
    """The class of the model with a generate() that tells the hooks how long the prompt is.

    A class and not an attribute of the instance, so that a shallow copy of the model generates as itself.
    """

    def generate(self: nn.Module, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with generating(decoder, prompt_width(inputs, kwargs)):
            return original.generate(self, inputs, *args, **kwargs)

    inner = {"generate": generate, "__module__": original.__module__, "_is_steered": True}
    return type(original.__name__, (original,), inner)


def _by_layer(layer: Array, index: Array, device: torch.device) -> dict[int, Tensor]:
    return {int(one): torch.tensor(index[layer == one], device=device) for one in np.unique(layer)}


def _check(model: nn.Module, rule: SteeringRule) -> None:
    family, layers, mlp_size, hidden_size = models.sizes_of(model)
    name = str(model.config.name_or_path or type(model).__name__)  # type: ignore[union-attr]
    rule.base.require_same(BaseModel(name, family, layers, mlp_size, hidden_size))
    if hasattr(type(model), "_is_steered"):
        raise RuleError(f"{name}: is steered already; leave that context first, or merge the rules")
