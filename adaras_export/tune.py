"""How many neurons and how strong: from validation questions, never from the test set."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaras_export.errors import RuleError
from adaras_export.evaluate import Exam, answer, gate_fires, require_fresh
from adaras_export.models import BaseModel
from adaras_export.rule import Gate, NeuronSet, Start, SteeringRule
from adaras_export.traces import digest
from adaras_export.verdicts import Arm, arms_table, compare, require_statistics

DEFAULT_COUNTS = (50, 200)
DEFAULT_STRENGTHS = (-3.0, -1.0, -0.3, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Trial:
    """One setting, and what it did to the validation questions."""

    count: int
    strength: float
    arm: Arm


@dataclass(frozen=True)
class TuneReport:
    """The chosen rule, every setting tried, and whether the best one beat no steering."""

    rule: SteeringRule
    off: Arm
    trials: tuple[Trial, ...]
    chosen: Trial

    @property
    def beats_off(self) -> bool:
        """Whether the chosen setting answered more validation questions than no steering."""
        return self.chosen.arm.accuracy > self.off.accuracy

    def table(self) -> str:
        """All settings, one line each, beside no steering."""
        return arms_table([self.off, *(trial.arm for trial in self.trials)])

    def line(self) -> str:
        """One line for a person."""
        arm = self.chosen.arm
        chosen = f"{arm.name}: {self.off.accuracy:.1%} -> {arm.accuracy:.1%} on {arm.questions} validation questions"
        return chosen if self.beats_off else f"{chosen}; NO SETTING BEATS NO STEERING, this is the least bad one"

    def as_record(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "rule": self.rule.fingerprint,
            "count": self.chosen.count,
            "strength": self.chosen.strength,
            "beats_off": self.beats_off,
            "arms": [vars(arm) for arm in (self.off, *(trial.arm for trial in self.trials))],
        }


def tune(  # noqa: PLR0913 - one decision of the researcher each
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    neurons: NeuronSet,
    gate: Gate | None,
    exam: Exam,
    *,
    base: BaseModel,
    counts: Sequence[int] = DEFAULT_COUNTS,
    strengths: Sequence[float] = DEFAULT_STRENGTHS,
    start: Start = "last_prompt_token",
) -> TuneReport:
    """Try every count of the best neurons at every signed strength, as it would be deployed (gated, with a gate).

    The most accurate setting wins; ties go to the smaller |strength|, then to fewer neurons, then to the positive
    strength. A setting is returned even where none beats no steering: the report says so.

    Raises:
        TraceError: a question was used to find the neurons or the gate.
        RuleError: no setting given, a count or strength of 0, or fewer neurons than a count.
        MissingExtraError: SciPy is not installed.
    """
    require_statistics()  # before the work, not after it
    require_fresh(exam.questions, (*neurons.questions, *(gate.questions if gate else ())))
    settings = [(count, float(strength)) for count in counts for strength in strengths]
    if not settings or any(count < 1 or strength == 0 for count, strength in settings):
        raise RuleError(f"tune: counts {list(counts)} and strengths {list(strengths)}; expected numbers other than 0")
    seen = tuple(digest(question.prompt) for question in exam.questions)
    rules = [
        SteeringRule(neurons.top(count), strength, base, start=start, gate=gate, questions=seen)
        for count, strength in settings
    ]
    off, *found = answer(model, tokenizer, exam, [None, *rules])
    fires = np.ones_like(off) if gate is None else gate_fires(model, tokenizer, gate, exam)
    trials = tuple(
        Trial(count, strength, compare(f"{count} neurons at {strength:g}", np.where(fires, verdicts, off), off))
        for (count, strength), verdicts in zip(settings, found, strict=True)
    )
    chosen = max(trials, key=lambda trial: (trial.arm.accuracy, -abs(trial.strength), -trial.count, trial.strength > 0))
    rule = rules[trials.index(chosen)]
    return TuneReport(rule, compare("off", off, off), trials, chosen)
