"""The config classes and the architectures of steered models, by name.

Spawned processes unpickle vLLM's configuration before they load plugins, so the classes are found in a module.
"""

from typing import Any

from transformers import CONFIG_MAPPING

from adaras_export.core import families

_SERVED = [family for family in families.FAMILIES.values() if family.vllm is not None]


def _architecture(family: families.Family) -> tuple[str, str]:
    """The module and the name of the class of vLLM's that serves a family."""
    native = "TransformersForCausalLM" if family.vllm == "transformers" else family.classes["AutoModelForCausalLM"]
    return f"vllm.model_executor.models.{family.vllm}", native


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
