"""Steer a stock model in memory: the reference semantics of a rule.

Adds strength * g * delta to the input of the down projection, as in the paper's equation. The exported module adds the
folded vector to its output instead; `verify` compares the two.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adaras_export.core import families
from adaras_export.core.base_model import BaseModel
from adaras_export.core.rule import SteeringRule
from adaras_export.errors import RuleError
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.gate import gate_module
from adaras_export.runtime.modeling_adaras import handing_on, unshared
from adaras_export.runtime.steering_adaras import (
    THREAD,
    Scope,
    Steering,
    SteeringGate,
    Step,
    begin_step,
    finish_step,
    here,
    parameter_names,
    place_of,
    preview,
    prompt_width,
    require_generation,
    scope_of,
    tokens_of,
)


@contextmanager
def steered(model: nn.Module, rule: SteeringRule) -> Iterator[nn.Module]:
    """Steer ``model`` inside the context; removes its hooks in the end.

    ``generate`` works as usual, with or without a cache, with left-padded batches. A direct forward call treats several
    tokens as a prompt, and one token after a KV cache as a generated one.

    Raises:
        RuleError: the rule belongs to another model, or the model is steered already.
        UnsupportedModelError: the architecture is not in the table.
    """
    _check(model, rule)
    decoder = families.decoder(model)
    with ExitStack() as undo:
        hooks = _Hooks(decoder, rule, families.input_device(model))
        for handle in hooks.attach():
            undo.callback(handle.remove)
        for layer in hooks.layers:
            down = families.down_projection(model, layer)
            undo.callback(down.register_forward_pre_hook(partial(hooks.at_down, layer)).remove)
        undo.callback(setattr, model, "__class__", type(model))
        native: Any = type(model)
        model.__class__ = announcing(
            native, **({"forward": handing_on(native)} if families.reads_images(model) else {})
        )
        yield model


@contextmanager
def steered_everywhere(model: nn.Module, rule: SteeringRule) -> Iterator[nn.Module]:
    """Steer every token of every sequence, prompts too; ignores start and gate of the rule.

    A static artifact computes this, since its format has neither. Removes its hooks in the end.

    Raises:
        RuleError: the rule belongs to another model, or the model is steered already.
        UnsupportedModelError: the architecture is not in the table.
    """
    _check(model, rule)
    with ExitStack() as undo:
        for layer in rule.layers():
            down = families.down_projection(model, layer)
            index, delta = (
                torch.tensor(values, device=next(down.parameters()).device) for values in rule.neurons_of(layer)
            )
            undo.callback(down.register_forward_pre_hook(partial(_add, index, rule.strength * delta)).remove)
        yield model


def _add(index_K: Tensor, change_K: Tensor, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    h_BTM, *rest = args
    return (h_BTM.index_add(-1, index_K, change_K.to(h_BTM.dtype).expand(*h_BTM.shape[:-1], -1)), *rest)


class _Open(threading.local):
    """The running forward passes of this thread, each with its hooks and its exit stack."""

    def __init__(self) -> None:
        self.passes: list[tuple[Passes, ExitStack]] = []


_OPEN = _Open()


class Passes:
    """Hooks on a decoder that begin and end the step of each forward pass.

    The running step is thread-local, so threads may share the model.
    """

    def __init__(self, decoder: nn.Module, gate: SteeringGate | None, dials: Steering, *, causal: bool) -> None:
        self.decoder = decoder
        self.gate = gate
        self.dials = dials
        self.causal = causal
        self.names = parameter_names(type(decoder).forward)

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks."""
        return [
            self.decoder.register_forward_pre_hook(self.begin, with_kwargs=True),
            self.decoder.register_forward_hook(self.end, with_kwargs=True, always_call=True),
        ]

    def applies(self) -> bool:
        """Whether these hooks steer the current forward pass."""
        return True

    @contextmanager
    def around(self) -> Iterator[None]:
        """A context around each forward pass."""
        yield

    def limit(self, step: Step, rows: int) -> None:
        """Adjust the step of a forward pass over ``rows`` rows before it runs."""

    def begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Decoder pre-hook: begin the step."""
        kwargs = families.for_all_tokens(kwargs)
        if not self.applies():
            return args, kwargs
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        with ExitStack() as opening:
            opening.enter_context(self.around())
            step = begin_step(self.decoder, self.gate, self.dials, arguments, *self._place())
            self.limit(step, len(tokens_of(arguments)))
            if not self.causal:
                preview(step, self.decoder.forward, arguments)
            opening.enter_context(here(step=step))
            _OPEN.passes.append((self, opening.pop_all()))
        return args, kwargs

    def end(self, _module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], outputs: Any) -> None:  # noqa: ANN401
        """Decoder hook: end the step, also after an error."""
        if not _OPEN.passes or _OPEN.passes[-1][0] is not self:  # begin() refused or ignored the call
            return
        _, opened = _OPEN.passes.pop()
        with opened:
            if outputs is not None and THREAD.step is not None:  # the forward pass succeeded
                finish_step(THREAD.step, outputs)

    def _place(self) -> tuple[int | None, Tensor | None]:
        """Where the prompt ends in a call that generate() prepared; None lets the shape of the call decide."""
        scope = scope_of(self.decoder)
        if scope is None:
            return THREAD.handed_on
        place, scope.place = scope.place, (None, None)  # the next call may have another prompt, as with guidance_scale
        return place


class _Hooks(Passes):
    """The hooks of one `steered` context."""

    def __init__(self, decoder: nn.Module, rule: SteeringRule, device: torch.device) -> None:
        gate = rule.gate
        threshold = 0.0 if gate is None else gate.threshold
        dials = Steering({"strength": rule.strength, "threshold": threshold, "start": rule.start})
        super().__init__(decoder, None if gate is None else gate_module(gate).to(device), dials, causal=rule.causal)
        self.features = {} if gate is None else _by_layer(gate.layer, gate.index, device)
        self.indices = _by_layer(rule.neurons.layer, rule.neurons.index, device)
        self.deltas = {layer: torch.tensor(rule.neurons_of(layer)[1], device=device) for layer in self.indices}
        self.layers = sorted({*self.features, *self.indices})

    def at_down(self, layer: int, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (h_BTM, *rest), step = args, THREAD.step
        assert step is not None
        if layer in self.features:
            step.read(h_BTM, self.features[layer])
        if layer in self.indices and (scale := step.scale(h_BTM)) is not None:
            change = (scale * self.deltas[layer]).to(h_BTM.dtype).expand(*h_BTM.shape[:2], -1)
            h_BTM = h_BTM.index_add(-1, self.indices[layer], change)
        return (h_BTM, *rest)


def announcing(original: Any, after: Callable[..., None] | None = None, **inner: Any) -> Any:  # noqa: ANN401 - a model class
    """The class of a model with a generate() that tells the hooks where the prompt ends in each call.

    A class rather than an instance attribute, so that a copy of the model generates with itself. ``after`` is called
    with the model, its scope and the outputs; ``inner`` holds more attributes of the class.

    Raises:
        NotImplementedError: generate() or its parts have other argument names in this Transformers.
    """
    require_generation(original)

    def generate(self: nn.Module, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        scope = Scope(families.decoder(self), prompt_width(inputs, kwargs))
        with scope.open():
            outputs = original.generate(self, inputs, *args, **kwargs)
        if after is not None:
            after(self, scope, outputs)
        return outputs

    @wraps(original.prepare_inputs_for_generation)  # Transformers inspects the signature
    def prepare(self: nn.Module, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        prepared = original.prepare_inputs_for_generation(self, input_ids, *args, **kwargs)
        scope = scope_of(families.decoder(self))
        place = place_of(scope, input_ids, kwargs.get("attention_mask"), prepared)
        if scope is not None:
            scope.place = place
        return prepared

    def init_continuous_batching(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return unshared(original.init_continuous_batching(self, *args, **kwargs))

    inner |= {"generate": generate, "prepare_inputs_for_generation": prepare}
    inner |= {"init_continuous_batching": init_continuous_batching}
    inner |= {"__module__": original.__module__, "_is_steered": True}
    return type(original.__name__, (original,), inner)


def _by_layer(layer: Array, index: Array, device: torch.device) -> dict[int, Tensor]:
    return {int(number): torch.tensor(index[layer == number], device=device) for number in np.unique(layer)}


def _check(model: nn.Module, rule: SteeringRule) -> None:
    name = str(model.config.name_or_path or type(model).__name__)  # type: ignore[union-attr]
    base = BaseModel(name, *families.sizes_of(model))
    families.require_version(base.family, name)
    rule.base.require_same(base)
    if hasattr(type(model), "_is_steered"):
        raise RuleError(f"{name}: is steered already; leave that context first, or merge the rules")
