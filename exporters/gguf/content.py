"""The content of a GGUF file, to be changed and written anew: its entries as bytes, and its tensors in pieces.

A GGUF file is a header, entries, one record a tensor, and the tensors' bytes, each at a multiple of an alignment.
Not by the gguf library's writer, which would take apart and rebuild all entries in memory (docs/decisions/043).
"""

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from adaras_export.exporters.gguf.reader import Gguf, Tensor, opened
from adaras_export.files.safe_read import pieces
from adaras_export.files.safetensors_record import Array

_START = 8  # magic and version


@dataclass(frozen=True)
class Part:
    """A tensor to write: name, type, shape with the last axis first, and its bytes in pieces."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[bytes]]

    @property
    def size(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape[1:]) * self.row_size(*self.shape[:1])

    def digest(self) -> str:
        """SHA-256 of the bytes."""
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest()

    def row_size(self, count: int = 1) -> int:
        """Bytes of ``count`` elements along the first axis, which are whole blocks."""
        block, width = GGML_QUANT_SIZES[self.kind]
        return count * width // block


@dataclass(frozen=True)
class Content:
    """The content of a file.

    Attributes:
        start: magic and version.
        alignment: of the tensors, in bytes; also an entry, unless it is the default.
        entries: the stored bytes of each entry, key and type included, by key.
        parts: the tensors, in the order of the file.
    """

    start: bytes
    alignment: int
    entries: dict[str, bytes]
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, path: Path) -> "Content":
        """The content of a file; the bytes of its tensors are read when they are needed.

        Raises:
            ArtifactError: it is missing, damaged or of another kind.
        """
        file = opened(path)
        entries = {name: b"".join(pieces(path, *place)) for name, place in file.entry_places.items()}
        parts = tuple(_stored(file, tensor) for tensor in file.tensors)
        return cls(b"".join(pieces(path, 0, _START)), file.alignment, entries, parts)

    def plus(self, added: Iterable[Part]) -> "Content":
        """The content with more tensors."""
        return replace(self, parts=(*self.parts, *added))

    def write(self, path: Path) -> None:
        """Write a file."""
        records = [*self._records()]
        end = _START + 16 + sum(map(len, (*self.entries.values(), *records)))
        with path.open("wb") as file:
            file.write(self.start + struct.pack("<QQ", len(self.parts), len(self.entries)))
            file.writelines((*self.entries.values(), *records, self._padding(end)))
            for part in self.parts:
                written = sum(map(file.write, part.pieces()))
                assert written == part.size, f"{part.name}: {written} bytes of {part.size}"
                file.write(self._padding(written))

    def digest(self) -> str:
        """SHA-256 of the entries and, for each tensor, of its record and bytes."""
        digest = hashlib.sha256()
        for entry in self.entries.values():
            digest.update(entry)
        for record, part in zip(self._records(), self.parts, strict=True):
            digest.update(record)
            for piece in part.pieces():
                digest.update(piece)
        return digest.hexdigest()

    def _records(self) -> Iterator[bytes]:
        place = 0
        for part in self.parts:
            shape = struct.pack(f"<I{len(part.shape)}Q", len(part.shape), *part.shape)
            yield text(part.name) + shape + struct.pack("<IQ", part.kind, place)
            place += part.size + len(self._padding(part.size))

    def _padding(self, size: int) -> bytes:
        return bytes(-size % self.alignment)


def floats(name: str, values: Array) -> Part:
    """A tensor of float32."""
    return Part(name, GGMLQuantizationType.F32, values.shape[::-1], lambda: iter([values.astype("<f4").tobytes()]))


def text(value: str) -> bytes:
    """A text as GGUF stores it, such as the key of an entry."""
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def entry(key: str, kind: GGUFValueType, value: bytes) -> bytes:
    """An entry as GGUF stores it."""
    return text(key) + struct.pack("<I", kind) + value


def _stored(file: Gguf, tensor: Tensor) -> Part:
    place = partial(pieces, file.path, tensor.place, tensor.place + tensor.size)
    return Part(tensor.name, tensor.kind, tensor.shape, place)
