"""Evaluation and tuning with an engine that holds a bank: the same verdicts, whatever the order of the answers."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import tiny

from adaras_export.core.bank import BankRule
from adaras_export.core.traces import Question
from adaras_export.errors import RuleError, TraceError
from adaras_export.evaluation.answers_by_arm import EvaluationOptions
from adaras_export.evaluation.engine import Backend
from adaras_export.evaluation.evaluate import evaluate
from adaras_export.evaluation.task import EvaluationTask
from adaras_export.evaluation.tune import TuneOptions, tune
from adaras_export.evaluation.tune_search import Search, Span
from adaras_export.modeling.gate import gate_probabilities
from adaras_export.modeling.generation import Sampling, complete_ids
from adaras_export.modeling.steering import steered, steered_everywhere

pytest.importorskip("scipy.stats")

QUESTIONS = [Question(f"q{n}", f"{n * 37} and {'so ' * (n % 4)}on", "x") for n in range(6)]


def has_even_sum(completion, answer):
    """A verdict that random text gets right about every second time."""
    return sum(completion.encode()) % 2 == 0


class Hooked:
    """An engine that answers the last request first, with the hooks of `steered`."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.banks, self.contexts, self.asked, self.stop_after = [], [], [], None

    @contextmanager
    def open(self, bank, context):
        self.banks.append({one.name: one for one in bank})
        self.contexts.append(context)
        yield self
        self.banks.append("closed")

    def complete(self, requests, sampling, ends):
        self.asked += requests
        for number in reversed(range(len(requests))):
            if self.stop_after == 0:
                raise KeyboardInterrupt
            self.stop_after = None if self.stop_after is None else self.stop_after - 1
            request = requests[number]
            with self._steering(request):
                [ids] = complete_ids(self.model, self.tokenizer, [request.prompt], sampling, [request.key])
            yield number, ids

    def _steering(self, request):
        one = self.banks[-1][request.rule]
        if request.strength == 0:
            return nullcontext()
        way = steered_everywhere if one.everywhere else steered
        return way(self.model, one.rule.with_strength(request.strength))


@pytest.fixture
def engine(stock, tokenizer):
    return Hooked(stock["qwen3"], tokenizer)


@pytest.fixture
def backend(engine):
    return Backend("hooks", engine.open)


@pytest.fixture(scope="module")
def gate(stock, tokenizer):
    """A gate that steers about half of the questions."""
    gate = tiny.make_gate()
    found = np.sort(gate_probabilities(stock["qwen3"], tokenizer, gate, [q.prompt for q in QUESTIONS]))
    return replace(gate, threshold=float(found[2:4].mean()))


@pytest.fixture
def run(stock, tokenizer, bases, gate):
    """`evaluate` on the tiny qwen3 with two random controls."""
    rule = tiny.make_rule(bases["qwen3"], gate=gate)
    task = EvaluationTask(QUESTIONS, has_even_sum, Sampling(3), max_rows=4)

    def go(arms=(), task=task, **options):
        options = EvaluationOptions(**{"random_seeds": (0, 1), **options})
        return evaluate(stock["qwen3"], tokenizer, rule, task, options, arms=arms)

    return go


def same(one, other):
    """Whether two records hold the same but for the backend and the seconds."""
    left_out = {"model": 0, "seconds": 0}
    return one.as_record() | left_out == other.as_record() | left_out


@pytest.mark.parametrize(
    ("arms", "prompts_too"), [((), {False}), (("always", "everywhere"), {False, True}), (("everywhere",), {True})]
)
def test_an_evaluation_by_an_engine_has_the_verdicts_of_the_model(arms, prompts_too, run, backend, engine):
    found = run(arms, backend=backend)
    assert same(found, run(arms))
    assert (found.model["backend"], found.seconds) == ("hooks", {})
    assert {one.everywhere for one in engine.banks[0].values()} == prompts_too
    assert engine.contexts == [max(len(one.prompt) for one in engine.asked) + 3]
    assert engine.banks[-1] == "closed"


def test_conditions_that_differ_in_strength_or_gate_share_a_rule_of_the_bank(run, backend, engine):
    run(backend=backend)
    assert len(engine.banks[0]) == 3  # the rule, also flipped and at strength 0, and two random ones
    assert all(one.rule.gate is None and one.rule.strength == 1 for one in engine.banks[0].values())
    first = engine.asked[: len(engine.asked) // len(QUESTIONS)]
    assert len({tuple(one.prompt) for one in first}) == 1  # what shares a prompt is asked together


def test_samples_of_a_question_stay_apart(run, backend):
    task = EvaluationTask(QUESTIONS[:2], has_even_sum, Sampling(3, temperature=1.0), samples=3)
    assert same(run(task=task, backend=backend), run(task=task))


def test_a_killed_run_asks_only_for_what_is_missing(run, backend, engine, tmp_path):
    whole = run(backend=backend)
    everything, engine.asked, engine.stop_after = len(engine.asked), [], 7
    with pytest.raises(KeyboardInterrupt):
        run(backend=backend, journal=tmp_path / "journal")
    engine.asked, engine.stop_after = [], None
    assert same(run(backend=backend, journal=tmp_path / "journal"), whole)
    assert len(engine.asked) == everything - 7


def test_a_journal_of_another_backend_is_refused(run, backend, tmp_path):
    run(journal=tmp_path / "journal")
    with pytest.raises(TraceError, match="delete it to begin again"):
        run(backend=backend, journal=tmp_path / "journal")


def test_a_prompt_that_leaves_no_room_is_refused_before_the_engine_starts(run, backend, engine):
    task = EvaluationTask(QUESTIONS, has_even_sum, Sampling(tiny.CONTEXT))
    with pytest.raises(TraceError, match=f"exceed the context of {tiny.CONTEXT}; expected max_new_tokens of at most"):
        run(task=task, backend=backend)
    assert not engine.banks


@pytest.fixture
def tuned(stock, tokenizer, bases, gate):
    """`tune` on the tiny qwen3 over two counts and both starts, as a record."""
    task = EvaluationTask(QUESTIONS, has_even_sum, Sampling(3), max_rows=4)

    def go(*search, backend=None):
        options = TuneOptions((3, 6), search[0], ("last_prompt_token", "first_generated_token"), *search[1:])
        args = (stock["qwen3"], tokenizer, tiny.make_neurons(), gate, task, bases["qwen3"])
        return tune(*args, replace(options, backend=backend)).as_record()

    return go


@pytest.mark.parametrize("search", [((-2.0, 2.0),), (Span(0.5, 4.0), Search(trials=4))], ids=["grid", "sampler"])
def test_tuning_by_an_engine_finds_what_tuning_the_model_finds(search, tuned, backend, engine):
    if len(search) == 2:
        pytest.importorskip("optuna")
    assert tuned(*search, backend=backend) == tuned(*search)
    assert len(engine.banks[0]) == 4  # a strength is a dial
    assert engine.banks[1:] == ["closed"]


def test_a_bank_refuses_a_nameless_rule_and_a_gate_that_would_not_be_asked(bases, gate):
    rule = tiny.make_rule(bases["qwen3"], gate=gate)
    with pytest.raises(RuleError, match="has no name"):
        BankRule("", rule)
    with pytest.raises(RuleError, match="steers every token, and has a gate"):
        BankRule("one", rule, everywhere=True)
