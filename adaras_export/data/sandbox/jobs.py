"""What a confined process does: all of it but `ready` runs after it gave up its rights.

Solutions and tests run in processes of their own; a solution gets calls and gives results, which are plain data. Knows
no limits and no filter.
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
    """Lines of JSON to whoever started the process and back; what is printed goes nowhere from then on."""

    def __init__(self) -> None:
        self._incoming: BinaryIO = os.fdopen(os.dup(0), "rb")
        self._outgoing: BinaryIO = os.fdopen(os.dup(1), "wb")
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1):
            os.dup2(nowhere, number)

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


def program(job: dict[str, Any]) -> None:
    """A program, which reads its input and prints."""
    exec(compile(job["source"], "solution", "exec"), {"__name__": "__main__"})


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
    space.update({name: _proxy(channel, name) for name in job["names"]})
    exec(compile(job["source"], "test", "exec"), space)
    channel.send(["passed"])


def compare(job: dict[str, Any], channel: Channel) -> None:
    """Call the solution with each input and compare; here, since values can be made that take long to compare."""
    call = _proxy(channel, job["name"])
    for given, wanted in zip(job["inputs"], job["expected"], strict=True):
        if not _same(call(*decoded(given, Handle)), decoded(wanted, Handle), job["tolerance"]):
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


def _same(found: Any, expected: Any, tolerance: float) -> bool:  # noqa: ANN401 - any plain data
    """Equality, for fractions up to a tolerance; 1e-6 where one is expected and none is given, as evalplus has it."""
    if isinstance(expected, float) and isinstance(found, int | float):
        close = math.isclose(found, expected, rel_tol=1e-7, abs_tol=tolerance or 1e-6)
        return close or (math.isnan(found) and math.isnan(expected))
    if isinstance(expected, list | tuple) and isinstance(found, list | tuple):
        pairs: Sequence[tuple[Any, Any]] = list(zip(found, expected, strict=False))
        return len(found) == len(expected) and all(_same(one, other, tolerance) for one, other in pairs)
    return bool(found == expected)


def score(job: dict[str, Any], channel: Channel) -> None:
    """Read the answers and say so, then score the completion by the last one.

    What is said of an answer leaves before the completion is looked at, which could say anything from then on.
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
    """What does the job; the files that it needs are open, since it could not open them without rights."""
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
