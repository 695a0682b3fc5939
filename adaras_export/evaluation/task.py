"""Questions to answer, how to answer and check them, and the ways to steer meanwhile.

Knows no statistics and no files. N questions, n answers to each.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from transformers import PreTrainedModel

from adaras_export.core.rule import SteeringRule
from adaras_export.core.traces import Checker, Question, name_of
from adaras_export.errors import TraceError
from adaras_export.files import hub
from adaras_export.modeling.generation import Sampling
from adaras_export.modeling.steering import steered, steered_everywhere

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Exam:
    """Questions, and how to answer and check them.

    Attributes:
        questions: N of them.
        check: tells right answers from wrong ones.
        sampling: greedy, or with a temperature: then the j-th answer to a question has the same random numbers under
            every way to steer, so that arms stay paired.
        max_rows: answers of one batch.
        token_budget: prompt tokens of one batch.
        progress: of answers done and answers in all.
        dataset: Hub id of what the questions are from, where somebody says so.
        task: the task of that benchmark, where somebody says so.
        samples: answers to each question (n).
        name: of the question set, where it has one.
    """

    questions: Sequence[Question]
    check: Checker
    sampling: Sampling
    max_rows: int = 64
    token_budget: int = 16384
    progress: Progress | None = None
    dataset: str | None = None
    task: str | None = None
    samples: int = 1
    name: str | None = None

    def __post_init__(self) -> None:
        if not self.questions:
            raise TraceError("questions: there are none; expected at least one")
        if self.dataset is not None and not hub.is_hub_id(self.dataset):
            raise TraceError(f"dataset {self.dataset!r}: is no Hub id; expected USER/NAME")
        if self.task is not None and self.dataset is None:
            raise TraceError(f"task {self.task}: of no dataset; expected its Hub id, too")
        if self.samples < 1:
            raise TraceError(f"exam: {self.samples} answers to each question; expected one or more")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise TraceError(f"exam: {self.samples} answers at temperature 0 are equal; expected one, or a temperature")

    @property
    def checker(self) -> str:
        """The name of ``check``."""
        return name_of(self.check)

    def keys(self, index: int) -> list[str]:
        """What the random numbers of every answer to a question hang on, beside the seed."""
        return [f"{self.questions[index].id}#{answer}" for answer in range(self.samples)]


@dataclass(frozen=True)
class Everywhere:
    """A rule without its gate and its start: every token of every sequence is steered, as static artifacts do."""

    rule: SteeringRule


@dataclass(frozen=True)
class Elsewhere:
    """Something else that answers: an exported artifact.

    Attributes:
        name: of its arm.
        key: differs where anything differs that its answers hang on.
        complete: new ids of every row of prompt ids, as `generation.complete_ids` gives them for the sampling and keys.
    """

    name: str
    key: str
    complete: Callable[[Sequence[Sequence[int]], Sampling, Sequence[str]], list[list[int]]]


Way = SteeringRule | Everywhere | Elsewhere | None
"""How to steer: by a rule without its gate, by a rule everywhere, as an artifact does, or not at all."""


def key_of(way: Way) -> str:
    """The same for ways that give the same answers."""
    if way is None:
        return "off"
    if isinstance(way, Elsewhere):
        return way.key
    return f"everywhere {way.rule.fingerprint}" if isinstance(way, Everywhere) else way.fingerprint


def in_effect(model: PreTrainedModel, way: Way) -> AbstractContextManager[object]:
    """The context in which ``model`` is steered that way."""
    if way is None or isinstance(way, Elsewhere):
        return nullcontext()
    return steered_everywhere(model, way.rule) if isinstance(way, Everywhere) else steered(model, way.ungated())
