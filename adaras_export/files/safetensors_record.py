"""Arrays and a JSON record in one safetensors file. The same content always gives the same bytes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from adaras_export.errors import ArtifactError
from adaras_export.files import safe_read
from adaras_export.files.atomic import replace_file
from adaras_export.files.safe_read import UnreadableError

Array = npt.NDArray[Any]
# One metadata key only: safetensors 0.8 writes several keys in random order.
_KEY = "adaras"
LARGEST = 64 << 20
# The types that NumPy has by itself; without bfloat16 and smaller floats.
_DTYPES = {"F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}


def save_file(path: str | Path, kind: str, arrays: Mapping[str, Array], record: Mapping[str, Any]) -> None:
    """Write ``arrays`` and ``record`` (JSON values) as a file of the given kind, atomically."""
    replace_file(path, to_bytes(kind, arrays, record))


def to_bytes(kind: str, arrays: Mapping[str, Array], record: Mapping[str, Any]) -> bytes:
    """The exact bytes that `save_file` writes."""
    metadata = json.dumps({"kind": kind, **record}, sort_keys=True, ensure_ascii=False, allow_nan=False)
    # safetensors needs C order; ascontiguousarray would turn shape () into (1,).
    ordered = {name: np.asarray(arrays[name], order="C") for name in sorted(arrays)}
    return save(ordered, metadata={_KEY: metadata})


def load_file(path: str | Path, kind: str, largest: int = LARGEST) -> tuple[dict[str, Array], dict[str, Any]]:
    """The arrays and the record of a file that `save_file` wrote; refuses more than ``largest`` bytes.

    Raises:
        ArtifactError: the file is missing, damaged, too large, or of another kind.
    """
    path = Path(path)
    try:
        safe_read.size_of(path, largest)
        with safe_read.tensors(path) as file:
            record = _record(file.metadata() or {}, kind)
            _require_numpy_types(file)
            return {name: file.get_tensor(name) for name in file.keys()}, record
    except UnreadableError as error:
        raise ArtifactError(f"{path}: {error}; expected a {kind} file of adaras_export") from error


def _require_numpy_types(file: Any) -> None:  # noqa: ANN401 - safetensors has no types
    if strange := sorted({file.get_slice(name).get_dtype() for name in file.keys()} - _DTYPES):
        raise UnreadableError(f"holds {', '.join(strange)}")


def _record(metadata: Mapping[str, str], kind: str) -> dict[str, Any]:
    """The record in a file's metadata, without the kind that it names."""
    if _KEY not in metadata:
        raise UnreadableError("has no adaras metadata")
    try:
        record = safe_read.parsed(metadata[_KEY].encode())
    except UnreadableError as error:
        raise UnreadableError(f"damaged metadata: {error}") from error
    if not isinstance(record, dict):
        raise UnreadableError("damaged metadata")
    if (found := record.pop("kind", None)) != kind:
        raise UnreadableError(f"is a {found} file")
    return record
