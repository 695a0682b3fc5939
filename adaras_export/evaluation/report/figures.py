"""Figures of evaluations, computed from their verdicts: arms, controls, several answers, rules across question sets.

Every figure has its interval; p-values are corrected for what was tested together. Knows no words and no format.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from adaras_export.core.intervals import (
    Estimate,
    bootstrap_mean,
    changed,
    detectable,
    difference,
    holm,
    pass_at_k,
    per_question,
)
from adaras_export.errors import ArtifactError
from adaras_export.evaluation.arms import RULE_ARMS, Arm, compare, is_random
from adaras_export.evaluation.claims import LEVEL, Judgement, adjusted_of, judge
from adaras_export.evaluation.record import Evaluation
from adaras_export.evaluation.report.reading import in_words

Role = Literal["off", "rule", "flipped", "random", "other"]

_LONGEST = 300


@dataclass(frozen=True)
class ArmResult:
    """One arm of one evaluation.

    Attributes:
        name: as in the file.
        role: what it is there for.
        accuracy: with Wilson's interval for one answer a question, a bootstrap interval over questions for several.
        change: accuracy minus that of no steering, with its paired bootstrap interval; None for no steering itself.
        fixed: questions that it does better on than no steering.
        broken: questions that it does worse on.
        p_value: of the exact paired test against no steering.
        adjusted: the p-value after Holm's correction for the ways to run the rule; None for other arms.
        tokens: generated for an answer, on average.
        cut: share of answers that reached the limit of tokens.
        seconds: for an answer, on average; None for an arm that was put together from others.
    """

    name: str
    role: Role
    accuracy: Estimate
    change: Estimate | None
    fixed: int
    broken: int
    p_value: float
    adjusted: float | None
    tokens: float
    cut: float
    seconds: float | None


@dataclass(frozen=True)
class Result:
    """One evaluation in figures.

    Attributes:
        file: name of its file, without the folder.
        evaluation: what the figures are computed from.
        arms: no steering first, then the rule, then controls.
        judgement: of the primary arm.
        over_random: accuracy of the primary arm minus the mean of its random controls, for these draws.
        over_flipped: the same for the flipped sign, with the p-value of the paired test.
        passes: (k, pass@k of no steering and of the primary arm), where there are several answers.
    """

    file: str
    evaluation: Evaluation
    arms: tuple[ArmResult, ...]
    judgement: Judgement
    over_random: Estimate | None
    over_flipped: tuple[Estimate, float] | None
    passes: tuple[tuple[int, Estimate, Estimate], ...]

    @property
    def primary(self) -> ArmResult:
        """The way to run the rule that is judged."""
        return next(arm for arm in self.arms if arm.name == self.judgement.arm.name)

    @property
    def random(self) -> tuple[ArmResult, ...]:
        """The random-neuron controls."""
        return tuple(arm for arm in self.arms if arm.role == "random")

    def ids_of_changed(self, *, fixed: bool) -> list[str]:
        """Questions on which the judged way does better than no steering, or worse."""
        verdicts = self.evaluation.verdicts
        gained_N = per_question(verdicts[self.primary.name]) - per_question(verdicts["off"])
        changed_N = gained_N > 0 if fixed else gained_N < 0
        return [self.evaluation.ids[place] for place in np.flatnonzero(changed_N)]

    def as_record(self) -> dict[str, Any]:
        """JSON values."""
        evaluation, judged = self.evaluation, self.judgement
        return {
            "file": self.file,
            "rule": evaluation.rule,
            "question_set": name_of_set(evaluation),
            "questions": evaluation.questions,
            "questions_digest": evaluation.questions_digest,
            "answers": evaluation.samples,
            "seen": evaluation.seen,
            "trained_on": evaluation.trained_on,
            "steered_share": evaluation.steered_share,
            "about": about(evaluation),
            "arms": [asdict(arm) for arm in self.arms],
            "judged": judged.arm.name,
            "outcome": "seen" if evaluation.seen else judged.outcome,
            "sentence": sentence(self),
            "p_adjusted": judged.p_value,
            "tested": list(judged.tested),
            "rank_p": judged.rank_p if judged.random else None,
            "random_as_good": judged.as_good,
            "random_draws": len(judged.random),
            "detectable": judged.detectable,
            "over_random": None if self.over_random is None else asdict(self.over_random),
            "over_flipped": None if self.over_flipped is None else asdict(self.over_flipped[0]),
            "over_flipped_p": None if self.over_flipped is None else self.over_flipped[1],
            "pass_at": [{"k": k, "off": asdict(off), judged.arm.name: asdict(own)} for k, off, own in self.passes],
        }


def sentence(result: Result) -> str:
    """What the evaluation allows to say of its rule."""
    if seen := result.evaluation.seen:
        return f"no test: the rule was made with {seen} of these {result.evaluation.questions} questions."
    return result.judgement.sentence()


def given_name(evaluation: Evaluation) -> str:
    """The name of the questions, or their dataset and task; empty where they have none."""
    return evaluation.question_set or ": ".join(part for part in (evaluation.dataset, evaluation.task) if part)


def name_of_set(evaluation: Evaluation) -> str:
    """The name of the questions, or what stands in for one."""
    return given_name(evaluation) or f"{evaluation.questions} questions {evaluation.questions_digest[:6]}"


def about(evaluation: Evaluation) -> dict[str, str]:
    """Model, checker and sampling in words."""
    values = {"model": evaluation.model, "checker": evaluation.checker, "sampling": evaluation.sampling}
    return {key: in_words(value)[:_LONGEST] for key, value in values.items()}


def result_of(file: str, evaluation: Evaluation) -> Result:
    """The figures of one evaluation."""
    verdicts = evaluation.verdicts
    off_Nn = verdicts["off"]
    arms = [compare(name, arm_Nn, off_Nn) for name, arm_Nn in verdicts.items()]
    judged, adjusted = judge(arms), adjusted_of(arms)
    primary_Nn = verdicts[judged.arm.name]
    judged = replace(judged, detectable=detectable(primary_Nn, off_Nn))
    random = [per_question(arm_Nn) for name, arm_Nn in verdicts.items() if is_random(name)]
    over_random = bootstrap_mean(per_question(primary_Nn) - np.mean(random, axis=0)) if random else None
    flipped_Nn = verdicts.get("flipped")
    over_flipped = None
    if flipped_Nn is not None:
        over_flipped = (difference(primary_Nn, flipped_Nn), changed(primary_Nn, flipped_Nn)[2])
    return Result(
        file=file,
        evaluation=evaluation,
        arms=tuple(_arm_result(arm, adjusted.get(arm.name), evaluation) for arm in arms),
        judgement=judged,
        over_random=over_random,
        over_flipped=over_flipped,
        passes=tuple((k, pass_at_k(off_Nn, k), pass_at_k(primary_Nn, k)) for k in _sizes(evaluation.samples)),
    )


def _sizes(answers: int) -> list[int]:
    """The k of pass@k: all up to 8, then doubled, and all answers; none for one answer."""
    sizes = [k for k in (*range(1, 9), *(2**power for power in range(4, 20))) if k < answers]
    return [*sizes, answers] if answers > 1 else []


def _arm_result(arm: Arm, adjusted: float | None, evaluation: Evaluation) -> ArmResult:
    name, verdicts, seconds = arm.name, evaluation.verdicts, evaluation.seconds.get(arm.name)
    return ArmResult(
        name=name,
        role=_role(name),
        accuracy=Estimate(arm.accuracy, arm.low, arm.high),
        change=None if name == "off" else difference(verdicts[name], verdicts["off"]),
        fixed=arm.fixed,
        broken=arm.broken,
        p_value=arm.p_value,
        adjusted=adjusted,
        tokens=float(evaluation.tokens[name].mean()),
        cut=float(evaluation.cut[name].mean()),
        seconds=None if seconds is None else seconds / verdicts[name].size,
    )


def _role(name: str) -> Role:
    if name in RULE_ARMS:
        return "rule"
    if is_random(name):
        return "random"
    return "off" if name == "off" else "flipped" if name == "flipped" else "other"


@dataclass(frozen=True)
class TransferCell:
    """A rule on a question set.

    Attributes:
        result: the evaluation.
        adjusted: p-value of the primary arm against no steering, after Holm's correction for all cells.
        own: whether the rule was made with questions of that set, as far as was recorded.
    """

    result: Result
    adjusted: float
    own: bool

    @property
    def is_significant(self) -> bool:
        """Whether that p-value is below the level."""
        return self.adjusted < LEVEL

    @property
    def change(self) -> Estimate:
        """The primary arm against no steering."""
        assert self.result.primary.change is not None
        return self.result.primary.change


@dataclass(frozen=True)
class Transfer:
    """Rules across question sets.

    Attributes:
        rules: fingerprints, rows.
        sets: names of question sets, columns.
        cells: by row and column; None where no evaluation was given.
    """

    rules: tuple[str, ...]
    sets: tuple[str, ...]
    cells: tuple[tuple[TransferCell | None, ...], ...]

    @property
    def count(self) -> int:
        """How many cells were evaluated."""
        return sum(cell is not None for row in self.cells for cell in row)

    @property
    def missing(self) -> int:
        """How many cells were not."""
        return len(self.rules) * len(self.sets) - self.count

    def as_record(self) -> dict[str, Any]:
        """JSON values."""
        return {"rules": list(self.rules), "sets": list(self.sets), "cells": [[*map(_cell, row)] for row in self.cells]}


def _cell(cell: TransferCell | None) -> dict[str, Any] | None:
    if cell is None:
        return None
    primary = cell.result.primary
    return {
        "file": cell.result.file,
        "arm": primary.name,
        "difference": asdict(cell.change),
        "p_value": primary.p_value,
        "p_adjusted": cell.adjusted,
        "own": cell.own,
    }


def transfer_of(results: Sequence[Result]) -> Transfer:
    """Rules in the order in which they were given, question sets too.

    Raises:
        ArtifactError: one rule was evaluated twice on the same questions.
    """
    adjusted = holm([result.primary.p_value for result in results])
    cells: dict[tuple[str, tuple[str, int]], TransferCell] = {}
    for result, p_value in zip(results, adjusted, strict=True):
        place = result.evaluation.rule, _set_of(result.evaluation)
        if place in cells:
            other = cells[place].result.file
            raise ArtifactError(
                f"{result.file}: evaluates the rule of {other} on the same questions; expected one of them"
            )
        cells[place] = TransferCell(result, p_value, _is_own(result.evaluation))
    rules = list(dict.fromkeys(rule for rule, _ in cells))
    sets = {_set_of(result.evaluation): _set_label(result.evaluation) for result in reversed(results)}
    ordered = list(dict.fromkeys(own for _, own in cells))
    rows = tuple(tuple(cells.get((rule, own)) for own in ordered) for rule in rules)
    return Transfer(tuple(rules), tuple(sets[own] for own in ordered), rows)


def _set_of(evaluation: Evaluation) -> tuple[str, int]:
    return evaluation.questions_digest, evaluation.samples


def _set_label(evaluation: Evaluation) -> str:
    return name_of_set(evaluation) + (f", {evaluation.samples} answers each" if evaluation.samples > 1 else "")


def _is_own(evaluation: Evaluation) -> bool:
    is_named = evaluation.trained_on is not None and evaluation.trained_on == evaluation.question_set
    return bool(evaluation.seen) or is_named
