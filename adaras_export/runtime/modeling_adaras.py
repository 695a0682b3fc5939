"""Steered versions of Transformers' own classes, for every architecture: AdaRAS + the name of the native class.

AdaRASQwen3ForCausalLM is Qwen3ForCausalLM with some of its MLPs steered, by steering_adaras.py. The classes are made
when Transformers asks for them by the names in config.json. No forward pass of a layer is written again here: a steered
MLP runs its native one, which finds a steered down projection. All weights keep their names.
"""

from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, modeling_utils

from .steering_adaras import (
    THREAD,
    Scope,
    SteeredProjection,
    Steering,
    SteeringGate,
    begin_step,
    finish_step,
    frozen,
    here,
    parameter_names,
    place_of,
    preview,
    prompt_width,
    require_generation,
    scope_of,
    tokens_of,
    valid_tokens,
)

try:
    from transformers import conversion_mapping
except ImportError:  # Transformers 4
    conversion_mapping = None  # type: ignore[assignment]


def __getattr__(name: str) -> Any:
    """The class of this name, when it is looked up in this module."""
    native: Any = getattr(transformers, name.removeprefix("AdaRAS"), None) if name.startswith("AdaRAS") else None
    if isinstance(native, type) and issubclass(native, (PreTrainedModel, PretrainedConfig)):
        found: Any = steered_class(native)  # type: ignore[arg-type]
        return found
    raise AttributeError(f"{name}: expected AdaRAS and the name of a model or config class of Transformers")


@cache
def steered_class(native: Any) -> Any:
    """The steered version of a model or config class of Transformers."""
    content: dict[str, Any] = {"__module__": OwnModelType.__module__}
    if issubclass(native, PretrainedConfig):
        parents: tuple[type, ...] = (native,)
        content["model_type"] = OwnModelType(f"adaras_{native.model_type}")
    else:
        kind: Any = SteeredGenerationMixin if issubclass(native, GenerationMixin) else SteeredModel
        if kind is SteeredModel and "text_config" in native.config_class.sub_configs:
            kind = SteeredWrapper
        parents = (kind, native)
        content["config_class"] = steered_class(native.config_class)
        if kind is not SteeredModel:
            content["forward"] = handing_on(native)
        if native.config_class.model_type == "gemma3_text":
            content["base_model_prefix"] = "model"  # version 4 uses the multimodal model's, and would find no weights
    return type(f"AdaRAS{native.__name__}", parents, content)


def handing_on(native: Any) -> Callable[..., Any]:
    """The forward pass of a model class, which tells the decoder where the prompt ends, and what is padding."""
    names = parameter_names(native.forward, ("input_ids", "attention_mask", "inputs_embeds"))
    around = "text_config" in native.config_class.sub_configs

    @wraps(native.forward)  # Transformers looks at the signature
    def forward(self: Any, *args: Any, steering_start: Any = None, steering_valid: Any = None, **kwargs: Any) -> Any:
        """As in Transformers; not every class gives its decoder further arguments, or a mask with two dimensions."""
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        mask = arguments.get("attention_mask")
        if steering_valid is None and around and (mask is None or mask.ndim == 2):
            steering_valid = valid_tokens(None, tokens_of(arguments)) if mask is None else mask
        with here(handed_on=(steering_start, steering_valid)):
            return native.forward(self, **arguments)

    return forward


class OwnModelType:
    """The model_type of a config class. Its instances have the base's, by which Transformers 5 picks tokenizers."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, config: Any, owner: type) -> str:
        return self.name if config is None else self.name.removeprefix("adaras_")

    def __set__(self, config: Any, name: str) -> None:
        """Ignore the value that Transformers reads from config.json."""


class SteeredMLP(SteeredProjection):
    """Mix-in for an MLP, whose native forward pass finds a steered down projection."""

    steered_from: tuple[Any, str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers."""
        with here(mlp=self):
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle the class as what it is made of."""
        return _new_mlp, self.steered_from, self.__dict__


@cache
def steered_mlp_class(native: Any, down: str) -> Any:
    """The steered version of an MLP class whose down projection is the submodule ``down``."""

    def projection(self: Any) -> Any:
        module = self._modules[down]
        return partial(self.steered_down, down=module) if THREAD.mlp is self else module

    content = {down: property(projection), "steered_from": (native, down)}
    return type(f"Steered{native.__name__}", (SteeredMLP, native), content)


def _new_mlp(native: Any, down: str) -> nn.Module:
    module = nn.Module()
    module.__class__ = steered_mlp_class(native, down)
    return module


class _Steered(PreTrainedModel):
    """What the decoder and the causal language model share: loading, saving and gradient checkpointing."""

    install_steering: Callable[[Any], None]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.install_steering(config.adaras)
        # On the instance, after construction: Transformers 4.57 checks the class's list against modules that exist.
        kept = set(self._keep_in_fp32_modules_strict or ())
        self._keep_in_fp32_modules_strict = kept | {"steering_gate", "steering_vector"}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Rename checkpoint keys as for the base class: Transformers 5 looks the renaming up by class name."""
        super().__init_subclass__(**kwargs)
        native = cls.native_class()
        names = (native.__name__, getattr(native.config_class, "model_type", None)) if conversion_mapping else ()
        for name in names:
            if (rules := conversion_mapping.get_checkpoint_conversion_mapping(name)) is not None:
                conversion_mapping.register_checkpoint_conversion_mapping(cls.__name__, rules, overwrite=True)
                break

    @classmethod
    def native_class(cls) -> Any:
        """The Transformers class that is steered."""
        return next(parent for parent in cls.__mro__ if parent.__module__.startswith("transformers."))

    @classmethod
    def is_custom_code(cls) -> bool:
        """Whether Transformers 5 leaves buffers to the class that its own classes fill; they are its own here."""
        return False

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, but the gate and the vectors stay frozen."""
        # Without it, version 4 does not load the buffers of layers on disk, and the gate's indices would be zero.
        loaded = super().from_pretrained(*args, **{"offload_buffers": True, **kwargs})
        for name, parameter in (loaded[0] if isinstance(loaded, tuple) else loaded).named_parameters():
            parameter.requires_grad &= "steering_" not in name
        return loaded

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, *, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        """Steer a layer that is recomputed for its gradient as it was steered in the forward pass."""

        def steered(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
            return gradient_checkpointing_func(here(step=THREAD.step)(function), *args, **options)

        super()._set_gradient_checkpointing(gradient_checkpointing_func=steered, **kwargs)


class SteeredModel(_Steered):
    """Mix-in for the decoder without LM head: decides in each call which tokens are prompt and which are steered.

    ``forward`` takes one more argument: ``steering_start``, the column of this call at which generation begins
    (an int or (B, 1)), for teacher forcing, losses and prefixes; above T, the prompt goes on in a later call.
    Without it, a call with several tokens is a whole prompt, and a call with one token a generated token.
    """

    _auto_class = "AutoModel"

    def install_steering(self, settings: dict[str, Any]) -> None:
        """Turn the MLPs of the rule's layers into steered MLPs. The base model's weights keep their names.

        Raises:
            NotImplementedError: a server packs requests into one row and does not show where their prompts end, or
                this Transformers has renamed the decoder's arguments.
        """
        self.forward_names = parameter_names(self.native_class().forward)
        if (server := self.config._attn_implementation) in ("vllm", "sglang", "tgi"):
            raise NotImplementedError(f"{server} does not say where a prompt ends; serve an export to `stock` there")
        gate = settings["gate"]
        self.steering = Steering(settings)
        self.steering_gate = SteeringGate(sum(gate["features"]), gate["hidden_size"]) if gate else None
        features = dict(zip(gate["layers"], gate["features"], strict=True)) if gate else {}
        self.steering_is_causal = not features or not settings["layers"] or max(features) < min(settings["layers"])
        self.steered_layers = sorted({*features, *settings["layers"]})
        path, _, down = settings["down_projection"].rpartition(".")
        for layer in self.steered_layers:
            mlp: Any = self.get_submodule(path.format(layer))
            native: Any = type(mlp)
            mlp.__class__ = steered_mlp_class(native, down)
            vector = frozen(self.config.hidden_size) if layer in settings["layers"] else None
            index = torch.zeros(features[layer], dtype=torch.int64) if layer in features else None
            mlp.register_parameter("steering_vector", vector)
            mlp.register_buffer("steering_index", index)

    def forward(
        self,
        *args: Any,
        steering_start: "int | Tensor | None" = None,
        steering_valid: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in Transformers.

        Raises:
            RuntimeError: not every steered MLP ran.
        """
        arguments = {**dict(zip(self.forward_names, args, strict=False)), **kwargs}
        if not self.steering.active:
            return super().forward(**arguments)
        if "logits_to_keep" in arguments:
            arguments["logits_to_keep"] = 0  # Gemma 4's upper layers would run the last tokens alone
        if steering_start is None:
            steering_start, steering_valid = THREAD.handed_on
        step = begin_step(self, self.steering_gate, self.steering, arguments, steering_start, steering_valid)
        if not self.steering_is_causal:
            preview(step, super().forward, arguments)
        with here(step=step):
            outputs = super().forward(**arguments)
        count = self.config.num_hidden_layers  # fewer than there are, in a draft of assistant_early_exit
        if step.projections < sum(layer < count for layer in self.steered_layers):
            raise RuntimeError("a steered MLP did not run: it was replaced, as by use_kernels=True; open it without")
        finish_step(step, outputs)
        return outputs


class SteeredWrapper(_Steered):
    """Mix-in for a model around the decoder, such as one that reads images."""

    _auto_class = "AutoModel"

    def install_steering(self, settings: dict[str, Any]) -> None:
        """Turn the decoder into a steered decoder."""
        decoder = self.steered_decoder
        native: Any = type(decoder)
        decoder.__class__ = steered_class(native)
        known: dict[str, Any] = getattr(modeling_utils, "_CAN_RECORD_REGISTRY", {})  # filled by constructors
        known.setdefault(str(decoder.__class__), decoder._can_record_outputs)
        decoder.install_steering(settings)
        self.steering = decoder.steering

    @property
    def steered_decoder(self) -> Any:
        """The model of the text without its LM head."""
        decoder = self.get_decoder()
        return self.base_model if decoder is self else decoder  # version 4 knows only some names of it


class SteeredGenerationMixin(SteeredWrapper, GenerationMixin):
    """Mix-in for the causal language model: generate() gives its forward passes the length of the prompt."""

    _auto_class = "AutoModelForCausalLM"

    def install_steering(self, settings: dict[str, Any]) -> None:
        """Turn the decoder into a steered decoder.

        Raises:
            NotImplementedError: this Transformers has renamed arguments of generate() or of its parts.
        """
        require_generation(self.native_class())
        super().install_steering(settings)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers. Afterwards ``steering.last_decisions`` has the gate's decisions.

        ``steering_start``, an argument or an attribute of the generation config, is the number of input columns that
        are the prompt; by default all are. The columns after them are the beginning of the answer, and are steered.
        """
        config = kwargs.get("generation_config", self.generation_config)
        start = kwargs.pop("steering_start", getattr(config, "steering_start", None))
        scope = Scope(self.steered_decoder, prompt_width(inputs, kwargs) if start is None else start)
        with scope.open():
            outputs = super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
        scope.remember(self.steering, outputs)
        return outputs

    def prepare_inputs_for_generation(
        self, input_ids: Any, *args: Any, inputs_embeds: Any = None, **kwargs: Any
    ) -> Any:
        """As in Transformers, and adds where the prompt ends in this call."""
        kwargs["inputs_embeds"] = inputs_embeds  # named above because Transformers looks at the signature
        prepared = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        start, valid_BT = place_of(scope_of(self.steered_decoder), input_ids, kwargs.get("attention_mask"), prepared)
        if start is not None:
            prepared |= {"steering_start": start, "steering_valid": valid_BT}
        return prepared

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, but no request uses another's KV cache, in which other tokens may have been steered.

        Raises:
            NotImplementedError: there is a gate, and packed requests have no place for its state; or see `unshared`.
        """
        if self.steered_decoder.steering_gate is not None:
            raise NotImplementedError("continuous batching is not supported by a model with a gate; use generate()")
        return unshared(super().init_continuous_batching(*args, **kwargs))


def unshared(manager: Any) -> Any:
    """The manager of continuous batching, set so that its requests share no KV blocks.

    Raises:
        NotImplementedError: this Transformers has no such setting.
    """
    settings: Any = getattr(manager, "continuous_batching_config", None)
    if conversion_mapping:  # Transformers 4 shares no blocks
        if not hasattr(settings, "allow_block_sharing"):
            raise NotImplementedError("this Transformers has no allow_block_sharing to switch off; use generate()")
        settings.allow_block_sharing = False
    return manager
