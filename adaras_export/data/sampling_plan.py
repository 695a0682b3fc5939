"""The attempts to sample, their batches and the stopping rule; the protocol of a backend.

A plan depends only on its arguments and the verdicts on finished batches, so a resumed run plans the same batches.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from adaras_export.core.traces import Question, Settings
from adaras_export.errors import TraceError


@dataclass(frozen=True)
class Attempt:
    """A completion to sample; its trace has the same id, ``question#number``."""

    id: str
    question: Question


@dataclass(frozen=True)
class Completion:
    """The text of an attempt; ``cut`` is true if the token limit ended it."""

    text: str
    cut: bool


class Backend(Protocol):
    """Something that completes prompts."""

    @property
    def settings(self) -> Settings:
        """The settings, beside prompt and model, that completions depend on; all traces of a file share them."""

    @property
    def streams(self) -> bool:
        """Whether completions arrive one by one, so that a batch may be as large as the plan."""

    def arranged(self, questions: Sequence[Question]) -> Sequence[Question]:
        """The questions in the best order for batches; it depends only on the arguments.

        Raises:
            AdarasError: a prompt cannot be completed; no trace has been written yet.
        """

    def complete(
        self, batch: Sequence[Attempt], missing: Collection[str]
    ) -> Generator[Mapping[str, Completion], None, None]:
        """The completions of a batch's ``missing`` attempts by id, in parts as they finish, in any order."""


@dataclass(frozen=True)
class Goal:
    """The stopping rule of sampling.

    Attributes:
        attempts: the largest number of attempts at a question.
        wanted: stop when this many questions have both outcomes (``per_class`` times each, if given).
        per_class: no more attempts at a question with this many correct and this many incorrect attempts.

    Raises:
        TraceError: a number is below 1, or there are too few attempts for ``per_class``.
    """

    attempts: int = 8
    wanted: int | None = None
    per_class: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise TraceError(f"collect: {name} is {value}; expected 1 or more")
        if self.per_class is not None and self.attempts < 2 * self.per_class:
            raise TraceError(
                f"collect: {self.per_class} correct and {self.per_class} incorrect attempts of {self.attempts}; "
                f"expected {2 * self.per_class} attempts or more"
            )


@dataclass
class SamplingPlan:
    """The batches of a goal; each is planned after the verdicts on the earlier ones went to `count`.

    Without ``per_class``, all attempts at a question come before the next question. With it, ``rows`` questions at a
    time get twice ``per_class`` attempts, then rounds of ``per_class`` more until both classes are full.

    Attributes:
        total: the number of attempts, without those that full questions no longer need.
        full: ids of questions with enough attempts of both outcomes.
    """

    questions: Sequence[Question]
    goal: Goal
    rows: int
    whole: bool = False
    total: int = field(init=False)
    full: set[str] = field(default_factory=set)
    _spared: set[str] = field(default_factory=set)
    _counts: dict[str, Counter[bool]] = field(default_factory=lambda: defaultdict(Counter))

    def __post_init__(self) -> None:
        self.total = len(self.questions) * self.goal.attempts

    def count(self, question_id: str, *, correct: bool) -> None:
        """Count a verdict."""
        counts = self._counts[question_id]
        counts[correct] += 1
        if min(counts[True], counts[False]) >= (self.goal.per_class or 1):
            self.full.add(question_id)

    def over(self, batch: Sequence[Attempt]) -> set[str]:
        """Questions without further attempts after this batch; a later batch may report more of them."""
        last = self.goal.attempts - 1
        return {each.question.id for each in batch if each.id == f"{each.question.id}#{last}"} | self._spared

    def batches(self) -> Iterator[list[Attempt]]:
        """The next attempts: ``rows`` of them, or with ``whole`` all that no verdict can change."""
        for part in self._rounds():
            rows = len(part) if self.whole and self.goal.wanted is None else self.rows
            for start in range(0, len(part), rows):
                if self.goal.wanted is not None and len(self.full) >= self.goal.wanted:
                    return
                yield part[start : start + rows]

    def _rounds(self) -> Iterator[list[Attempt]]:
        per_class = self.goal.per_class
        if per_class is None:
            yield _attempts(self.questions, 0, self.goal.attempts)
            return
        for first in range(0, len(self.questions), self.rows):
            still = self.questions[first : first + self.rows]
            done = 0
            while still:
                end = min(done + per_class if done else 2 * per_class, self.goal.attempts)
                yield _attempts(still, done, end)
                spared = [question for question in still if question.id in self.full]
                self._spared.update(question.id for question in spared)
                self.total -= len(spared) * (self.goal.attempts - end)
                done = end
                still = [] if done == self.goal.attempts else [each for each in still if each.id not in self.full]


def _attempts(questions: Sequence[Question], start: int, end: int) -> list[Attempt]:
    return [Attempt(f"{question.id}#{number}", question) for question in questions for number in range(start, end)]
