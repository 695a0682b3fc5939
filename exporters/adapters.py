"""PEFT adapters, opened and played the same way by every target that writes one. Knows no method and no rule."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from adaras_export.errors import ArtifactError, first_line
from adaras_export.parity import Mode, Play, play_model

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


def play_adapted(model: Any, rows: Sequence[Sequence[int]], mode: Mode, follow_BS: torch.Tensor | None) -> Play:  # noqa: ANN401
    """As `Player` says: off is the model without its adapter, everything else with it."""
    if mode != "off":
        return play_model(model, rows, follow_BS)
    with model.disable_adapter():
        return play_model(model, rows, follow_BS)
