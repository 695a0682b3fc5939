"""An evaluation task: questions, how to answer and check them, and the conditions under which a model answers.

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
class EvaluationTask:
    """Questions, and how to answer and check them.

    Attributes:
        questions: N of them.
        check: tells right answers from wrong ones.
        sampling: greedy, or with a temperature: then the j-th answer to a question has the same random numbers under
            every condition, so that arms stay paired.
        max_rows: answers in one batch.
        token_budget: prompt tokens in one batch.
        progress: is called with the number of answers done and the number of all answers.
        dataset: Hub id of the dataset that the questions are from, where it was named.
        benchmark_task: the task of that benchmark, where it was named.
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
    benchmark_task: str | None = None
    samples: int = 1
    name: str | None = None

    def __post_init__(self) -> None:
        if not self.questions:
            raise TraceError("questions: there are none; expected at least one")
        if self.dataset is not None and not hub.is_hub_id(self.dataset):
            raise TraceError(f"dataset {self.dataset!r}: is no Hub id; expected USER/NAME")
        if self.benchmark_task is not None and self.dataset is None:
            raise TraceError(f"task {self.benchmark_task}: names no dataset; expected its Hub id, too")
        if self.samples < 1:
            raise TraceError(f"samples: {self.samples} answers to each question; expected one or more")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise TraceError(
                f"samples: {self.samples} answers at temperature 0 are equal; expected one, or a temperature"
            )

    @property
    def checker(self) -> str:
        """The name of ``check``."""
        return name_of(self.check)

    def keys(self, index: int) -> list[str]:
        """What determines the random numbers of each answer to a question, beside the seed."""
        return [f"{self.questions[index].id}#{answer}" for answer in range(self.samples)]


@dataclass(frozen=True)
class StaticCondition:
    """A rule without its gate and its start: every token of every sequence is steered, as in static artifacts."""

    rule: SteeringRule


@dataclass(frozen=True)
class ArtifactCondition:
    """An exported artifact answers.

    Attributes:
        name: of its arm.
        key: differs wherever two artifacts could answer differently.
        complete: new ids for every row of prompt ids, given the sampling and the keys of the random numbers; see
            `generation.complete_ids`.
    """

    name: str
    key: str
    complete: Callable[[Sequence[Sequence[int]], Sampling, Sequence[str]], list[list[int]]]


Condition = SteeringRule | StaticCondition | ArtifactCondition | None
"""Who answers: the model steered by a rule without its gate, or by a static rule; an artifact; the model unsteered."""


def condition_key(condition: Condition) -> str:
    """The same text for conditions that give the same answers."""
    if condition is None:
        return "off"
    if isinstance(condition, ArtifactCondition):
        return condition.key
    if isinstance(condition, StaticCondition):
        return f"everywhere {condition.rule.fingerprint}"
    return condition.fingerprint


def under_condition(model: PreTrainedModel, condition: Condition) -> AbstractContextManager[object]:
    """The context in which ``model`` is steered as the condition says."""
    if condition is None or isinstance(condition, ArtifactCondition):
        return nullcontext()
    if isinstance(condition, StaticCondition):
        return steered_everywhere(model, condition.rule)
    return steered(model, condition.ungated())
