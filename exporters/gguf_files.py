"""Read GGUF files, and copy one with more tensors in it. Knows nothing of models and of steering.

A GGUF file is a header, metadata, one record a tensor, and the tensors' bytes, each at a multiple of an alignment.
"""

import hashlib
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, ReaderField, ReaderTensor

from adaras_export import storage
from adaras_export.disclosure import Disclosed
from adaras_export.errors import ArtifactError, first_line
from adaras_export.storage import Array

Entry = tuple[GGUFValueType, Any]
"""A value of the metadata, with its type."""

_PIECE = 1 << 20
_HEADER = 24  # magic, version, and how many tensors and entries


def opened(path: Path) -> GGUFReader:
    """A GGUF file, mapped into memory.

    Raises:
        ArtifactError: it is missing, damaged or of another kind.
    """
    try:
        return GGUFReader(path)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, OSError) as error:
        raise ArtifactError(f"{path}: {first_line(error)}; expected a GGUF file") from error


def metadata(reader: GGUFReader) -> dict[str, Entry]:
    """The entries of a file by name; of an array only its type."""
    return {name: _entry(field) for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def vectors(reader: GGUFReader) -> dict[str, Array]:
    """The tensors of a file that are float32 and of one dimension, by name."""
    return {tensor.name: np.array(tensor.data) for tensor in reader.tensors if _is_vector(tensor)}


def strange(reader: GGUFReader, expected: Mapping[str, Array]) -> list[str]:
    """Names of tensors that are missing, or not float32 vectors of the expected size."""
    sizes = {tensor.name: tensor.n_elements for tensor in reader.tensors if _is_vector(tensor)}
    return [name for name, values in expected.items() if sizes.get(name) != values.size]


def differing(found: Mapping[str, Array], expected: Mapping[str, Array]) -> list[str]:
    """Which of the expected tensors are not there, or have other values."""
    return [name for name, value in expected.items() if name not in found or not np.array_equal(found[name], value)]


def disclosed(folder: Path, file: str, ending: str = "") -> tuple[Disclosed, ...]:
    """The tensors of a file of an artifact whose names have this ending, as added ones."""
    return tuple(
        Disclosed(
            name=tensor.name,
            file=file,
            dtype=tensor.tensor_type.name,
            shape=tuple(tensor.shape.tolist()),
            sha256=storage.sha256(tensor.data.tobytes()),
            what="added",
        )
        for tensor in opened(folder / file).tensors
        if tensor.name.endswith(ending)
    )


def write(path: Path, entries: Mapping[str, Entry], tensors: Mapping[str, Array]) -> None:
    """Write a file; ``entries`` name its general.architecture."""
    writer = GGUFWriter(path, entries["general.architecture"][1])  # writes that entry by itself
    for name, (kind, value) in entries.items():
        if name != "general.architecture":
            writer.add_key_value(name, value, kind)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def copy_with(source: Path, target: Path, added: Mapping[str, Array]) -> None:
    """Write ``source`` anew with float32 vectors more; what it holds stays as it is, byte for byte."""
    reader = opened(source)
    alignment, data_start = int(reader.alignment), int(reader.data_offset)  # NumPy's, where the file names the former
    data_size = max(int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors) - data_start
    records, place = b"", _padded(data_size, alignment)
    for name, values in added.items():
        records += _record(name, values, place)
        place += _padded(values.nbytes, alignment)
    with source.open("rb") as old, target.open("wb") as new:
        start, counts = old.read(8), struct.unpack("<QQ", old.read(16))
        new.write(start + struct.pack("<QQ", counts[0] + len(added), counts[1]))
        _copy(old, new, _records_end(reader) - _HEADER)
        new.write(records)
        _pad(new, alignment)
        old.seek(data_start)
        _copy(old, new, data_size)
        for values in added.values():
            _pad(new, alignment)
            new.write(values.astype("<f4").tobytes())
        _pad(new, alignment)


def content_digest(path: Path, without: Collection[str] = ()) -> str:
    """SHA-256 of a file's metadata and tensors, those named in ``without`` left out.

    A copy with more tensors has the same digest, once these are left out.
    """
    reader = opened(path)
    digest = hashlib.sha256()
    first = min((tensor.field.offset for tensor in reader.tensors), default=reader.data_offset)
    _update(digest, path, _HEADER, int(first) - _HEADER)
    for tensor in reader.tensors:
        if tensor.name not in without:
            _update(digest, path, int(tensor.field.offset), _size(tensor.field))
            _update(digest, path, int(tensor.data_offset), int(tensor.n_bytes))
    return digest.hexdigest()


def _entry(field: ReaderField) -> Entry:
    kind = field.types[0]
    if kind == GGUFValueType.ARRAY:
        return kind, None
    part = field.parts[field.data[0]]
    return kind, bytes(part).decode(errors="replace") if kind == GGUFValueType.STRING else part.tolist()[0]


def _is_vector(tensor: ReaderTensor) -> bool:
    return bool(tensor.tensor_type == GGMLQuantizationType.F32 and len(tensor.shape) == 1)


def _record(name: str, values: Array, place: int) -> bytes:
    encoded = name.encode()
    shape = struct.pack("<IQ", 1, len(values))
    return struct.pack("<Q", len(encoded)) + encoded + shape + struct.pack("<IQ", GGMLQuantizationType.F32, place)


def _size(field: ReaderField) -> int:
    return sum(int(part.nbytes) for part in field.parts)


def _records_end(reader: GGUFReader) -> int:
    return max(int(tensor.field.offset) + _size(tensor.field) for tensor in reader.tensors)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _pad(file: BinaryIO, alignment: int) -> None:
    position = file.tell()
    file.write(bytes(_padded(position, alignment) - position))


def _copy(old: BinaryIO, new: BinaryIO, size: int) -> None:
    """Copy the next ``size`` bytes, in pieces."""
    while size > 0:
        piece = old.read(min(_PIECE, size))
        new.write(piece)
        size -= len(piece)


def _update(digest: Any, path: Path, start: int, size: int) -> None:  # noqa: ANN401 - a hash object
    with path.open("rb") as file:
        file.seek(start)
        while size > 0:
            piece = file.read(min(_PIECE, size))
            digest.update(piece)
            size -= len(piece)
