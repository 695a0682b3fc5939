"""Float32 rows in a memory-mapped file, written batch by batch; a killed run resumes from it.

The file begins with one line of JSON, which identifies the run. The rows follow in the order of the batches.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adaras_export.errors import TraceError
from adaras_export.files import safe_read
from adaras_export.files.append_log import AppendLog
from adaras_export.files.safe_read import UnreadableError
from adaras_export.files.safetensors_record import Array

ReadBatch = Callable[[Sequence[int]], Sequence[Array]]

_ALIGNED = 64  # bytes; the numbers begin at a multiple of it


@dataclass(frozen=True, eq=False)
class KeptRows:
    """Rows by number, each as a view of the file."""

    numbers: Array
    starts: Array
    widths: Array

    def __len__(self) -> int:
        return len(self.widths)

    def __getitem__(self, row: int) -> Array:
        values: Array = self.numbers[self.starts[row] : self.starts[row] + self.widths[row]]
        return values


def keep_rows(
    path: Path,
    key: Mapping[str, Any],
    widths: Sequence[int],
    groups: Sequence[Sequence[int]],
    read_batch: ReadBatch,
    progress: Callable[[int, int], None] | None = None,
) -> KeptRows:
    """All rows, memory-mapped: reads the batches that the file lacks and appends them to it.

    Args:
        path: the file; the caller removes it.
        key: identifies the run, JSON values by name; a file with another key is refused.
        widths: how many numbers each row has.
        groups: the rows of each batch, every row in exactly one. A resumed run reads whole batches, since other batches
            could round differently.
        read_batch: returns the rows with these indices.
        progress: called with the number of finished rows and of all rows.

    Raises:
        TraceError: the file belongs to another run, another process writes it, or it cannot be written.
    """
    order = [row for group in groups for row in group]
    assert sorted(order) == [*range(len(widths))]  # every row once
    starts = np.zeros(len(widths), np.int64)
    starts[order] = np.cumsum([0, *(widths[row] for row in order)])[:-1]
    header = _header(key)
    ends = np.cumsum([sum(widths[row] for row in group) for group in groups])
    log = AppendLog(path)
    log.claim()
    with closing(log):
        with log.worded():
            done = _begin(path, header, ends)
            _require_room(path, 4 * int(ends[-1] - (ends[done - 1] if done else 0)))
        for at, group in enumerate(groups):
            if at >= done:
                log.append(b"".join(np.ascontiguousarray(row, "<f4").tobytes() for row in read_batch(group)))
            if progress is not None:
                progress(sum(map(len, groups[: at + 1])), len(widths))
    numbers = np.memmap(path, "<f4", "r", offset=len(header), shape=(int(ends[-1]),))
    return KeptRows(numbers, starts, np.asarray(widths, np.int64))


def _header(key: Mapping[str, Any]) -> bytes:
    line = json.dumps(key, sort_keys=True, allow_nan=False).encode()
    return line + b" " * (-(len(line) + 1) % _ALIGNED) + b"\n"


def _begin(path: Path, header: bytes, ends: Array) -> int:
    """How many complete batches the file holds; cuts off an incomplete batch, and completes the header."""
    safe_read.size_of(path)  # refuses a path that is not a regular file
    with path.open("rb") as file:
        found = file.readline(safe_read.LARGEST)
    if found != header:
        if not header.startswith(found):  # a killed run can leave the beginning of its header
            raise TraceError(
                f"{path}: is of an unfinished run with other input ({_differences(found, header)}); expected the same; "
                "repeat that run, or delete the file"
            )
        path.write_bytes(header)
        return 0
    held = (path.stat().st_size - len(header)) // 4
    done = int(np.searchsorted(ends, held, side="right"))
    os.truncate(path, len(header) + 4 * int(ends[done - 1] if done else 0))
    return done


def _differences(found: bytes, header: bytes) -> str:
    """Names of the entries in which two headers differ."""
    expected = json.loads(header)
    try:
        other = safe_read.parsed(found)
    except UnreadableError:
        other = None
    if not isinstance(other, dict):
        return "it does not begin with a line of ours"
    return ", ".join(name for name in sorted({*expected, *other}) if expected.get(name) != other.get(name))


def _require_room(path: Path, needed: int) -> None:
    if needed > (free := shutil.disk_usage(path.parent).free):
        raise TraceError(
            f"{path}: needs {needed / 1e9:.1f} GB for activations of the prompts, and {free / 1e9:.1f} GB are free; "
            "expected room; read fewer layers (--below-layer) or fewer prompts, or write to another disk"
        )
