"""The jobs of a confined process; all code here except `ready` runs without rights.

Solutions and tests run in separate processes; a solution receives calls and returns results as plain data.
"""

import builtins
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, BinaryIO

from adaras_export.data.sandbox.inputs import Handle, decoded, encoded
from adaras_export.data.sandbox.scorers import SCORERS, UnreadableAnswer


class Channel:
    """Lines of JSON to and from the parent process; from then on, printed text is discarded."""

    def __init__(self) -> None:
        self._incoming: BinaryIO = os.fdopen(os.dup(0), "rb")
        self._outgoing: BinaryIO = os.fdopen(os.dup(1), "wb")
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1):
            os.dup2(nowhere, number)

    def send(self, message: Any) -> None:  # noqa: ANN401 - a JSON value
        """Send one line."""
        self._outgoing.write(json.dumps(message).encode() + b"\n")
        self._outgoing.flush()

    def receive(self) -> Any:  # noqa: ANN401 - a JSON value
        """Receive one line; end the process if the input has ended."""
        line = self._incoming.readline()
        if not line:
            sys.exit(0)
        return json.loads(line)


def program(job: dict[str, Any]) -> None:
    """Run a program, which reads standard input and prints."""
    exec(compile(job["source"], "solution", "exec"), {"__name__": "__main__"})


def serve(job: dict[str, Any], channel: Channel) -> None:
    """Run calls of the solution's functions and send their results."""
    keep: list[Any] = []
    space: dict[str, Any] = {"__name__": "solution"}
    exec(compile(job["source"], "solution", "exec"), space)
    while True:
        name, encoded_arguments = channel.receive()
        arguments = decoded(encoded_arguments, keep.__getitem__)
        try:
            reply = ["value", encoded(_function(space, name)(*arguments), keep)]
        except Exception as error:  # noqa: BLE001 - an exception of the solution is its result
            reply = ["raised", type(error).__name__]
        channel.send(reply)


def _function(space: dict[str, Any], name: str) -> Callable[..., Any]:
    """A function of the solution; LiveCodeBench's are methods of a class Solution."""
    if name not in space and "Solution" in space:
        method: Callable[..., Any] = getattr(space["Solution"](), name)
        return method
    function: Callable[..., Any] = space[name]
    return function


def examine(job: dict[str, Any], channel: Channel) -> None:
    """Run a benchmark's own tests; each call of the solution is a message, so only its results reach this process."""
    space: dict[str, Any] = {"__name__": "examination"}
    if job["setup"]:
        exec(compile(job["setup"], "setup", "exec"), space)
    space.update({name: _proxy(channel, name) for name in job["names"]})
    exec(compile(job["source"], "test", "exec"), space)
    channel.send(["passed"])


def compare(job: dict[str, Any], channel: Channel) -> None:
    """Call the solution with each input and compare the results; confined, since a value may be slow to compare."""
    call = _proxy(channel, job["name"])
    for arguments, expected in zip(job["inputs"], job["expected"], strict=True):
        if not _same(call(*decoded(arguments, Handle)), decoded(expected, Handle), job["tolerance"]):
            return
    channel.send(["passed"])


def _proxy(channel: Channel, name: str) -> Callable[..., Any]:
    """A function of the solution, which runs in another process."""

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


def _same(result: Any, expected: Any, tolerance: float) -> bool:  # noqa: ANN401 - any plain data
    """Equality, for floats up to the tolerance, or up to 1e-6 if it is 0, as in evalplus."""
    if isinstance(expected, float) and isinstance(result, int | float):
        close = math.isclose(result, expected, rel_tol=1e-7, abs_tol=tolerance or 1e-6)
        return close or (math.isnan(result) and math.isnan(expected))
    if isinstance(expected, list | tuple) and isinstance(result, list | tuple):
        pairs: Sequence[tuple[Any, Any]] = list(zip(result, expected, strict=False))
        return len(result) == len(expected) and all(_same(left, right, tolerance) for left, right in pairs)
    return bool(result == expected)


def score(job: dict[str, Any], channel: Channel) -> None:
    """Read the answers and send a reply for each, then score the completion by the last answer.

    The replies are sent before the completion is read, because a hostile completion could send its own from then on.
    """
    scorer = SCORERS[job["scorer"]]
    for answer in job["answers"]:
        try:
            expected, note = scorer.read(answer)
        except UnreadableAnswer as error:
            channel.send(["refused", str(error)])
            return
        channel.send(["read", note])
    if job["completion"] is not None:
        channel.send(["scored", scorer.score(job["completion"], expected)])


def ready(job: dict[str, Any]) -> Callable[[], None]:
    """The function that does the job; it opens the job's files now, since that needs rights."""
    if job["mode"] == "program":
        _take_input(job["input"])
        return partial(program, job)
    modes = {"serve": serve, "examine": examine, "compare": compare, "score": score}
    return partial(modes[job["mode"]], job, Channel())


def _take_input(content: str) -> None:
    file = os.memfd_create("input")
    with os.fdopen(os.dup(file), "wb") as writer:
        writer.write(content.encode())
    os.lseek(file, 0, os.SEEK_SET)
    os.dup2(file, 0)
    os.close(file)
