"""Which settings are tried, and on how many questions: a grid or a sampler, and successive halving.

Knows no model and no question: settings are numbers and names, results are gains that somebody tells.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol

from adaras_export.core.rule import Start
from adaras_export.errors import RuleError, require

_ROUND = 12
"""Settings that the sampler proposes at once: they share prefilled prompts, and the next ones learn from them."""


@dataclass(frozen=True)
class Setting:
    """One way to steer: so many of the best neurons of a ranking, how strongly, and from which token on."""

    ranking: str
    count: int
    strength: float
    start: Start


@dataclass(frozen=True)
class Span:
    """All strengths of both signs whose magnitude is between two numbers, evenly on a logarithmic scale."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < float("inf"):
            raise RuleError(f"strengths {self.low:g}:{self.high:g}: no range; expected two numbers, 0 < low < high")


@dataclass(frozen=True)
class Space:
    """What to choose from."""

    rankings: Sequence[str]
    counts: Sequence[int]
    strengths: Sequence[float] | Span
    starts: Sequence[Start]

    def __post_init__(self) -> None:
        strengths = [1.0] if isinstance(self.strengths, Span) else list(self.strengths)
        if not self.counts or not strengths or any(one < 1 for one in self.counts) or 0 in strengths:
            raise RuleError(
                f"tune: counts {list(self.counts)} and strengths {strengths}; expected numbers other than 0"
            )
        if not self.rankings or not self.starts:
            raise RuleError("tune: no ranking or no start; expected at least one of each")

    def grid(self) -> list[Setting] | None:
        """Every setting, each once; None where there are infinitely many."""
        if isinstance(self.strengths, Span):
            return None
        found = product(self.rankings, self.starts, self.counts, map(float, self.strengths))
        return list(dict.fromkeys(Setting(ranking, k, strength, start) for ranking, start, k, strength in found))


@dataclass(frozen=True)
class Search:
    """How to search.

    Attributes:
        trials: settings to propose by a sampler (TPE); None tries the whole grid.
        first: questions that every setting answers before the worse ones stop; None or 0: all of them.
        divisor: of the settings of a rung, one in so many goes on, to so many times the questions.
        seed: of the sampler and of the order of questions.
    """

    trials: int | None = None
    first: int | None = None
    divisor: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.trials is not None and self.trials < 1) or (self.first or 0) < 0 or self.divisor < 2:
            raise RuleError(
                f"search: {self.trials} trials, first {self.first}, divisor {self.divisor}; "
                "expected at least 1 trial, 0 or more first questions, a divisor of 2 or more"
            )


def rungs(settings: int, questions: int, search: Search) -> list[tuple[int, int]]:
    """(settings, questions) of every rung: fewer and fewer settings on more and more questions, at last on all."""
    reached, left = search.first or questions, settings
    found = []
    while reached < questions and left > 1:
        found.append((left, reached))
        left, reached = -(-left // search.divisor), reached * search.divisor
    return [*found, (left, questions)]


class Proposer(Protocol):
    """Who says which settings come next."""

    def ask(self) -> list[Setting]:
        """The settings of the next round, none of them asked before; empty at the end."""

    def tell(self, setting: Setting, gain: float, questions: int, *, complete: bool) -> None:
        """What a setting gained over no steering on so many questions, and whether those were all."""


def proposer(space: Space, search: Search) -> Proposer:
    """The whole grid at once, or a sampler where fewer trials are wanted than that.

    Raises:
        RuleError: a range of strengths without a number of trials.
        MissingExtraError: a sampler is needed, and Optuna is not installed.
    """
    grid = space.grid()
    if search.trials is None and grid is None:
        raise RuleError("tune: a range of strengths is no grid; expected a number of trials, too")
    if grid is not None and (search.trials is None or search.trials >= len(grid)):
        return _Grid(grid)
    return _Sampler(space, search)


class _Grid:
    def __init__(self, settings: list[Setting]) -> None:
        self._left = settings

    def ask(self) -> list[Setting]:
        asked, self._left = self._left, []
        return asked

    def tell(self, setting: Setting, gain: float, questions: int, *, complete: bool) -> None:
        """A grid learns nothing."""


@dataclass
class _Sampler:
    """Optuna's tree-structured Parzen estimator, in rounds; the same gains lead to the same proposals."""

    space: Space
    search: Search
    open: dict[Setting, list[Any]] = field(default_factory=dict)
    told: dict[Setting, tuple[float, int, bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        optuna = require("optuna", "tune", "sampling settings")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=self.search.seed, n_startup_trials=_ROUND)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._pruned = optuna.trial.TrialState.PRUNED

    def ask(self) -> list[Setting]:
        asked = 0  # proposals of a known setting count for nothing, but end somewhere: a list may be exhausted
        wanted = min(_ROUND, (self.search.trials or 0) - len(self.told))
        while len(self.open) < wanted and asked < 20 * _ROUND:
            asked += 1
            trial = self._study.ask()
            setting = self._setting(trial)
            if setting in self.told:
                gain, questions, complete = self.told[setting]
                self._tell(trial, gain, questions, complete=complete)
            else:
                self.open.setdefault(setting, []).append(trial)
        return list(self.open)

    def tell(self, setting: Setting, gain: float, questions: int, *, complete: bool) -> None:
        self.told[setting] = gain, questions, complete
        for trial in self.open.pop(setting):
            self._tell(trial, gain, questions, complete=complete)

    def _tell(self, trial: Any, gain: float, questions: int, *, complete: bool) -> None:  # noqa: ANN401 - Optuna's
        trial.report(gain, questions)
        if complete:
            self._study.tell(trial, gain)
        else:
            self._study.tell(trial, state=self._pruned)

    def _setting(self, trial: Any) -> Setting:  # noqa: ANN401 - Optuna's
        ranking = trial.suggest_categorical("ranking", list(self.space.rankings))
        count = trial.suggest_categorical("count", list(self.space.counts))
        start = trial.suggest_categorical("start", list(self.space.starts))
        return Setting(ranking, count, self._strength(trial), start)

    def _strength(self, trial: Any) -> float:  # noqa: ANN401 - Optuna's
        strengths = self.space.strengths
        if not isinstance(strengths, Span):
            return float(trial.suggest_categorical("strength", [float(one) for one in strengths]))
        size = trial.suggest_float("magnitude", strengths.low, strengths.high, log=True)
        sign = trial.suggest_categorical("sign", [-1, 1])
        return float(f"{sign * size:.3g}")  # as it is printed
