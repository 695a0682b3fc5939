"""Reads and writes JSONL files of traces and questions. An error names the file and line."""

import json
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from adaras_export.core.traces import _T, Question, Trace, _require_text, digest
from adaras_export.errors import TraceError
from adaras_export.files import safe_read
from adaras_export.files.atomic import replace_file
from adaras_export.files.safe_read import UnreadableError


def read_traces(path: str | Path) -> list[Trace]:
    """The traces of a JSONL file, in this package's format or the reference's, in file order.

    The reference's lines (``id`` is the question, ``_id`` the attempt) get the prompt text that its
    authors used, and the trace id ``question#attempt``.

    Args:
        path: what `collect` wrote, or lines with id, question_id, prompt, completion and correct.

    Raises:
        TraceError: with path:line of the first line that is not a trace, repeats a trace id, or
            asks something else under a known question id; with the path, where there is no line.

    Example:
        traces = read_traces("traces.jsonl")
        print(sum(trace.correct for trace in traces), "of", len(traces), "are correct")
    """
    traces: list[Trace] = []
    lines: dict[str, int] = {}
    prompts: dict[str, tuple[str, int]] = {}
    for line, trace in _parsed(path, _trace_of):
        _claim(lines, f"trace {trace.id}", path, line)
        prompt, first = prompts.setdefault(trace.question_id, (digest(trace.prompt), line))
        if prompt != digest(trace.prompt):
            raise TraceError(
                f"{path}:{line}: question {trace.question_id} has another prompt than on "
                f"line {first}; expected one prompt per question_id"
            )
        traces.append(trace)
    return traces


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a JSONL file, in file order.

    A ``prompt`` stays as it is (text is raw text); a ``question`` becomes the only user message of a chat. The
    reference's AIME files use some ids in two years. Where all rows of an id have a year, ``@`` and the digest of the
    prompt are appended to the id.

    Args:
        path: lines with id, prompt (text, or chat messages) or question, and answer.

    Raises:
        TraceError: with path:line of the first line that is not a question or repeats the id of one; with the
            path, where the file has no line.

    Example:
        questions = read_questions("questions.jsonl")
        print(questions[0].id, questions[0].prompt, questions[0].answer)
    """
    rows = list(_parsed(path, _question_of))
    years = Counter(question.id for _, (question, has_year) in rows if has_year)
    undated = {question.id for _, (question, has_year) in rows if not has_year}
    lines: dict[str, int] = {}
    questions: list[Question] = []
    for line, (question, _) in rows:
        if question.id not in undated and years[question.id] > 1:
            question = replace(question, id=f"{question.id}@{digest(question.prompt)}")
        _claim(lines, f"question {question.id}", path, line)
        questions.append(replace(question, place=f"{path}:{line}"))
    return questions


def read_prompts(path: str | Path) -> list[Trace] | list[Question]:
    """The traces of a JSONL file if its first line has a label, else its questions.

    Raises:
        TraceError: `read_traces` or `read_questions` refuses the file.
    """
    _, first = next(_parsed(path, dict))
    return read_traces(path) if {"correct", "is_good"} & first.keys() else read_questions(path)


def write_traces(path: str | Path, traces: Sequence[Trace]) -> None:
    """Write what `read_traces` reads, atomically.

    Raises:
        ArtifactError: the file cannot be written.
    """
    replace_file(path, _jsonl([trace_line(trace) for trace in traces]))


def write_questions(path: str | Path, questions: Sequence[Question]) -> None:
    """Write what `read_questions` reads, atomically.

    Raises:
        ArtifactError: the file cannot be written.
    """
    replace_file(path, _jsonl([question_line(question) for question in questions]))


def trace_line(trace: Trace) -> str:
    """One JSON object in a fixed key order, without the line end."""
    known = [name for name in ("model", "settings") if getattr(trace, name) is not None]
    return _line(trace, ("id", "question_id", "prompt", "completion", "correct", *known))


def question_line(question: Question) -> str:
    """One JSON object in a fixed key order, without the line end."""
    return _line(question, ("id", "prompt", "answer", *(() if question.check is None else ("check",))))


def _parsed(path: str | Path, parse: Callable[[dict[str, Any]], _T]) -> Iterator[tuple[int, _T]]:
    """Line number (from 1) and value of every line that is not blank."""
    is_empty = True
    try:
        safe_read.size_of(Path(path))
        with Path(path).open("rb") as file:  # bytes: text mode would break lines at a lone carriage return
            for line, content in enumerate(iter(partial(file.readline, safe_read.LARGEST + 1), b""), 1):
                if content.strip():
                    is_empty = False
                    yield line, _located(f"{path}:{line}", content, parse)
    except (UnreadableError, OSError) as error:
        raise TraceError(f"{path}: cannot be read ({safe_read.reason(error)}); expected a JSONL file") from error
    if is_empty:
        raise TraceError(f"{path}: is empty; expected one JSON object per line")


def _claim(lines: dict[str, int], name: str, path: str | Path, line: int) -> None:
    """Record the line of a name in ``lines``; refuse a name that is already there."""
    if name in lines:
        raise TraceError(f"{path}:{line}: {name} was already on line {lines[name]}; expected unique ids")
    lines[name] = line


def _located(place: str, content: bytes, parse: Callable[[dict[str, Any]], _T]) -> _T:
    try:
        return parse(_object(content))
    except TraceError as error:
        raise TraceError(f"{place}: {error}") from error


def _object(content: bytes) -> dict[str, Any]:
    if len(content) > safe_read.LARGEST:
        raise TraceError(f"is longer than {safe_read.LARGEST} bytes; expected one JSON object per line")
    try:
        value = safe_read.parsed(content, exact=True)  # a float would turn the answer 0.10 into 0.1
    except UnreadableError as error:
        raise TraceError(f"{error}; expected one JSON object in UTF-8 per line") from error
    if not isinstance(value, dict):
        raise TraceError(f"is {reprlib.repr(value)}; expected a JSON object")
    return value


def _trace_of(row: dict[str, Any]) -> Trace:
    if "_id" in row or "thinking" in row:
        _require_keys(row, ("id", "_id", "question", "thinking", "is_good"))
        question = _identifier(row, "id")
        _require_text("trace", "question", row["question"])
        return Trace(
            id=f"{question}#{_identifier(row, '_id')}",
            question_id=question,
            prompt=f"Question: {row['question']}\nThinking process:",
            completion=row["thinking"],
            correct=row["is_good"],
        )
    _require_keys(row, ("id", "question_id", "prompt", "completion", "correct"))
    return Trace(
        id=_identifier(row, "id"),
        question_id=_identifier(row, "question_id"),
        prompt=row["prompt"],
        completion=row["completion"],
        correct=row["correct"],
        model=row.get("model"),
        settings=row.get("settings"),
    )


def _question_of(row: dict[str, Any]) -> tuple[Question, bool]:
    """The question, and whether the line is in the reference's format with a year."""
    if "prompt" in row and "question" in row:
        raise TraceError("has both prompt and question; expected one of them")
    is_reference = "question" in row
    _require_keys(row, ("id", "question" if is_reference else "prompt", "answer"))
    answer = row["answer"]
    if isinstance(answer, int | Decimal) and not isinstance(answer, bool):
        answer = str(answer)
    prompt = [{"role": "user", "content": row["question"]}] if is_reference else row["prompt"]
    return Question(_identifier(row, "id"), prompt, answer, row.get("check")), is_reference and "year" in row


def _require_keys(row: Mapping[str, Any], keys: Sequence[str]) -> None:
    missing = [key for key in keys if key not in row]
    if missing:
        found = ", ".join(row) or "no key"
        raise TraceError(f"has no {', '.join(missing)} (found {found}); expected {', '.join(keys)}")


def _identifier(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise TraceError(f"{key} is {reprlib.repr(value)}; expected text or a whole number")
    return value


def _line(value: object, keys: Sequence[str]) -> str:
    return json.dumps({key: getattr(value, key) for key in keys}, ensure_ascii=False)


def _jsonl(lines: Sequence[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
