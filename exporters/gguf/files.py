"""Compare and write GGUF files, and copy one with more tensors in it. Knows nothing of models and of steering.

A GGUF file is a header, metadata, one record a tensor, and the tensors' bytes, each at a multiple of an alignment.
"""

import hashlib
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from adaras_export.exporters.gguf.reader import Entry, Gguf, Tensor, opened
from adaras_export.exporters.manifest import Disclosed
from adaras_export.files import atomic
from adaras_export.files.safetensors_record import Array

_PIECE = 1 << 20
_HEADER = 24  # magic, version, and how many tensors and entries


def vectors(file: Gguf) -> dict[str, Array]:
    """The tensors of a file that are float32 and of one dimension, by name; read when they are looked at."""
    return {tensor.name: file.values(tensor) for tensor in file.tensors if _is_vector(tensor)}


def strange(file: Gguf, expected: Mapping[str, Array]) -> list[str]:
    """Names of tensors that are missing, or not float32 vectors of the expected size; bytes that belong to none."""
    shapes = {tensor.name: tensor.shape for tensor in file.tensors if _is_vector(tensor)}
    wrong = [name for name, values in expected.items() if shapes.get(name) != values.shape]
    end = max((tensor.place + tensor.size for tensor in file.tensors), default=file.data_start)
    surplus = file.path.stat().st_size - _padded(end, file.alignment)
    return wrong if surplus <= 0 else [*wrong, f"{surplus} bytes behind the last tensor"]


def differing(found: Mapping[str, Array], expected: Mapping[str, Array]) -> list[str]:
    """Which of the expected tensors are not there, or have other values."""
    return [name for name, value in expected.items() if name not in found or not np.array_equal(found[name], value)]


def disclosed(folder: Path, file: str, ending: str = "") -> tuple[Disclosed, ...]:
    """The tensors of a file of an artifact whose names have this ending, as added ones."""
    found = opened(folder / file)
    return tuple(
        Disclosed(
            name=tensor.name,
            file=file,
            dtype=tensor.kind.name,
            shape=tensor.shape,
            sha256=atomic.sha256(found.content(tensor)),
            what="added",
        )
        for tensor in found.tensors
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
    found = opened(source)
    data_size = max(tensor.place + tensor.size for tensor in found.tensors) - found.data_start
    records, place = b"", _padded(data_size, found.alignment)
    for name, values in added.items():
        records += _record(name, values, place)
        place += _padded(values.nbytes, found.alignment)
    with source.open("rb") as old, target.open("wb") as new:
        start, counts = old.read(8), struct.unpack("<QQ", old.read(16))
        new.write(start + struct.pack("<QQ", counts[0] + len(added), counts[1]))
        _copy(old, new, found.records_end - _HEADER)
        new.write(records)
        _pad(new, found.alignment)
        old.seek(found.data_start)
        _copy(old, new, data_size)
        for values in added.values():
            _pad(new, found.alignment)
            new.write(values.astype("<f4").tobytes())
        _pad(new, found.alignment)


def content_digest(path: Path, without: Collection[str] = ()) -> str:
    """SHA-256 of a file's metadata and tensors, those named in ``without`` left out.

    A copy with more tensors has the same digest, once these are left out.
    """
    found, digest = opened(path), hashlib.sha256()
    _update(digest, path, _HEADER, found.records - _HEADER)
    for tensor in found.tensors:
        if tensor.name not in without:
            _update(digest, path, tensor.record, tensor.record_size)
            _update(digest, path, tensor.place, tensor.size)
    return digest.hexdigest()


def _is_vector(tensor: Tensor) -> bool:
    return tensor.kind == GGMLQuantizationType.F32 and len(tensor.shape) == 1


def _record(name: str, values: Array, place: int) -> bytes:
    encoded = name.encode()
    shape = struct.pack("<IQ", 1, len(values))
    return struct.pack("<Q", len(encoded)) + encoded + shape + struct.pack("<IQ", GGMLQuantizationType.F32, place)


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
