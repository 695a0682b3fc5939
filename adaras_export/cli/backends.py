"""What answers on `--backend`: joins evaluation, which knows no engine, with an engine, which knows no evaluation."""

import os
from functools import partial
from typing import TYPE_CHECKING

from adaras_export.cli.options import Dtype, quiet_libraries

if TYPE_CHECKING:
    from adaras_export.evaluation.engine import Backend


def bank_backend(name: str, model: str, revision: str | None, dtype: Dtype, sequences: int) -> "Backend | None":
    """The backend of that name, ``sequences`` answers at a time; None for the model in memory.

    Raises:
        MissingExtraError: vLLM is not installed.
    """
    if name == "transformers":
        return None
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vLLM is imported, in each of its processes
    quiet_libraries()
    from adaras_export.core.checkpoint import Checkpoint
    from adaras_export.errors import require
    from adaras_export.evaluation.engine import Backend
    from adaras_export.files.hub import fetch
    from adaras_export.serving.vllm.bank import opened

    require("vllm", "vllm", f"the backend {name}")
    base = Checkpoint(fetch(model, revision))
    return Backend(name, partial(opened, base, dtype=dtype, sequences=sequences))
