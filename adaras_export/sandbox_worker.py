"""The inside of the sandbox: a process of its own that gives up its rights, then runs code that nobody has read.

Started by sandbox.py with a folder that holds ``job.json``; imports the standard library only. It never learns what the
right answers are: results leave it as plain data, and what they are compared with stays with whoever asked.
"""

import builtins
import ctypes
import json
import os
import re
import resource
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

# Of x86-64. EPERM for all of them: programs and processes, signals, other processes, sockets, kernel interfaces that
# lead around the filter, memory that outlives the process, and everything that changes files.
_DENIED = (
    *(
        41,
        57,
        58,
        59,
        322,
        62,
        200,
        234,
        129,
        297,
        424,
        434,
        438,
        101,
        310,
        311,
        440,
        109,
        112,
        141,
        144,
        203,
        251,
        135,
    ),
    *(
        141,
        144,
        203,
        251,
        135,
        272,
        308,
        165,
        166,
        155,
        161,
        321,
        298,
        323,
        248,
        249,
        250,
        425,
        426,
        427,
        304,
        428,
        429,
        430,
        432,
    ),
    *(29, 30, 68, 64, 240, 319, 447, 85, 76, 77, 285, 82, 264, 316, 83, 258, 84, 86, 265, 87, 263, 88, 266, 133, 259),
    *(90, 91, 268, 452, 92, 93, 94, 260, 132, 235, 261, 280, 188, 189, 190, 197, 198, 199),
)
_UNKNOWN = (435, 437)  # clone3, openat2: their arguments lie in memory; ENOSYS makes libc use the older call
_OPEN, _OPENAT, _CLONE, _FCNTL, _PRLIMIT = 2, 257, 56, 72, 302
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CLONE_THREAD = 0x10000
_X86_64 = 0xC000003E
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_EPERM, _ENOSYS = _ERRNO | 1, _ERRNO | 38


def _filter() -> bytes:
    """The seccomp program: pairs of a test and a verdict, so that no jump is longer than five."""
    program = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, _X86_64),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, 0, 1, 0x40000000),  # the same calls by the numbers of x32
        (_RETURN, 0, 0, _EPERM),
    ]
    for number, verdict in [*((one, _EPERM) for one in _DENIED), *((one, _ENOSYS) for one in _UNKNOWN)]:
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, verdict)]
    program += _looks_at(_OPEN, 1, (_ANY_BIT, 0, 1, _WRITING)) + _looks_at(_OPENAT, 2, (_ANY_BIT, 0, 1, _WRITING))
    program += _looks_at(_CLONE, 0, (_ANY_BIT, 1, 0, _CLONE_THREAD))
    program += _looks_at(_PRLIMIT, 0, (_EQUAL, 1, 0, 0))  # another process's limits
    # Whom a file's signals go to: 8 is F_SETOWN, 15 F_SETOWN_EX.
    program += [
        (_EQUAL, 0, 4, _FCNTL),
        (_LOAD, 0, 0, 24),
        (_EQUAL, 1, 0, 8),
        (_EQUAL, 0, 1, 15),
        (_RETURN, 0, 0, _EPERM),
    ]
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *one) for one in program)


def _looks_at(number: int, argument: int, test: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
    """A call that an argument decides about; the test jumps over the refusal where the argument is harmless."""
    return [
        (_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, 16 + 8 * argument),
        test,
        (_RETURN, 0, 0, _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]


def give_up(job: dict[str, Any]) -> None:
    """Limits, no capabilities, no way back to them, and the filter: after this, the process can compute and read.

    Raises:
        OSError: the kernel refuses one of them.
    """
    for kind, most in (
        (resource.RLIMIT_CPU, job["cpu_seconds"]),
        (resource.RLIMIT_AS, job["memory"]),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(kind, (most, most))
    libc = ctypes.CDLL(None, use_errno=True)
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    program = _filter()
    code = ctypes.create_string_buffer(program)
    described = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    no = ctypes.c_ulong(0)
    _done(libc.capset(header, nothing))
    _done(libc.prctl(4, no, no, no, no))  # not dumpable: its memory is nobody's to read
    _done(libc.prctl(38, ctypes.c_ulong(1), no, no, no))  # no new privileges
    _done(libc.prctl(22, ctypes.c_ulong(2), described, no, no))  # the filter


def _done(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Handle:
    """What is no plain data, and so stays where it was made; only its number travels."""

    def __init__(self, number: int) -> None:
        self.number = number


def encoded(value: Any, keep: list[Any]) -> Any:  # noqa: ANN401 - any value
    """A value as JSON: scalars as they are, the rest as a list of its kind and its content."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, dict):
        return ["dict", [[encoded(key, keep), encoded(one, keep)] for key, one in value.items()]]
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encoded(value.tolist(), keep)
    scalar = next((kind for kind in _SCALARS if isinstance(value, kind)), None)
    if scalar is not None:
        return [scalar.__name__, _scalar(scalar(value))]
    container = next((kind for kind in _CONTAINERS.values() if isinstance(value, kind)), None)
    if container is not None:
        return [container.__name__, [encoded(one, keep) for one in value]]
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
        return hex(value)  # decimal digits of a long number take long, and Python limits them
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
    """The value again, made of Python's own types only.

    Raises:
        ValueError: it is not of `encoded`'s form. So do TypeError, KeyError and RecursionError.
    """
    if value is None or isinstance(value, bool):
        return value
    kind, content = value
    if kind in _CONTAINERS:
        return _CONTAINERS[kind]([decoded(one, resolve) for one in content])
    if kind == "dict":
        return {decoded(key, resolve): decoded(one, resolve) for key, one in content}
    return resolve(content) if kind == "ref" else _READERS[kind](content)


class Channel:
    """Lines of JSON to whoever started the process and back."""

    def __init__(self, incoming: BinaryIO, outgoing: BinaryIO) -> None:
        self._incoming, self._outgoing = incoming, outgoing

    def send(self, message: Any) -> None:  # noqa: ANN401 - a JSON value
        """One line out."""
        self._outgoing.write(json.dumps(message).encode() + b"\n")
        self._outgoing.flush()

    def receive(self) -> Any:  # noqa: ANN401 - a JSON value
        """One line in; the end of the process where there is none."""
        line = self._incoming.readline()
        if not line:
            sys.exit(0)
        return json.loads(line)


def serve(job: dict[str, Any], channel: Channel) -> None:
    """Answer calls of the solution's functions."""
    keep: list[Any] = []
    space: dict[str, Any] = {"__name__": "solution"}
    exec(compile(job["source"], "solution", "exec"), space)
    while True:
        name, encoded_arguments = channel.receive()
        arguments = decoded(encoded_arguments, keep.__getitem__)
        try:
            reply = ["value", encoded(_function(space, name)(*arguments), keep)]
        except Exception as error:  # noqa: BLE001 - whatever a solution raises is its answer
            reply = ["raised", type(error).__name__]
        channel.send(reply)


def _function(space: dict[str, Any], name: str) -> Callable[..., Any]:
    """LiveCodeBench's functions are methods of a class Solution."""
    if name not in space and "Solution" in space:
        found: Callable[..., Any] = getattr(space["Solution"](), name)
        return found
    called: Callable[..., Any] = space[name]
    return called


def examine(job: dict[str, Any], channel: Channel) -> None:
    """Run a benchmark's own tests; each call of the solution is a message, so that only its results come in."""
    space: dict[str, Any] = {"__name__": "examination"}
    if job["setup"]:
        exec(compile(job["setup"], "setup", "exec"), space)

    def proxy(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:  # noqa: ANN401 - any value
            channel.send(["call", name, encoded(arguments, [])])
            kind, content = channel.receive()
            if kind == "value":
                return decoded(content, Handle)
            known = getattr(builtins, str(content), None)
            # StopIteration would end a loop of the test before its assertions.
            if isinstance(known, type) and issubclass(known, Exception) and known is not StopIteration:
                raise known
            raise RuntimeError(content)

        return call

    space.update({name: proxy(name) for name in job["names"]})
    exec(compile(job["source"], "test", "exec"), space)
    channel.send(["passed"])


def search(job: dict[str, Any], channel: Channel) -> None:
    """Whether a pattern occurs; here, because there are patterns that take for ever."""
    channel.send(["found", re.search(job["pattern"], job["source"]) is not None])


def _program(job: dict[str, Any]) -> None:
    exec(compile(job["source"], "solution", "exec"), {"__name__": "__main__"})


def main(folder: Path) -> None:
    """Read the job, give up every right, do it."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    sys.setrecursionlimit(20_000 if job["mode"] == "program" else 5_000)
    sys.set_int_max_str_digits(0)
    if job["mode"] == "program":
        os.dup2(os.open(folder / "input", os.O_RDONLY), 0)
        give_up(job)
        _program(job)
        return
    channel = Channel(os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(nowhere, number)  # what a solution prints is not part of its answer
    give_up(job)
    {"serve": serve, "examine": examine, "search": search}[job["mode"]](job, channel)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
