"""The streaming writer of safetensors files, judged by the library's own reader."""

import json
import struct
import tracemalloc

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adaras_export.errors import ArtifactError, ExportError
from adaras_export.exporters.stock import stream
from adaras_export.files import safe_read

TYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "int8", "uint8", "bool", "float8_e4m3fn")


def some(**shapes):
    """Tensors of every type, of odd sizes, empty and without axes."""
    generator = torch.Generator().manual_seed(0)
    shapes = shapes or {"matrix": (3, 5), "odd": (7,), "one": (1,), "number": (), "empty": (0, 4)}
    return {
        f"{kind}.{name}": (torch.randn(shape, generator=generator) * 9).to(getattr(torch, kind))
        for kind in TYPES
        for name, shape in shapes.items()
    }


def same(one, other):
    return (one.dtype, one.shape) == (other.dtype, other.shape) and bytes_of(one) == bytes_of(other)


def bytes_of(tensor):
    return tensor.reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []


@pytest.fixture
def source(tmp_path):
    save_file(some(), tmp_path / "source.safetensors")
    return tmp_path / "source.safetensors"


def test_a_copied_file_holds_the_same_tensors(source, tmp_path):
    stream.write(tmp_path / "copy.safetensors", stream.streams(source))
    found, expected = load_file(tmp_path / "copy.safetensors"), load_file(source)
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in expected)
    with safe_open(tmp_path / "copy.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("left_out", ["bool.odd", "uint8.odd", "bfloat16.odd", "float64.one"])
def test_what_is_left_out_leaves_no_hole_and_every_tensor_lies_where_its_type_wants_it(left_out, source, tmp_path):
    kept = {name: tensor for name, tensor in stream.streams(source).items() if name != left_out}
    stream.write(tmp_path / "part.safetensors", kept)
    assert load_file(tmp_path / "part.safetensors").keys() == load_file(source).keys() - {left_out}
    content = (tmp_path / "part.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    for name, entry in json.loads(content[8 : 8 + length]).items():
        assert name == "__metadata__" or (8 + length + entry["data_offsets"][0]) % kept[name].width == 0


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (70, 199)])
def test_padding_adds_zero_rows_or_columns_and_changes_nothing(axis, shape, tmp_path, monkeypatch):
    monkeypatch.setattr(safe_read, "PIECE", 1 << 9)  # several pieces, and rows that lie in two of them
    tensors = {name: value for name, value in some(m=shape).items() if "float8" not in name}
    save_file(tensors, tmp_path / "narrow.safetensors")
    wide = {
        name: stream.padded(value, axis, 3) for name, value in stream.streams(tmp_path / "narrow.safetensors").items()
    }
    stream.write(tmp_path / "wide.safetensors", wide)
    for name, found in load_file(tmp_path / "wide.safetensors").items():
        expected = torch.nn.functional.pad(tensors[name], (0, 3) if axis else (0, 0, 0, 3))
        assert same(found, expected), name


def test_equality_is_of_names_types_shapes_and_bytes(source, tmp_path):
    tensors, path = load_file(source), tmp_path / "other.safetensors"
    flipped = tensors["float32.odd"].clone()
    flipped[3] = -flipped[3]
    changes = [
        {},
        {"float32.odd": flipped},
        {"float32.odd": tensors["float32.odd"].double()},
        {"float32.odd": tensors["float32.odd"][None]},
        {"more": flipped},
    ]
    found = []
    for change in changes:
        save_file(tensors | change, path)
        found.append(stream.same_tensors(path, stream.streams(source)))
    assert found == [True, False, False, False, False]
    path.write_bytes(path.read_bytes()[:-1])
    assert not stream.same_tensors(path, stream.streams(source))


def test_no_more_than_pieces_are_in_memory(tmp_path):
    save_file({"big": torch.zeros(1 << 23), "wide": torch.zeros(1 << 10, 1 << 12)}, tmp_path / "big.safetensors")
    tensors = stream.streams(tmp_path / "big.safetensors")
    tracemalloc.start()
    stream.write(tmp_path / "out.safetensors", tensors | {"wide": stream.padded(tensors["wide"], 1, 32)})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20  # of 48 MiB


def test_a_type_that_is_not_known_and_a_file_that_is_none_are_refused(tmp_path):
    with pytest.raises(ExportError, match=r"a tensor of type F4: not known; expected one of F64, I64"):
        stream.write(tmp_path / "x.safetensors", {"x": stream.Stream("F4", (2,), lambda: iter([b"x"]))})
    (tmp_path / "y.safetensors").write_bytes(b"not a file")
    with pytest.raises(ArtifactError, match="expected a safetensors file"):
        stream.streams(tmp_path / "y.safetensors")
