"""A file that one process at a time appends to; a killed run resumes from it.

`AppendLog` is the file. `SealedLog` appends JSON lines. Each line has a seal: a hash over the line and all lines before
it. The seals reveal a line that was edited, duplicated or moved.
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
    """A file that only this process appends to after `claim`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._free: Callable[[], object] | None = None

    @property
    def is_claimed(self) -> bool:
        """Whether this process holds the lock of the file."""
        return self._free is not None

    def claim(self) -> None:
        """Lock the file until `close`; create it if it is missing.

        Raises:
            TraceError: another process writes the file, or it cannot be written.
        """
        with self.worded():
            lock = locked(self.path)
        if lock is None:
            raise self.taken()
        self._free = weakref.finalize(self, os.close, lock)

    def append(self, content: bytes) -> None:
        """Append ``content``; it is on disk when this returns.

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
        """Release the lock."""
        if self._free is not None:
            self._free()
            self._free = None

    def taken(self) -> TraceError:
        """The error for a file that another process writes."""
        return TraceError(f"{self.path}: another process is writing it; wait until it ends, or choose another file")

    @contextmanager
    def worded(self) -> Iterator[None]:
        """Turn errors of the file system into a `TraceError`."""
        try:
            yield
        except (OSError, UnreadableError) as error:
            raise TraceError(
                f"{self.path}: cannot be written ({safe_read.reason(error)}); expected a writable place with room; "
                "repeat the command to resume from this file"
            ) from error


class SealedLog:
    """JSON lines of one run. Runs with the same ``identity`` may resume from each other's file."""

    def __init__(self, path: Path, identity: str) -> None:
        self._log, self._identity = AppendLog(path), identity
        self._head = json.dumps({"kind": _KIND, "of": identity}).encode() + b"\n"  # written before the first line
        self._seal = identity

    def read(self, entry: Callable[[Any], None]) -> None:
        """Pass every line to ``entry``; cut off an unfinished last line.

        Raises:
            TraceError: the file belongs to another run, another process writes it, a line has a wrong seal, ``entry``
                raises `UnreadableError`, or the file cannot be read or written. The file is left unchanged.
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
        """Release the lock."""
        self._log.close()

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one line; it is on disk when this returns. Creates the file if it is missing.

        Raises:
            TraceError: the file cannot be written, or another process has written it since `read`.
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
        """Process a line and return how many of its bytes stay: 0 for a line that a crash left unfinished."""
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
        """The seal of the next line."""
        return sha256(f"{self._seal}{json.dumps(record)}".encode())[:16]

    def _require_own(self, head: Any) -> None:  # noqa: ANN401 - a JSON value
        if not isinstance(head, dict) or head.get("kind") != _KIND or head.get("of") != self._identity:
            raise TraceError(
                f"{self._log.path}: was written with other questions, another checker or other generation options; "
                "expected the same ones; delete it to begin again"
            )
