"""Answers to the same questions under many ways to steer, asked for piece by piece and never twice; figures, too.

With a file, each batch is on disk before the next one starts: a run that was killed goes on there. Knows nothing of
which ways are worth trying. N questions, n answers to each, B questions of a batch.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaras_export.core.traces import digest
from adaras_export.evaluation.task import Elsewhere, Everywhere, Exam, Way, in_effect, key_of
from adaras_export.files.append_log import SealedLog
from adaras_export.files.atomic import sha256
from adaras_export.files.safe_read import UnreadableError
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.generation import Prefilled, batches, continue_ids, decode, encode_prompt, pad_id, prefill

_UNKNOWN = -1


@dataclass(frozen=True, eq=False)
class Answers:
    """What one way to steer answered.

    Attributes:
        correct: (N, n) bool.
        tokens: (N, n) new tokens, without the one that ends a text.
        cut: (N, n) bool: as many as there may be.
        seconds: wall-clock time of all of them, each batch from its prompts on.
    """

    correct: Array
    tokens: Array
    cut: Array
    seconds: float


class AnswerBook:
    """Answers of one model; a rule's gate does not count here."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, exam: Exam, journal: Path | None = None
    ) -> None:
        """``journal`` is the file to append to and to go on from.

        Raises:
            TraceError: the file is of other questions or settings of generation, is written by another process, or
                cannot be read or written.
        """
        self._model, self._tokenizer, self._exam = model, tokenizer, exam
        self._rows = [encode_prompt(tokenizer, question.prompt) for question in exam.questions]
        self._tables: dict[str, Array] = {}
        self._seconds: dict[str, float] = {}
        self._figures: dict[str, dict[int, Array]] = {}
        self._done = self._total = 0
        self._journal = None if journal is None else SealedLog(journal, _identity(model, exam, self._rows))
        if self._journal is not None:
            self._journal.read(self._entry)

    def close(self) -> None:
        """Let other processes write the journal."""
        if self._journal is not None:
            self._journal.close()

    def missing(self, ways: Sequence[Way], questions: Sequence[int]) -> int:
        """How many answers are not known."""
        indices = list(questions)
        return sum(int((self._of(key_of(way))[0][indices] == _UNKNOWN).sum()) for way in ways)

    def expect(self, answers: int) -> None:
        """Tell how many more answers will be asked for, for the progress; by default, those of one `ask`."""
        self._total = self._done + answers

    def ask(self, ways: Sequence[Way], questions: Sequence[int] | None = None) -> None:
        """Have these questions (indices; None: all) answered under each way, where that is not known."""
        exam, indices = self._exam, list(range(len(self._rows)) if questions is None else questions)
        total = max(self._total, self._done + self.missing(ways, indices))
        most = max(1, exam.max_rows // exam.samples)
        for places in batches([len(self._rows[one]) for one in indices], exam.token_budget, most):
            batch = [indices[place] for place in places]
            # The whole batch again where a part is known: another batch shape rounds differently.
            missing = [way for way in ways if self.missing([way], batch)]
            if not missing:
                continue
            plain, read_in = self._prefilled(batch) if any(map(_is_plain, missing)) else (None, 0.0)
            for way in missing:
                self._answer(way, batch, plain, read_in if _is_plain(way) else 0.0)
                self._done += len(batch) * exam.samples
                if exam.progress is not None:
                    exam.progress(self._done, max(self._done, total))

    def answers(self, way: Way, questions: Sequence[int] | None = None) -> Answers:
        """Of answered questions; the seconds are those of all that were ever asked."""
        key = key_of(way)
        table = self._of(key) if questions is None else self._of(key)[:, list(questions)]
        assert (table != _UNKNOWN).all()
        correct, tokens = table
        return Answers(correct == 1, tokens, tokens >= self._exam.sampling.max_new_tokens, self._seconds.get(key, 0.0))

    def figures(self, key: str, compute: Callable[[Sequence[int]], Array], most: int | None = None) -> Array:
        """Numbers of every question, (N, F), computed for one batch of indices at a time, where they are not known.

        ``key`` differs where anything differs that they hang on, beside questions and model; ``most`` is how many
        questions a batch may have.
        """
        exam, known = self._exam, self._figures.setdefault(key, {})
        most = exam.max_rows if most is None else min(most, exam.max_rows)
        done = 0
        for batch in batches([len(row) for row in self._rows], exam.token_budget, most):
            if not known.keys() >= {*batch}:
                values = compute(batch).astype(np.float64)  # as a journal has them
                if self._journal is not None:
                    self._journal.append({"figures": key, "questions": batch, "values": values.tolist()})
                known.update(zip(batch, values, strict=True))
            done += len(batch)
            if exam.progress is not None:
                exam.progress(done, len(self._rows))
        return np.stack([known[index] for index in range(len(self._rows))])

    def _prefilled(self, batch: Sequence[int]) -> tuple[Prefilled, float]:
        started = time.perf_counter()
        found = prefill(self._model, [self._rows[one] for one in batch], pad_id(self._tokenizer))
        return found, time.perf_counter() - started

    def _answer(self, way: Way, batch: Sequence[int], plain: Prefilled | None, read_in: float) -> None:
        exam, started = self._exam, time.perf_counter()
        keys = [key for index in batch for key in exam.keys(index)]
        if isinstance(way, Elsewhere):
            rows = [self._rows[index] for index in batch for _ in range(exam.samples)]
            found = way.complete(rows, exam.sampling, keys)
        else:
            with in_effect(self._model, way):
                own = self._prefilled(batch)[0] if plain is None or isinstance(way, Everywhere) else plain
                rows_of = [place for place in range(len(batch)) for _ in range(exam.samples)]
                found = continue_ids(self._model, self._tokenizer, own.repeated(rows_of), exam.sampling, keys)
        seconds = round(read_in + time.perf_counter() - started, 4)  # as a journal has it
        answers = [exam.questions[index].answer for index in batch for _ in range(exam.samples)]
        texts = [decode(self._tokenizer, ids) for ids in found]
        correct = [int(bool(exam.check(text, one))) for text, one in zip(texts, answers, strict=True)]
        values = np.array([correct, [len(ids) for ids in found]]).reshape(2, len(batch), exam.samples)
        if self._journal is not None:
            record = {"way": key_of(way), "questions": list(batch), "seconds": seconds}
            self._journal.append(record | {"correct": values[0].tolist(), "tokens": values[1].tolist()})
        self._enter(key_of(way), batch, values, seconds)

    def _of(self, key: str) -> Array:
        """Verdicts and tokens of a way, (2, N, n)."""
        return self._tables.setdefault(key, np.full((2, len(self._rows), self._exam.samples), _UNKNOWN))

    def _enter(self, key: str, indices: Sequence[int], values: Array, seconds: float) -> None:
        self._of(key)[:, list(indices)] = values
        self._seconds[key] = self._seconds.get(key, 0.0) + seconds

    def _entry(self, record: Any) -> None:  # noqa: ANN401 - a JSON value
        """Take over one line of a journal."""
        try:
            if "figures" in record:
                self._take_figures(record)
            else:
                self._enter(*self._sound(record))
        except (TypeError, KeyError, ValueError, OverflowError, AttributeError) as error:
            raise UnreadableError("holds a line that is no verdicts") from error

    def _take_figures(self, record: Mapping[str, Any]) -> None:
        key, indices, values = record["figures"], record["questions"], np.array(record["values"], dtype=np.float64)
        if not isinstance(key, str) or values.ndim != 2 or not np.isfinite(values).all():
            raise ValueError
        self._figures.setdefault(key, {}).update(zip(self._indices(indices), values, strict=True))

    def _indices(self, found: Any) -> list[int]:  # noqa: ANN401 - a JSON value
        if not isinstance(found, list) or not all(type(one) is int and 0 <= one < len(self._rows) for one in found):
            raise ValueError
        return found

    def _sound(self, record: Mapping[str, Any]) -> tuple[str, list[int], Array, float]:
        way, indices, seconds = record["way"], self._indices(record["questions"]), record["seconds"]
        values = np.array([record["correct"], record["tokens"]])
        if not isinstance(way, str) or not isinstance(seconds, int | float):
            raise TypeError
        if values.dtype != np.int64 or values.shape != (2, len(indices), self._exam.samples):
            raise ValueError
        if values.min() < 0 or values[0].max() > 1 or not 0 <= seconds < math.inf:
            raise ValueError
        return way, indices, values, float(seconds)


def _is_plain(way: Way) -> bool:
    """Whether it goes on from prompts that were read unsteered."""
    return not isinstance(way, Everywhere | Elsewhere)


def _identity(model: PreTrainedModel, exam: Exam, rows: Sequence[Sequence[int]]) -> str:
    """What the verdicts in a file hang on, beside the ways to steer."""
    # The ids of a prompt hang on the tokenizer and the chat template, too.
    questions = [[one.id, digest(one.prompt), row, one.answer] for one, row in zip(exam.questions, rows, strict=True)]
    first = [one.detach().flatten()[:8].float().tolist() for one in model.parameters() if not one.is_meta]
    of = [questions, exam.checker, exam.samples, vars(exam.sampling), str(model.dtype), first]
    return sha256(json.dumps(of).encode())[:16]
