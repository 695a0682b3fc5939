"""Which attempts at which questions are sampled, in which batches and until when; what a backend has to do.

Knows no model, no server and no file. A plan follows from its arguments and the verdicts on finished batches alone,
so a run that was killed plans the same batches again.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from adaras_export.core.traces import Question, Settings
from adaras_export.errors import TraceError


@dataclass(frozen=True)
class Attempt:
    """One completion to come; its id, ``question#number``, is that of the trace that it makes."""

    id: str
    question: Question


@dataclass(frozen=True)
class Completion:
    """What was written at an attempt; ``cut`` where the limit of tokens ended it."""

    text: str
    cut: bool


class Backend(Protocol):
    """Something that completes prompts."""

    @property
    def settings(self) -> Settings:
        """What its completions hang on, beside the prompt and the model: of a file, all have the same."""

    @property
    def streams(self) -> bool:
        """Whether completions come one by one, so that a batch may be as large as the plan."""

    def arranged(self, questions: Sequence[Question]) -> Sequence[Question]:
        """The questions in the order in which they are done best; it follows from the arguments alone.

        Raises:
            AdarasError: a prompt cannot be completed; nothing has been written yet.
        """

    def complete(
        self, batch: Sequence[Attempt], missing: Collection[str]
    ) -> Generator[Mapping[str, Completion], None, None]:
        """The completions of the ``missing`` attempts of a batch by id, in pieces as they are done, in any order."""


@dataclass(frozen=True)
class Goal:
    """When there are enough attempts.

    Attributes:
        attempts: most attempts at a question.
        wanted: stop when so many questions have both outcomes (``per_class`` times each, if that is given).
        per_class: no more attempts at a question with so many correct and so many incorrect ones.

    Raises:
        TraceError: a number below 1, or a class that could never be full.
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
class Plan:
    """The batches of a goal, each decided when the ones before are done and told to `count`.

    Without ``per_class``: attempts at a question are together, questions follow each other. With it: ``rows`` questions
    at a time get twice ``per_class`` attempts, then rounds of ``per_class`` more until both classes are full.

    Attributes:
        total: attempts in all; those that a full question was spared are taken off.
        full: questions that have enough of both outcomes.
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
        """Take note of a verdict."""
        counts = self._counts[question_id]
        counts[correct] += 1
        if min(counts[True], counts[False]) >= (self.goal.per_class or 1):
            self.full.add(question_id)

    def over(self, batch: Sequence[Attempt]) -> set[str]:
        """Questions that get no more attempts after this batch; some of them may be named later."""
        last = self.goal.attempts - 1
        return {one.question.id for one in batch if one.id == f"{one.question.id}#{last}"} | self._spared

    def batches(self) -> Iterator[list[Attempt]]:
        """What to sample next: ``rows`` attempts, or with ``whole`` all that no verdict can change."""
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
                still = [] if done == self.goal.attempts else [one for one in still if one.id not in self.full]


def _attempts(questions: Sequence[Question], start: int, end: int) -> list[Attempt]:
    return [Attempt(f"{question.id}#{number}", question) for question in questions for number in range(start, end)]
