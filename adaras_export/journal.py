"""A file of finished batches, from which a run that was killed goes on: JSON lines, only ever appended to.

The first line says what the others are about. Knows nothing of what they hold.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adaras_export import foreign
from adaras_export.errors import TraceError
from adaras_export.foreign import UnreadableError
from adaras_export.storage import append

_KIND = "answers"
_HEAD = b'{"kind": "answers", "of": "'


class Journal:
    """Lines of one run; ``identity`` is the same for runs whose lines may be used for each other."""

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._identity = path, identity
        self._head = b""  # what the first line appended must be preceded by

    def read(self, entry: Callable[[Any], None]) -> None:
        """Give every line to ``entry``; cuts off an unfinished last one.

        Raises:
            TraceError: the file is of another run, holds what ``entry`` raises `UnreadableError` for, or cannot be
                read or written. It is left as it was.
        """
        try:
            content = foreign.content(self._path) if self._path.is_file() else b""
            lines = content[: content.rfind(b"\n") + 1].splitlines()  # a crash may leave the last one unfinished
            if lines or not _HEAD.startswith(content[: len(_HEAD)]):
                self._require_own(foreign.parsed(lines[0] if lines else content))
            for line in lines[1:]:
                entry(foreign.parsed(line))
        except UnreadableError as error:
            raise TraceError(f"{self._path}: {error}; expected the journal of an earlier run, or no file") from error
        if content:
            self._cut(len(b"".join(line + b"\n" for line in lines)))
        if not lines:
            self._head = json.dumps({"kind": _KIND, "of": self._identity}).encode() + b"\n"

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

    def append(self, record: Mapping[str, Any]) -> None:
        """One line, on disk when this returns; makes the file if there is none.

        Raises:
            TraceError: it cannot be written.
        """
        try:
            append(self._path, self._head + json.dumps(record).encode() + b"\n")
        except OSError as error:
            raise self._unwritable(error) from error
        self._head = b""

    def _unwritable(self, error: OSError) -> TraceError:
        return TraceError(
            f"{self._path}: cannot be written ({foreign.reason(error)}); expected a writable place with room"
        )
