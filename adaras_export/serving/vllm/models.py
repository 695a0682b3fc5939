"""vLLM's classes for causal language models, steered. Imported where a model is built.

A family that vLLM has a class for is steered there; the others are served by vLLM with its Transformers backend, and
steered in it. The classes are made when vLLM asks for them by name.
"""

import importlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from adaras_export.core import families
from adaras_export.serving.vllm import checks, runner
from adaras_export.serving.vllm.configs import ARCHITECTURES
from adaras_export.serving.vllm.gate import Steering
from adaras_export.serving.vllm.mlp import steer

_TENSOR = re.compile(r"(?:^|\.)(?:(\d+)\.mlp\.(steering_vector|steering_index)|steering_gate(?:s\.(\d+))?\.(\w+))$")


class Steered:
    """Mix-in for a causal language model of vLLM's."""

    steered_native: type[Any]

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        checks.require_supported(vllm_config)
        config = vllm_config.model_config.hf_config
        family = families.FAMILIES[config.model_type.removeprefix("adaras_")]
        on_transformers = self.steered_native.__name__.startswith("Transformers")
        if on_transformers:
            _introduce(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        decoder: Any = self.model if on_transformers else getattr(self, family.decoder)  # type: ignore[attr-defined]
        name = f"{prefix}.model" if prefix else "model"
        text = config.get_text_config()
        self.steering = Steering(vllm_config, text.num_hidden_layers, name)
        self.steered_layers = (getattr(decoder, family.layers),)  # in a tuple it is no submodule
        steer(self.steered_layers[0], self.steering, config.adaras, text.hidden_size)
        if (record := config.adaras.get("base")) is not None:
            self.allow_patterns_overrides = ["model-steering.safetensors"]
            self.secondary_weights = [_weights_in(checks.base_folder(record))]
        runner.watch()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As vLLM does, and the steering tensors here: what maps names for the Transformers backend does not know them.

        Raises:
            ValueError: a steering tensor is unknown or has another size; vLLM's loader refuses a missing one.
        """
        loaded: set[str] = set()

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if (match := _TENSOR.search(name)) is None:
                    yield name, tensor
                else:
                    loaded.add(self._fill(match, tensor))

        return super().load_weights(others()) | loaded  # type: ignore[misc,no-any-return]

    def _fill(self, match: re.Match[str], tensor: Tensor) -> str:
        """Copy a steering tensor of the checkpoint into its parameter; the parameter's name."""
        layer, leaf, gate, weight = match.groups()
        owner = self.steered_layers[0][int(layer)].mlp if layer else self.steering.gates[int(gate or 0)]
        parameter = getattr(owner, leaf or weight, None)
        if not isinstance(parameter, nn.Parameter) or parameter.numel() != tensor.numel():
            raise ValueError(f"{match.string}: {tuple(tensor.shape)}; the model's config.json has no place for it")
        parameter.data.copy_(tensor.view(parameter.shape))
        own: Any = self
        return str(next(name for name, one in own.named_parameters() if one is parameter))

    @staticmethod
    def get_model_state_cls() -> type[Any]:
        """Where vLLM's Model Runner V2 asks how a model wants its inputs prepared."""
        return runner.model_state_class()


def _introduce(config: Any) -> None:
    """Tell Transformers which decoder a config of ours belongs to, and to rename its weights as the native one's."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoModel, conversion_mapping

    own = type(config)
    native: Any = own.__mro__[1]
    decoders: Any = MODEL_MAPPING
    models: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    base, causal = decoders[native], models[native]
    for name in (causal.__name__, native.model_type):
        if (rules := conversion_mapping.get_checkpoint_conversion_mapping(name)) is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(own.model_type, rules, overwrite=True)
            break
    known = type(base.__name__, (base,), {"config_class": own, "__module__": base.__module__})
    AutoModel.register(own, known, exist_ok=True)


def _weights_in(folder: str) -> Any:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    return DefaultModelLoader.Source(folder, None)


def __getattr__(name: str) -> type[Any]:
    """The steered class of an architecture, made when vLLM asks for it."""
    if name not in ARCHITECTURES:
        raise AttributeError(name)
    module, native = ARCHITECTURES[name]
    base = getattr(importlib.import_module(module), native)
    made = type(name, (Steered, base), {"__module__": __name__, "steered_native": base})
    globals()[name] = made
    return made
