"""Forks of this process, alone or as a group that meets over gloo: they have all libraries loaded already."""

import os
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path


def forked(work, log, environment=()):
    """The number of a process that calls ``work()``, with its streams in the file ``log``; a bug is status 70."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads of ours that wait meanwhile
        child = os.fork()
    if child:
        return child
    status = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(file, stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))  # pytest has others
        os.environ.update(dict(environment))
        status = work() or 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        raise
    finally:
        os._exit(status)


def ended(children, seconds=60):
    """The exit status of each, minus the signal where one ended it; all are killed when the time is over."""
    left, found = [*children], {}
    until = time.monotonic() + seconds
    while left:
        for child in [*left]:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.remove(child)
                found[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            for child in left:
                os.kill(child, signal.SIGKILL)
            seconds, until = -1, float("inf")
        time.sleep(0.005)
    assert seconds > 0, "a process hangs"
    return [found[child] for child in children]


def group(size, work, folder):
    """Exit status and what was written, of each of ``size`` processes that call ``work(rank)`` under a launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    logs = [Path(folder) / f"log-{rank}-of-{size}" for rank in range(size)]
    children = [
        forked(lambda rank=rank: work(rank), log, {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}.items())
        for rank, log in enumerate(logs)
    ]
    return [(status, log.read_text()) for status, log in zip(ended(children), logs, strict=True)]
