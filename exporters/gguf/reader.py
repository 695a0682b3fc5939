"""What is in a GGUF file, as far as its counts can be true. Knows no key and no tensor.

The gguf library's own reader goes through as many entries, elements and tensors as a file says, keeps an object for
each, and goes on behind the end of the file: an array of 2**60 numbers keeps it forever.
"""

import math
import struct
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
_LONGEST_NAME = 1 << 10
_LARGEST_ALIGNMENT = 1 << 20


@dataclass(frozen=True)
class Tensor:
    """A tensor's record, and where record and values lie, in bytes from the beginning of the file."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    record: int
    record_size: int
    place: int
    size: int


@dataclass(frozen=True)
class Gguf:
    """A file, looked through. ``order``: "<" or ">", that of its bytes."""

    path: Path
    order: str
    entries: dict[str, Entry]
    tensors: tuple[Tensor, ...]
    records: int
    records_end: int
    data_start: int
    alignment: int

    def values(self, tensor: Tensor) -> Array:
        """The values of a float32 tensor, mapped into memory."""
        if not tensor.size:
            return np.zeros(tensor.shape, np.float32)
        return np.memmap(self.path, f"{self.order}f4", "r", tensor.place, tensor.shape)

    def content(self, tensor: Tensor) -> bytes:
        """The bytes of a tensor."""
        with self.path.open("rb") as file:
            file.seek(tensor.place)
            return file.read(tensor.size)


def opened(path: Path) -> Gguf:
    """Look a GGUF file through.

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
    order: str = "<"
    elements: int = 0

    def gguf(self) -> Gguf:
        if self.take(4) != b"GGUF":
            raise UnreadableError("does not begin with GGUF")
        start = self.take(4)
        self.order = "<" if struct.unpack("<I", start)[0] & 65535 else ">"
        if (version := struct.unpack(f"{self.order}I", start)[0]) not in (2, 3):
            raise UnreadableError(f"is of version {version}, not of 2 or 3")
        count = self.count("Q", _MOST_TENSORS, "tensors")
        entries: dict[str, Entry] = {}
        for _ in range(self.count("Q", _MOST_ENTRIES, "entries")):
            name = self.text(_LONGEST_NAME)
            if name in entries:
                raise UnreadableError(f"has the entry {name!r} twice")
            entries[name] = self.entry()
        alignment = _alignment(entries.get("general.alignment"))
        records, found = self.file.tell(), [self.tensor() for _ in range(count)]
        end = self.file.tell()
        start_of_data = -(-end // alignment) * alignment
        tensors = tuple(self.placed(one, start_of_data) for one in found)
        if len({one.name for one in tensors}) < count:
            raise UnreadableError("has two tensors of one name")
        return Gguf(self.path, self.order, entries, tensors, records, end, start_of_data, alignment)

    def take(self, count: int) -> bytes:
        if len(content := self.file.read(count)) < count:
            raise UnreadableError("ends before its entries and tensors do")
        return content

    def skip(self, count: int) -> None:
        if self.file.seek(count, 1) > self.size:
            raise UnreadableError("ends before its entries and tensors do")

    def number(self, form: str) -> Any:  # noqa: ANN401 - a number or a boolean
        return struct.unpack(self.order + form, self.take(struct.calcsize(form)))[0]

    def count(self, form: str, most: int, what: str) -> int:
        if (found := int(self.number(form))) > most:
            raise UnreadableError(f"says {found} {what}; at most {most} are read")
        return found

    def text(self, longest: int = safe_read.LARGEST) -> str:
        return self.take(self.count("Q", longest, "bytes of text")).decode(errors="replace")

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
        record, name = self.file.tell(), self.text(_LONGEST_NAME)
        shape = tuple(self.count("Q", 1 << 48, "along an axis") for _ in range(self.count("I", _MOST_AXES, "axes")))
        code = self.number("I")
        if code not in _KINDS:
            raise UnreadableError(f"has {name!r} of the unknown type {code}")
        block, width = GGML_QUANT_SIZES[_KINDS[code]]
        place, size = self.number("Q"), math.prod(shape) * width // block
        return Tensor(name, _KINDS[code], shape, record, self.file.tell() - record, place, size)

    def placed(self, tensor: Tensor, start: int) -> Tensor:
        if start + tensor.place + tensor.size > self.size:
            raise UnreadableError(f"ends before the values of {tensor.name!r} do")
        return replace(tensor, place=start + tensor.place)


_KINDS = {int(kind): kind for kind in GGML_QUANT_SIZES}


def _alignment(entry: Entry | None) -> int:
    if entry is None:
        return int(GGUF_DEFAULT_ALIGNMENT)
    kind, value = entry
    if kind != GGUFValueType.UINT32 or not 1 <= value <= _LARGEST_ALIGNMENT or value & (value - 1):
        raise UnreadableError(f"aligns its tensors to {value!r} bytes, not to a power of two")
    return int(value)
