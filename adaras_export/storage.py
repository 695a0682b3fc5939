"""One safetensors file per value: arrays, plus one metadata key with sorted JSON.

Knows nothing of what it stores. The same value always gives the same bytes, and a write either
replaces the destination completely or leaves it as it was.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from adaras_export import foreign
from adaras_export.errors import ArtifactError
from adaras_export.foreign import UnreadableError

Array = npt.NDArray[Any]

# One metadata key only: safetensors 0.8 writes several in an order that changes from run to run.
_KEY = "adaras"

LARGEST = 64 << 20
"""Bytes of a file of neurons or a rule, two million of them."""


def save_file(path: str | Path, kind: str, arrays: Mapping[str, Array], record: Mapping[str, Any]) -> None:
    """Write ``arrays`` and ``record`` (JSON values) as a file of the given kind, atomically."""
    replace_file(path, to_bytes(kind, arrays, record))


def to_bytes(kind: str, arrays: Mapping[str, Array], record: Mapping[str, Any]) -> bytes:
    """The exact bytes that `save_file` writes."""
    metadata = json.dumps({"kind": kind, **record}, sort_keys=True, ensure_ascii=False, allow_nan=False)
    # In C order, or safetensors would write other values; ascontiguousarray would turn () into (1,).
    ordered = {name: np.asarray(arrays[name], order="C") for name in sorted(arrays)}
    return save(ordered, metadata={_KEY: metadata})


def load_file(path: str | Path, kind: str, largest: int = LARGEST) -> tuple[dict[str, Array], dict[str, Any]]:
    """The arrays and the record of a file that `save_file` wrote, which has no reason to exceed ``largest`` bytes.

    Raises:
        ArtifactError: the file is missing, damaged, larger, or of another kind.
    """
    path = Path(path)
    try:
        foreign.size_of(path, largest)
        with foreign.tensors(path) as file:
            record = _record(file.metadata() or {}, kind)
            _require_numpy_types(file)
            return {name: file.get_tensor(name) for name in file.keys()}, record
    except UnreadableError as error:
        raise ArtifactError(f"{path}: {error}; expected a {kind} file of adaras_export") from error


# Not those that NumPy lacks unless another library has taught it: bfloat16, and floats of fewer bits.
_DTYPES = {"F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}


def _require_numpy_types(file: Any) -> None:  # noqa: ANN401 - safetensors has no types
    if strange := sorted({file.get_slice(name).get_dtype() for name in file.keys()} - _DTYPES):
        raise UnreadableError(f"holds {', '.join(strange)}")


def _record(metadata: Mapping[str, str], kind: str) -> dict[str, Any]:
    """The record in a file's metadata, without the kind that it names."""
    if _KEY not in metadata:
        raise UnreadableError("has no adaras metadata")
    try:
        record = foreign.parsed(metadata[_KEY].encode())
    except UnreadableError as error:
        raise UnreadableError(f"damaged metadata: {error}") from error
    if not isinstance(record, dict):
        raise UnreadableError("damaged metadata")
    if (found := record.pop("kind", None)) != kind:
        raise UnreadableError(f"is a {found} file")
    return record


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


def append(path: Path, content: bytes) -> None:
    """Add to a file, made if there is none; on disk when this returns. An OSError is the caller's to word."""
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def link_or_copy(source: Path, target: Path, *, copy: bool = False) -> None:
    """Give ``source`` a second name without rewriting it; a copy where that is asked for or the file systems differ."""
    source = source.resolve()  # a Hub snapshot holds links into its blobs
    if copy:
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError as error:
        # Another file system, none that links, too many links, or a file of another user.
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        shutil.copyfile(source, target)


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ArtifactError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        value = foreign.parsed(foreign.content(Path(path)))
    except UnreadableError as error:
        raise ArtifactError(f"{path}: {error}; expected a JSON object") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: holds a {type(value).__name__}; expected a JSON object")
    return value


def sha256(content: bytes) -> str:
    """The SHA-256 of ``content``, hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file, hexadecimal, read in pieces of 1 MiB.

    Raises:
        ArtifactError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({foreign.reason(error)}); expected a file to hash") from error
    return digest.hexdigest()
