"""Whether two ONNX graphs are the same: nodes, functions, inputs, outputs, and every number.

Runs nothing. Knows neither rules nor bases.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx

# What torch computes while it exports, rotary frequencies say, may have other last digits on another kind of processor.
_ROUNDINGS = 4


def differing(found: Path, expected: Path) -> list[str]:
    """Names of the nodes, functions and values that only one of two graphs has, or has otherwise; "graph" for the rest.

    The numbers of ``found`` are read from where ``expected`` has them, below its own folder, and from nowhere else.
    """
    one, other = (onnx.load(path, load_external_data=False) for path in (found, expected))
    raw, its_raw = _taken_out(one), _taken_out(other)
    named = [
        *_other_than(one.graph.node, other.graph.node),
        *_other_than(one.functions, other.functions),
        *_other_than(one.graph.initializer, other.graph.initializer),
    ]
    numbers = [
        tensor.name
        for tensor in other.graph.initializer
        if tensor.name not in named
        and not _equal(
            tensor.data_type,
            _numbers(tensor, raw[tensor.name], found.parent),
            _numbers(tensor, its_raw[tensor.name], expected.parent),
        )
    ]
    return sorted({*named, *numbers}) or ([] if _rest(one) == _rest(other) else ["graph"])


def _taken_out(model: Any) -> dict[str, bytes]:  # noqa: ANN401 - protobuf's messages
    """The numbers that a graph itself holds, by name; in it, only type, shape and place are left."""
    raw = {tensor.name: tensor.raw_data for tensor in model.graph.initializer}
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
    return raw


def _other_than(one: Any, other: Any) -> set[str]:  # noqa: ANN401
    first, second = ({(message.name, _bytes(message)) for message in messages} for messages in (one, other))
    return {name for name, _ in first ^ second}


def _numbers(tensor: Any, raw: bytes, folder: Path) -> bytes:  # noqa: ANN401
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return raw
    place = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / str(place["location"])).open("rb") as file:
        file.seek(int(place["offset"]))
        return file.read(int(place["length"]))


def _equal(data_type: int, one: bytes, other: bytes) -> bool:
    if one == other or data_type != onnx.TensorProto.FLOAT or len(one) != len(other):
        return one == other
    first, second = (np.frombuffer(content, np.float32) for content in (one, other))
    return np.allclose(first, second, rtol=_ROUNDINGS * np.finfo(np.float32).eps, atol=0)


def _rest(model: Any) -> bytes:  # noqa: ANN401
    for field in ("node", "initializer"):
        model.graph.ClearField(field)
    model.ClearField("functions")
    return _bytes(model)


def _bytes(message: Any) -> bytes:  # noqa: ANN401
    return bytes(message.SerializeToString(deterministic=True))
