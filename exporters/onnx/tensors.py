"""What steering added to the graphs of target `onnx`: initialisers and functions, by name, with their hashes.

The base's weights are in them in another layout, so they cannot be held against the base's tensors one by one; what
steering adds is known by its name, and functions by being there at all.
"""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from adaras_export.errors import ArtifactError
from adaras_export.exporters.manifest import Disclosed
from adaras_export.files import atomic
from adaras_export.files.safetensors_record import Array

_MARK = "steering_"
_TYPES = {"float32": "F32", "int64": "I64"}


def disclosed(graphs: Mapping[str, ir.Model]) -> tuple[Disclosed, ...]:
    """The list for some graphs, by their path within the artifact.

    Raises:
        ArtifactError: an initialiser has no values that could be read.
    """
    return tuple(
        one for file, model in graphs.items() for one in (*_initialisers(file, model), *_functions(file, model))
    )


def _initialisers(file: str, model: ir.Model) -> list[Disclosed]:
    names = sorted(name for name in model.graph.initializers if any(part.startswith(_MARK) for part in name.split(".")))
    return [_initialiser(file, name, model.graph.initializers[name]) for name in names]


def _initialiser(file: str, name: str, value: ir.Value) -> Disclosed:
    array = None if value.const_value is None else numbers(value.const_value)
    if array is None:
        raise ArtifactError(f"{file}: {name} has no values that can be read; expected them in the graph")
    dtype = _TYPES.get(str(array.dtype), str(array.dtype))
    return Disclosed(name, file, dtype, tuple(array.shape), atomic.sha256(array.tobytes()), "added")


def numbers(tensor: Any) -> Array | None:  # noqa: ANN401 - the protocol of onnx-ir
    """The values of a tensor that the graph itself holds; none where they are in another file, or cannot be read."""
    if isinstance(tensor, ir.ExternalTensor):  # not even looked at: it could be any file
        return None
    try:
        values: Array = tensor.numpy()
    except (ValueError, TypeError, AssertionError):  # fewer bytes than its shape says, or numbers of another type
        return None
    return values


def _functions(file: str, model: ir.Model) -> list[Disclosed]:
    functions = {f"{domain}.{name}": function for (domain, name, _), function in model.functions.items()}
    return [
        Disclosed(name, file, "function", (), atomic.sha256(text(function)), "added")
        for name, function in sorted(functions.items())
    ]


def text(function: ir.Function) -> bytes:
    """A function as bytes, the same for the same function."""
    return bytes(ir.serde.serialize_function(function).SerializeToString(deterministic=True))
