"""One safetensors file per value: arrays, plus one metadata key with sorted JSON.

Knows nothing of what it stores. The same value always gives the same bytes, and a write either
replaces the destination completely or leaves it as it was.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from adaras_export.errors import ArtifactError

Array = npt.NDArray[Any]

# One metadata key only: safetensors 0.8 writes several in an order that changes from run to run.
_KEY = "adaras"


def save_file(path: str | Path, kind: str, arrays: Mapping[str, Array], record: Mapping[str, Any]) -> None:
    """Write ``arrays`` and ``record`` (JSON values) as a file of the given kind, atomically."""
    replace_file(path, to_bytes(kind, arrays, record))


def to_bytes(kind: str, arrays: Mapping[str, Array], record: Mapping[str, Any]) -> bytes:
    """The exact bytes that `save_file` writes."""
    metadata = json.dumps({"kind": kind, **record}, sort_keys=True, ensure_ascii=False, allow_nan=False)
    # In C order, or safetensors would write other values; ascontiguousarray would turn () into (1,).
    ordered = {name: np.asarray(arrays[name], order="C") for name in sorted(arrays)}
    return save(ordered, metadata={_KEY: metadata})


def load_file(path: str | Path, kind: str) -> tuple[dict[str, Array], dict[str, Any]]:
    """The arrays and the record of a file that `save_file` wrote.

    Raises:
        ArtifactError: the file is missing, damaged, or of another kind.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        _require_numpy_types(arrays)
    except (SafetensorError, OSError, TypeError) as error:
        reason = "no such file" if not path.exists() else str(error)
        raise ArtifactError(f"{path}: {reason}; expected a {kind} file of adaras_export") from error
    record = _parse(path, metadata.get(_KEY), kind)
    found = record.pop("kind", None)
    if found != kind:
        raise ArtifactError(f"{path}: is a {found} file; expected a {kind} file")
    return arrays, record


def _require_numpy_types(arrays: Mapping[str, Array]) -> None:
    """Refuse bfloat16 and 8-bit floats, as safetensors does unless another library has taught NumPy such types."""
    if strange := sorted({str(array.dtype) for array in arrays.values() if array.dtype.kind not in "biuf"}):
        raise TypeError(f"holds {', '.join(strange)}")


def replace_file(path: str | Path, content: bytes) -> None:
    """Put ``content`` at ``path`` through a temporary file beside it, so that no reader sees a part.

    Raises:
        ArtifactError: the folder is missing, not writable, or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror}); nothing was changed") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ArtifactError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: {error}; expected a JSON object") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: holds a {type(value).__name__}; expected a JSON object")
    return value


def sha256(content: bytes) -> str:
    """The SHA-256 of ``content``, hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file, hexadecimal, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _parse(path: Path, metadata: str | None, kind: str) -> dict[str, Any]:
    if metadata is None:
        raise ArtifactError(f"{path}: has no adaras metadata; expected a {kind} file of adaras_export")
    try:
        record = json.loads(metadata)
    except ValueError as error:
        raise ArtifactError(f"{path}: damaged metadata ({error}); expected a {kind} file") from error
    if not isinstance(record, dict):
        raise ArtifactError(f"{path}: damaged metadata; expected a {kind} file")
    return record
