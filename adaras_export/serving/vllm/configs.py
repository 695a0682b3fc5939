"""The config classes and the architectures of steered models, by name.

Spawned processes unpickle vLLM's configuration before they load plugins, so the classes are found in a module.
"""

from typing import Any

from transformers import CONFIG_MAPPING

from adaras_export.core import families

_NATIVE = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "granite": "granite",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
"""vLLM's module by family; it serves the other families with its Transformers backend."""

_MODULES = "vllm.model_executor.models"


def _architecture(family: families.Family) -> tuple[str, str]:
    """The module and the name of the class of vLLM's that serves a family."""
    module = _NATIVE.get(family.model_type)
    if module is None:
        return f"{_MODULES}.transformers", "TransformersForCausalLM"
    return f"{_MODULES}.{module}", family.classes["AutoModelForCausalLM"]


_SERVED = [families.FAMILIES[name] for name in (*_NATIVE, "olmo2", "smollm3", "gpt_neox")]

ARCHITECTURES = {f"AdaRAS{one.classes['AutoModelForCausalLM']}": _architecture(one) for one in _SERVED}
"""vLLM's module and class, by the name of the architecture in the exports."""

ARCHITECTURES["AdaRASGPT2ForCausalLM"] = ARCHITECTURES["AdaRASGPT2LMHeadModel"]  # its name in earlier exports


def _config_class(family: families.Family) -> type[Any]:
    base = CONFIG_MAPPING[family.model_type]
    name = f"AdaRAS{base.__name__}"
    return type(name, (base,), {"model_type": f"adaras_{family.model_type}", "__module__": __name__})


CONFIGS = {one.model_type: _config_class(one) for one in _SERVED}
"""The config class of each family's exports."""

globals().update({one.__name__: one for one in CONFIGS.values()})
