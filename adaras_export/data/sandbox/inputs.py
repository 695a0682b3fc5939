"""Encode values as JSON for the way into and out of the sandbox; standard library only."""

from collections.abc import Callable
from typing import Any


class Handle:
    """A value that is not plain data: it stays in its process, and only its number is sent."""

    def __init__(self, number: int) -> None:
        self.number = number


def encoded(value: Any, keep: list[Any]) -> Any:  # noqa: ANN401 - any value
    """A value as JSON: None and booleans as they are, other values as a list of type name and content."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, dict):
        return ["dict", [[encoded(key, keep), encoded(item, keep)] for key, item in value.items()]]
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encoded(value.tolist(), keep)
    scalar = next((kind for kind in _SCALARS if isinstance(value, kind)), None)
    if scalar is not None:
        return [scalar.__name__, _scalar(scalar(value))]
    container = next((kind for kind in _CONTAINERS.values() if isinstance(value, kind)), None)
    if container is not None:
        return [container.__name__, [encoded(item, keep) for item in value]]
    if not isinstance(value, Handle):
        keep.append(value)
    return ["ref", value.number if isinstance(value, Handle) else len(keep) - 1]


_SCALARS: tuple[type[Any], ...] = (str, int, float, complex, bytes)


def _scalar(value: Any) -> Any:  # noqa: ANN401 - a scalar
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, int):
        return hex(value)  # decimal digits of a long number are slow, and Python limits their count
    return value.hex() if isinstance(value, float) else [value.real.hex(), value.imag.hex()]


_READERS: dict[str, Callable[[Any], Any]] = {
    "str": str,
    "bytes": bytes.fromhex,
    "int": lambda digits: int(digits, 16),
    "float": float.fromhex,
    "complex": lambda parts: complex(*map(float.fromhex, parts)),
}
_CONTAINERS: dict[str, type[Any]] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def decoded(value: Any, resolve: Callable[[int], Any]) -> Any:  # noqa: ANN401 - any value
    """The value of an encoding, made of Python's own types only.

    Raises:
        ValueError: it is not in the form of `encoded`; TypeError, KeyError and RecursionError mean the same.
    """
    if value is None or isinstance(value, bool):
        return value
    kind, content = value
    if kind in _CONTAINERS:
        return _CONTAINERS[kind]([decoded(item, resolve) for item in content])
    if kind == "dict":
        return {decoded(key, resolve): decoded(item, resolve) for key, item in content}
    return resolve(content) if kind == "ref" else _READERS[kind](content)
