"""A file of finished batches, from which a run that was killed goes on: JSON lines, only ever appended to.

The first line says what the others are about. Each further one ends with a seal over itself and all before it, so that
a line that was edited, doubled or moved is found. One process at a time writes. Knows nothing of what the lines hold.
"""

import json
import os
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from adaras_export.errors import TraceError
from adaras_export.files import safe_read
from adaras_export.files.atomic import append, sha256
from adaras_export.files.locks import locked
from adaras_export.files.safe_read import UnreadableError

_KIND = "answers"
_HEAD = b'{"kind": "answers", "of": "'


class Journal:
    """Lines of one run; ``identity`` is the same for runs whose lines may be used for each other."""

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._identity = path, identity
        self._head = json.dumps({"kind": _KIND, "of": identity}).encode() + b"\n"  # to be written before the next line
        self._seal = identity
        self._free: Callable[[], object] | None = None

    def read(self, entry: Callable[[Any], None]) -> None:
        """Give every line to ``entry``; cuts off an unfinished last one.

        Raises:
            TraceError: the file is of another run or is written by another process, holds a line that is not as it was
                written or that ``entry`` raises `UnreadableError` for, or cannot be read or written. It is left as it
                was.
        """
        if not self._path.is_file():
            return
        self._claim()
        try:
            self._read(entry)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes write the file."""
        if self._free is not None:
            self._free()
            self._free = None

    def append(self, record: Mapping[str, Any]) -> None:
        """One line, on disk when this returns; makes the file if there is none.

        Raises:
            TraceError: it cannot be written, or another process began it meanwhile.
        """
        if self._free is None:
            self._claim()
            if self._path.stat().st_size:
                self.close()
                raise self._taken()
        seal = self._sealed(record)
        try:
            append(self._path, self._head + json.dumps({**record, "seal": seal}).encode() + b"\n")
        except OSError as error:
            raise self._unwritable(error) from error
        self._head, self._seal = b"", seal

    def _claim(self) -> None:
        try:
            lock = locked(self._path)
        except OSError as error:
            raise self._unwritable(error) from error
        if lock is None:
            raise self._taken()
        self._free = weakref.finalize(self, os.close, lock)

    def _read(self, entry: Callable[[Any], None]) -> None:
        number = end = 0
        try:
            safe_read.size_of(self._path)
            with self._path.open("rb") as file:
                for number, line in enumerate(iter(partial(file.readline, safe_read.LARGEST + 1), b""), 1):
                    end += self._take(number, line, entry)
        except (UnreadableError, OSError) as error:
            raise TraceError(
                f"{self._path}:{number}: {safe_read.reason(error)}; expected the journal of an earlier run, or no file"
            ) from error
        self._cut(end)

    def _take(self, number: int, line: bytes, entry: Callable[[Any], None]) -> int:
        """Use a line; how many of its bytes stay, which is none where a crash left it unfinished."""
        if len(line) > safe_read.LARGEST:
            raise UnreadableError(f"is longer than {safe_read.LARGEST} bytes")
        is_whole = line.endswith(b"\n")
        if number == 1 and (is_whole or not _HEAD.startswith(line[: len(_HEAD)])):
            self._require_own(safe_read.parsed(line))
            self._head = b""
        elif is_whole:
            self._use(safe_read.parsed(line), entry)
        return len(line) if is_whole else 0

    def _use(self, line: Any, entry: Callable[[Any], None]) -> None:  # noqa: ANN401 - a JSON value
        seal = line.pop("seal", None) if isinstance(line, dict) else None
        if seal != self._sealed(line):
            raise UnreadableError("is not as it was written: edited, doubled, moved, or of an earlier version")
        self._seal = seal
        entry(line)

    def _sealed(self, record: Mapping[str, Any]) -> str:
        """The seal of a line behind those before."""
        return sha256(f"{self._seal}{json.dumps(record)}".encode())[:16]

    def _require_own(self, head: Any) -> None:  # noqa: ANN401 - a JSON value
        if not isinstance(head, dict) or head.get("kind") != _KIND or head.get("of") != self._identity:
            raise TraceError(
                f"{self._path}: is of other questions, another checker or other options of generation; "
                "expected those of the run that it is from; delete it to begin again"
            )

    def _cut(self, length: int) -> None:
        try:
            with self._path.open("ab") as file:
                file.truncate(length)
        except OSError as error:
            raise self._unwritable(error) from error

    def _taken(self) -> TraceError:
        return TraceError(f"{self._path}: another process is writing it; wait for its end, or choose another output")

    def _unwritable(self, error: OSError) -> TraceError:
        return TraceError(
            f"{self._path}: cannot be written ({safe_read.reason(error)}); expected a writable place with room"
        )
