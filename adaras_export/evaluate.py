"""Does the rule help? Paired arms on fresh questions, with the controls that a claim needs.

Every arm answers the same questions, greedily, from the same prefilled prompts, so that arms differ in nothing but
steering. Knows nothing of how neurons, gate and strength were found.

N questions, K neurons, D model width.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaras_export import models
from adaras_export.checkers import Checker
from adaras_export.conclusions import conclusion, lead_of
from adaras_export.errors import RuleError, TraceError
from adaras_export.gate import gate_probabilities
from adaras_export.generation import Sampling, batches, complete_from, encode_prompt, pad_id, prefill
from adaras_export.rule import Gate, SteeringRule
from adaras_export.steering import steered, steered_everywhere
from adaras_export.storage import Array, replace_file
from adaras_export.traces import Question, digest
from adaras_export.verdicts import Arm, Comparison, arms_table, compare, require_statistics

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Exam:
    """Questions, and how to answer and check them.

    ``dataset`` is the Hub id of what they are from, and ``task`` the task of that benchmark, where somebody says so.
    """

    questions: Sequence[Question]
    check: Checker
    sampling: Sampling
    max_rows: int = 64
    token_budget: int = 16384
    progress: Progress | None = None
    dataset: str | None = None
    task: str | None = None

    def __post_init__(self) -> None:
        if not self.questions:
            raise TraceError("questions: there are none; expected at least one")
        if self.dataset is not None and not models.is_hub_id(self.dataset):
            raise TraceError(f"dataset {self.dataset!r}: is no Hub id; expected USER/NAME")
        if self.task is not None and self.dataset is None:
            raise TraceError(f"task {self.task}: of no dataset; expected its Hub id, too")
        if self.sampling.temperature != 0:
            raise TraceError(f"exam: temperature {self.sampling.temperature}; expected 0, so that arms are paired")


@dataclass(frozen=True)
class Everywhere:
    """A rule without its gate and its start: every token of every sequence is steered, as static artifacts do."""

    rule: SteeringRule


Way = SteeringRule | Everywhere | None
"""How to steer: by a rule without its gate, by a rule everywhere, or not at all."""


@dataclass(frozen=True)
class Evaluation:
    """All arms, and what they show; the comparison is there where ways to run the rule were compared.

    ``seen`` of the questions were used to make the rule; ``dataset`` and ``task`` are the exam's.
    """

    rule: str
    arms: tuple[Arm, ...]
    steered_share: float
    verdict: str
    ids: tuple[str, ...]
    verdicts: dict[str, Array]
    seen: int = 0
    dataset: str | None = None
    task: str | None = None
    comparison: Comparison | None = None

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def table(self) -> str:
        """All arms, one line each; below it the comparison, where there is one."""
        below = "" if self.comparison is None else f"\n\n{self.comparison.table()}"
        return arms_table(self.arms) + below

    def save(self, path: str | Path) -> None:
        """Write `as_record` as a JSON file, atomically.

        Raises:
            ArtifactError: the file cannot be written.
        """
        replace_file(path, (json.dumps(self.as_record(), indent=1, sort_keys=True) + "\n").encode())

    def as_record(self) -> dict[str, Any]:
        """JSON values, with the verdict of every arm on every question."""
        return {
            "version": 1,
            "rule": self.rule,
            "questions": len(self.ids),
            "steered_share": self.steered_share,
            "seen": self.seen,
            "dataset": self.dataset,
            "task": self.task,
            "verdict": self.verdict,
            "arms": [vars(arm) for arm in self.arms],
            "verdicts": {
                "id": list(self.ids),
                **{name: values.astype(int).tolist() for name, values in self.verdicts.items()},
            },
            **({} if self.comparison is None else {"comparison": self.comparison.as_record()}),
        }


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rule: SteeringRule,
    exam: Exam,
    *,
    random_seeds: Sequence[int] = (0, 1, 2, 3, 4),
    allow_seen: bool = False,
) -> Evaluation:
    """Compare off, always, gated, sign-flipped and norm-matched random neurons on the same questions.

    With a gate, the controls are gated like the rule, so that they differ from it in nothing but the neurons.

    Args:
        model: the base model, in float32 if verdicts are to be reproducible.
        tokenizer: its tokenizer.
        rule: what to evaluate.
        exam: fresh questions.
        random_seeds: one random-neuron arm each; see `random_control`.
        allow_seen: accept questions that neurons, gate or strength were fitted on.

    Raises:
        TraceError: a question was used to make the rule.
        MissingExtraError: SciPy is not installed.
    """
    require_ready(rule, exam, allow_seen=allow_seen)
    names = ("always",) if rule.gate is None else ("gated", "always")
    verdicts, fires = arm_verdicts(model, tokenizer, rule, exam, names, random_seeds)
    return reported(rule, exam, verdicts, fires)


def require_ready(rule: SteeringRule, exam: Exam, *, allow_seen: bool) -> None:
    """Refuse, before the work, what could not be reported after it.

    Raises:
        TraceError: a question was used to make the rule.
        MissingExtraError: SciPy is not installed.
    """
    require_statistics()
    if not allow_seen:
        require_fresh(exam.questions, rule.questions)


def arm_verdicts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rule: SteeringRule,
    exam: Exam,
    names: Sequence[str],
    random_seeds: Sequence[int],
) -> tuple[dict[str, Array], Array]:
    """Verdicts of no steering, of the named ways to run the rule and of the controls, (N,) bool each; the gate's last.

    Controls are steered as the first name of `RULE_ARMS` among ``names`` is, so that they differ from it in nothing
    but the neurons. The gate's verdicts say which questions that one steers: all, unless it is "gated".
    """
    lead = lead_of(names)
    controls = {"flipped": rule.with_strength(-rule.strength)}
    controls |= {f"random {seed}": random_control(model, rule, seed) for seed in random_seeds}
    ways: dict[str, Way] = {} if lead == "everywhere" else {"always": rule}
    if "everywhere" in names:
        ways["everywhere"] = Everywhere(rule)
    ways |= {name: Everywhere(one) if lead == "everywhere" else one for name, one in controls.items()}
    off, *found = answer(model, tokenizer, exam, [None, *ways.values()])
    verdicts, fires = dict(zip(ways, found, strict=True)), np.ones(len(off), dtype=bool)
    if rule.gate is not None and lead == "gated":
        fires = gate_fires(model, tokenizer, rule.gate, exam)
        gated = {"gated": verdicts["always"], **{name: verdicts[name] for name in controls}}
        verdicts |= {name: np.where(fires, values, off) for name, values in gated.items()}
    order = ["off", *sorted(names, key=_ORDER.index), *controls]
    return {name: {"off": off, **verdicts}[name] for name in order}, fires


_ORDER = ("always", "gated", "everywhere")


def reported(rule: SteeringRule, exam: Exam, verdicts: dict[str, Array], fires: Array) -> Evaluation:
    """The evaluation that these verdicts are."""
    arms = tuple(compare(name, values, verdicts["off"]) for name, values in verdicts.items())
    ids = tuple(question.id for question in exam.questions)
    seen = len(seen_before(exam.questions, rule.questions))
    found = Evaluation(rule.fingerprint, arms, float(fires.mean()), conclusion(arms), ids, verdicts)
    return replace(found, seen=seen, dataset=exam.dataset, task=exam.task)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    exam: Exam,
    ways: Sequence[Way],
) -> Array:
    """Which questions are answered correctly under each way of steering, (len(ways), N) bool.

    Prompts are prefilled once per batch: only `Everywhere` changes anything before the last prompt token.
    """
    rows = [encode_prompt(tokenizer, question.prompt) for question in exam.questions]
    correct, done = np.zeros((len(ways), len(rows)), dtype=bool), 0
    for indices in batches([len(row) for row in rows], exam.token_budget, exam.max_rows):
        batch = [rows[index] for index in indices]
        plain = prefill(model, batch, pad_id(tokenizer))
        for position, way in enumerate(ways):
            with in_effect(model, way):
                own = prefill(model, batch, pad_id(tokenizer)) if isinstance(way, Everywhere) else plain
                texts = complete_from(model, tokenizer, own, exam.sampling)
            for index, text in zip(indices, texts, strict=True):
                correct[position, index] = exam.check(text, exam.questions[index].answer)
            done += len(indices)
            if exam.progress is not None:
                exam.progress(done, len(ways) * len(rows))
    return correct


def in_effect(model: PreTrainedModel, way: Way) -> AbstractContextManager[object]:
    """The context in which ``model`` is steered that way."""
    if way is None:
        return nullcontext()
    return steered_everywhere(model, way.rule) if isinstance(way, Everywhere) else steered(model, way.ungated())


def gate_fires(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, gate: Gate, exam: Exam) -> Array:
    """Which questions the gate would steer, (N,) bool."""
    prompts = [question.prompt for question in exam.questions]
    fires: Array = gate_probabilities(model, tokenizer, gate, prompts) < gate.threshold
    return fires


def random_control(model: PreTrainedModel, rule: SteeringRule, seed: int) -> SteeringRule:
    """The rule with other neurons of the same layers, drawn at random, and random signs.

    Per layer there are as many neurons as in the rule (fewer where the layer has not so many others), none of them
    the rule's own, and the vector that they add behind the down projection has the same norm.

    Raises:
        RuleError: a layer has no other neuron that adds anything.
    """
    random = np.random.default_rng(seed)
    layers, indices, deltas = [], [], []
    for layer in rule.layers():
        own, delta = rule.neurons_of(layer)
        others = np.setdiff1d(np.arange(rule.base.mlp_size), own)
        drawn = random.choice(others, size=min(len(own), len(others)), replace=False)
        signed = random.permutation(np.abs(delta))[: len(drawn)] * random.choice([-1.0, 1.0], size=len(drawn))
        wanted, drawn_norm = _norm(model, layer, own, delta), _norm(model, layer, drawn, signed)
        if wanted > 0 and drawn_norm == 0:
            raise RuleError(f"random control: no neuron of layer {layer} beside the rule's adds anything; expected one")
        scale = wanted / drawn_norm if drawn_norm else 0.0
        layers += [layer] * len(drawn)
        indices += drawn.tolist()
        deltas += (signed * scale).tolist()
    neurons = replace(
        rule.neurons,
        layer=np.array(layers, dtype=np.int64),
        index=np.array(indices, dtype=np.int64),
        delta=np.array(deltas),
        mean_correct=None,
        mean_incorrect=None,
        score=None,
        ranking="given",
    )
    return replace(rule, neurons=neurons)


@torch.no_grad()
def _norm(model: PreTrainedModel, layer: int, index: Array, delta: Array) -> float:
    """Norm of what these neurons add behind the down projection, measured through the module (it may be quantised)."""
    down = models.down_projection(model, layer)
    mlp_size = models.sizes_of(model)[2]
    parameter = next(model.parameters())
    h_2M = torch.zeros(2, mlp_size, dtype=parameter.dtype, device=parameter.device)
    h_2M[1, torch.tensor(index)] = torch.tensor(delta).to(h_2M)
    without, with_them = down(h_2M).float()
    return float((with_them - without).norm())


def require_fresh(questions: Sequence[Question], used: Sequence[str]) -> None:
    """Refuse questions whose digests are among the used ones.

    Raises:
        TraceError: names the first of them.
    """
    if seen := seen_before(questions, used):
        raise TraceError(
            f"questions: {len(seen)} of {len(questions)} were used before, to find neurons, gate or strength "
            f"(first: {seen[0]}); expected fresh ones; give others, or say --allow-seen and do not call it a test"
        )


def seen_before(questions: Sequence[Question], used: Sequence[str]) -> list[str]:
    """Ids of the questions whose digests are among the used ones."""
    known = set(used)
    return [question.id for question in questions if digest(question.prompt) in known]
