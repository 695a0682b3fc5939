"""The entries and tensors of a GGUF file, little-endian, as far as its counts can be true.

Not by the gguf library's reader, which keeps objects for every element of an array and believes every count: of a
vocabulary of 150,000 it makes 500 MB in 7 seconds, and an array of 2**60 numbers keeps it forever (docs/decisions/043).
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from adaras_export.errors import ArtifactError
from adaras_export.files import safe_read
from adaras_export.files.safe_read import UnreadableError
from adaras_export.files.safetensors_record import Array

Entry = tuple[GGUFValueType, Any]
"""A value of the metadata, with its type; of an array only the type."""

_FORMS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_MOST_ENTRIES, _MOST_TENSORS, _MOST_AXES = 10_000, 100_000, 8
_MOST_ELEMENTS = 1 << 22  # of all arrays; the largest vocabulary, with scores, types and merges, has a third of that
_MOST_TEXT = 16 << 20  # bytes of all names and texts outside arrays
_LARGEST_ALIGNMENT = 1 << 20


@dataclass(frozen=True)
class Tensor:
    """A tensor's record, and where its values lie, in bytes from the beginning of the file."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    place: int
    size: int


@dataclass(frozen=True)
class Gguf:
    """The entries and tensors of a file, and where they lie, in bytes from its beginning."""

    path: Path
    entries: dict[str, Entry]
    entry_places: dict[str, tuple[int, int]]
    tensors: tuple[Tensor, ...]
    data_start: int
    alignment: int

    @property
    def data_end(self) -> int:
        """Where the values of the last tensor end, without padding."""
        return max((tensor.place + tensor.size for tensor in self.tensors), default=self.data_start)

    def values(self, tensor: Tensor) -> Array:
        """The values of a float32 tensor, mapped into memory; GGUF has the last axis first."""
        shape = tensor.shape[::-1]
        if not tensor.size:
            return np.zeros(shape, np.float32)
        return np.memmap(self.path, "<f4", "r", tensor.place, shape)


def opened(path: Path) -> Gguf:
    """Read what a GGUF file says of itself; no values.

    Raises:
        ArtifactError: it is missing, damaged or of another kind.
    """
    try:
        size = safe_read.size_of(path)
        with path.open("rb") as file:
            return _Cursor(path, file, size).gguf()
    except (UnreadableError, OSError) as error:
        raise ArtifactError(f"{path}: {safe_read.reason(error)}; expected a GGUF file") from error


@dataclass
class _Cursor:
    path: Path
    file: BinaryIO
    size: int
    elements: int = 0
    text_bytes: int = 0

    def gguf(self) -> Gguf:
        if self.take(4) != b"GGUF":
            raise UnreadableError("does not begin with GGUF")
        if (version := self.number("I")) not in (2, 3):
            raise UnreadableError(f"is of version {version}, or big-endian; only versions 2 and 3 are read")
        count = self.count("Q", _MOST_TENSORS, "tensors")
        entries: dict[str, Entry] = {}
        places: dict[str, tuple[int, int]] = {}
        for _ in range(self.count("Q", _MOST_ENTRIES, "entries")):
            start, name = self.file.tell(), self.text()
            if name in entries:
                raise UnreadableError(f"has the entry {name!r} twice")
            entries[name] = self.entry()
            places[name] = start, self.file.tell()
        alignment = _alignment(entries.get("general.alignment"))
        unplaced = [self.tensor() for _ in range(count)]
        data_start = -(-self.file.tell() // alignment) * alignment
        tensors = tuple(replace(tensor, place=data_start + tensor.place) for tensor in unplaced)
        self.require_places(tensors)
        return Gguf(self.path, entries, places, tensors, data_start, alignment)

    def take(self, count: int) -> bytes:
        if len(content := self.file.read(count)) < count:
            raise UnreadableError("ends before its entries and tensors do")
        return content

    def skip(self, count: int) -> None:
        if self.file.seek(count, 1) > self.size:
            raise UnreadableError("ends before its entries and tensors do")

    def number(self, form: str) -> Any:  # noqa: ANN401 - a number or a boolean
        return struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]

    def count(self, form: str, most: int, what: str) -> int:
        if (count := int(self.number(form))) > most:
            raise UnreadableError(f"says {count} {what}; at most {most} are read")
        return count

    def text(self) -> str:
        length = self.count("Q", _MOST_TEXT - self.text_bytes, "bytes of text")
        self.text_bytes += length
        return self.take(length).decode(errors="replace")

    def entry(self) -> Entry:
        kind = self.kind()
        if kind == GGUFValueType.ARRAY:
            self.skip_array()
            return kind, None
        return kind, self.text() if kind == GGUFValueType.STRING else self.number(_FORMS[kind])

    def kind(self) -> GGUFValueType:
        return GGUFValueType(self.count("I", max(GGUFValueType), "as the type of a value"))

    def skip_array(self) -> None:
        kind, count = self.kind(), self.count("Q", _MOST_ELEMENTS, "elements")
        self.elements += count
        if kind == GGUFValueType.ARRAY or self.elements > _MOST_ELEMENTS:
            raise UnreadableError(f"has arrays of arrays, or of more than {_MOST_ELEMENTS} elements in all")
        if kind != GGUFValueType.STRING:
            self.skip(count * struct.calcsize(_FORMS[kind]))
            return
        for _ in range(count):
            self.skip(self.count("Q", self.size, "bytes of text"))

    def tensor(self) -> Tensor:
        """A tensor by its record; its place is from the beginning of the data."""
        name = self.text()
        shape = tuple(self.count("Q", 1 << 48, "along an axis") for _ in range(self.count("I", _MOST_AXES, "axes")))
        code = self.number("I")
        if code not in _KINDS:
            raise UnreadableError(f"has {name!r} of the unknown type {code}")
        block, width = GGML_QUANT_SIZES[_KINDS[code]]
        if shape and shape[0] % block:
            raise UnreadableError(f"has {name!r} with {shape[0]} values in a row, which are no whole blocks of {block}")
        place, size = self.number("Q"), math.prod(shape) * width // block
        return Tensor(name, _KINDS[code], shape, place, size)

    def require_places(self, tensors: Sequence[Tensor]) -> None:
        """Refuse two tensors of one name, and values that are outside the file or shared: many could hash for hours."""
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise UnreadableError("has two tensors of one name")
        end = 0
        for tensor in sorted(tensors, key=lambda tensor: (tensor.place, tensor.size)):
            if tensor.place < end:
                raise UnreadableError(f"has {tensor.name!r} where the values of another tensor are")
            end = tensor.place + tensor.size
            if end > self.size:
                raise UnreadableError(f"ends before the values of {tensor.name!r} do")


_KINDS = {int(kind): kind for kind in GGML_QUANT_SIZES}


def _alignment(entry: Entry | None) -> int:
    if entry is None:
        return int(GGUF_DEFAULT_ALIGNMENT)
    kind, value = entry
    if kind != GGUFValueType.UINT32 or not 1 <= value <= _LARGEST_ALIGNMENT or value & (value - 1):
        raise UnreadableError(f"aligns its tensors to {value!r} bytes, not to a power of two")
    return int(value)
