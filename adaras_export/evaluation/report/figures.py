"""Figures of evaluations, made from their verdicts: arms, controls, several answers, and rules across question sets.

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
from adaras_export.evaluation.claims import Judgement, adjusted_of, judge
from adaras_export.evaluation.report.reading import Recorded

Role = Literal["off", "rule", "flipped", "random", "other"]


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
        adjusted: that after Holm's correction for the ways to run the rule; None for what is no such way.
        tokens: generated for an answer, on average.
        cut: share of answers that reached the limit of tokens.
        seconds: for an answer, on average.
    """

    name: str
    role: Role
    accuracy: Estimate
    change: Estimate | None
    fixed: int
    broken: int
    p_value: float
    adjusted: float | None
    tokens: float | None
    cut: float | None
    seconds: float | None


@dataclass(frozen=True)
class Result:
    """One evaluation in figures.

    Attributes:
        recorded: what they are made from.
        arms: no steering first, then the rule, then controls.
        judgement: of the way to run the rule that its controls are steered like.
        over_random: that way's accuracy minus the mean of its random controls, these draws given.
        over_flipped: the same from the flipped sign, with the p-value of the paired test.
        passes: (k, pass@k of no steering and of that way), where there are several answers.
    """

    recorded: Recorded
    arms: tuple[ArmResult, ...]
    judgement: Judgement
    over_random: Estimate | None
    over_flipped: tuple[Estimate, float] | None
    passes: tuple[tuple[int, Estimate, Estimate], ...]

    @property
    def lead(self) -> ArmResult:
        """The way to run the rule that is judged."""
        return next(arm for arm in self.arms if arm.name == self.judgement.arm.name)

    @property
    def random(self) -> tuple[ArmResult, ...]:
        """The random-neuron controls."""
        return tuple(arm for arm in self.arms if arm.role == "random")

    def ids_of_changed(self, *, fixed: bool) -> list[str]:
        """Questions on which the judged way does better than no steering, or worse."""
        verdicts = self.recorded.verdicts
        gained_N = per_question(verdicts[self.lead.name]) - per_question(verdicts["off"])
        chosen_N = gained_N > 0 if fixed else gained_N < 0
        return [self.recorded.ids[place] for place in np.flatnonzero(chosen_N)]

    def as_record(self) -> dict[str, Any]:
        """JSON values."""
        recorded, judged = self.recorded, self.judgement
        return {
            "file": recorded.file,
            "rule": recorded.rule,
            "question_set": recorded.set_name,
            "questions": len(recorded.ids),
            "questions_digest": recorded.questions_digest,
            "answers": recorded.answers,
            "seen": recorded.seen,
            "trained_on": recorded.trained_on,
            "steered_share": recorded.steered_share,
            "about": dict(recorded.about),
            "arms": [asdict(arm) for arm in self.arms],
            "judged": judged.arm.name,
            "outcome": "seen" if recorded.seen else judged.outcome,
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
    if seen := result.recorded.seen:
        return f"no test: the rule was made with {seen} of these {len(result.recorded.ids)} questions."
    return result.judgement.sentence()


def result_of(recorded: Recorded) -> Result:
    """The figures of one evaluation."""
    off_Nn = recorded.verdicts["off"]
    arms = [compare(name, values_Nn, off_Nn) for name, values_Nn in recorded.verdicts.items()]
    judged, adjusted = judge(arms), adjusted_of(arms)
    lead_Nn = recorded.verdicts[judged.arm.name]
    judged = replace(judged, detectable=detectable(lead_Nn, off_Nn))
    random = [per_question(values_Nn) for name, values_Nn in recorded.verdicts.items() if is_random(name)]
    over_random = bootstrap_mean(per_question(lead_Nn) - np.mean(random, axis=0)) if random else None
    flipped_Nn = recorded.verdicts.get("flipped")
    over_flipped = None
    if flipped_Nn is not None:
        over_flipped = (difference(lead_Nn, flipped_Nn), changed(lead_Nn, flipped_Nn)[2])
    return Result(
        recorded=recorded,
        arms=tuple(_filled(arm, adjusted.get(arm.name), recorded) for arm in arms),
        judgement=judged,
        over_random=over_random,
        over_flipped=over_flipped,
        passes=tuple((k, pass_at_k(off_Nn, k), pass_at_k(lead_Nn, k)) for k in _sizes(recorded.answers)),
    )


def _sizes(answers: int) -> list[int]:
    """The k of pass@k: all up to 8, then doubled, and all answers; none for one answer."""
    wanted = [k for k in (*range(1, 9), *(2**power for power in range(4, 20))) if k < answers]
    return [*wanted, answers] if answers > 1 else []


def _filled(arm: Arm, adjusted: float | None, recorded: Recorded) -> ArmResult:
    name, verdicts = arm.name, recorded.verdicts
    tokens, cut, seconds = recorded.tokens.get(name), recorded.cut.get(name), recorded.seconds.get(name)
    return ArmResult(
        name=name,
        role=_role(name),
        accuracy=Estimate(arm.accuracy, arm.low, arm.high),
        change=None if name == "off" else difference(verdicts[name], verdicts["off"]),
        fixed=arm.fixed,
        broken=arm.broken,
        p_value=arm.p_value,
        adjusted=adjusted,
        tokens=None if tokens is None else float(tokens.mean()),
        cut=None if cut is None else float(cut.mean()),
        seconds=None if seconds is None else seconds / verdicts[name].size,
    )


def _role(name: str) -> Role:
    if name in RULE_ARMS:
        return "rule"
    if is_random(name):
        return "random"
    return "off" if name == "off" else "flipped" if name == "flipped" else "other"


@dataclass(frozen=True)
class Cell:
    """A rule on a question set.

    Attributes:
        result: the evaluation.
        adjusted: p-value of the judged way against no steering, after Holm's correction for all cells.
        own: whether the rule was made with questions of that set, as far as was recorded.
    """

    result: Result
    adjusted: float
    own: bool

    @property
    def change(self) -> Estimate:
        """The judged way against no steering."""
        assert self.result.lead.change is not None
        return self.result.lead.change


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
    cells: tuple[tuple[Cell | None, ...], ...]

    def as_record(self) -> dict[str, Any]:
        """JSON values."""
        return {"rules": list(self.rules), "sets": list(self.sets), "cells": [[*map(_cell, row)] for row in self.cells]}


def _cell(cell: Cell | None) -> dict[str, Any] | None:
    if cell is None:
        return None
    lead = cell.result.lead
    return {
        "file": cell.result.recorded.file,
        "arm": lead.name,
        "difference": asdict(cell.change),
        "p_value": lead.p_value,
        "p_adjusted": cell.adjusted,
        "own": cell.own,
    }


def transfer_of(results: Sequence[Result]) -> Transfer:
    """Rules in the order in which they were given, question sets too.

    Raises:
        ArtifactError: one rule was evaluated twice on the same questions.
    """
    adjusted = holm([result.lead.p_value for result in results])
    found: dict[tuple[str, tuple[str, int]], Cell] = {}
    for result, p_value in zip(results, adjusted, strict=True):
        place = result.recorded.rule, _set_of(result.recorded)
        if place in found:
            other = found[place].result.recorded.file
            raise ArtifactError(
                f"{result.recorded.file}: evaluates the rule of {other} on the same questions; expected one of them"
            )
        found[place] = Cell(result, p_value, _is_own(result.recorded))
    rules = list(dict.fromkeys(rule for rule, _ in found))
    sets = {_set_of(result.recorded): _set_label(result.recorded) for result in reversed(results)}
    ordered = list(dict.fromkeys(own for _, own in found))
    rows = tuple(tuple(found.get((rule, own)) for own in ordered) for rule in rules)
    return Transfer(tuple(rules), tuple(sets[own] for own in ordered), rows)


def _set_of(recorded: Recorded) -> tuple[str, int]:
    return recorded.questions_digest, recorded.answers


def _set_label(recorded: Recorded) -> str:
    return recorded.set_name + (f", {recorded.answers} answers each" if recorded.answers > 1 else "")


def _is_own(recorded: Recorded) -> bool:
    return bool(recorded.seen) or (recorded.trained_on is not None and recorded.trained_on == recorded.question_set)
