"""Structured damage to a valid file: to its bytes, to a JSON value in it, to the header of its tensors.

Every choice comes from ``pick(n)``, a number below n, so that Hypothesis and libFuzzer both can drive it.
"""

import json
import struct
from collections.abc import Callable
from typing import Any

Pick = Callable[[int], int]

NASTY = [
    None, True, False, 0, 1, -1, 2, 7.5, -0.0, 1e308, 1e-320, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63),
    "", "x", "llama", "\x1b[31mred\x1b[0m", "a\nb", "\x00", "\u202e", "../../etc/passwd", "/dev/zero", "..\\x", "é",
    "a" * 300, "NaN", "1", [], [[]], [1, 2], ["a"], [None], {}, {"a": {}}, {"": 0}, [0] * 40, "model.safetensors",
]  # fmt: skip
RAW = [
    b"NaN", b"-Infinity", b"1e999", b"1" * 150, b"9" * 5000, b'"\\ud800"', b"[" * 2000, b"[" * 70 + b"]" * 70,
    b'{"a":1,"a":2}', b"\xff", b"\x00", b"\xef\xbb\xbf", b"tru", b'"', b"{", b"\x1b[2J", b"-0", b"01",
]  # fmt: skip
"""JSON that json.dumps does not write, or no JSON."""

_MARK = "\x07mark\x07"


def mutated(content: bytes, pick: Pick) -> bytes:
    """``content`` with one to three pieces of damage."""
    for _ in range(1 + pick(3)):
        content = _DAMAGES[pick(len(_DAMAGES))](content, pick)
    return content


def in_bytes(content: bytes, pick: Pick) -> bytes:
    """Cut it off, drop, double or change a piece, or put a nasty one in."""
    at, length = pick(len(content) + 1), 1 + pick(8)
    head, piece, tail = content[:at], content[at : at + length], content[at + length :]
    return [
        head,
        head + tail,
        head + piece + piece + tail,
        head + bytes(255 - one for one in piece) + tail,
        head + RAW[pick(len(RAW))] + piece + tail,
        head + struct.pack("<Q", [0, 2**63, 2**64 - 1, 2**60, len(content)][pick(5)]) + content[at + 8 :],
    ][pick(6)]


def in_json(content: bytes, pick: Pick) -> bytes:
    """Change a node of JSON, wherever it is: the whole, a line, or in and below the header of a safetensors file."""
    header = _header(content)
    if header is not None:
        value, data = header
        return packed(_in_header(value, pick), data)
    lines = content.split(b"\n")
    at = pick(len(lines))
    for part in (content, lines[at]):
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            continue
        changed = _dumped(*_changed(value, pick))
        return changed if part is content else b"\n".join([*lines[:at], changed, *lines[at + 1 :]])
    return in_bytes(content, pick)


def packed(header: bytes, data: bytes) -> bytes:
    """A safetensors file of just these bytes."""
    return struct.pack("<Q", len(header)) + header + data


def _header(content: bytes) -> tuple[dict[str, Any], bytes] | None:
    size = int.from_bytes(content[:8], "little")
    try:
        value = json.loads(content[8 : 8 + size]) if 0 < size < len(content) else None
    except (ValueError, RecursionError):
        return None
    return (value, content[8 + size :]) if isinstance(value, dict) else None


def _in_header(header: dict[str, Any], pick: Pick) -> bytes:
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and isinstance(metadata.get("adaras"), str) and pick(2):
        record = in_json(metadata["adaras"].encode(errors="replace"), pick)
        return json.dumps({**header, "__metadata__": {"adaras": record.decode(errors="replace")}}).encode()
    return _dumped(*_changed(header, pick))


def _dumped(value: Any, raw: bytes | None) -> bytes:
    try:
        text = json.dumps(value).encode()
    except (ValueError, RecursionError):
        return b"null"
    return text if raw is None else text.replace(json.dumps(_MARK).encode(), raw)


def _changed(value: Any, pick: Pick) -> tuple[Any, bytes | None]:
    """A copy in which one node is another, gone, doubled or renamed; the bytes to put in place of `_MARK`."""
    nodes = [()]
    for path in nodes:  # grows while it is walked
        inner = _at(value, path)
        keys = range(len(inner)) if isinstance(inner, list) else inner if isinstance(inner, dict) else ()
        nodes += [(*path, key) for key in keys][:200]
    path = nodes[pick(len(nodes))]
    raw = RAW[pick(len(RAW))] if pick(4) == 0 else None
    new = _MARK if raw is not None else NASTY[pick(len(NASTY))]
    return _replaced(value, path, new, pick(4) if path else 0), raw


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _replaced(value: Any, path: tuple[Any, ...], new: Any, how: int) -> Any:
    if not path:
        return new
    key, rest = path[0], path[1:]
    if isinstance(value, list):
        inner = [_replaced(value[key], rest, new, how)] if rest or how < 2 else [] if how == 2 else [value[key]] * 2
        return [*value[:key], *inner, *value[key + 1 :]]
    changed = dict(value)
    if rest or how < 2:
        changed[key] = _replaced(value[key], rest, new, how)
    elif how == 2:
        del changed[key]
    else:
        changed[new if isinstance(new, str) else str(new)] = changed.pop(key)
    return changed


_DAMAGES = (in_bytes, in_json, in_json, in_json)
