"""The PEFT method ADARAS: adapters that carry gate and start. Importing this module registers it with PEFT.

Afterwards `PeftModel.from_pretrained(base, folder)` and `model.load_adapter(folder)` open what target `peft` writes
with `adaptive`; without the import they fail with KeyError: 'ADARAS'. The steering is that of `modeling.steering`, with
the folded vectors added to the outputs of the down projections; this module connects it to PEFT.

One rule steers a batch: several active adapters are refused, and so is merging. `set_adapter` switches between rules;
`adapter_names` takes one rule and "__base__". The dials are at ``model.steering``, as in the exports of target hf.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adaras_export.core import families
from adaras_export.errors import ExportError, first_line, require
from adaras_export.exporters.peft import settings
from adaras_export.modeling.steering import Passes, announcing
from adaras_export.runtime.steering_adaras import Scope, SteeredProjection, Steering, SteeringGate, Step

require("peft", "peft", "the method ADARAS")  # the imports below would fail without naming the extra

import peft  # noqa: E402
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer  # noqa: E402
from peft.utils import register_peft_method  # noqa: E402

METHOD = "ADARAS"


class _Local(threading.local):
    """The adapter names of a batch's rows, and the adapter of the running forward pass."""

    def __init__(self) -> None:
        self.rows: Sequence[str] | None = None
        self.adapter: str | None = None


_LOCAL = _Local()


@dataclass
class AdarasConfig(peft.PeftConfig):
    """The adapter_config.json of a rule.

    Attributes:
        target_modules: the down projections of steered layers and of layers that the gate reads.
        steered: the down projections that get a vector.
        features: the neurons that the gate reads, by down projection.
        gate_module: the down projection that holds the gate.
        gate_size: hidden units of the gate; 0 without a gate.
        hidden_size: D, the width of a vector.
        strength: factor on every vector; a dial, like the threshold.
        threshold: sequences with p(correct) below it are steered.
        start: "last_prompt_token" or "first_generated_token".
        rule: SHA-256 of the rule.
    """

    target_modules: list[str] | None = None
    steered: list[str] = field(default_factory=list)
    features: dict[str, list[int]] = field(default_factory=dict)
    gate_module: str | None = None
    gate_size: int = 0
    hidden_size: int = 0
    strength: float = 0.0
    threshold: float = 1.0
    start: str = "last_prompt_token"
    rule: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = peft.PeftType(METHOD)
        settings.require(vars(self))


class AdarasLayer(nn.Module, BaseTunerLayer, SteeredProjection):
    """A down projection with the vectors and gate features of its adapters; the running adapter is used."""

    adapter_layer_names = ("adaras_vector", "adaras_gate")
    other_param_names = ("adaras_index",)

    def __init__(self, base_layer: nn.Module, adapter: str, config: AdarasConfig, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adaras_vector = nn.ParameterDict()
        self.adaras_gate = nn.ModuleDict()
        self.adaras_index: dict[str, Tensor | None] = {}  # for every adapter of this layer
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter = adapter
        self.update_layer(adapter, config, name)

    def update_layer(self, adapter: str, config: AdarasConfig, name: str) -> None:
        """Create empty tensors for an adapter, which PEFT loads afterwards; ``name`` is the name of this module."""
        settings.require_fits(name, vars(config), *_sizes(self.base_layer))
        index = config.features.get(name)
        self.adaras_index[adapter] = None if index is None else torch.tensor(index)
        if name in config.steered:
            self.adaras_vector[adapter] = nn.Parameter(torch.zeros(config.hidden_size), requires_grad=False)
        if name == config.gate_module:
            self.adaras_gate[adapter] = SteeringGate(sum(map(len, config.features.values())), config.gate_size)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters)

    @property
    def steering_vector(self) -> Tensor | None:  # type: ignore[override]
        """The vector of the running adapter."""
        vectors: Any = self.adaras_vector
        vector: Tensor | None = vectors.get(_LOCAL.adapter, None)
        return vector

    @property
    def steering_index(self) -> Tensor | None:  # type: ignore[override]
        """The features of the running adapter's gate, on the device of the weights."""
        adapter = _LOCAL.adapter
        if adapter is None or (index := self.adaras_index.get(adapter)) is None:
            return None
        if index.device != self.weight.device:
            index = self.adaras_index[adapter] = index.to(self.weight.device)
        return index

    def forward(self, x: Tensor) -> Tensor:
        """The down projection, plus the vector at the steered tokens."""
        return self.steered_down(x, self.base_layer)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = True) -> None:  # noqa: ARG002, FBT001, FBT002 - PEFT's signature
        """Make an adapter the active one; its weights stay frozen.

        Raises:
            ValueError: several adapters are given.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else [*adapter_names]
        if len(names) > 1:
            raise ValueError(f"ADARAS: {', '.join(names)} cannot steer together; choose one: set_adapter({names[0]!r})")
        super().set_adapter(names, inference_mode=True)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: ARG002, FBT001, FBT002 - PEFT's signature
        """Refuse to merge: weights have neither gate nor start.

        Raises:
            ValueError: always.
        """
        raise ValueError(_UNMERGEABLE)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the base layer's device, but keep it in float32."""
        to = self.weight.device if device is None else device
        for held in (self.adaras_vector, self.adaras_gate):
            if adapter_name in held and not any(parameter.is_meta for parameter in held.parameters()):
                held[adapter_name] = held[adapter_name].to(to)


def _sizes(module: Any) -> tuple[int, int]:  # noqa: ANN401 - a linear map of PyTorch, Transformers or a quantiser
    """The numbers of inputs and outputs of a down projection; a quantised weight has another shape."""
    return (module.nx, module.nf) if hasattr(module, "nf") else (module.in_features, module.out_features)


_UNMERGEABLE = (
    "ADARAS: cannot be merged, since weights have neither gate nor start; unload() gives the base back, and the stock "
    "adapter of `adaras-export export --to peft` can be merged where the base has biases"
)


class _AdapterPasses(Passes):
    """The hooks of one adapter on one model."""

    def __init__(self, adapter: str, layer: AdarasLayer, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter = adapter
        self.layer = layer
        self.handles: list[RemovableHandle] = []

    def applies(self) -> bool:
        names = self.layer.active_adapters if _LOCAL.rows is None else _LOCAL.rows
        return self.adapter in names and not self.layer.disable_adapters and self.dials.active

    @contextmanager
    def around(self) -> Iterator[None]:
        before = _LOCAL.adapter
        _LOCAL.adapter = self.adapter
        try:
            yield
        finally:
            _LOCAL.adapter = before

    def limit(self, step: Step, rows: int) -> None:
        """Refuse a KV cache of another adapter, and do not steer rows that use the base."""
        owner = vars(step.state).setdefault("adapter", self.adapter)
        if owner != self.adapter:
            raise ValueError(f"the KV cache was filled under adapter {owner}; {self.adapter} needs one of its own")
        if _LOCAL.rows is None:
            return
        copies, rest = divmod(rows, len(_LOCAL.rows))
        if rest:
            raise ValueError(f"adapter_names: has {len(_LOCAL.rows)} names for {rows} rows")
        chosen = torch.tensor([name == self.adapter for name in _LOCAL.rows], device=self.layer.weight.device)
        chosen_B1 = chosen.repeat_interleave(copies)[:, None]  # beams lie side by side
        if step.steered_BT is not None:
            step.steered_BT = step.steered_BT & chosen_B1


class AdarasModel(BaseTuner):
    """PEFT's wrapper around a model."""

    prefix = "adaras_"
    tuner_layer_cls = AdarasLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's declaration

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter as PEFT does, and add the hooks on the decoder."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: Any = self.peft_config[adapter_name]
        _install(model, adapter_name, config)

    def _create_and_replace(  # noqa: PLR0913 - PEFT's signature
        self,
        peft_config: Any,  # noqa: ANN401
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,  # noqa: ARG002
    ) -> None:
        if isinstance(target, AdarasLayer):
            target.update_layer(adapter_name, peft_config, current_key)
        else:
            self._replace_module(
                parent, target_name, AdarasLayer(target, adapter_name, peft_config, current_key), target
            )

    def _check_merge_allowed(self) -> None:
        raise ValueError(_UNMERGEABLE)

    def unload(self) -> nn.Module:
        """Remove all adapters and hooks; returns the base model."""
        model: nn.Module = super().unload()
        for passes in model.__dict__.pop("_adaras").values():
            _remove(passes)
        model.__class__ = type(model).__mro__[1]
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *_args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this context around every call, with its ``adapter_names``."""
        before, _LOCAL.rows = _LOCAL.rows, _rows(kwargs.get("adapter_names"), self.peft_config)
        try:
            yield
        finally:
            _LOCAL.rows = before


def _rows(names: Sequence[str] | None, known: dict[str, Any]) -> Sequence[str] | None:
    if names is None:
        return None
    chosen = sorted({*names} - {"__base__"})
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"adapter_names: no adapter {', '.join(unknown)}; expected of: __base__, {', '.join(known)}")
    if len(chosen) > 1:
        raise ValueError(f"ADARAS: {', '.join(chosen)} cannot steer one batch; take one of them and __base__")
    return names


def _install(model: Any, adapter: str, config: AdarasConfig) -> None:  # noqa: ANN401 - a model of Transformers
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AdarasLayer)}
    layers = {name: layer for name, layer in layers.items() if adapter in layer.adaras_index}
    if missing := sorted({*config.steered, *config.features} - layers.keys()):
        raise ValueError(f"ADARAS: the model has no {', '.join(missing)}; expected the base that the adapter names")
    order = [*layers]  # the order of the forward pass
    read, steered = ([order.index(name) for name in names] for names in (config.features, config.steered))
    gate: Any = layers[config.gate_module].adaras_gate[adapter] if config.gate_module else None
    passes = _AdapterPasses(
        adapter,
        layers[order[0]],
        families.decoder(model),
        gate,
        Steering(vars(config)),  # saving an adapter saves its current dials
        causal=not read or not steered or max(read) < min(steered),
    )
    installed = model.__dict__.setdefault("_adaras", {})
    _remove(installed.get(adapter))
    passes.handles = passes.attach()
    installed[adapter] = passes
    if not hasattr(type(model), "_is_steered"):
        model.__class__ = announcing(type(model), _remember, steering=property(_active_dials))


def _remove(passes: _AdapterPasses | None) -> None:
    for handle in () if passes is None else passes.handles:
        handle.remove()


def _active_dials(model: Any) -> Steering:  # noqa: ANN401 - a model of Transformers
    """The dials of the active adapter."""
    for passes in model.__dict__["_adaras"].values():
        if passes.adapter in passes.layer.active_adapters:
            dials: Steering = passes.dials
            return dials
    raise AttributeError("no ADARAS adapter is active; load one, or choose one with set_adapter")


def _remember(model: Any, scope: Scope, outputs: Any) -> None:  # noqa: ANN401 - a model of Transformers
    if _LOCAL.rows is None:  # with adapter_names the gate did not decide for all rows
        scope.remember(_active_dials(model), outputs)


def _register() -> None:
    """Register the method in PEFT, whose list of methods is a closed enumeration.

    Raises:
        ExportError: this PEFT cannot be extended, or has a method of that name.
    """
    kind: Any = peft.PeftType
    if METHOD in kind.__members__:
        raise ExportError(f"peft {peft.__version__}: has a method {METHOD} already; expected none of that name")
    try:
        member = str.__new__(kind, METHOD)
        member._name_ = member._value_ = METHOD
        tables, names = (kind._member_map_, kind._value2member_map_), kind._member_names_
        type.__setattr__(kind, METHOD, member)
        for table in tables:
            table[METHOD] = member
        names.append(METHOD)
        kind(METHOD)  # a ValueError if this Python stores members elsewhere
        register_peft_method(name=METHOD.lower(), config_cls=AdarasConfig, model_cls=AdarasModel)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f"peft {peft.__version__}: does not let methods be added ({first_line(error)}); expected a version from "
            "0.18 to 0.21: pip install 'peft<0.22', or export without adaptive"
        ) from error


_register()
