"""The base class of values that are saved as one file each, and the checks of their fields."""

import reprlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from adaras_export.core.base_model import BaseModel
from adaras_export.errors import ArtifactError, RuleError, UnsupportedModelError
from adaras_export.files import atomic, safetensors_record
from adaras_export.files.safetensors_record import Array

_V = TypeVar("_V", bound="Value")

_MOST = 1 << 53


class Value:
    """A frozen value that is saved as one file; two values are equal if their bytes are equal."""

    kind: ClassVar[str]
    largest: ClassVar[int] = safetensors_record.LARGEST
    """The largest file of this kind that is read, in bytes."""

    def _arrays(self) -> dict[str, Array]:
        raise NotImplementedError

    def _record(self) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def _restore(cls: type[_V], arrays: Mapping[str, Array], record: Mapping[str, Any], subject: str) -> _V:
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically; the same value gives the same bytes.

        Raises:
            ArtifactError: the file cannot be written; an existing file is unchanged.
        """
        atomic.replace_file(path, self.to_bytes())

    @classmethod
    def load(cls: type[_V], path: str | Path) -> _V:
        """Read what `save` wrote.

        Raises:
            ArtifactError: the file is missing, damaged or of another kind.
            RuleError: its content contradicts itself.
        """
        arrays, record = safetensors_record.load_file(path, cls.kind, cls.largest)
        try:
            return cls._restore(arrays, record, str(path))
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: damaged {cls.kind} file ({error}); write it again") from error
        except (RuleError, UnsupportedModelError) as error:
            raise type(error)(f"{path}: {error}") from error

    def to_bytes(self) -> bytes:
        """The bytes of the file."""
        return safetensors_record.to_bytes(self.kind, self._arrays(), self._record())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value) and type(self) is type(other) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())


def restore_base(record: Mapping[str, Any], subject: str) -> BaseModel | None:
    """The base model in a record; None where it has none."""
    return None if record["base"] is None else BaseModel.from_record(record["base"], subject)


def check_version(record: Mapping[str, Any], subject: str) -> None:
    """Refuse a file of a later format."""
    version = record["version"]
    if type(version) is not int or version != 1:
        raise ArtifactError(f"{subject}: format version {reprlib.repr(version)}; expected 1; use a newer adaras-export")


def set_questions(value: object, subject: str) -> None:
    """Sort the questions of a value and remove duplicates."""
    given: object = value.questions  # type: ignore[attr-defined]
    if not isinstance(given, list | tuple | set | frozenset) or not all(isinstance(digest, str) for digest in given):
        raise RuleError(f"{subject}: questions are {reprlib.repr(given)}; expected a list of digests")
    object.__setattr__(value, "questions", tuple(sorted(set(given))))


def freeze(value: object, name: str, array: Array) -> None:
    """Set a field of a frozen dataclass to a read-only copy."""
    # A copy, which other code cannot change; in C order, which safetensors needs.
    array = np.array(array, order="C")
    array.setflags(write=False)
    object.__setattr__(value, name, array)


def set_array(value: object, subject: str, name: str, dtype: type[np.generic]) -> None:
    """Convert a field to a finite, read-only array; never rounds a fraction to an integer."""
    given = np.asarray(getattr(value, name))
    integers = issubclass(dtype, np.integer)
    if given.size and not np.issubdtype(given.dtype, np.integer if integers else np.number):
        expected = "integers" if integers else "numbers"
        raise RuleError(f"{subject}: {name} holds {given.dtype}; expected {expected}")
    if not np.isfinite(given.astype(np.float64)).all():
        raise RuleError(f"{subject}: {name} holds NaN or infinity; expected finite numbers")
    with np.errstate(over="ignore"):
        converted = given.astype(dtype)
    if not np.isfinite(converted).all():
        raise RuleError(f"{subject}: {name} exceeds the range of {np.dtype(dtype)}")
    freeze(value, name, converted)


def set_vectors(value: object, subject: str, types: Mapping[str, type[np.generic]]) -> None:
    """`set_array` for fields of one dimension."""
    for name, dtype in types.items():
        set_array(value, subject, name, dtype)
        shape = getattr(value, name).shape
        if len(shape) != 1:
            raise RuleError(f"{subject}: {name} has shape {shape}; expected one dimension")


def same_length(value: object, subject: str, names: Iterable[str]) -> None:
    """Refuse fields of different lengths; None fields are ignored."""
    lengths = {name: len(getattr(value, name)) for name in names if getattr(value, name) is not None}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise RuleError(f"{subject}: lengths differ: {found}; expected one entry per neuron")


def check_axes(subject: str, name: str, shape: tuple[int, ...], axes: tuple[str, ...], sizes: dict[str, int]) -> None:
    """Refuse a shape that contradicts ``sizes``, the sizes of axes so far; adds the sizes of new axes to it."""
    expected = tuple(sizes.setdefault(axis, size) for axis, size in zip(axes, shape, strict=False))
    if len(shape) != len(axes) or shape != expected:
        named = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in axes)
        raise RuleError(f"{subject}: {name} has shape {shape}; expected ({named})")


def check_number(subject: str, name: str, number: object) -> None:
    """Refuse a value that is not a finite float64 number."""
    most = sys.float_info.max
    if isinstance(number, bool) or not isinstance(number, int | float) or not -most <= number <= most:
        raise RuleError(f"{subject}: {name} is {reprlib.repr(number)}; expected a finite number")


def check_count(subject: str, name: str, number: object) -> None:
    """Refuse a value that is not a whole number from 0 to 2^53, which float64 holds exactly."""
    if type(number) is not int or not 0 <= number <= _MOST:
        raise RuleError(f"{subject}: {name} is {reprlib.repr(number)}; expected a count")


def check_choice(subject: str, name: str, choice: object, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not one of the choices."""
    if choice not in choices:
        raise RuleError(f"{subject}: {name} is {reprlib.repr(choice)}; expected one of: {', '.join(choices)}")


def check_places(subject: str, layer: Array, index: Array, base: BaseModel | None) -> None:
    """Refuse a repeated (layer, index), or one outside the model; an unknown model has no upper limit."""
    for name, values, limit in (
        ("layer", layer, base and base.layers),
        ("index", index, base and base.widest),
    ):
        outside = values[(values < 0) | (values >= (np.iinfo(np.int64).max if limit is None else limit))]
        if outside.size:
            where = f"0..{limit - 1} of {base.id}" if base and limit else "0 or more"
            raise RuleError(f"{subject}: {name} {_some(outside)} outside {where}")
    for place in zip(layer.tolist(), index.tolist(), strict=True):
        if base is not None and place[1] >= base.width(place[0]):
            raise RuleError(
                f"{subject}: neuron (layer:index) {place[0]}:{place[1]}, but that layer of {base.id} has "
                f"{base.width(place[0])} neurons; expected an index below"
            )
    places, counts = np.unique(np.stack([layer, index]), axis=1, return_counts=True)
    if (twice := places[:, counts > 1]).size:
        named = [f"{place[0]}:{place[1]}" for place in twice.T.tolist()]
        raise RuleError(f"{subject}: neuron (layer:index) {_some(named)} given more than once")


def _some(values: Any) -> str:  # noqa: ANN401 - a list or an array
    shown = [str(value) for value in list(values)[:5]]
    return f"[{', '.join(shown)}{', ...' if len(values) > 5 else ''}]"
