"""PEFT adapters, opened and played the same way by every target that writes one. Knows no method and no rule."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from adaras_export.errors import ArtifactError, first_line
from adaras_export.exporters.parity import Mode

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

# What is said of every adapter with `lora_bias`, what whoever opens one here finds out without it, and a name that PEFT
# 0.21 asks Transformers 5.23 for, which has renamed it.
_EXPECTED = (
    "`lora_bias=True` was passed but the targeted layer",
    "Found missing adapter keys",
    "`is_gradient_checkpointing` is deprecated",
)


def adapted(model: Any, folder: Path) -> Any:  # noqa: ANN401 - a class of Transformers, a class of PEFT
    """The model with the adapter in ``folder``.

    Raises:
        ArtifactError: it does not open.
    """
    from peft import PeftModel

    try:
        # PEFT draws adapters before it reads them.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            for message in _EXPECTED:
                warnings.filterwarnings("ignore", message)
            return PeftModel.from_pretrained(model, str(folder)).eval()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: cannot be opened ({first_line(error)})") from error


def set_to(model: Any, mode: Mode) -> AbstractContextManager[Any]:  # noqa: ANN401 - PEFT's class
    """As `base.SteeredModel` says: off is the model without its adapter, everything else with it."""
    off: AbstractContextManager[Any] = model.disable_adapter()
    return off if mode == "off" else nullcontext()
