"""Reads untrusted files: a bad file raises one line, and never blocks the reader or fills its memory.

Only regular files are opened, since a pipe or a device can block forever. Sizes are limited, since parsed JSON takes up
to thirty times its size in memory. JSON that readers could understand differently is refused: duplicate keys, NaN,
numbers of hundreds of digits, lone surrogates.
"""

import json
import math
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

LARGEST = 4 << 20
"""Limit in bytes for JSON, tables and safetensors headers; an index of a thousand tensors has 0.1 MiB."""

PIECE = 1 << 20
"""Bytes that are read at a time from files that may be larger than memory."""

_DEEPEST = 64


class UnreadableError(ValueError):
    """A file is refused; the message continues a sentence that begins with the file's name."""


def size_of(path: Path, largest: float = math.inf) -> int:
    """The size of a regular file, in bytes.

    Raises:
        UnreadableError: there is no such file, the path is not a regular file, or the file is larger.
    """
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise UnreadableError("no such file") from error
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        raise UnreadableError(reason(error)) from error
    if not stat.S_ISREG(found.st_mode):
        raise UnreadableError("is not a regular file")
    if found.st_size > largest:
        raise UnreadableError(f"has {found.st_size} bytes; at most {largest} are read")
    return found.st_size


def content(path: Path, largest: int = LARGEST) -> bytes:
    """The bytes of a regular file.

    Raises:
        UnreadableError: the path is not a regular file, or the file is too large or cannot be read.
    """
    size_of(path, largest)
    try:
        with path.open("rb") as file:
            found = file.read(largest + 1)
    except OSError as error:
        raise UnreadableError(reason(error)) from error
    if len(found) > largest:  # the file grew, or the kernel reports size 0, as under /proc
        raise UnreadableError(f"has more than {largest} bytes; at most {largest} are read")
    return found


def pieces(path: Path, first: int, last: int) -> Iterator[bytes]:
    """The bytes of a file from offset ``first`` up to ``last``, `PIECE` at a time."""
    with path.open("rb") as file:
        file.seek(first)
        for position in range(first, last, PIECE):
            yield file.read(min(PIECE, last - position))


def text(encoded: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark.

    Raises:
        UnreadableError: the bytes are not UTF-8.
    """
    try:
        return encoded.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"is not UTF-8 (byte {error.start})") from error


def parsed(encoded: bytes, *, exact: bool = False) -> Any:  # noqa: ANN401 - a JSON value
    """The JSON value in ``encoded``; with ``exact``, fractions are Decimal, and whole numbers may be long.

    Raises:
        UnreadableError: the text is not JSON, or two readers could understand it differently.
    """
    # Tokenizers write 10**30 for "no limit". Long integers parse slowly; Python itself refuses more than 4300 digits.
    fraction, most = (_decimal, 4000) if exact else (_finite, 100)
    try:
        value = json.loads(
            text(encoded).rstrip(),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=fraction,
            parse_int=partial(_whole, most),
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise UnreadableError(f"is not JSON ({error.msg}, {place}column {error.colno})") from error
    except RecursionError as error:
        raise UnreadableError("is nested too deeply") from error
    _require_plain(value)
    return value


def header(path: Path) -> tuple[dict[str, Any], int]:
    """Type, shape and offsets of each tensor of a safetensors file, and where its data begin, for who reads its bytes.

    The library does not give the offsets, so the header is read again.

    Raises:
        UnreadableError: `tensors` refuses the file, or two readers could understand its header differently.
    """
    with tensors(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = parsed(file.read(length))
    entries.pop("__metadata__", None)
    return entries, 8 + length


@contextmanager
def tensors(path: Path, framework: str = "numpy") -> Iterator[Any]:
    """A safetensors file, opened by the library, which has checked that each tensor lies in a place of its own.

    Raises:
        UnreadableError: it is no safetensors file, its header is longer than `LARGEST`, or the framework lacks the type
            of a tensor.
    """
    size = size_of(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > LARGEST:
            raise UnreadableError(f"says that its header has {length} bytes; at most {LARGEST} are read")
        with safe_open(path, framework=framework) as opened:
            _require_axes(opened, size)
            yield opened
    except (SafetensorError, OSError) as error:
        raise UnreadableError(reason(error)) from error


def _require_axes(opened: Any, size: int) -> None:  # noqa: ANN401 - the library has no types
    """Refuse axes longer than the file: NumPy raises its own error for those of empty tensors."""
    for name in opened.keys():
        # Two 4-bit elements share a byte.
        if long := [axis for axis in opened.get_slice(name).get_shape() if axis > 2 * size]:
            raise UnreadableError(f"says {long[0]} of the shape of tensor {name!r}, in {size} bytes")


def reason(error: BaseException) -> str:
    """The message of an error, without the errno and the file name that Python adds."""
    return getattr(error, "strerror", None) or str(error)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UnreadableError(f"has the key {twice!r} twice in one object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise UnreadableError(f"holds {name}, which is not JSON")


def _finite(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise UnreadableError(f"holds {digits}, which is not a finite number")
    return value


def _decimal(digits: str) -> Decimal:
    try:
        return Decimal(digits)
    except InvalidOperation as error:
        raise UnreadableError(f"holds {digits}, which is not a finite number") from error


def _whole(most: int, digits: str) -> int:
    if len(digits) > most:
        raise UnreadableError(f"holds a whole number of {len(digits)} digits; at most {most} are read")
    return int(digits)


def _require_plain(value: Any) -> None:  # noqa: ANN401 - a JSON value
    """Refuse deep nesting, which recursive code cannot handle, and lone surrogates."""
    level: list[Any] = [[value]]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise UnreadableError(f"is nested more than {_DEEPEST} deep")


def _inside(outer: list[Any] | dict[str, Any]) -> Iterator[Any]:
    """The lists and objects directly inside a value; checks its texts."""
    for part in outer if isinstance(outer, list) else chain(outer, outer.values()):
        if isinstance(part, str):
            _require_characters(part)
        elif isinstance(part, list | dict):
            yield part


def _require_characters(part: str) -> None:
    if not part.isascii() and any("\ud800" <= char <= "\udfff" for char in part):
        raise UnreadableError("holds half of a character (a lone surrogate)")
