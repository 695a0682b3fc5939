"""Appends traces to a file. A crash loses at most the last line."""

import json
import os
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from adaras_export.core.trace_files import read_traces, trace_line
from adaras_export.core.traces import Question, Settings, Trace, digest
from adaras_export.errors import TraceError
from adaras_export.files import safe_read
from adaras_export.files.append_log import AppendLog
from adaras_export.files.safe_read import UnreadableError

_LINE_START = b'{"id": '


class TraceLog:
    """The trace file of one run of `collect`; as a context manager it locks the file.

    Raises:
        TraceError: another process writes the file, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._log = AppendLog(path)

    def __enter__(self) -> "TraceLog":
        self._log.claim()
        return self

    def __exit__(self, *_: object) -> None:
        path = self._log.path
        if path.is_file() and path.stat().st_size == 0:  # nothing was written
            path.unlink()
        self._log.close()

    def append(self, traces: Sequence[Trace]) -> None:
        """Append traces; they are on disk when this returns.

        Raises:
            TraceError: the file cannot be written.
        """
        self._log.append("".join(f"{trace_line(trace)}\n" for trace in traces).encode())

    def resume(
        self, questions: Sequence[Question], model: str | None = None, settings: Settings | None = None
    ) -> dict[str, Trace]:
        """The traces in the file, by id; repairs an unfinished last line.

        Raises:
            TraceError: the file cannot be read or written or holds no traces, or a trace has a question that is not
                given, another ``model``, or other ``settings``.
        """
        path = self._log.path
        with self._log.worded():
            if not path.is_file():  # a device such as /dev/full has no end
                return {}
            _mend_last_line(path)
            if path.stat().st_size == 0:
                return {}
        traces = read_traces(path)
        prompts = {question.id: digest(question.prompt) for question in questions}
        for trace in traces:
            _require_question(path, trace, prompts)
            if model is not None and trace.model not in (None, model):
                raise TraceError(
                    f"{path}: trace {trace.id} was written by {trace.model}; expected one of {model}, or a new file"
                )
            if trace.settings is not None and settings is not None:
                _require_settings(path, trace, trace.settings, settings)
        return {trace.id: trace for trace in traces}


def _require_question(out: Path, trace: Trace, prompts: Mapping[str, str]) -> None:
    if trace.question_id not in prompts:
        raise TraceError(
            f"{out}: holds question {trace.question_id}, which is not among the {len(prompts)} given; expected all "
            "questions of the file, and possibly new ones; or choose a new file"
        )
    if prompts[trace.question_id] != digest(trace.prompt):
        raise TraceError(
            f"{out}: trace {trace.id} has another prompt than question {trace.question_id}; "
            "expected a file of the same questions, or a new one"
        )


def _require_settings(out: Path, trace: Trace, found: Settings, given: Settings) -> None:
    """Refuse other settings: a contrast of such traces would show the effect of the settings."""
    other = [name for name in dict.fromkeys((*found, *given)) if found.get(name) != given.get(name)]
    if other:
        differences = ", ".join(
            f"{name} {json.dumps(found.get(name))} (now {json.dumps(given.get(name))})" for name in other
        )
        raise TraceError(
            f"{out}: trace {trace.id} was sampled with {differences}; expected the same settings; give those of the "
            "file, or choose a new file"
        )


def _mend_last_line(out: Path) -> None:
    """Cut off an unfinished last line, or add its missing line end."""
    with out.open("rb") as file:
        last = b"".join(deque(file, maxlen=1))
    if last.endswith(b"\n") or not last:
        return
    if last[: len(_LINE_START)] != _LINE_START[: len(last)]:
        raise TraceError(f"{out}: last line is not a trace; expected a file of traces or a new one")
    with out.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        if _is_json(last):
            file.write(b"\n")
        else:
            file.truncate(end - len(last))


def _is_json(line: bytes) -> bool:
    try:
        safe_read.parsed(line, exact=True)
    except UnreadableError:
        return False
    return True
