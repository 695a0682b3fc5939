"""A cache of answers to the same questions under many conditions, and of figures of these questions.

No answer is generated twice. With a journal, each batch is on disk before the next one starts, and a run that was
killed continues from there. Knows nothing of which conditions are worth trying.

N questions, n answers to each, F figures of a question.
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

from adaras_export.core import families
from adaras_export.core.traces import digest
from adaras_export.errors import TraceError
from adaras_export.evaluation.engine import Bank
from adaras_export.evaluation.task import (
    ArtifactCondition,
    Condition,
    EvaluationTask,
    StaticCondition,
    condition_key,
    under_condition,
)
from adaras_export.files.append_log import SealedLog
from adaras_export.files.atomic import sha256
from adaras_export.files.safe_read import UnreadableError
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.generation import (
    Prefilled,
    batches,
    continue_ids,
    decode,
    encode_prompt,
    end_ids,
    pad_id,
    prefill,
)

_UNKNOWN = -1


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers under one condition.

    Attributes:
        correct: (N, n) bool.
        tokens: (N, n) new tokens, without the one that ends a text.
        cut: (N, n) bool, whether the answer reached the limit of tokens.
        seconds: wall-clock time of all answers; the time of a batch starts with its prompts.
    """

    correct: Array
    tokens: Array
    cut: Array
    seconds: float


class AnswerCache:
    """Answers of one model. The gate of a rule is ignored."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: EvaluationTask,
        journal: Path | None = None,
        bank: Bank | None = None,
    ) -> None:
        """``journal`` is the file to append to and to continue from; ``bank`` answers instead of the model.

        Raises:
            TraceError: the file belongs to other questions or settings of generation, another process writes it, or
                it cannot be read or written.
        """
        self._model, self._tokenizer, self._task, self._bank = model, tokenizer, task, bank
        self._rows = [encode_prompt(tokenizer, question.prompt) for question in task.questions]
        self._tables: dict[str, Array] = {}
        self._seconds: dict[str, float] = {}
        self._figures: dict[str, dict[int, Array]] = {}
        self._done = self._total = 0
        self._journal = None if journal is None else SealedLog(journal, _identity(model, task, self._rows, bank))
        if self._journal is not None:
            self._journal.read(self._entry)

    def close(self) -> None:
        """Let other processes write the journal, and end the engine."""
        if self._journal is not None:
            self._journal.close()
        if self._bank is not None:
            self._bank.close()

    def missing(self, conditions: Sequence[Condition], questions: Sequence[int]) -> int:
        """How many answers are not in the cache."""
        indices = list(questions)
        return sum(int((self._of(condition_key(condition))[0][indices] == _UNKNOWN).sum()) for condition in conditions)

    def expect(self, answers: int) -> None:
        """Announce how many more answers will be generated, for the progress; by default, those of one `ask`."""
        self._total = self._done + answers

    def ask(self, conditions: Sequence[Condition], questions: Sequence[int] | None = None) -> None:
        """Answer these questions (indices; None: all) under each condition, where the cache lacks the answer."""
        indices = list(range(len(self._rows)) if questions is None else questions)
        self._total = max(self._total, self._done + self.missing(conditions, indices))
        here = [one for one in conditions if self._bank is None or isinstance(one, ArtifactCondition)]
        if self._bank is not None:
            self._ask_bank(self._bank, [one for one in conditions if one not in here], indices)
        self._ask_model(here, indices)

    def _ask_bank(self, bank: Bank, conditions: Sequence[Condition], indices: Sequence[int]) -> None:
        """All that is missing at once; conditions of one question beside each other, since they share its prompt."""
        task = self._task
        work = [(one, index) for index in indices for one in conditions if self.missing([one], [index])]
        if not work:
            return
        requests = [bank.request(one, self._rows[index], key) for one, index in work for key in task.keys(index)]
        ends = end_ids(self._model, self._tokenizer, task.sampling.stop)
        waiting: dict[int, dict[int, list[int]]] = {}
        for number, ids in bank.complete(requests, task.sampling, ends, self._longest()):
            place, answer = divmod(number, task.samples)
            waiting.setdefault(place, {})[answer] = ids
            if len(waiting[place]) == task.samples:
                found = waiting.pop(place)
                condition, index = work[place]
                # What one condition takes is not known where all are in one batch.
                self._take(condition, [index], [found[at] for at in range(task.samples)], seconds=0.0)
                self._tell(task.samples)
        assert not waiting

    def _longest(self) -> int:
        """Tokens of the longest prompt.

        Raises:
            TraceError: it leaves no room for an answer in the model's context.
        """
        longest, new = max(map(len, self._rows)), self._task.sampling.max_new_tokens
        context = int(families.text_config(self._model).max_position_embeddings)
        if longest + new > context:
            raise TraceError(
                f"prompt of {longest} tokens: {new} new ones exceed the context of {context}; expected "
                f"max_new_tokens of at most {context - longest}, or a shorter prompt"
            )
        return longest

    def _ask_model(self, conditions: Sequence[Condition], indices: Sequence[int]) -> None:
        task = self._task
        most = max(1, task.max_rows // task.samples)
        for places in batches([len(self._rows[index]) for index in indices], task.token_budget, most):
            batch = [indices[place] for place in places]
            # The whole batch again where a part is missing: another batch shape rounds differently.
            missing = [condition for condition in conditions if self.missing([condition], batch)]
            if not missing:
                continue
            plain, read_in = self._prefilled(batch) if any(map(_is_prefilled, missing)) else (None, 0.0)
            for condition in missing:
                self._answer(condition, batch, plain, read_in if _is_prefilled(condition) else 0.0)
                self._tell(len(batch) * task.samples)

    def _tell(self, answers: int) -> None:
        """Progress by so many answers."""
        self._done += answers
        if self._task.progress is not None:
            self._task.progress(self._done, max(self._done, self._total))

    def answers(self, condition: Condition, questions: Sequence[int] | None = None) -> Answers:
        """Of questions that were answered; the seconds are those of all answers under this condition."""
        key = condition_key(condition)
        table = self._of(key) if questions is None else self._of(key)[:, list(questions)]
        assert (table != _UNKNOWN).all()
        correct, tokens = table
        return Answers(correct == 1, tokens, tokens >= self._task.sampling.max_new_tokens, self._seconds.get(key, 0.0))

    def figures(self, key: str, compute: Callable[[Sequence[int]], Array], most: int | None = None) -> Array:
        """Numbers for every question, (N, F), computed for one batch of indices at a time, where the cache lacks them.

        ``key`` differs wherever anything differs that the numbers depend on, beside questions and model; ``most`` is
        how many questions a batch may have.
        """
        task, known = self._task, self._figures.setdefault(key, {})
        most = task.max_rows if most is None else min(most, task.max_rows)
        done = 0
        for batch in batches([len(row) for row in self._rows], task.token_budget, most):
            if not known.keys() >= {*batch}:
                values = compute(batch).astype(np.float64)  # as the journal stores them
                if self._journal is not None:
                    self._journal.append({"figures": key, "questions": batch, "values": values.tolist()})
                known.update(zip(batch, values, strict=True))
            done += len(batch)
            if task.progress is not None:
                task.progress(done, len(self._rows))
        return np.stack([known[index] for index in range(len(self._rows))])

    def _prefilled(self, batch: Sequence[int]) -> tuple[Prefilled, float]:
        started = time.perf_counter()
        prompts = prefill(self._model, [self._rows[index] for index in batch], pad_id(self._tokenizer))
        return prompts, time.perf_counter() - started

    def _answer(self, condition: Condition, batch: Sequence[int], plain: Prefilled | None, read_in: float) -> None:
        task, started = self._task, time.perf_counter()
        keys = [key for index in batch for key in task.keys(index)]
        if isinstance(condition, ArtifactCondition):
            rows = [self._rows[index] for index in batch for _ in range(task.samples)]
            completions = condition.complete(rows, task.sampling, keys)
        else:
            with under_condition(self._model, condition):
                own = self._prefilled(batch)[0] if plain is None or isinstance(condition, StaticCondition) else plain
                rows_of = [place for place in range(len(batch)) for _ in range(task.samples)]
                prompts = own.repeated(rows_of)
                completions = continue_ids(self._model, self._tokenizer, prompts, task.sampling, keys)
        self._take(condition, batch, completions, read_in + time.perf_counter() - started)

    def _take(
        self, condition: Condition, batch: Sequence[int], completions: Sequence[Sequence[int]], seconds: float
    ) -> None:
        """Check the answers to a batch, ids of n for each question, and keep what they are."""
        task, seconds = self._task, round(seconds, 4)  # as the journal stores it
        answers = [task.questions[index].answer for index in batch for _ in range(task.samples)]
        texts = [decode(self._tokenizer, ids) for ids in completions]
        correct = [int(bool(task.check(text, answer))) for text, answer in zip(texts, answers, strict=True)]
        values = np.array([correct, [len(ids) for ids in completions]]).reshape(2, len(batch), task.samples)
        if self._journal is not None:
            record = {"condition": condition_key(condition), "questions": list(batch), "seconds": seconds}
            self._journal.append(record | {"correct": values[0].tolist(), "tokens": values[1].tolist()})
        self._enter(condition_key(condition), batch, values, seconds)

    def _of(self, key: str) -> Array:
        """Verdicts and tokens of a condition, (2, N, n)."""
        return self._tables.setdefault(key, np.full((2, len(self._rows), self._task.samples), _UNKNOWN))

    def _enter(self, key: str, indices: Sequence[int], values: Array, seconds: float) -> None:
        self._of(key)[:, list(indices)] = values
        self._seconds[key] = self._seconds.get(key, 0.0) + seconds

    def _entry(self, record: Any) -> None:  # noqa: ANN401 - a JSON value
        """Enter one line of a journal."""
        try:
            if "figures" in record:
                self._take_figures(record)
            else:
                self._enter(*self._sound(record))
        except (TypeError, KeyError, ValueError, OverflowError, AttributeError) as error:
            raise UnreadableError("holds a line that is no batch of answers") from error

    def _take_figures(self, record: Mapping[str, Any]) -> None:
        key, indices, values = record["figures"], record["questions"], np.array(record["values"], dtype=np.float64)
        if not isinstance(key, str) or values.ndim != 2 or not np.isfinite(values).all():
            raise ValueError
        self._figures.setdefault(key, {}).update(zip(self._indices(indices), values, strict=True))

    def _indices(self, value: Any) -> list[int]:  # noqa: ANN401 - a JSON value
        if not isinstance(value, list) or not all(type(part) is int and 0 <= part < len(self._rows) for part in value):
            raise ValueError
        return value

    def _sound(self, record: Mapping[str, Any]) -> tuple[str, list[int], Array, float]:
        condition, indices, seconds = record["condition"], self._indices(record["questions"]), record["seconds"]
        values = np.array([record["correct"], record["tokens"]])
        if not isinstance(condition, str) or not isinstance(seconds, int | float):
            raise TypeError
        if values.dtype != np.int64 or values.shape != (2, len(indices), self._task.samples):
            raise ValueError
        if values.min() < 0 or values[0].max() > 1 or not 0 <= seconds < math.inf:
            raise ValueError
        return condition, indices, values, float(seconds)


def _is_prefilled(condition: Condition) -> bool:
    """Whether the condition continues from prompts that were read unsteered."""
    return not isinstance(condition, StaticCondition | ArtifactCondition)


def _identity(model: PreTrainedModel, task: EvaluationTask, rows: Sequence[Sequence[int]], bank: Bank | None) -> str:
    """Everything that the answers in a journal depend on, beside the conditions."""
    # The ids of a prompt depend on the tokenizer and the chat template, too.
    questions = [
        [question.id, digest(question.prompt), row, question.answer]
        for question, row in zip(task.questions, rows, strict=True)
    ]
    first = [weight.detach().flatten()[:8].float().tolist() for weight in model.parameters() if not weight.is_meta]
    parts = [questions, task.checker, task.samples, vars(task.sampling), str(model.dtype), first]
    parts += [] if bank is None else [bank.name]  # its random numbers are others
    return sha256(json.dumps(parts).encode())[:16]
