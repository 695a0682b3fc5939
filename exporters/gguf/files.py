"""Compare and write GGUF files, and copy one with more tensors in it. Knows nothing of models and of steering."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from itertools import starmap
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from adaras_export.exporters.gguf import content
from adaras_export.exporters.gguf.content import Content
from adaras_export.exporters.gguf.reader import Entry, Gguf
from adaras_export.exporters.manifest import Disclosed, What
from adaras_export.files.safetensors_record import Array


def floats(file: Gguf) -> dict[str, Array]:
    """The float32 tensors of a file, by name; read when they are looked at."""
    kind = GGMLQuantizationType.F32
    return {tensor.name: file.values(tensor) for tensor in file.tensors if tensor.kind == kind}


def strange(file: Gguf, expected: Mapping[str, Array]) -> list[str]:
    """Names of tensors that are missing, or not float32 of the expected shape; bytes that belong to none."""
    shapes = {tensor.name: tensor.shape[::-1] for tensor in file.tensors if tensor.kind == GGMLQuantizationType.F32}
    wrong = [name for name, values in expected.items() if shapes.get(name) != values.shape]
    surplus = file.path.stat().st_size - -(-file.data_end // file.alignment) * file.alignment
    return wrong if surplus <= 0 else [*wrong, f"{surplus} bytes behind the last tensor"]


def differing(found: Mapping[str, Array], expected: Mapping[str, Array]) -> list[str]:
    """Which of the expected tensors are not there, or have other values."""
    return [name for name, value in expected.items() if name not in found or not np.array_equal(found[name], value)]


def disclosed(
    folder: Path, file: str, what: Callable[[str], What | None] = lambda _name: "added"
) -> tuple[Disclosed, ...]:
    """The tensors of a file of an artifact that ``what``, asked by name, calls added or changed."""
    named = ((part, what(part.name)) for part in Content.of(folder / file).parts)
    return tuple(
        Disclosed(part.name, file, part.kind.name, part.shape, part.digest(), verdict)
        for part, verdict in named
        if verdict is not None
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
    """Write ``source`` anew with more float32 tensors; what it holds stays as it is, byte for byte."""
    Content.of(source).plus(starmap(content.floats, added.items())).write(target)


def content_digest(path: Path, without: Collection[str] = ()) -> str:
    """SHA-256 of a file's entries and tensors, those named in ``without`` left out.

    A copy with more tensors has the same digest, once these are left out.
    """
    whole = Content.of(path)
    return replace(whole, parts=tuple(part for part in whole.parts if part.name not in without)).digest()
