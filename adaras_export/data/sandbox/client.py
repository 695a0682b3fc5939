"""Run code that nobody has read: a process of its own, without rights, with limits, ended in time.

Knows no benchmark. What contains it is listed in docs/questions.md; where the machine or the kernel does not offer
that, nothing is run. What comes out of the sandbox stays JSON here: values that are made of it could cost us seconds.
"""

import atexit
import json
import os
import platform
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from adaras_export.errors import BrokenInstallationError

_MACHINES = ("x86_64", "aarch64")  # libseccomp knows more, of which some have the flags of `clone` in another argument
_BEGIN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    " from adaras_export.data.sandbox.worker import main; main()"
)


@dataclass(frozen=True)
class Limits:
    """What one run may use: seconds of CPU and of the clock, bytes of address space and of output."""

    cpu_seconds: int = 10
    wall_seconds: float = 30.0
    memory: int = 1 << 30
    output: int = 1 << 20


_EXAMINATION = Limits(wall_seconds=60.0)  # thousands of calls: both processes get more time than one call needs


class SandboxFailure(Exception):  # noqa: N818 - the code's failure, which is a verdict and not an error of ours
    """The code crashed, ran over a limit, or answered nonsense."""


def require_sandbox() -> None:
    """Refuse a machine on which code cannot be contained, before anything is sampled.

    Raises:
        BrokenInstallationError: it is another system or machine, or the filter does not work there.
    """
    found = f"{platform.system()} {platform.machine()}"
    remedy = "check these answers elsewhere"
    if platform.system() != "Linux" or platform.machine() not in _MACHINES:
        expected = " or ".join(_MACHINES)
        raise BrokenInstallationError(
            f"sandbox: this is {found}; such answers are checked on Linux {expected}; {remedy}"
        )
    try:
        works = output_of("print('ran')", "").strip() == "ran"
    except SandboxFailure:
        works = False
    if not works:
        expected = "libseccomp.so.2 (Debian's libseccomp2) and a kernel from 5.5 on that allows filters"
        raise BrokenInstallationError(f"sandbox: does not start on this {found}; expected {expected}; or {remedy}")


def output_of(source: str, given: str, limits: Limits | None = None) -> str:
    """What a program prints, given its standard input.

    Raises:
        SandboxFailure: it failed, or printed more than is read.
    """
    limits = limits or Limits()
    with _process({"mode": "program", "source": source, "input": given}, limits) as process:
        printed: bytes = _pipe(process.stdout).read(limits.output + 1)
        if len(printed) > limits.output:
            raise SandboxFailure("printed too much")
        if process.wait():
            raise SandboxFailure("failed")
    return printed.decode(errors="replace")


class Solution:
    """Functions of a solution that runs in a process of its own; made by `solution`."""

    def __init__(self, process: "subprocess.Popen[bytes]", limits: Limits) -> None:
        self._process, self._limits = process, limits

    def reply(self, name: str, arguments: Any) -> list[Any]:  # noqa: ANN401 - a JSON value
        """The encoded result of a call with encoded arguments: ``value`` and a value, or ``raised`` and a name.

        Raises:
            SandboxFailure: there is none.
        """
        _say(self._process, [name, arguments])
        reply = _heard(self._process, self._limits)
        if len(reply) != 2 or reply[0] not in ("value", "raised"):
            raise SandboxFailure("answered nonsense")
        return reply


@contextmanager
def solution(source: str, limits: Limits | None = None) -> Iterator[Solution]:
    """A solution's functions, for as long as the context lasts."""
    limits = limits or Limits()
    with _process({"mode": "serve", "source": source}, limits) as process:
        yield Solution(process, limits)


def passes(solved: Solution, test: str, setup: str, names: Sequence[str], limits: Limits = _EXAMINATION) -> bool:
    """Whether a benchmark's test ends without an error; it runs in another process than the solution.

    The names are those that it calls of the solution. Their arguments and results travel as data.
    """
    return _examined({"mode": "examine", "source": test, "setup": setup, "names": list(names)}, solved, limits)


def agrees(solved: Solution, name: str, cases: Sequence[tuple[Any, Any]], tolerance: float) -> bool:
    """Whether a function gives what is expected, in each case of encoded arguments and an encoded result."""
    inputs, expected = ([case[place] for case in cases] for place in (0, 1))
    job = {"mode": "compare", "name": name, "inputs": inputs, "expected": expected, "tolerance": tolerance}
    return _examined(job, solved, _EXAMINATION)


def _examined(job: dict[str, Any], solved: Solution, limits: Limits) -> bool:
    try:
        with _process(job, limits) as process:
            while (message := _heard(process, limits)) != ["passed"]:
                _, name, arguments = message
                _say(process, solved.reply(name, arguments))
    except (SandboxFailure, ValueError):
        return False
    return True


class SandboxScorer:
    """A process that has a scorer loaded, and forks for each completion a child without rights; made by `scorer`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._process = _started()
        atexit.register(self._close)

    def notes(self, answers: Sequence[str], limits: Limits | None = None) -> list[Any]:
        """What is said of each answer: ``["read", note]``, or ``["refused", reason]``, behind which none is read.

        Fewer come back where the last of them took too long, or too much memory.
        """
        return [json.loads(line) for line in self._said(answers, None, limits or Limits())]

    def score(self, completion: str, answer: str, limits: Limits | None = None) -> tuple[list[Any] | None, bool]:
        """What is said of the answer, as in `notes`, if it came to that, and whether the completion is correct."""
        said = self._said([answer], completion, limits or Limits())
        return json.loads(said[0]) if said else None, said[1:] == [b'["scored", true]']

    def _said(self, answers: Sequence[str], completion: str | None, limits: Limits) -> list[bytes]:
        job = {"mode": "score", "scorer": self._name, "answers": list(answers), "completion": completion}
        with self._lock:
            try:
                _send(self._process, job | asdict(limits))
                (length,) = struct.unpack(">Q", _pipe(self._process.stdout).read(8))
                said: bytes = _pipe(self._process.stdout).read(length)
            except BaseException as error:
                _scorer.cache_clear()
                _end(self._process)  # an interruption may have left half a reply, which the next one would read
                if isinstance(error, SandboxFailure | struct.error | ValueError):
                    raise BrokenInstallationError(f"checker {self._name}: its process ended; run this again") from error
                raise
        return said.split(b"\n")[:-1]  # whole lines: the process may have been killed within one

    def _close(self) -> None:
        if os.getpid() == self._owner:  # else this is a fork, which has the same handlers
            _end(self._process)


def scorer(name: str) -> SandboxScorer:
    """The scorer of that name, one for this process."""
    return _scorer(name, os.getpid())  # a fork must not share the pipes


@lru_cache(maxsize=8)
def _scorer(name: str, process: int) -> SandboxScorer:  # noqa: ARG001 - a part of the key
    return SandboxScorer(name)


@contextmanager
def _process(job: dict[str, Any], limits: Limits) -> "Iterator[subprocess.Popen[bytes]]":
    """A worker at its job, which ends with the context."""
    process = _started()
    try:
        _send(process, job | asdict(limits))
        yield process
    finally:
        _end(process)


def _started() -> "subprocess.Popen[bytes]":
    """A worker. It finds modules where we find them, but not in the folder where we happen to be."""
    return subprocess.Popen(
        [sys.executable, "-I", "-B", "-c", _BEGIN, json.dumps([one for one in sys.path if one])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={"HOME": "/", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,
    )


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Tell the worker by closing its pipes; it kills its child and waits for it, so that nothing is left to others."""
    _pipe(process.stdout).close()
    try:
        _pipe(process.stdin).close()
    except BrokenPipeError:
        pass  # it ended before it read everything
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _send(process: "subprocess.Popen[bytes]", job: dict[str, Any]) -> None:
    content = json.dumps(job).encode()
    _write(process, struct.pack(">Q", len(content)) + content)


def _say(process: "subprocess.Popen[bytes]", message: Any) -> None:  # noqa: ANN401 - a JSON value
    _write(process, json.dumps(message).encode() + b"\n")


def _write(process: "subprocess.Popen[bytes]", content: bytes) -> None:
    try:
        _pipe(process.stdin).write(content)
        _pipe(process.stdin).flush()
    except BrokenPipeError as error:
        raise SandboxFailure("ended") from error


def _heard(process: "subprocess.Popen[bytes]", limits: Limits) -> list[Any]:
    return _message(_pipe(process.stdout).readline(limits.output + 1))


def _message(line: bytes) -> list[Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SandboxFailure("ended" if not line else "answered nonsense") from error
    if not isinstance(message, list) or not message:
        raise SandboxFailure("answered nonsense")
    return message


def _pipe(pipe: Any) -> Any:  # noqa: ANN401 - Popen's pipes are None where none was asked for
    assert pipe is not None
    return pipe
