"""The process around a confined one: it forks, and the child gives up its rights and does the job.

Started by sandbox.py, which sends jobs over standard input: no job lies in a file that another solution could read. The
process itself runs nothing of a stranger. It watches the clock, counts the child's threads, and kills the child when
whoever asked is gone.
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
_ASKED, _ANSWERED = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV and _SEND, of 80 and 24 bytes
_GO_ON = 1


def main() -> None:
    """Do the one job that comes, or, where answers are scored, each one that comes; each in a child."""
    hide()
    job = _job()
    sys.setrecursionlimit(20_000 if job["mode"] == "program" else 5_000)
    sys.set_int_max_str_digits(0)
    if job["mode"] == "score":
        _score_each(job)
        return
    child = _forked(job)
    if child is not None:
        _to_nowhere(1)  # what the child prints ends with the child
        os._exit(0 if child.ended_well(job["wall_seconds"]) else 1)


def _score_each(job: dict[str, Any]) -> None:
    """Fork for each job. This process looks at no answer, and so stays as it was for the next one."""
    SCORERS[job["scorer"]].load()
    gc.freeze()  # or collecting garbage in a child would copy all of this process's memory
    while True:
        reading, writing = os.pipe()
        child = _forked(job, writing)
        if child is None:
            return
        os.close(writing)
        child.ended_well(job["wall_seconds"], reading, job["output"])
        os.close(reading)
        _write(struct.pack(">Q", len(child.said)) + child.said)
        job = _job()


def _to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _job() -> dict[str, Any]:
    """The next job; the end of the process where there is none. What stands behind it is left unread."""
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
    """The child at the job; None in the child itself, when it has done it. It writes to the output, if one is given."""
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
                os._exit(0)  # the long way out takes a second where a large library is loaded
        return None
    theirs.close()
    with ours:
        listeners = socket.recv_fds(ours, 1, 1)[1]
    return _Child(number, os.pidfd_open(number), listeners)


@dataclass
class _Child:
    """A process at its job: its number, a file that tells of its end, and one for the kernel's questions on threads."""

    number: int
    end: int
    listeners: list[int]
    said: bytearray = field(default_factory=bytearray)

    def ended_well(self, seconds: float, output: int | None = None, most: int = 0) -> bool:
        """Wait for its end, at most so long; ``said`` is what it wrote, for whoever reads it, up to so much."""
        latest = time.monotonic() + seconds
        watched = select.poll()
        watched.register(0, 0)  # tells when whoever asked is gone
        for one in (self.end, *self.listeners, *([] if output is None else [output])):
            watched.register(one, select.POLLIN)
        while len(self.said) <= most:
            events = dict(watched.poll(max(0.0, latest - time.monotonic()) * 1000))
            if not events or 0 in events or self.end in events:
                break
            for one, event in events.items():
                if not event & select.POLLIN:
                    watched.unregister(one)
                elif one == output:
                    self.said += os.read(output, 1 << 16)
                else:
                    self._decide(one)
        return self._over(output)

    def _over(self, output: int | None) -> bool:
        """Whether it ended by itself and well; kill it where it has not ended."""
        os.kill(self.number, signal.SIGKILL)  # it is ours to wait for, so the number is still its own
        status = os.waitpid(self.number, 0)[1]
        while output is not None and (piece := os.read(output, 1 << 16)):
            self.said += piece
        for one in (self.end, *self.listeners):
            os.close(one)
        return status == 0

    def _decide(self, listener: int) -> None:
        """Whether there may be one more thread."""
        asked = bytearray(80)
        try:
            fcntl.ioctl(listener, _ASKED, asked)
            few = len(list(Path(f"/proc/{self.number}/task").iterdir())) < _MOST_THREADS
            verdict = (0, _GO_ON) if few else (-errno.EAGAIN, 0)
            fcntl.ioctl(listener, _ANSWERED, struct.pack("=8sqiI", bytes(asked[:8]), 0, *verdict))
        except FileNotFoundError:
            pass  # the thread that asked is gone
