"""Run code that nobody has read: a process of its own, without rights, with limits, killed as a group.

Knows no benchmark. What contains it is a seccomp filter (no network, no process or program, no signal, no change of any
file), resource limits, no capabilities, an empty environment and a folder of its own; where the kernel or the machine
offers no such filter, nothing is run. What is not contained: it can read what its user can read, and burn its CPU time.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaras_export import sandbox_worker
from adaras_export.errors import BrokenInstallationError
from adaras_export.sandbox_worker import Handle, decoded, encoded


@dataclass(frozen=True)
class Limits:
    """What one run may use: seconds of CPU and of the clock, bytes of address space and of output."""

    cpu_seconds: int = 10
    wall_seconds: float = 30.0
    memory: int = 1 << 30
    output: int = 1 << 20


class SandboxFailure(Exception):  # noqa: N818 - the code's failure, which is a verdict and not an error of ours
    """The code crashed, ran over a limit, or answered nonsense."""


def require_sandbox() -> None:
    """Refuse a machine on which code cannot be contained, before anything is sampled.

    Raises:
        BrokenInstallationError: it is not Linux on x86-64, or its kernel refuses the filter.
    """
    found = f"{platform.system()} {platform.machine()}"
    remedy = "check these answers elsewhere"
    if found != "Linux x86_64":
        raise BrokenInstallationError(f"sandbox: this is {found}; code is run on Linux x86_64 only; {remedy}")
    try:
        works = output_of("print('ran')", "").strip() == "ran"
    except SandboxFailure:
        works = False
    if not works:
        raise BrokenInstallationError(f"sandbox: the kernel refuses a seccomp filter; expected one; {remedy}")


def output_of(source: str, given: str, limits: Limits | None = None) -> str:
    """What a program prints, given its standard input.

    Raises:
        SandboxFailure: it failed, or printed more than is read.
    """
    limits = limits or Limits()
    with _process({"mode": "program", "source": source}, limits, given) as process:
        printed: bytes = _pipe(process.stdout).read(limits.output + 1)
        if len(printed) > limits.output:
            raise SandboxFailure("printed too much")
        if process.wait():
            raise SandboxFailure("failed")
    return printed.decode(errors="replace")


def found_in(pattern: str, text: str, limits: Limits | None = None) -> bool:
    """Whether a regular expression occurs in a text; one that takes too long does not."""
    try:
        with _process({"mode": "search", "pattern": pattern, "source": text}, limits or Limits()) as process:
            return bool(_received(process, limits or Limits())[1])
    except SandboxFailure:
        return False


class Solution:
    """Functions of a solution that runs in a process of its own; made by `solution`."""

    def __init__(self, process: "subprocess.Popen[bytes]", limits: Limits) -> None:
        self._process, self._limits = process, limits

    def reply(self, name: str, arguments: Any) -> list[Any]:  # noqa: ANN401 - a JSON value
        """The encoded result of a call with encoded arguments: ``value`` and a value, or ``raised`` and a name.

        Raises:
            SandboxFailure: there is none.
        """
        _send(self._process, [name, arguments])
        reply = _received(self._process, self._limits)
        if len(reply) != 2 or reply[0] not in ("value", "raised"):
            raise SandboxFailure("answered nonsense")
        return reply

    def __call__(self, name: str, arguments: Sequence[Any]) -> Any:  # noqa: ANN401 - any value
        """The result of a call, of Python's own types.

        Raises:
            SandboxFailure: there is none.
        """
        kind, content = self.reply(name, encoded(list(arguments), []))
        if kind == "raised":
            raise SandboxFailure(f"raised {content}")
        try:
            return decoded(content, Handle)
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
            raise SandboxFailure("answered nonsense") from error


@contextmanager
def solution(source: str, limits: Limits | None = None) -> Iterator[Solution]:
    """A solution's functions, for as long as the context lasts."""
    limits = limits or Limits()
    with _process({"mode": "serve", "source": source}, limits) as process:
        yield Solution(process, limits)


def passes(solved: Solution, test: str, setup: str, names: Sequence[str], limits: Limits | None = None) -> bool:
    """Whether a benchmark's test ends without an error; it runs in another process than the solution.

    The names are those that it calls of the solution. Their arguments and results travel as data.
    """
    limits = limits or Limits()
    job = {"mode": "examine", "source": test, "setup": setup, "names": list(names)}
    try:
        with _process(job, limits) as process:
            while (message := _received(process, limits)) != ["passed"]:
                _, name, arguments = message
                _send(process, solved.reply(name, arguments))
    except (SandboxFailure, ValueError):
        return False
    return True


@contextmanager
def _process(job: dict[str, Any], limits: Limits, given: str = "") -> "Iterator[subprocess.Popen[bytes]]":
    """A worker at its job, killed with its group at the end of the context or of its time."""
    with tempfile.TemporaryDirectory(prefix="adaras-sandbox-") as folder:
        own = {"cpu_seconds": limits.cpu_seconds, "memory": limits.memory}
        (Path(folder) / "job.json").write_text(json.dumps(own | job), encoding="utf-8")
        (Path(folder) / "input").write_bytes(given.encode())
        environment = {"HOME": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
        with subprocess.Popen(
            [sys.executable, "-I", "-B", str(sandbox_worker.__file__), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,
        ) as process:
            timer = threading.Timer(limits.wall_seconds, _kill, [process])
            timer.start()
            try:
                yield process
            finally:
                timer.cancel()
                _kill(process)
                _pipe(process.stdout).close()
                _close(process)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is not None:
        return  # its number may be another process's by now
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has ended; nothing of its group is left


def _close(process: "subprocess.Popen[bytes]") -> None:
    try:
        _pipe(process.stdin).close()
    except BrokenPipeError:
        pass  # it ended before it read everything


def _send(process: "subprocess.Popen[bytes]", message: Any) -> None:  # noqa: ANN401 - a JSON value
    try:
        _pipe(process.stdin).write(json.dumps(message).encode() + b"\n")
        _pipe(process.stdin).flush()
    except BrokenPipeError as error:
        raise SandboxFailure("ended") from error


def _received(process: "subprocess.Popen[bytes]", limits: Limits) -> list[Any]:
    line = _pipe(process.stdout).readline(limits.output + 1)
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
