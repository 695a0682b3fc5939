"""Run untrusted code in a separate process without rights, with limits and a timeout.

docs/questions.md lists the protections; if the machine or the kernel lacks them, no code is run. Results of the sandbox
stay JSON in this process, since building and comparing values from them could take seconds.
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

_MACHINES = ("x86_64", "aarch64")  # on some other machines of libseccomp, `clone` has its flags in another argument
_BEGIN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    " from adaras_export.data.sandbox.worker import main; main()"
)


@dataclass(frozen=True)
class Limits:
    """Limits of one run: seconds of CPU and wall-clock time, bytes of address space and of output."""

    cpu_seconds: int = 10
    wall_seconds: float = 30.0
    memory: int = 1 << 30
    output: int = 1 << 20


_EXAMINATION = Limits(wall_seconds=60.0)  # thousands of calls: both processes get more time than one call needs


class SandboxFailure(Exception):  # noqa: N818 - the code's failure, which is a verdict and not an error of ours
    """The code crashed, exceeded a limit, or sent an invalid message."""


def require_sandbox() -> None:
    """Refuse a machine on which code cannot be contained, before sampling starts.

    Raises:
        BrokenInstallationError: the system or machine is not supported, or the filter does not work.
    """
    here = f"{platform.system()} {platform.machine()}"
    remedy = "check these answers elsewhere"
    if platform.system() != "Linux" or platform.machine() not in _MACHINES:
        expected = " or ".join(_MACHINES)
        raise BrokenInstallationError(
            f"sandbox: this is {here}; such answers are checked on Linux {expected}; {remedy}"
        )
    try:
        works = output_of("print('ran')", "").strip() == "ran"
    except SandboxFailure:
        works = False
    if not works:
        expected = "libseccomp.so.2 (Debian's libseccomp2) and a kernel from 5.5 on that allows filters"
        raise BrokenInstallationError(f"sandbox: does not start on this {here}; expected {expected}; or {remedy}")


def output_of(source: str, stdin: str, limits: Limits | None = None) -> str:
    """The output of a program for a standard input.

    Raises:
        SandboxFailure: the program failed, or printed more than the limit.
    """
    limits = limits or Limits()
    with _process({"mode": "program", "source": source, "input": stdin}, limits) as process:
        printed: bytes = _pipe(process.stdout).read(limits.output + 1)
        if len(printed) > limits.output:
            raise SandboxFailure("printed too much")
        if process.wait():
            raise SandboxFailure("failed")
    return printed.decode(errors="replace")


class Solution:
    """The functions of a solution, which runs in a separate process; made by `solution`."""

    def __init__(self, process: "subprocess.Popen[bytes]", limits: Limits) -> None:
        self._process, self._limits = process, limits

    def reply(self, name: str, arguments: Any) -> list[Any]:  # noqa: ANN401 - a JSON value
        """The encoded result of a call with encoded arguments: ``value`` and a value, or ``raised`` and a name.

        Raises:
            SandboxFailure: the process ended or sent no valid reply.
        """
        _send_line(self._process, [name, arguments])
        reply = _receive_line(self._process, self._limits)
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

    ``names`` are the solution's functions that the test calls. Their arguments and results are sent as data.
    """
    return _examined({"mode": "examine", "source": test, "setup": setup, "names": list(names)}, solved, limits)


def agrees(solved: Solution, name: str, cases: Sequence[tuple[Any, Any]], tolerance: float) -> bool:
    """Whether a function returns the expected result in each case; arguments and results are encoded."""
    inputs, expected = ([case[place] for case in cases] for place in (0, 1))
    job = {"mode": "compare", "name": name, "inputs": inputs, "expected": expected, "tolerance": tolerance}
    return _examined(job, solved, _EXAMINATION)


def _examined(job: dict[str, Any], solved: Solution, limits: Limits) -> bool:
    try:
        with _process(job, limits) as process:
            while (message := _receive_line(process, limits)) != ["passed"]:
                _, name, arguments = message
                _send_line(process, solved.reply(name, arguments))
    except (SandboxFailure, ValueError):
        return False
    return True


class SandboxScorer:
    """A process with a loaded scorer, which forks a child without rights for each completion; made by `scorer`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._process = _started()
        atexit.register(self._close)

    def notes(self, answers: Sequence[str], limits: Limits | None = None) -> list[Any]:
        """A reply for each answer: ``["read", note]``, or ``["refused", reason]``, after which no answer is read.

        There are fewer replies than answers if an answer exceeded the time or the memory.
        """
        return [json.loads(line) for line in self._replies(answers, None, limits or Limits())]

    def score(self, completion: str, answer: str, limits: Limits | None = None) -> tuple[list[Any] | None, bool]:
        """The reply for the answer, as in `notes`, or None without one; and whether the completion is correct."""
        replies = self._replies([answer], completion, limits or Limits())
        return json.loads(replies[0]) if replies else None, replies[1:] == [b'["scored", true]']

    def _replies(self, answers: Sequence[str], completion: str | None, limits: Limits) -> list[bytes]:
        job = {"mode": "score", "scorer": self._name, "answers": list(answers), "completion": completion}
        with self._lock:
            try:
                _send(self._process, job | asdict(limits))
                (length,) = struct.unpack(">Q", _pipe(self._process.stdout).read(8))
                replies: bytes = _pipe(self._process.stdout).read(length)
            except BaseException as error:
                _scorer.cache_clear()
                _end(self._process)  # an interruption may have left half a reply, which the next job would read
                if isinstance(error, SandboxFailure | struct.error | ValueError):
                    raise BrokenInstallationError(f"checker {self._name}: its process ended; run this again") from error
                raise
        return replies.split(b"\n")[:-1]  # complete lines only: a kill may have cut the last one

    def _close(self) -> None:
        if os.getpid() == self._owner:  # a fork inherits the exit handler, but does not own the process
            _end(self._process)


def scorer(name: str) -> SandboxScorer:
    """The scorer of that name; this process has one of each."""
    return _scorer(name, os.getpid())  # a fork must not share the pipes


@lru_cache(maxsize=8)
def _scorer(name: str, process: int) -> SandboxScorer:  # noqa: ARG001 - part of the cache key
    return SandboxScorer(name)


@contextmanager
def _process(job: dict[str, Any], limits: Limits) -> "Iterator[subprocess.Popen[bytes]]":
    """A worker with its job; it ends with the context."""
    process = _started()
    try:
        _send(process, job | asdict(limits))
        yield process
    finally:
        _end(process)


def _started() -> "subprocess.Popen[bytes]":
    """A new worker. It has our module path, but without the working directory."""
    return subprocess.Popen(
        [sys.executable, "-I", "-B", "-c", _BEGIN, json.dumps([folder for folder in sys.path if folder])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={"HOME": "/", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,
    )


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the worker by closing its pipes; it kills its child and waits for it, so that no process is left."""
    _pipe(process.stdout).close()
    try:
        _pipe(process.stdin).close()
    except BrokenPipeError:
        pass  # the worker ended before it read all input
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _send(process: "subprocess.Popen[bytes]", job: dict[str, Any]) -> None:
    content = json.dumps(job).encode()
    _write(process, struct.pack(">Q", len(content)) + content)


def _send_line(process: "subprocess.Popen[bytes]", message: Any) -> None:  # noqa: ANN401 - a JSON value
    _write(process, json.dumps(message).encode() + b"\n")


def _write(process: "subprocess.Popen[bytes]", content: bytes) -> None:
    try:
        _pipe(process.stdin).write(content)
        _pipe(process.stdin).flush()
    except BrokenPipeError as error:
        raise SandboxFailure("ended") from error


def _receive_line(process: "subprocess.Popen[bytes]", limits: Limits) -> list[Any]:
    return _message(_pipe(process.stdout).readline(limits.output + 1))


def _message(line: bytes) -> list[Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SandboxFailure("ended" if not line else "answered nonsense") from error
    if not isinstance(message, list) or not message:
        raise SandboxFailure("answered nonsense")
    return message


def _pipe(pipe: Any) -> Any:  # noqa: ANN401 - Popen's type of a pipe that may be None
    assert pipe is not None
    return pipe
