"""Open PEFT adapters and switch them on and off, for all targets that write one."""

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

# PEFT's warning for every adapter with `lora_bias`, its warning about missing keys, which our checks report, and a
# deprecated name that PEFT 0.21 uses in Transformers 5.23.
_EXPECTED = (
    "`lora_bias=True` was passed but the targeted layer",
    "Found missing adapter keys",
    "`is_gradient_checkpointing` is deprecated",
)


def adapted(model: Any, folder: Path) -> Any:  # noqa: ANN401 - a class of Transformers, a class of PEFT
    """The model with the adapter in ``folder``.

    Raises:
        ArtifactError: the adapter cannot be opened.
    """
    from peft import PeftModel

    try:
        # PEFT initialises adapters at random before it loads them.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            for message in _EXPECTED:
                warnings.filterwarnings("ignore", message)
            return PeftModel.from_pretrained(model, str(folder)).eval()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: cannot be opened ({first_line(error)})") from error


def set_to(model: Any, mode: Mode) -> AbstractContextManager[Any]:  # noqa: ANN401 - PEFT's class
    """Disable the adapter inside the context if ``mode`` is "off"; see `base.SteeredModel`."""
    off: AbstractContextManager[Any] = model.disable_adapter()
    return off if mode == "off" else nullcontext()
