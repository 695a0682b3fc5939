"""How many neurons and how strong: from validation questions, never from the test set.

Knows neither how settings are proposed (search.py) nor how they are reported (tune_report.py).
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaras_export.core.base_model import BaseModel
from adaras_export.core.gate import Gate
from adaras_export.core.intervals import require_statistics
from adaras_export.core.neurons import NeuronSet
from adaras_export.core.question_identity import identity
from adaras_export.core.rule import Start, SteeringRule
from adaras_export.errors import TraceError
from adaras_export.evaluation.answer_cache import AnswerCache
from adaras_export.evaluation.answers_by_arm import is_steered_by, require_fresh
from adaras_export.evaluation.arms import compare
from adaras_export.evaluation.engine import Backend, Bank
from adaras_export.evaluation.selection_bias import SelectionBias, selection_bias
from adaras_export.evaluation.task import EvaluationTask
from adaras_export.evaluation.tune_report import Trial, TuneReport
from adaras_export.evaluation.tune_search import Proposer, Search, Setting, Space, Span, proposer, rungs
from adaras_export.files.safetensors_record import Array

DEFAULT_COUNTS = (50, 200)
DEFAULT_STRENGTHS = (-3.0, -1.0, -0.3, 0.3, 1.0, 3.0)
_WHOLE_GRID = Search()


@dataclass(frozen=True)
class TuneOptions:
    """Which settings are tried, and how.

    Attributes:
        counts: numbers of neurons.
        strengths: signed strengths, or a span of magnitudes of both signs; never 0.
        start: the first steered token, or several to choose among.
        search: grid or sampler, and whether settings stop early.
        journal: file of answers, from which a killed run continues; the caller removes it.
        backend: answers instead of the model in memory.
    """

    counts: Sequence[int] = DEFAULT_COUNTS
    strengths: Sequence[float] | Span = DEFAULT_STRENGTHS
    start: Start | Sequence[Start] = "last_prompt_token"
    search: Search = _WHOLE_GRID
    journal: Path | None = None
    backend: Backend | None = None


_DEFAULT = TuneOptions()


def tune(  # noqa: PLR0913 - what the job is made of
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    neurons: NeuronSet | Mapping[str, NeuronSet],
    gate: Gate | None,
    task: EvaluationTask,
    base: BaseModel,
    options: TuneOptions = _DEFAULT,
    *,
    out: str | Path | None = None,
) -> TuneReport:
    """Try counts of the best neurons at signed strengths, as they would be deployed (gated, with a gate).

    Of the settings that answered all questions, the most accurate one wins; ties go to the smaller |strength|, then to
    fewer neurons, then to the positive strength. A setting is returned even where none beats no steering: the report
    says so, and how much of a gain is selection bias.

    Args:
        model: the base model, in float32 if answers are to be reproducible.
        tokenizer: its tokenizer.
        neurons: a ranking, or several by name, to choose among.
        gate: which prompts are steered; None steers all.
        task: fresh questions, one answer to each.
        base: the identity of ``model``.
        options: counts, strengths, starts and search; default: 50 and 200 neurons at 6 strengths.
        out: file to write the chosen rule to. Answers are kept beside it until then, so that a killed run goes on.

    Returns:
        the chosen rule, every setting that was tried, and the chance that the best of them is best by luck.

    Raises:
        TraceError: a question was used to find the neurons or the gate, or the file beside ``out`` is of another run.
        RuleError: no setting given, a count or strength of 0, or fewer neurons than a count.
        MissingExtraError: SciPy is not installed, or Optuna where settings are sampled.

    Source: this library; the paper (arXiv 2601.19847) gives one count and one strength.

    Example:
        task = EvaluationTask(read_questions("validation.jsonl"), check, Sampling(512))
        report = tune(model, tokenizer, found.neurons, gate, task, base, TuneOptions(counts=(50,)))
        report.rule.save("rule.safetensors")
    """
    if out is None:
        return _tuned(model, tokenizer, neurons, gate, task, base, options)
    journal = Path(out).with_name(f"{Path(out).name}.partial.jsonl")
    report = _tuned(model, tokenizer, neurons, gate, task, base, replace(options, journal=journal))
    report.rule.save(out)
    journal.unlink(missing_ok=True)
    return report


def _tuned(  # noqa: PLR0913 - the arguments of `tune`
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    neurons: NeuronSet | Mapping[str, NeuronSet],
    gate: Gate | None,
    task: EvaluationTask,
    base: BaseModel,
    options: TuneOptions,
) -> TuneReport:
    require_statistics()  # before the work, not after it
    if task.samples > 1:
        raise TraceError(f"tune: {task.samples} answers to each question; expected one, of more questions")
    rankings = {"": neurons} if isinstance(neurons, NeuronSet) else dict(neurons)
    used = [one for ranking in rankings.values() for one in ranking.questions]
    require_fresh(task.questions, (*used, *(gate.questions if gate else ())), "give others")
    starts: Sequence[Start] = (options.start,) if isinstance(options.start, str) else options.start
    space = Space(tuple(rankings), options.counts, options.strengths, starts)
    maker = _RuleMaker(rankings, gate, base, (*used, *(identity(question.prompt) for question in task.questions)))
    maker.require_possible(space)
    proposals = proposer(space, options.search)
    bank = None if options.backend is None else Bank(options.backend, maker.directions(space))
    with closing(AnswerCache(model, tokenizer, task, options.journal, bank)) as cache:
        is_steered_N = np.ones(len(task.questions), dtype=bool)
        if gate is not None:
            is_steered_N = is_steered_by(model, tokenizer, gate, task, cache)
        return _Tuning(space, options.search, maker, _GatedAnswers(cache, is_steered_N), len(task.questions)).run(
            proposals
        )


@dataclass(frozen=True)
class _GatedAnswers:
    """Verdicts of rules that act where ``is_steered_N`` says so: elsewhere they are those of no steering."""

    cache: AnswerCache
    is_steered_N: Array

    def answer(self, rules: Sequence[SteeringRule], questions: Sequence[int]) -> None:
        """Have these questions answered, unsteered and by each rule, where that is not known."""
        steered = [one for one in questions if self.is_steered_N[one]]
        missing = self.cache.missing([None], questions) + self.cache.missing(rules, steered)
        self.cache.expect(missing)
        self.cache.ask([None], questions)
        self.cache.ask(rules, steered)

    def verdicts(self, rule: SteeringRule | None, questions: Sequence[int]) -> Array:
        """Of answered questions, (len(questions),) bool."""
        found: Array = self.cache.answers(None, questions).correct[:, 0]
        if rule is not None:
            steered = [place for place, one in enumerate(questions) if self.is_steered_N[one]]
            found[steered] = self.cache.answers(rule, [questions[place] for place in steered]).correct[:, 0]
        return found


@dataclass(frozen=True)
class _RuleMaker:
    rankings: Mapping[str, NeuronSet]
    gate: Gate | None
    base: BaseModel
    questions: Sequence[str]

    def rule(self, setting: Setting) -> SteeringRule:
        """What would be deployed."""
        neurons = self.rankings[setting.ranking].top(setting.count)
        given = {"start": setting.start, "gate": self.gate, "questions": tuple(self.questions)}
        return SteeringRule(neurons, setting.strength, self.base, **given)  # type: ignore[arg-type]

    def bare(self, setting: Setting) -> SteeringRule:
        """What answers hang on: no gate, and no questions beside those that found the neurons."""
        return replace(self.rule(setting), gate=None, questions=())

    def require_possible(self, space: Space) -> None:
        """Refuse now what a sampler might propose late."""
        strengths = (space.strengths.low,) if isinstance(space.strengths, Span) else space.strengths
        for setting in replace(space, strengths=strengths).grid() or ():
            self.rule(setting)

    def directions(self, space: Space) -> list[SteeringRule]:
        """What is tried, each at one strength of all."""
        return [self.bare(setting) for setting in replace(space, strengths=(1.0,)).grid() or ()]


class _Tuning:
    """One run: rounds of proposals, each halved on more and more questions."""

    def __init__(self, space: Space, search: Search, maker: _RuleMaker, cache: _GatedAnswers, questions: int) -> None:
        self._space, self._search, self._maker, self._answers = space, search, maker, cache
        # Shuffled, so that the first ones are no easier than the others in a file that has an order.
        self._order = np.random.default_rng(search.seed).permutation(questions)
        self._tried: dict[Setting, int] = {}  # questions answered
        self._rules: dict[Setting, SteeringRule] = {}

    def run(self, proposals: Proposer) -> TuneReport:
        trials: dict[Setting, Trial] = {}
        while settings := proposals.ask():
            self._halve(settings)
            for setting in settings:
                trial = trials[setting] = self._trial(setting)
                proposals.tell(setting, trial.gain, trial.arm.questions, complete=not trial.stopped)
        best = max((one for one in trials if not trials[one].stopped), key=self._merit)
        everything = self._asked(len(self._order))
        off = self._answers.verdicts(None, everything)
        rule, found = self._maker.rule(best), (*trials.values(),)
        return TuneReport(rule, compare("off", off, off), found, trials[best], self._selection_bias(best), self._search)

    def _halve(self, settings: Sequence[Setting]) -> None:
        left = list(settings)
        self._rules |= {setting: self._maker.bare(setting) for setting in settings}
        for kept, questions in rungs(len(settings), len(self._order), self._search):
            if len(left) > kept:
                left = sorted(left, key=self._merit, reverse=True)[:kept]
            self._answers.answer([self._rules[one] for one in settings if one in left], self._asked(questions))
            self._tried |= dict.fromkeys(left, questions)

    def _asked(self, questions: int) -> list[int]:
        """Indices of the first questions of the order, as they stand in the file."""
        return sorted(self._order[:questions].tolist())

    def _merit(self, setting: Setting) -> tuple[float, ...]:
        """Of settings that answered the same questions, the greatest is the best."""
        strength = setting.strength
        correct = self._answers.verdicts(self._rules[setting], self._asked(self._tried[setting]))
        return int(correct.sum()), -abs(strength), -setting.count, strength > 0

    def _trial(self, setting: Setting) -> Trial:
        asked = self._asked(self._tried[setting])
        verdicts, off = self._answers.verdicts(self._rules[setting], asked), self._answers.verdicts(None, asked)
        arm = compare(self._name(setting), verdicts, off)
        stopped = len(asked) < len(self._order)
        return Trial(setting.count, setting.strength, arm, setting.ranking, setting.start, stopped)

    def _name(self, setting: Setting) -> str:
        """What differs between settings."""
        ranking = f" of {setting.ranking}" if len(self._space.rankings) > 1 else ""
        start = f" from {setting.start}" if len(self._space.starts) > 1 else ""
        return f"{setting.count} neurons{ranking} at {setting.strength:g}{start}"

    def _selection_bias(self, best: Setting) -> SelectionBias:
        shape = len(self._tried), len(self._order)
        differences: Array = np.zeros(shape, dtype=np.int8)
        answered: Array = np.zeros(shape, dtype=bool)
        for row, (setting, questions) in enumerate(self._tried.items()):
            asked = self._asked(questions)
            steered, off = self._answers.verdicts(self._rules[setting], asked), self._answers.verdicts(None, asked)
            differences[row, asked] = steered.astype(np.int8) - off
            answered[row, asked] = True
        return selection_bias(differences, answered, list(self._tried).index(best))
