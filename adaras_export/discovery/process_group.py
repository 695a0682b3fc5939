"""One of several processes that do one job: which it is, and how results come together. Knows nothing of the job.

Launchers (`accelerate launch`, torchrun) say in environment variables how many there are and where they meet. Only
arrays on the CPU are sent, as bytes of a safetensors file, so that gloo serves on GPUs too, and nothing is unpickled.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import distributed

from adaras_export.core.value import Value
from adaras_export.errors import DistributionError, first_line

_V = TypeVar("_V", bound=Value)

_FAILED, _ENDED = "adaras-failed", "adaras-ended"
_SECONDS = 2  # that a process which failed waits for the others; they look up between two chunks
_PATIENCE = timedelta(days=30)  # a process that is done waits for the slowest; one that died is noticed at once


class StoppedError(DistributionError):
    """Another process of the group failed, and says why."""


@dataclass(frozen=True)
class Group:
    """This process, counted from 0, of so many."""

    rank: int = 0
    size: int = 1

    def check(self) -> None:
        """End this process, too, if another one has failed.

        Raises:
            StoppedError: one has.
        """
        if self.size > 1 and _failed():
            raise StoppedError("another process failed")

    def gather(self, value: _V) -> list[_V]:
        """The values of all processes in the order of their ranks, in process 0; nothing in the others.

        Raises:
            StoppedError: another process failed.
        """
        with _deaths():
            if not self.rank:
                return [value, *(_received(type(value), rank) for rank in range(1, self.size))]
            _send(value, 0)
            return []

    def share(self, value: _V) -> _V:
        """The value of process 0, in every process; the others give one of the same type.

        Raises:
            StoppedError: another process failed.
        """
        with _deaths():
            if self.rank:
                return _received(type(value), 0)
            for rank in range(1, self.size):
                _send(value, rank)
            return value

    def wait(self) -> None:
        """Go on when all processes have come here.

        Raises:
            StoppedError: another process failed.
        """
        if self.size > 1:
            with _deaths():
                distributed.barrier()


_CURRENT: ContextVar[Group] = ContextVar("group", default=Group())  # noqa: B039 - a frozen value


def current() -> Group:
    """The group that this process has `joined`; a group of its own where it has joined none."""
    return _CURRENT.get()


def device() -> str | None:
    """The GPU of this process among those of its machine; None where there is one process, or no GPU."""
    if size_of_group() == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def size_of_group() -> int:
    """How many processes the launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined() -> Iterator[Group]:
    """Be one of the processes that the launcher started. If one fails, all end, and the first to fail says why.

    Raises:
        StoppedError: another process failed first.
    """
    if size_of_group() == 1:
        yield Group()
        return
    distributed.init_process_group("gloo", timeout=_PATIENCE)
    group = Group(distributed.get_rank(), distributed.get_world_size())
    token = _CURRENT.set(group)
    try:
        yield group
    except BaseException as error:
        stopped = isinstance(error, StoppedError) or not _is_first_to_fail(group.rank)
        _part(group)
        if stopped:
            raise StoppedError("another process failed") from error
        raise
    finally:
        _CURRENT.reset(token)
        distributed.destroy_process_group()


@contextmanager
def _deaths() -> Iterator[None]:
    """Turn what gloo says of a connection that the other side closed into an error of ours."""
    try:
        yield
    except RuntimeError as error:
        if _failed():
            raise StoppedError("another process failed") from error
        raise DistributionError(
            f"process group: another process ended without a word ({first_line(error)}); expected all to reach the "
            "end; run the same command again to go on"
        ) from error


def _store() -> Any:  # noqa: ANN401 - torch does not type it
    return distributed.distributed_c10d._get_default_store()


def _failed() -> bool:
    try:
        return bool(_store().check([_FAILED]))
    except RuntimeError:  # the process that keeps the store is gone
        return True


def _is_first_to_fail(rank: int) -> bool:
    try:
        return bool(_store().compare_set(_FAILED, "", str(rank)).decode() == str(rank))
    except RuntimeError:  # as above
        return False


def _part(group: Group) -> None:
    """Have process 0, which may keep the store, outlive those that look there, or torch warns of it in each of them."""
    try:
        ended = _store().add(_ENDED, 1)
        until = time.monotonic() + _SECONDS
        while group.rank == 0 and ended < group.size and time.monotonic() < until:
            time.sleep(0.02)
            ended = _store().add(_ENDED, 0)
    except RuntimeError:
        return  # it is gone already


def _send(value: Value, rank: int) -> None:
    content = torch.from_numpy(np.frombuffer(value.to_bytes(), np.uint8).copy())
    distributed.send(torch.tensor([len(content)]), rank)
    distributed.send(content, rank)


def _received(kind: type[_V], rank: int) -> _V:
    length = torch.zeros(1, dtype=torch.int64)
    distributed.recv(length, rank)
    content = torch.empty(int(length), dtype=torch.uint8)
    distributed.recv(content, rank)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rank{rank}"
        path.write_bytes(content.numpy().tobytes())
        return kind.load(path)
