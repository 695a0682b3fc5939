"""What tuning found, for a person and for a program: the chosen setting, every trial, and the selection bias.

Knows no model; settings and verdicts come from tune.py.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaras_export.core.markdown import plain
from adaras_export.core.rule import Start, SteeringRule
from adaras_export.errors import ArtifactError
from adaras_export.evaluation.arms import Arm, arms_table
from adaras_export.evaluation.selection_bias import SelectionBias
from adaras_export.evaluation.tune_search import Search
from adaras_export.files.atomic import replace_file

FORMATS = (".json", ".md")
"""Endings of the names of files that `TuneReport.save` can write."""


@dataclass(frozen=True)
class Trial:
    """One setting, and what it did to the validation questions that it answered."""

    count: int
    strength: float
    arm: Arm
    ranking: str = ""
    start: Start = "last_prompt_token"
    stopped: bool = False

    @property
    def gain(self) -> float:
        """Its accuracy minus that of no steering, on the questions that it answered."""
        return _gain(self.arm)

    def as_record(self) -> dict[str, Any]:
        """JSON values."""
        record = {key: value for key, value in vars(self).items() if key != "arm"}
        return {**record, "gain": self.gain, "arm": vars(self.arm)}


@dataclass(frozen=True)
class TuneReport:
    """The chosen rule, every setting tried, and whether the best one beat no steering.

    ``trials`` are in the order of trying; ``off`` and ``chosen`` are on all questions.
    """

    rule: SteeringRule
    off: Arm
    trials: tuple[Trial, ...]
    chosen: Trial
    bias: SelectionBias
    search: Search

    @property
    def beats_off(self) -> bool:
        """Whether the chosen setting answered more validation questions than no steering."""
        return self.chosen.arm.accuracy > self.off.accuracy

    @property
    def distinguishable(self) -> bool:
        """Whether chance alone would rarely make the best of so many settings as good."""
        return self.beats_off and self.bias.p_value < 0.05

    def table(self) -> str:
        """All settings, one line each, beside no steering."""
        return arms_table([self.off, *(_labelled(trial) for trial in self.trials)])

    def line(self) -> str:
        """One line for a person."""
        arm = self.chosen.arm
        chosen = f"{arm.name}: {self.off.accuracy:.1%} -> {arm.accuracy:.1%} on {arm.questions} validation questions"
        if not self.beats_off:
            return f"{chosen}; NO SETTING BEATS NO STEERING, this is the least bad one"
        if not self.distinguishable:
            return f"{chosen}; NOT DISTINGUISHABLE FROM LUCK: {self._chance()}"
        return chosen

    def _chance(self) -> str:
        """The winner's curse in words."""
        return (
            f"the best of {self.bias.settings} settings gains as much by chance with p = {self.bias.p_value:.2g}; "
            f"expect {100 * self.bias.fresh_gain:+.1f} points on fresh questions"
        )

    def as_record(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "rule": self.rule.fingerprint,
            "count": self.chosen.count,
            "strength": self.chosen.strength,
            "ranking": self.chosen.ranking,
            "start": self.chosen.start,
            "beats_off": self.beats_off,
            "distinguishable": self.distinguishable,
            "selection_bias": self.bias.as_record(),
            "search": vars(self.search),
            "arms": [vars(arm) for arm in (self.off, *(trial.arm for trial in self.trials))],
            "trials": [{**trial.as_record(), "chosen": trial is self.chosen} for trial in self.trials],
        }

    def markdown(self) -> str:
        """A page with every trial, best first."""
        rows = sorted(self.trials, key=lambda trial: (trial.stopped, -trial.arm.accuracy))
        heads = ("", "setting", "questions", "accuracy", "95 % interval", "fixed", "broken", "gain")
        lines = [
            "# Settings tried on validation questions",
            "",
            f"Chosen: {plain(self.line())}.",
            "",
            f"Tried: {self.bias.settings}; {sum(trial.stopped for trial in self.trials)} were stopped before all "
            f"questions; {self._chance()}. Rule: `{self.rule.fingerprint}`.",
            "",
            f"| {' | '.join(heads)} |",
            f"|{'---|' * len(heads)}",
            _row("", self.off),
            *(_row(self._mark(trial), trial.arm) for trial in rows),
        ]
        return "\n".join(lines) + "\n"

    def _mark(self, trial: Trial) -> str:
        return "chosen" if trial is self.chosen else "stopped" if trial.stopped else ""

    def save(self, path: str | Path) -> None:
        """Write the trials as JSON or Markdown, by the ending of the name, atomically.

        Raises:
            ArtifactError: another ending, or the file cannot be written.
        """
        path = Path(path)
        if path.suffix not in FORMATS:
            raise ArtifactError(f"{path}: no format is called {path.suffix!r}; expected {' or '.join(FORMATS)}")
        text = (
            self.markdown() if path.suffix == ".md" else json.dumps(self.as_record(), indent=1, sort_keys=True) + "\n"
        )
        replace_file(path, text.encode())


def _gain(arm: Arm) -> float:
    return (arm.fixed - arm.broken) / arm.questions


def _labelled(trial: Trial) -> Arm:
    note = f" (stopped at {trial.arm.questions})" if trial.stopped else ""
    return replace(trial.arm, name=trial.arm.name + note)


def _row(mark: str, arm: Arm) -> str:
    interval = f"{arm.low:.1%} - {arm.high:.1%}"
    figures = (arm.questions, f"{arm.accuracy:.1%}", interval, arm.fixed, arm.broken, f"{100 * _gain(arm):+.1f}")
    cells = (mark, plain(arm.name), *figures)
    return f"| {' | '.join(map(str, cells))} |"
