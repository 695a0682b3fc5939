"""Questions of benchmarks, procedural tasks and files, in the form that `collect` and `eval` read.

A preset is a data set on the Hub at a pinned commit; its rows may come from a file with the same columns instead. Rows
are data: no code of a repository is run, and nothing is unpickled.
"""

import base64
import binascii
import hashlib
import json
import re
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaras_export.core.question_identity import BOXED, COMPLETE, SOLVE, TAGGED, TEST
from adaras_export.core.trace_files import question_line, read_questions
from adaras_export.core.traces import Question, digest
from adaras_export.data.code_execution import called_names
from adaras_export.errors import HubError, TraceError, first_line, require
from adaras_export.files import safe_read
from adaras_export.files.safe_read import UnreadableError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """A benchmark: its repository, commit and licence, and the function that turns a row into a question."""

    repository: str
    revision: str
    split: str
    licence: str
    checker: str
    instruction: str
    parse: Callable[[Row], tuple[str, str]]
    """Returns a row's question text and the answer for the checker."""
    key: str | None = None
    """The column of the id; if None, the row's number is the id."""
    config: str | None = None
    files: str | None = None
    """A pattern of JSONL files, for a repository whose own loader is a script (scripts are not run)."""


@dataclass(frozen=True)
class Source:
    """Another source of rows than the preset's."""

    file: Path | None = None
    revision: str | None = None
    split: str | None = None


def _columns(question: str, answer: str) -> Callable[[Row], tuple[str, str]]:
    return lambda row: (_text(row, question), _text(row, answer))


def _gsm8k(row: Row) -> tuple[str, str]:
    return _text(row, "question"), _text(row, "answer").rpartition("####")[2].strip()


def _humaneval(row: Row) -> tuple[str, str]:
    keys = ("entry_point", "prompt", *(("test",) if "test" in row else ("canonical_solution", "base_input")))
    problem = {key: _value(row, key) for key in keys}
    problem |= {key: row[key] for key in ("plus_input", "atol", "contract") if "base_input" in problem and key in row}
    return f"```python\n{_text(row, 'prompt')}```", json.dumps(problem)


def _mbpp(row: Row) -> tuple[str, str]:
    """MBPP and MBPP+: the assertions name the function; MBPP+'s ``test`` replaces the assertions."""
    tests = _value(row, "test_list")
    names = called_names(tests[0])
    if not names:
        raise TraceError(f"test {tests[0]!r}: calls no function")
    setup = "\n".join(row.get("test_imports") or [row.get("test_setup_code") or ""])
    question = f"{row.get('text') or _text(row, 'prompt')}\n{TEST}\n{tests[0]}"
    test = row.get("test") or "\n".join([setup, *tests])
    return question, json.dumps({"entry_point": names[0], "test": test})


def _livecodebench(row: Row) -> tuple[str, str]:
    cases = [*json.loads(_text(row, "public_test_cases")), *_private_cases(row.get("private_test_cases") or "[]")]
    starter = row.get("starter_code") or ""
    question = _text(row, "question_content") + (f"\n\n```python\n{starter}\n```" if starter else "")
    name = (json.loads(row.get("metadata") or "{}") or {}).get("func_name")
    if not name:
        return question, json.dumps({"stdin": [{"input": case["input"], "output": case["output"]} for case in cases]})
    functional = [
        {"input": [json.loads(line) for line in case["input"].splitlines()], "output": json.loads(case["output"])}
        for case in cases
    ]
    return question, json.dumps({"entry_point": name, "functional": functional})


def _private_cases(text: str) -> list[dict[str, str]]:
    """LiveCodeBench's private tests: JSON, or a pickled string in zlib and base64, which is read without unpickling."""
    try:
        cases: list[dict[str, str]] = json.loads(text)
    except json.JSONDecodeError:
        inflate = zlib.decompressobj()
        try:
            content = inflate.decompress(base64.b64decode(text, validate=True), 256 << 20)
            cases = json.loads(pickled_string(content))
        except (binascii.Error, zlib.error, ValueError) as error:
            raise TraceError(f"private_test_cases: cannot be read ({first_line(error)})") from error
    return cases


def pickled_string(content: bytes) -> str:
    """The string in a pickle of protocol 2 to 5 that holds one string and nothing else; nothing is unpickled.

    Raises:
        ValueError: the pickle holds anything else.
    """
    frame = rb"(?:\x95.{8})?"
    head = re.match(rb"\x80[\x02-\x05]" + frame + rb"([X\x8c\x8d])", content, re.DOTALL)
    if head is None:
        raise ValueError("is no pickled string")
    layout = {b"X": "<I", b"\x8c": "<B", b"\x8d": "<Q"}[head[1]]
    start = head.end() + struct.calcsize(layout)
    (length,) = struct.unpack(layout, content[head.end() : start].ljust(8, b"\0")[: struct.calcsize(layout)])
    if re.fullmatch(frame + rb"(?:\x94|q.)?\.", content[start + length :], re.DOTALL) is None:
        raise ValueError("is more than a pickled string")
    return content[start : start + length].decode()


PRESETS: dict[str, Preset] = {
    "gsm8k": Preset(
        "openai/gsm8k", "cc7b047b6e5bb11b4f1af84efc572db110a51b3c", "test", "MIT", "math_verify", BOXED, _gsm8k,
        config="main",
    ),
    "math-500": Preset(
        "HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", "test", "MIT", "math_verify", BOXED,
        _columns("problem", "answer"), key="unique_id",
    ),
    "aime-24": Preset(
        "HuggingFaceH4/aime_2024", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a", "train", "not stated", "math_verify",
        BOXED, _columns("problem", "answer"), key="id",
    ),
    "aime-25": Preset(
        "math-ai/aime25", "563bb8404243c5f09de6ec262f2db674fe5bce9b", "test", "Apache-2.0", "math_verify", BOXED,
        _columns("problem", "answer"), key="id",
    ),
    "amc-23": Preset(
        "math-ai/amc23", "80815d37005feb82cd7f8fbc6901d5d3eff43057", "test", "not stated", "math_verify", BOXED,
        _columns("question", "answer"), key="id",
    ),
    "humaneval": Preset(
        "openai/openai_humaneval", "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544", "test", "MIT", "code", COMPLETE,
        _humaneval, key="task_id",
    ),
    "humaneval+": Preset(
        "evalplus/humanevalplus", "d32357cf319e50e9c8d8dab5ea876c72b0fd321b", "test", "Apache-2.0", "code", COMPLETE,
        _humaneval, key="task_id",
    ),
    "mbpp": Preset(
        "google-research-datasets/mbpp", "4bb6404fdc6cacfda99d4ac4205087b89d32030c", "test", "CC-BY-4.0", "code", SOLVE,
        _mbpp, key="task_id", config="full",
    ),
    "mbpp+": Preset(
        "evalplus/mbppplus", "b2d74c91837c3f2a20c1299ae98133cbe7cfa077", "test", "Apache-2.0", "code", SOLVE, _mbpp,
        key="task_id",
    ),
    "livecodebench": Preset(
        "livecodebench/code_generation_lite", "0fe84c3912ea0c4d4a78037083943e8f0c4dd505", "test", "CC", "code", SOLVE,
        _livecodebench, key="question_id", files="test.jsonl",
    ),
}  # fmt: skip


def of_preset(name: str, source: Source, instruction: str | None = None) -> list[Question]:
    """The questions of a benchmark.

    Raises:
        TraceError: there is no such preset, or a row has another form.
        HubError: the data set cannot be read from the Hub.
        MissingExtraError: datasets is not installed.
    """
    if name not in PRESETS:
        raise TraceError(f"{name}: is no preset; expected one of: {', '.join(PRESETS)}, reasoning-gym:TASK, or a file")
    preset = PRESETS[name]
    chosen = preset.instruction if instruction is None else instruction
    rows = _rows(preset, source)
    return [_question(f"{name}/{number}", preset, chosen, row) for number, row in enumerate(rows)]


def _question(numbered: str, preset: Preset, instruction: str, row: Row) -> Question:
    try:
        text, answer = preset.parse(row)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise TraceError(f"row {numbered}: is not of {preset.repository}'s form ({first_line(error)})") from error
    except TraceError as error:
        raise TraceError(f"row {numbered}: {error}") from error
    own = None if preset.key is None else row.get(preset.key)
    id_ = numbered if own is None else f"{numbered.partition('/')[0]}/{own}"
    prompt = [{"role": "user", "content": f"{text}\n\n{instruction}".strip()}]
    return Question(id_, prompt, answer, preset.checker)


def _rows(preset: Preset, source: Source) -> Sequence[Row]:
    library = require("datasets", "questions", "reading a question set")
    if source.split is not None and (source.file is not None or preset.files is not None):
        raise TraceError(f"split {source.split}: {source.file or preset.files} has no splits; expected none")
    split = source.split or preset.split
    revision = source.revision or preset.revision
    try:
        if source.file is not None:
            safe_read.size_of(source.file)
            kind = "parquet" if source.file.suffix == ".parquet" else "json"
            rows = library.load_dataset(kind, data_files=str(source.file), split="train")
        elif preset.files is not None:
            files = f"hf://datasets/{preset.repository}@{revision}/{preset.files}"
            rows = library.load_dataset("json", data_files=files, split="train")
        else:
            rows = library.load_dataset(preset.repository, preset.config, split=split, revision=revision)
    except UnreadableError as error:
        raise TraceError(f"{source.file}: {error}; expected JSONL or Parquet") from error
    except Exception as error:  # datasets passes on errors of its readers and of the network
        subject = source.file or f"{preset.repository}@{revision}"
        refusal = TraceError if source.file else HubError
        raise refusal(f"{subject}: cannot be read ({first_line(error)}); or give its rows by --source") from error
    return rows  # type: ignore[no-any-return]


def of_task(task: str, size: int, seed: int, instruction: str | None = None) -> list[Question]:
    """Questions of a reasoning-gym task; that library generates and scores them.

    Raises:
        TraceError: there is no such task.
        MissingExtraError: reasoning-gym is not installed.
    """
    library = require("reasoning_gym", "questions", "making questions of its tasks")
    try:
        entries = library.create_dataset(task, seed=seed, size=size)
    except ValueError as error:
        raise TraceError(f"reasoning-gym:{task}: {first_line(error)}") from error
    chosen = TAGGED if instruction is None else instruction
    places = [{"seed": seed, "size": size, "index": index} for index in range(size)]
    return [_task_question(task, place, entries[place["index"]], chosen) for place in places]


def _task_question(task: str, place: dict[str, int], entry: Row, instruction: str) -> Question:
    answer = json.dumps({"task": task, **place, "digest": digest(entry["question"])})
    prompt = [{"role": "user", "content": f"{entry['question'].strip()}\n\n{instruction}".strip()}]
    return Question(f"{task}/{place['seed']}/{place['index']}", prompt, answer, "reasoning_gym")


def of_file(path: Path) -> list[Question]:
    """The questions of a JSONL file.

    Raises:
        TraceError: the file cannot be read, or a line is not a question.
    """
    return read_questions(path)


def distinct(questions: Sequence[Question]) -> list[Question]:
    """The first question of each prompt, without questions whose line would be too long to read."""
    seen: dict[str, Question] = {}
    for question in questions:
        if len(question_line(question).encode()) < safe_read.LARGEST:
            seen.setdefault(digest(question.prompt), question)
    return list(seen.values())


def deal(questions: Sequence[Question], parts: Mapping[str, int], seed: int) -> dict[str, list[Question]]:
    """Disjoint parts of the given sizes, chosen by the seed and the prompts' digests, whatever the order of questions.

    Raises:
        TraceError: there are fewer questions than the parts take.
    """
    if sum(parts.values()) > len(questions):
        raise TraceError(f"parts: take {sum(parts.values())} questions; there are {len(questions)} different ones")
    ranked = sorted(questions, key=lambda each: hashlib.sha256(f"{seed}:{digest(each.prompt)}".encode()).digest())
    dealt, start = {}, 0
    for name, size in parts.items():
        dealt[name] = ranked[start : start + size]
        start += size
    return dealt


def _value(row: Row, key: str) -> Any:  # noqa: ANN401 - a JSON value
    if row.get(key) is None:
        raise TraceError(f"has no {key} (found {', '.join(row)})")
    return row[key]


def _text(row: Row, key: str) -> str:
    return str(_value(row, key))
