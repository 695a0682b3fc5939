"""A reading job done by this process, by its group, or as one shard of several; kept beside its output meanwhile.

Knows nothing of rankings.
"""

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

from adaras_export.discovery import process_group
from adaras_export.discovery.process_group import Group
from adaras_export.discovery.reading_job import Job, Part
from adaras_export.modeling.activations import Reading


@contextmanager
def read_together(
    job: Job, reading: Reading, out: Path | None = None, shard: tuple[int, int] | None = None
) -> Iterator[Part]:
    """The sums of a shard (i of n, from 0), or else those of all processes of the group, the same in each.

    With ``out`` they are kept in files beside it until the context ends: a killed run goes on from them.

    Raises:
        TraceError: a trace cannot be read, or a file beside ``out`` is of another job.
        StoppedError: another process of the group failed.
    """
    group = process_group.current()
    is_first = group.rank == 0
    for caution in job.plan.cautions() if is_first else ():
        reading.warn(caution)
    index, count = shard or (group.rank, group.size)
    partial = None if out is None else _partial(out, group, index)
    for path in _strangers(out, group) if is_first and out is not None else ():
        reading.warn(f"{path}: is of an unfinished run of another number of processes, and is not used")
    own = job.read(job.plan.share(index, count), partial, reading.progress if is_first else None, group.check)
    parts = group.gather(own)
    yield group.share(reduce(Part.merge, parts) if parts else own)
    group.wait()
    if partial is not None:
        partial.unlink(missing_ok=True)


def _partial(out: Path, group: Group, rank: int) -> Path:
    return out.with_name(f"{out.name}.partial" + (f"-{rank}of{group.size}" if group.size > 1 else ""))


def _strangers(out: Path, group: Group) -> list[Path]:
    """Files that an unfinished run of another number of processes has left."""
    own = {_partial(out, group, rank) for rank in range(group.size)}
    return sorted({*out.parent.glob(f"{glob.escape(out.name)}.partial*")} - own)
