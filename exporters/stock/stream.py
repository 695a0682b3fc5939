"""Writes safetensors files in pieces, so that only one piece of a tensor is in memory.

The library's own writer needs all tensors of a file at once.
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from adaras_export.core import checkpoint
from adaras_export.errors import ArtifactError, ExportError
from adaras_export.files import safe_read

_WIDTHS = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}


@dataclass(frozen=True)
class Stream:
    """A tensor to write: safetensors' name of its type, its shape, and its bytes in pieces."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[bytes]]

    @property
    def width(self) -> int:
        """Bytes of one element."""
        if self.dtype not in _WIDTHS:
            raise ExportError(f"a tensor of type {self.dtype}: not known; expected one of {', '.join(_WIDTHS)}")
        return _WIDTHS[self.dtype]

    @property
    def size(self) -> int:
        """Bytes of all elements."""
        return self.width * math.prod(self.shape)


def streams(path: Path) -> dict[str, Stream]:
    """The tensors of a file, in the order of the file; each is read when it is written.

    Raises:
        ArtifactError: the file is not safetensors.
    """
    header, start = checkpoint.header(path), checkpoint.data_start(path)
    ordered = sorted(header, key=lambda name: (header[name]["data_offsets"], name))
    return {name: _stored(path, start, header[name]) for name in ordered}


def _stored(path: Path, start: int, entry: Mapping[str, Any]) -> Stream:
    first, last = entry["data_offsets"]  # the library has checked the header
    return Stream(entry["dtype"], tuple(entry["shape"]), partial(safe_read.pieces, path, start + first, start + last))


def padded(tensor: Stream, axis: int, count: int) -> Stream:
    """A matrix with ``count`` zero rows (axis 0) or columns (axis 1) appended."""
    rows, columns = tensor.shape
    shape = (rows + count, columns) if axis == 0 else (rows, columns + count)
    gap = bytes(count * tensor.width * (columns if axis == 0 else 1))

    def pieces() -> Iterator[bytes]:
        if axis == 0:
            yield from tensor.pieces()
            yield gap
            return
        for row in runs(tensor.pieces(), columns * tensor.width):
            yield row + gap

    return Stream(tensor.dtype, shape, pieces)


def runs(pieces: Iterator[bytes], length: int) -> Iterator[bytes]:
    """The same bytes in runs of ``length``."""
    rest = b""
    for piece in pieces:
        rest += piece
        whole = len(rest) // length * length
        for at in range(0, whole, length):
            yield rest[at : at + length]
        rest = rest[whole:]


def write(path: Path, tensors: Mapping[str, Stream]) -> None:
    """Write a file of these tensors, the widest types first, so that all are aligned."""
    names = sorted(tensors, key=lambda name: -tensors[name].width)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].size
        header[name] = {
            "dtype": tensors[name].dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            written = sum(file.write(piece) for piece in tensors[name].pieces())
            assert written == tensors[name].size, f"{name}: {written} bytes of {tensors[name].size}"


def same_tensors(path: Path, expected: Mapping[str, Stream]) -> bool:
    """Whether a file has exactly these tensors, by name, type, shape and bytes."""
    try:
        found = streams(path)
    except ArtifactError:  # missing, truncated
        return False
    return found.keys() == expected.keys() and all(_equal(found[name], expected[name]) for name in found)


def _equal(one: Stream, other: Stream) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and _digest(one) == _digest(other)


def _digest(tensor: Stream) -> bytes:
    digest = hashlib.sha256()
    for piece in tensor.pieces():
        digest.update(piece)
    return digest.digest()
