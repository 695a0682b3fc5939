"""A file of traces that grows: every line that was written stays, and a crash costs at most the last one.

Knows nothing of how traces are made.
"""

import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from adaras_export import foreign
from adaras_export.errors import TraceError
from adaras_export.foreign import UnreadableError
from adaras_export.storage import append
from adaras_export.traces import Question, Trace, digest, read_traces, trace_line

_LINE_START = b'{"id": '


def append_traces(out: Path, traces: Sequence[Trace]) -> None:
    """Add lines; they are on disk when this returns.

    Raises:
        TraceError: the file cannot be written.
    """
    content = "".join(f"{trace_line(trace)}\n" for trace in traces).encode()
    try:
        append(out, content)
    except OSError as error:
        raise _unwritable(out, error) from error


def resume(out: Path, questions: Sequence[Question], model: str | None = None) -> dict[str, Trace]:
    """The traces that the file holds, by id; the file is made if there is none, a broken last line is mended.

    Raises:
        TraceError: it cannot be read or written, is no file of traces, or is one of other
            questions or of another ``model``.
    """
    try:
        if out.is_file():
            _mend_last_line(out)
        out.open("ab").close()  # fails now, not after the first batch
    except OSError as error:
        raise _unwritable(out, error) from error
    if not out.is_file() or out.stat().st_size == 0:
        return {}
    traces = read_traces(out)
    prompts = {question.id: digest(question.prompt) for question in questions}
    for trace in traces:
        if prompts.get(trace.question_id, digest(trace.prompt)) != digest(trace.prompt):
            raise TraceError(
                f"{out}: trace {trace.id} has another prompt than question {trace.question_id}; "
                "expected a file of the same questions, or a new one"
            )
        if model is not None and trace.model not in (None, model):
            raise TraceError(
                f"{out}: trace {trace.id} was written by {trace.model}; expected one of {model}, or a new file"
            )
    return {trace.id: trace for trace in traces}


def _mend_last_line(out: Path) -> None:
    """Cut off a line that a crash left unfinished; end one that lacks only its line end."""
    with out.open("rb") as file:
        last = b"".join(deque(file, maxlen=1))
    if last.endswith(b"\n") or not last:
        return
    if last[: len(_LINE_START)] != _LINE_START[: len(last)]:
        raise TraceError(f"{out}: last line is no trace of ours; expected a file of traces or a new one")
    with out.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        if _is_json(last):
            file.write(b"\n")
        else:
            file.truncate(end - len(last))


def _is_json(line: bytes) -> bool:
    try:
        foreign.parsed(line, exact=True)
    except UnreadableError:
        return False
    return True


def _unwritable(out: Path, error: OSError) -> TraceError:
    return TraceError(
        f"{out}: cannot be written ({error.strerror}); "
        "expected a writable place with room; run again to go on with what it holds"
    )
