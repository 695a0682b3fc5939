"""Tells vLLM of steered models. Runs in each of its processes, for every model, so it changes nothing for others."""

from typing import Any

from adaras_export.serving.vllm.configs import ARCHITECTURES, CONFIGS

_SCHEDULER = "adaras_export.serving.vllm.scheduler.make_scheduler"


def register() -> None:
    """Make vLLM know the architectures and config classes of `hf` exports. vLLM calls it by the entry point."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class SteeredConfig(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            _configure(vllm_config)

    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, f"adaras_export.serving.vllm.models:{name}")
        MODELS_CONFIG_MAP[name] = SteeredConfig
    for family, config in CONFIGS.items():
        AutoConfig.register(f"adaras_{family}", config, exist_ok=True)


def _configure(vllm_config: Any) -> None:
    """Refuse what would make steering inexact, and choose the scheduler that keys KV pages by it.

    Raises:
        ValueError: something in the configuration would.
    """
    from adaras_export.serving.vllm import checks, frontend

    checks.require_supported(vllm_config)
    chosen = vllm_config.scheduler_config.scheduler_cls
    if chosen not in (None, _SCHEDULER):
        raise ValueError(f"{chosen}: this scheduler would not tell steered KV pages from unsteered ones; leave it out")
    vllm_config.scheduler_config.scheduler_cls = _SCHEDULER  # by name, as it crosses processes
    frontend.watch()
