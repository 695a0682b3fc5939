"""Float32 rows in a file, written batch by batch, so that a run that was killed goes on where it was.

Knows nothing of what the rows mean. The file is one line of JSON, which says what is kept and of what, and then the
numbers of row after row in the order in which they are read. They are mapped and never in memory as a whole.
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

_ALIGNED = 64  # bytes; the numbers begin at a multiple, so that they can be mapped as they are


@dataclass(frozen=True, eq=False)
class KeptRows:
    """Rows by number, each as a view of the file."""

    numbers: Array
    starts: Array
    widths: Array

    def __len__(self) -> int:
        return len(self.widths)

    def __getitem__(self, row: int) -> Array:
        found: Array = self.numbers[self.starts[row] : self.starts[row] + self.widths[row]]
        return found


def keep_rows(
    path: Path,
    key: Mapping[str, Any],
    widths: Sequence[int],
    groups: Sequence[Sequence[int]],
    read_batch: ReadBatch,
    progress: Callable[[int, int], None] | None = None,
) -> KeptRows:
    """The rows, of ``widths[row]`` numbers each: those that the file holds, and the others read into it.

    Args:
        path: the file; it stays, and its owner removes it.
        key: what the rows are of, JSON values by name; a file of something else is refused.
        widths: of each row.
        groups: the rows of each batch, every row in exactly one. A batch is read and written as a whole, since another
            batch could round differently.
        read_batch: gives the rows with these numbers.
        progress: whom to tell how many rows there are.

    Raises:
        TraceError: the file is of another run, is written by another process, or cannot be written.
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
    """How many batches the file holds whole; cuts off what is behind them, and writes the header if it is not whole."""
    safe_read.size_of(path)  # refuses what is no regular file
    with path.open("rb") as file:
        found = file.readline(safe_read.LARGEST)
    if found != header:
        if not header.startswith(found):  # else a kill left the beginning of it
            raise TraceError(
                f"{path}: is of an unfinished run with other input ({_differences(found, header)}); expected the same; "
                "run that one again, or delete the file"
            )
        path.write_bytes(header)
        return 0
    held = (path.stat().st_size - len(header)) // 4
    done = int(np.searchsorted(ends, held, side="right"))
    os.truncate(path, len(header) + 4 * int(ends[done - 1] if done else 0))
    return done


def _differences(found: bytes, header: bytes) -> str:
    """In which entries two keys differ."""
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
            f"{path}: needs {needed / 1e9:.1f} GB for what is read off the prompts, and {free / 1e9:.1f} GB are free; "
            "expected room; read fewer layers (--below-layer) or fewer prompts, or write to another disk"
        )
