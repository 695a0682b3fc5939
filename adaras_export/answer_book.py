"""Verdicts of many settings on the same questions, asked for piece by piece and never twice.

With a file, each batch is on disk before the next one starts: a run that was killed goes on there. Knows nothing of
which settings are worth trying. N questions.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaras_export import foreign
from adaras_export.errors import TraceError
from adaras_export.evaluate import Exam, in_effect
from adaras_export.foreign import UnreadableError
from adaras_export.generation import batches, complete_from, encode_prompt, pad_id, prefill
from adaras_export.rule import SteeringRule
from adaras_export.storage import Array, append, sha256
from adaras_export.traces import digest

_UNKNOWN = -1
_HEAD = b'{"kind": "tune journal", "of": "'


class AnswerBook:
    """Which questions are answered correctly, unsteered and by rules; a rule acts where ``fires`` says so."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        exam: Exam,
        fires: Array,
        journal: Path | None = None,
    ) -> None:
        """``journal`` is the file to append to and to go on from.

        Raises:
            TraceError: the file is of other questions or settings of generation, or cannot be read or written.
        """
        self._model, self._tokenizer, self._exam, self._fires = model, tokenizer, exam, fires
        self._rows = [encode_prompt(tokenizer, question.prompt) for question in exam.questions]
        self._verdicts: dict[str, Array] = {}
        self._done = 0
        self._journal = None if journal is None else _Journal(journal, _identity(model, exam))
        for key, verdicts in (self._journal.read(len(self._rows)) if self._journal else {}).items():
            self._of(key)[list(verdicts)] = list(verdicts.values())

    def answer(self, rules: Sequence[SteeringRule], questions: Sequence[int]) -> None:
        """Have these questions answered, unsteered and by each rule, where that is not known."""
        steered = [int(one) for one in questions if self._fires[one]]
        planned = [(None, list(map(int, questions))), *((rule, steered) for rule in rules)]
        total = self._done + sum(int((self._of(_key(way))[indices] == _UNKNOWN).sum()) for way, indices in planned)
        self._run([None], planned[0][1], total)
        self._run(rules, steered, total)

    def verdicts(self, rule: SteeringRule | None, questions: Sequence[int]) -> Array:
        """Of answered questions, bool: those of no steering where the gate leaves a prompt alone."""
        indices = np.asarray(questions, dtype=int)
        off = self._of(_key(None))[indices]
        found: Array = np.where(self._fires[indices], self._of(_key(rule))[indices], off)
        assert (found != _UNKNOWN).all()
        correct: Array = found == 1
        return correct

    def _of(self, key: str) -> Array:
        return self._verdicts.setdefault(key, np.full(len(self._rows), _UNKNOWN, dtype=np.int8))

    def _run(self, ways: Sequence[SteeringRule | None], questions: Sequence[int], total: int) -> None:
        exam = self._exam
        for places in batches([len(self._rows[one]) for one in questions], exam.token_budget, exam.max_rows):
            indices = [questions[place] for place in places]
            # The whole batch again where a part is known: another batch shape rounds differently.
            missing = [way for way in ways if (self._of(_key(way))[indices] == _UNKNOWN).any()]
            if not missing:
                continue
            plain = prefill(self._model, [self._rows[one] for one in indices], pad_id(self._tokenizer))
            for way in missing:
                with in_effect(self._model, way):
                    texts = complete_from(self._model, self._tokenizer, plain, exam.sampling)
                self._note(way, indices, texts)
                self._done += len(indices)
                if exam.progress is not None:
                    exam.progress(self._done, max(self._done, total))

    def _note(self, way: SteeringRule | None, indices: Sequence[int], texts: Sequence[str]) -> None:
        answers = [self._exam.questions[index].answer for index in indices]
        correct = [bool(self._exam.check(text, one)) for text, one in zip(texts, answers, strict=True)]
        if self._journal is not None:
            self._journal.append({"way": _key(way), "questions": list(indices), "correct": correct})
        self._of(_key(way))[list(indices)] = correct


def _key(way: SteeringRule | None) -> str:
    return "off" if way is None else way.fingerprint


def _identity(model: PreTrainedModel, exam: Exam) -> str:
    """What the verdicts in a file hang on, beside the rules."""
    questions = [[one.id, digest(one.prompt), one.answer] for one in exam.questions]
    check = getattr(exam.check, "__name__", type(exam.check).__name__)
    sampling = [exam.sampling.max_new_tokens, exam.sampling.stop]
    return sha256(json.dumps([questions, check, sampling, str(model.dtype)]).encode())[:16]


class _Journal:
    """An append-only file of JSON lines; the first one says what it is about."""

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._identity = path, identity

    def read(self, questions: int) -> Mapping[str, Mapping[int, bool]]:
        """Verdicts by way and question; makes the file if there is none."""
        try:
            content = foreign.content(self._path) if self._path.is_file() else b""
            lines = content[: content.rfind(b"\n") + 1].splitlines()  # a crash may leave the last one unfinished
            if lines or not _HEAD.startswith(content[: len(_HEAD)]):
                self._require_own(foreign.parsed(lines[0] if lines else content))
            found: dict[str, dict[int, bool]] = {}
            for line in lines[1:]:
                way, verdicts = _entry(foreign.parsed(line), questions)
                found.setdefault(way, {}).update(verdicts)
        except UnreadableError as error:
            raise TraceError(f"{self._path}: {error}; expected the journal of an earlier run, or no file") from error
        self._mend(len(b"".join(line + b"\n" for line in lines)), new=not lines)
        return found

    def _require_own(self, head: Any) -> None:  # noqa: ANN401 - a JSON value
        if not isinstance(head, dict) or head.get("kind") != "tune journal" or head.get("of") != self._identity:
            raise TraceError(
                f"{self._path}: is of other questions, another checker or other options of generation; "
                "expected those of the run that it is from; delete it to begin again"
            )

    def _mend(self, length: int, *, new: bool) -> None:
        try:
            with self._path.open("ab") as file:
                file.truncate(length)
        except OSError as error:
            raise _unwritable(self._path, error) from error
        if new:
            self.append({"kind": "tune journal", "of": self._identity})

    def append(self, record: Mapping[str, Any]) -> None:
        """One line, on disk when this returns."""
        try:
            append(self._path, json.dumps(record).encode() + b"\n")
        except OSError as error:
            raise _unwritable(self._path, error) from error


def _entry(record: Any, questions: int) -> tuple[str, dict[int, bool]]:  # noqa: ANN401 - a JSON value
    try:
        way, indices, correct = record["way"], record["questions"], record["correct"]
        verdicts = dict(zip(indices, correct, strict=True))
        sound = isinstance(way, str) and all(type(one) is int and 0 <= one < questions for one in verdicts)
    except (TypeError, KeyError, ValueError) as error:
        raise UnreadableError("holds a line that is no verdicts") from error
    if not sound or not all(type(one) is bool for one in verdicts.values()):
        raise UnreadableError("holds a line that is no verdicts")
    return way, verdicts


def _unwritable(path: Path, error: OSError) -> TraceError:
    return TraceError(f"{path}: cannot be written ({foreign.reason(error)}); expected a writable place with room")
