"""vLLM's offline engine, opened. In vLLM's own environment; knows no steering."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from adaras_export.errors import ArtifactError, first_line


def open_engine(vllm: ModuleType, folder: Path, subject: str, settings: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """A `vllm.LLM` of a model folder; ``subject`` is what an error calls it.

    Raises:
        ArtifactError: vLLM cannot load the folder.
    """
    try:
        return vllm.LLM(model=str(folder), disable_log_stats=True, seed=0, **settings)
    except (OSError, ValueError, RuntimeError) as error:  # what engines say of configurations, memory and kernels
        raise ArtifactError(
            f"{subject}: vLLM cannot load it ({_reason(error)}); expected a model that it serves"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of a message; of pydantic's, whose first line only counts problems, that of each problem."""
    from pydantic import ValidationError  # vLLM checks its configuration with it

    if not isinstance(error, ValidationError):
        return first_line(error)
    return "; ".join(
        ": ".join([*map(str, one["loc"][:1]), first_line(one.get("ctx", {}).get("error", one["msg"]))])
        for one in error.errors()
    )
