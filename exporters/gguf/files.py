"""Compare and write GGUF files, and copy one with more tensors in it. Knows nothing of models and of steering.

A GGUF file is a header, metadata, one record a tensor, and the tensors' bytes, each at a multiple of an alignment.
"""

import hashlib
import struct
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from adaras_export.exporters.gguf.reader import Entry, Gguf, Tensor, opened
from adaras_export.exporters.manifest import Disclosed
from adaras_export.files.safe_read import pieces
from adaras_export.files.safetensors_record import Array

_HEADER, _HEADER_SIZE = "<8sQQ", 24  # magic and version, the counts of tensors and entries


def vectors(file: Gguf) -> dict[str, Array]:
    """The tensors of a file that are float32 and of one dimension, by name; read when they are looked at."""
    return {tensor.name: file.values(tensor) for tensor in file.tensors if _is_vector(tensor)}


def strange(file: Gguf, expected: Mapping[str, Array]) -> list[str]:
    """Names of tensors that are missing, or not float32 vectors of the expected size; bytes that belong to none."""
    shapes = {tensor.name: tensor.shape for tensor in file.tensors if _is_vector(tensor)}
    wrong = [name for name, values in expected.items() if shapes.get(name) != values.shape]
    surplus = file.path.stat().st_size - _padded(file.data_end, file.alignment)
    return wrong if surplus <= 0 else [*wrong, f"{surplus} bytes behind the last tensor"]


def differing(found: Mapping[str, Array], expected: Mapping[str, Array]) -> list[str]:
    """Which of the expected tensors are not there, or have other values."""
    return [name for name, value in expected.items() if name not in found or not np.array_equal(found[name], value)]


def disclosed(folder: Path, file: str, ending: str = "") -> tuple[Disclosed, ...]:
    """The tensors of a file of an artifact whose names have this ending, as added ones."""
    path = folder / file
    return tuple(
        Disclosed(
            name=tensor.name,
            file=file,
            dtype=tensor.kind.name,
            shape=tensor.shape,
            sha256=_digest(path, [(tensor.place, tensor.place + tensor.size)]),
            what="added",
        )
        for tensor in opened(path).tensors
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
    """Write ``source`` anew with float32 vectors more; what it holds stays as it is, byte for byte.

    Not by the gguf library's writer, which would take apart and rebuild all metadata in memory (docs/decisions/043).
    """
    file = opened(source)
    records, place = b"", _padded(file.data_end - file.data_start, file.alignment)
    for name, values in added.items():
        records += _record(name, values, place)
        place += _padded(values.nbytes, file.alignment)
    start, tensor_count, entry_count = struct.unpack(_HEADER, b"".join(pieces(source, 0, _HEADER_SIZE)))
    with target.open("wb") as new:
        new.write(struct.pack(_HEADER, start, tensor_count + len(added), entry_count))
        new.writelines(pieces(source, _HEADER_SIZE, file.records_end))
        new.write(records)
        _pad(new, file.alignment)
        new.writelines(pieces(source, file.data_start, file.data_end))
        for values in added.values():
            _pad(new, file.alignment)
            new.write(values.astype("<f4").tobytes())
        _pad(new, file.alignment)


def content_digest(path: Path, without: Collection[str] = ()) -> str:
    """SHA-256 of a file's metadata and tensors, those named in ``without`` left out.

    A copy with more tensors has the same digest, once these are left out.
    """
    file = opened(path)
    places = [(_HEADER_SIZE, file.records)]
    for tensor in file.tensors:
        if tensor.name not in without:
            places.append((tensor.record, tensor.record + tensor.record_size))
            places.append((tensor.place, tensor.place + tensor.size))
    return _digest(path, places)


def _digest(path: Path, places: Iterable[tuple[int, int]]) -> str:
    """SHA-256 of some parts of a file, each from its first byte up to its last."""
    digest = hashlib.sha256()
    for first, last in places:
        for piece in pieces(path, first, last):
            digest.update(piece)
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
