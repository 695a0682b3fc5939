"""The parent of a confined process: it forks, and the child gives up its rights and does the job.

client.py starts it and sends jobs over standard input, so no job is in a file that another solution could read. This
process runs no untrusted code. It watches the clock, counts the child's threads, and kills the child when the client
has ended.
"""

import errno
import fcntl
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaras_export.data.sandbox import jobs
from adaras_export.data.sandbox.filter import confine, hide
from adaras_export.data.sandbox.scorers import SCORERS

_MOST_THREADS = 128
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV and _SEND, of 80 and 24 bytes
_GO_ON = 1


def main() -> None:
    """Do one job in a child; in mode "score", do each job that arrives, each in a child."""
    hide()
    job = _job()
    sys.setrecursionlimit(20_000 if job["mode"] == "program" else 5_000)
    sys.set_int_max_str_digits(0)
    if job["mode"] == "score":
        _score_each(job)
        return
    child = _forked(job)
    if child is not None:
        _to_nowhere(1)  # so that the child's output ends with the child
        os._exit(0 if child.ended_well(job["wall_seconds"]) else 1)


def _score_each(job: dict[str, Any]) -> None:
    """Fork for each job. This process reads no answer, so an answer cannot change the scoring of the next one."""
    SCORERS[job["scorer"]].load()
    gc.freeze()  # otherwise garbage collection in a child would copy all of this process's memory
    while True:
        reading, writing = os.pipe()
        child = _forked(job, writing)
        if child is None:
            return
        os.close(writing)
        child.ended_well(job["wall_seconds"], reading, job["output"])
        os.close(reading)
        _write(struct.pack(">Q", len(child.written)) + child.written)
        job = _job()


def _to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _job() -> dict[str, Any]:
    """The next job; the process ends if the input has ended. Later input stays unread."""
    (length,) = struct.unpack(">Q", _read(8))
    job: dict[str, Any] = json.loads(_read(length))
    return job


def _read(length: int) -> bytes:
    read = bytearray()
    while len(read) < length:
        piece = os.read(0, length - len(read))
        if not piece:
            os._exit(0)
        read += piece
    return bytes(read)


def _write(content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(1, rest) :]


def _forked(job: dict[str, Any], output: int | None = None) -> "_Child | None":
    """The child with the job; None in the child itself, after the job. It writes to ``output`` if given."""
    parent = os.getpid()
    ours, theirs = socket.socketpair()
    number = os.fork()
    if number == 0:
        ours.close()
        if output is not None:
            _to_nowhere(0)  # the next jobs are not for the child
            os.dup2(output, 1)
        ready = jobs.ready(job)
        with theirs:
            confine(job, parent, theirs)
        try:
            ready()
        finally:
            if output is not None:
                os._exit(0)  # a normal exit takes a second with a large library
        return None
    theirs.close()
    with ours:
        listeners = socket.recv_fds(ours, 1, 1)[1]
    return _Child(number, os.pidfd_open(number), listeners)


@dataclass
class _Child:
    """A process with a job: its number, and descriptors for its end and for the kernel's questions about threads."""

    number: int
    end: int
    listeners: list[int]
    written: bytearray = field(default_factory=bytearray)

    def ended_well(self, seconds: float, output: int | None = None, most: int = 0) -> bool:
        """Wait up to ``seconds`` for the child to end; collect up to ``most`` bytes of its output in ``written``."""
        latest = time.monotonic() + seconds
        watched = select.poll()
        watched.register(0, 0)  # reports the end of the client
        for descriptor in (self.end, *self.listeners, *([] if output is None else [output])):
            watched.register(descriptor, select.POLLIN)
        while len(self.written) <= most:
            events = dict(watched.poll(max(0.0, latest - time.monotonic()) * 1000))
            if not events or 0 in events or self.end in events:
                break
            for descriptor, event in events.items():
                if not event & select.POLLIN:
                    watched.unregister(descriptor)
                elif descriptor == output:
                    self.written += os.read(output, 1 << 16)
                else:
                    self._decide(descriptor)
        return self._over(output)

    def _over(self, output: int | None) -> bool:
        """Kill the child if it still runs; return whether it ended by itself with status 0."""
        os.kill(self.number, signal.SIGKILL)  # safe: the number stays the child's until we wait for it
        status = os.waitpid(self.number, 0)[1]
        while output is not None and (piece := os.read(output, 1 << 16)):
            self.written += piece
        for descriptor in (self.end, *self.listeners):
            os.close(descriptor)
        return status == 0

    def _decide(self, listener: int) -> None:
        """Answer the kernel's question whether one more thread is allowed."""
        request = bytearray(80)
        try:
            fcntl.ioctl(listener, _RECEIVE, request)
            few = len(list(Path(f"/proc/{self.number}/task").iterdir())) < _MOST_THREADS
            verdict = (0, _GO_ON) if few else (-errno.EAGAIN, 0)
            fcntl.ioctl(listener, _SEND, struct.pack("=8sqiI", bytes(request[:8]), 0, *verdict))
        except FileNotFoundError:
            pass  # the requesting thread has ended
