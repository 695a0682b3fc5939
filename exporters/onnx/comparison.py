"""Whether two ONNX graphs are the same: nodes, functions, inputs, outputs, and every number in them.

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

    Numbers in files beside a graph are not looked at, only where it says that they are.
    """
    one, other = (onnx.load(path, load_external_data=False) for path in (found, expected))
    numbers, expected_numbers = _taken_out(one), _taken_out(other)
    wrong = {
        *_other_than(one.graph.node, other.graph.node),
        *_other_than(one.functions, other.functions),
        *_other_than(one.graph.initializer, other.graph.initializer),
        *(name for name, value in expected_numbers.items() if not _equal(numbers.get(name), value)),
    }
    return sorted(wrong) or ([] if _rest(one) == _rest(other) else ["graph"])


def _taken_out(model: Any) -> dict[str, Any]:  # noqa: ANN401 - protobuf's messages
    """Type and bytes of the numbers that a graph itself holds, by name; in it, no bytes are left."""
    taken = {tensor.name: (tensor.data_type, tensor.raw_data) for tensor in model.graph.initializer}
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
    return taken


def _other_than(one: Any, other: Any) -> set[str]:  # noqa: ANN401
    first, second = ({(message.name, _bytes(message)) for message in messages} for messages in (one, other))
    return {name for name, _ in first ^ second}


def _equal(one: Any, other: Any) -> bool:  # noqa: ANN401
    if one is None or one == other or one[0] != onnx.TensorProto.FLOAT or len(one[1]) != len(other[1]):
        return bool(one == other)
    first, second = (np.frombuffer(raw, np.float32) for _, raw in (one, other))
    return np.allclose(first, second, rtol=_ROUNDINGS * np.finfo(np.float32).eps, atol=0)


def _rest(model: Any) -> bytes:  # noqa: ANN401
    for field in ("node", "initializer"):
        model.graph.ClearField(field)
    model.ClearField("functions")
    return _bytes(model)


def _bytes(message: Any) -> bytes:  # noqa: ANN401
    return bytes(message.SerializeToString(deterministic=True))
