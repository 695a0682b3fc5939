"""A file that one process at a time appends to, and from which a run that was killed goes on.

`AppendLog` is the file; `SealedLog` writes JSON lines to one, each with a seal over itself and all before it, so that a
line that was edited, doubled or moved is found. Knows nothing of what the content means.
"""

import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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


class AppendLog:
    """A file that this process alone appends to, once it has claimed it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._free: Callable[[], object] | None = None

    @property
    def is_claimed(self) -> bool:
        """Whether other processes are kept out."""
        return self._free is not None

    def claim(self) -> None:
        """Keep other processes out until `close`; makes the file if there is none.

        Raises:
            TraceError: another process writes the file, or it cannot be written.
        """
        with self.worded():
            lock = locked(self.path)
        if lock is None:
            raise self.taken()
        self._free = weakref.finalize(self, os.close, lock)

    def append(self, content: bytes) -> None:
        """Add ``content``, on disk when this returns.

        Raises:
            TraceError: the file cannot be written.
        """
        with self.worded():
            append(self.path, content)

    def cut(self, length: int) -> None:
        """Keep the first ``length`` bytes.

        Raises:
            TraceError: the file cannot be written.
        """
        with self.worded():
            os.truncate(self.path, length)

    def close(self) -> None:
        """Let other processes write the file."""
        if self._free is not None:
            self._free()
            self._free = None

    def taken(self) -> TraceError:
        """The error for a file that another process writes."""
        return TraceError(f"{self.path}: another process is writing it; wait for its end, or choose another file")

    @contextmanager
    def worded(self) -> Iterator[None]:
        """Turn what the file system says into one line."""
        try:
            yield
        except (OSError, UnreadableError) as error:
            raise TraceError(
                f"{self.path}: cannot be written ({safe_read.reason(error)}); expected a writable place with room; "
                "run again to go on with what it holds"
            ) from error


class SealedLog:
    """JSON lines of one run; ``identity`` is the same for runs whose lines may be used for each other."""

    def __init__(self, path: Path, identity: str) -> None:
        self._log, self._identity = AppendLog(path), identity
        self._head = json.dumps({"kind": _KIND, "of": identity}).encode() + b"\n"  # to be written before the next line
        self._seal = identity

    def read(self, entry: Callable[[Any], None]) -> None:
        """Give every line to ``entry``; cuts off an unfinished last one.

        Raises:
            TraceError: the file is of another run or is written by another process, holds a line that is not as it was
                written or that ``entry`` raises `UnreadableError` for, or cannot be read or written. It is left as it
                was.
        """
        if not self._log.path.is_file():
            return
        self._log.claim()
        try:
            self._read(entry)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes write the file."""
        self._log.close()

    def append(self, record: Mapping[str, Any]) -> None:
        """One line, on disk when this returns; makes the file if there is none.

        Raises:
            TraceError: it cannot be written, or another process began it meanwhile.
        """
        if not self._log.is_claimed:
            self._log.claim()
            if self._log.path.stat().st_size:
                self.close()
                raise self._log.taken()
        seal = self._sealed(record)
        self._log.append(self._head + json.dumps({**record, "seal": seal}).encode() + b"\n")
        self._head, self._seal = b"", seal

    def _read(self, entry: Callable[[Any], None]) -> None:
        path, number, end = self._log.path, 0, 0
        try:
            safe_read.size_of(path)
            with path.open("rb") as file:
                for number, line in enumerate(iter(partial(file.readline, safe_read.LARGEST + 1), b""), 1):
                    end += self._take(number, line, entry)
        except (UnreadableError, OSError) as error:
            raise TraceError(
                f"{path}:{number}: {safe_read.reason(error)}; expected the journal of an earlier run, or no file"
            ) from error
        self._log.cut(end)

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
                f"{self._log.path}: is of other questions, another checker or other options of generation; "
                "expected those of the run that it is from; delete it to begin again"
            )
