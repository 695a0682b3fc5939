"""Answers of the rule, of no steering, of the controls that a claim needs, and of artifacts, to the same questions.

Every arm answers the same questions with the same random numbers, so that arms differ in nothing but steering. Knows
nothing of how neurons, gate and strength were found.

N questions, n answers to each, K neurons, D model width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaras_export.core.gate import Gate
from adaras_export.core.intervals import difference, require_statistics
from adaras_export.core.markdown import Example
from adaras_export.core.question_identity import is_known, parts_of
from adaras_export.core.rule import SteeringRule
from adaras_export.core.traces import Question
from adaras_export.errors import ArtifactError, TraceError
from adaras_export.evaluation.answer_cache import AnswerCache, Answers
from adaras_export.evaluation.arms import compare, primary_arm
from adaras_export.evaluation.claims import conclusion
from adaras_export.evaluation.controls import random_control
from adaras_export.evaluation.engine import Backend, Bank
from adaras_export.evaluation.record import Evaluation
from adaras_export.evaluation.task import ArtifactCondition, Condition, EvaluationTask, StaticCondition
from adaras_export.files.atomic import sha256
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.gate import gate_probabilities, is_below

OpenArtifact = Callable[[], AbstractContextManager[ArtifactCondition]]
"""Opens an artifact for as long as it answers."""


@dataclass(frozen=True)
class EvaluationOptions:
    """How an evaluation is run, beside its task.

    Attributes:
        random_seeds: one random-neuron arm for each; see `random_control`.
        allow_seen: accept questions that neurons, gate or strength were fitted on.
        journal: file of finished batches, from which a killed run continues; the caller removes it.
        artifacts: exports of the rule; each is an arm of its own, and they are opened one after the other.
        trained_on: the name of the question set that the rule was made with.
        backend: answers instead of the model in memory.
    """

    random_seeds: Sequence[int] = tuple(range(20))
    allow_seen: bool = False
    journal: Path | None = None
    artifacts: Sequence[OpenArtifact] = ()
    trained_on: str | None = None
    backend: Backend | None = None


@dataclass(frozen=True)
class AnswersByArm:
    """The answers of every arm, in the order of the record.

    Attributes:
        arms: answers by the name of the arm.
        timed: arms whose time is known: not that of one put together from others, or run in one batch with others.
        is_steered_N: which questions the gate steers, (N,) bool.
        model: the model, as the record describes it.
        trained_on: the name of the question set that the rule was made with.
        cache: the answers of all conditions.
    """

    arms: Mapping[str, Answers]
    timed: frozenset[str]
    is_steered_N: Array
    model: Mapping[str, Any]
    trained_on: str | None
    cache: AnswerCache

    def column(self, name: str) -> dict[str, Array]:
        """One of the arrays of `Answers` for every arm, (N, n)."""
        return {arm: getattr(answers, name) for arm, answers in self.arms.items()}


@contextmanager
def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rule: SteeringRule,
    task: EvaluationTask,
    names: Sequence[str],
    options: EvaluationOptions,
) -> Iterator[AnswersByArm]:
    """Answers under no steering, the named ways to run the rule, the controls and the artifacts.

    Controls are steered like the primary arm among ``names``, so that they differ from it in nothing but the neurons.
    All questions are steered, unless that arm is "gated".

    Raises:
        TraceError: a question was used to make the rule, or the journal belongs to another run.
        ArtifactError: an artifact cannot be opened, or two have one name.
        MissingExtraError: SciPy is not installed.
    """
    require_statistics()  # before the work, not after it
    if not options.allow_seen:
        require_fresh(task.questions, rule.questions, "give others, or say --allow-seen and do not call it a test")
    controls = {"flipped": rule.with_strength(-rule.strength)}
    controls |= {f"random {seed}": random_control(model, rule, seed) for seed in options.random_seeds}
    conditions = _conditions(rule, controls, names)
    bank = None if options.backend is None else Bank(options.backend, [*conditions.values()])
    with closing(AnswerCache(model, tokenizer, task, options.journal, bank)) as cache:
        others = len(options.artifacts) * len(task.questions) * task.samples
        cache.expect(cache.missing([*conditions.values()], range(len(task.questions))) + others)
        cache.ask([*conditions.values()])
        answers = {name: cache.answers(condition) for name, condition in conditions.items()}
        is_gated = rule.gate is not None and primary_arm(names) == "gated"
        timed = {name for name in answers if bank is None and (not is_gated or name in ("off", *names))}
        is_steered_N = np.ones(len(task.questions), dtype=bool)
        if rule.gate is not None and is_gated:
            is_steered_N = is_steered_by(model, tokenizer, rule.gate, task, cache)
            gated = {"gated": answers["always"], **{name: answers[name] for name in controls}}
            answers |= {name: _where(is_steered_N, steered, answers["off"]) for name, steered in gated.items()}
        arms = {name: answers[name] for name in ("off", *sorted(names, key=_ORDER.index), *controls)}
        artifacts = _answers_of_artifacts(options.artifacts, cache, arms)
        timed |= artifacts.keys()
        described = _description(model, rule) | ({} if bank is None else {"backend": bank.name})
        yield AnswersByArm(arms | artifacts, frozenset(timed), is_steered_N, described, options.trained_on, cache)


_ORDER = ("always", "gated", "everywhere")


def _conditions(rule: SteeringRule, controls: Mapping[str, SteeringRule], names: Sequence[str]) -> dict[str, Condition]:
    """What must be run: "gated" is put together from "off" and "always"."""
    is_static = primary_arm(names) == "everywhere"
    conditions: dict[str, Condition] = {"off": None} if is_static else {"off": None, "always": rule}
    if "everywhere" in names:
        conditions["everywhere"] = StaticCondition(rule)
    return conditions | {name: StaticCondition(control) if is_static else control for name, control in controls.items()}


def _answers_of_artifacts(
    openers: Sequence[OpenArtifact], cache: AnswerCache, arms: Mapping[str, Answers]
) -> dict[str, Answers]:
    answers: dict[str, Answers] = {}
    for opener in openers:
        with opener() as condition:
            if condition.name in arms or condition.name in answers:
                raise ArtifactError(
                    f"artifacts: two are called {condition.name!r}; expected folders of different names"
                )
            cache.ask([condition])
        answers[condition.name] = cache.answers(condition)
    return answers


def _where(is_steered_N: Array, steered: Answers, off: Answers) -> Answers:
    """Steered answers to some questions, unsteered ones to the others; this took no time of its own."""

    def chosen(name: str) -> Array:
        answers_Nn: Array = np.where(is_steered_N[:, None], getattr(steered, name), getattr(off, name))
        return answers_Nn

    return Answers(chosen("correct"), chosen("tokens"), chosen("cut"), seconds=0.0)


def _description(model: PreTrainedModel, rule: SteeringRule) -> dict[str, Any]:
    base = rule.base
    named = {"name": base.id, "revision": base.revision, "fingerprint": base.fingerprint}
    return named | {"dtype": str(model.dtype).removeprefix("torch.")}


def evaluation_from_answers(rule: SteeringRule, task: EvaluationTask, answers: AnswersByArm) -> Evaluation:
    """The record of these answers."""
    verdicts = answers.column("correct")
    arms = tuple(compare(name, right_Nn, verdicts["off"]) for name, right_Nn in verdicts.items())
    return Evaluation(
        rule=rule.fingerprint,
        ids=tuple(question.id for question in task.questions),
        verdicts=verdicts,
        arms=arms,
        differences={
            name: difference(right_Nn, verdicts["off"]) for name, right_Nn in verdicts.items() if name != "off"
        },
        conclusion=conclusion(arms),
        steered_share=float(answers.is_steered_N.mean()),
        model=answers.model,
        checker=task.checker,
        sampling=vars(task.sampling),
        seen=len(seen_before(task.questions, rule.questions)),
        question_set=task.name,
        trained_on=answers.trained_on,
        dataset=task.dataset,
        task=task.benchmark_task,
        example=_example(task.questions, verdicts),
        tokens=answers.column("tokens"),
        cut=answers.column("cut"),
        seconds={name: answers.arms[name].seconds for name in answers.arms if name in answers.timed},
    )


def _example(questions: Sequence[Question], verdicts: Mapping[str, Array]) -> Example | None:
    """A question that steering sets right, where there is one, or else the first, of those that a card can ask."""
    fixed_N = (verdicts[primary_arm(verdicts)] > verdicts["off"]).any(axis=1)
    order = np.argsort(~fixed_N, kind="stable")
    examples = (Example.of(questions[index].prompt) for index in order)
    return next((example for example in examples if example is not None), None)


def is_steered_by(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, gate: Gate, task: EvaluationTask, cache: AnswerCache
) -> Array:
    """Which questions the gate steers, (N,) bool; its probabilities are kept in ``cache``."""

    def probabilities(indices: Sequence[int]) -> Array:
        prompts = [task.questions[index].prompt for index in indices]
        return gate_probabilities(model, tokenizer, gate, prompts)[:, None]

    return is_below(cache.figures(f"gate {sha256(gate.to_bytes())}", probabilities)[:, 0], gate.threshold)


def require_fresh(questions: Sequence[Question], used: Sequence[str], remedy: str) -> None:
    """Refuse questions that are among the used ones, in whatever form; ``remedy`` is what the caller can do about it.

    Raises:
        TraceError: names the first of them.
    """
    if seen := seen_before(questions, used):
        raise TraceError(
            f"questions: {len(seen)} of {len(questions)} were used before, to find neurons, gate or strength "
            f"(first: {seen[0]}); expected fresh ones; {remedy}"
        )


def seen_before(questions: Sequence[Question], used: Sequence[str]) -> list[str]:
    """Ids of the questions that are among the used ones, in whatever form they were asked."""
    digests = parts_of(used)
    return [question.id for question in questions if is_known(question.prompt, digests)]
