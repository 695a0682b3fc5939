"""Does the rule help? Paired arms on fresh questions, with the controls that a claim needs.

Every arm answers the same questions, greedily, from the same prefilled prompts, so that arms differ in nothing but
steering. Knows nothing of how neurons, gate and strength were found.

N questions, K neurons, D model width.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaras_export import models
from adaras_export.checkers import Checker
from adaras_export.errors import RuleError, TraceError, require
from adaras_export.gate import gate_probabilities
from adaras_export.generation import Sampling, batches, complete_from, encode_prompt, pad_id, prefill
from adaras_export.rule import Gate, SteeringRule
from adaras_export.steering import steered
from adaras_export.storage import Array, replace_file
from adaras_export.traces import Question, digest

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Exam:
    """Questions, and how to answer and check them."""

    questions: Sequence[Question]
    check: Checker
    sampling: Sampling
    max_rows: int = 64
    token_budget: int = 16384
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if not self.questions:
            raise TraceError("questions: there are none; expected at least one")
        if self.sampling.temperature != 0:
            raise TraceError(f"exam: temperature {self.sampling.temperature}; expected 0, so that arms are paired")


@dataclass(frozen=True)
class Arm:
    """One way of steering, compared with no steering on the same questions."""

    name: str
    questions: int
    accuracy: float
    low: float
    high: float
    fixed: int
    broken: int
    p_value: float


@dataclass(frozen=True)
class Evaluation:
    """All arms, and one sentence on what they show."""

    rule: str
    arms: tuple[Arm, ...]
    steered_share: float
    verdict: str
    ids: tuple[str, ...]
    verdicts: dict[str, Array]

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def table(self) -> str:
        """All arms, one line each."""
        return arms_table(self.arms)

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
            "verdict": self.verdict,
            "arms": [vars(arm) for arm in self.arms],
            "verdicts": {
                "id": list(self.ids),
                **{name: values.astype(int).tolist() for name, values in self.verdicts.items()},
            },
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
    require_statistics()  # before the work, not after it
    if not allow_seen:
        require_fresh(exam.questions, rule.questions)
    controls = {f"random {seed}": random_control(model, rule, seed) for seed in random_seeds}
    rules = {"always": rule, "flipped": rule.with_strength(-rule.strength), **controls}
    off, *found = answer(model, tokenizer, exam, [None, *rules.values()])
    verdicts, share = {"off": off, **dict(zip(rules, found, strict=True))}, 1.0
    if rule.gate is not None:
        fires = gate_fires(model, tokenizer, rule.gate, exam)
        share = float(fires.mean())
        gated = {"gated": verdicts["always"], **{name: verdicts[name] for name in rules if name != "always"}}
        verdicts |= {name: np.where(fires, values, off) for name, values in gated.items()}
    arms = tuple(compare(name, verdicts[name], verdicts["off"]) for name in _ordered(verdicts))
    ids = tuple(question.id for question in exam.questions)
    return Evaluation(rule.fingerprint, arms, share, conclusion(arms), ids, verdicts)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    exam: Exam,
    rules: Sequence[SteeringRule | None],
) -> Array:
    """Which questions are answered correctly under each rule (None: no steering), (len(rules), N) bool.

    Prompts are prefilled once per batch: no rule changes anything before the last prompt token.
    """
    rows = [encode_prompt(tokenizer, question.prompt) for question in exam.questions]
    correct, done = np.zeros((len(rules), len(rows)), dtype=bool), 0
    for indices in batches([len(row) for row in rows], exam.token_budget, exam.max_rows):
        prefilled = prefill(model, [rows[index] for index in indices], pad_id(tokenizer))
        for position, rule in enumerate(rules):
            with nullcontext() if rule is None else steered(model, rule.ungated()):
                texts = complete_from(model, tokenizer, prefilled, exam.sampling)
            for index, text in zip(indices, texts, strict=True):
                correct[position, index] = exam.check(text, exam.questions[index].answer)
            done += len(indices)
            if exam.progress is not None:
                exam.progress(done, len(rules) * len(rows))
    return correct


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


def compare(name: str, arm: Array, off: Array) -> Arm:
    """Accuracy with its 95 % Wilson interval, and the exact McNemar test against no steering."""
    stats = require_statistics()
    count, right = len(arm), int(arm.sum())
    interval = stats.binomtest(right, count).proportion_ci(confidence_level=0.95, method="wilson")
    fixed, broken = int((arm & ~off).sum()), int((off & ~arm).sum())
    p_value = float(stats.binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0
    return Arm(name, count, right / count, float(interval.low), float(interval.high), fixed, broken, p_value)


def require_statistics() -> ModuleType:
    """SciPy's statistics, or the error that names the extra to install."""
    return require("scipy.stats", "identify", "comparing verdicts")


def conclusion(arms: Sequence[Arm]) -> str:
    """One sentence: a gain needs a significant paired test and more than every control reached."""
    by_name = {arm.name: arm for arm in arms}
    name = "gated" if "gated" in by_name else "always"
    arm, off = by_name[name], by_name["off"]
    random = [one.accuracy for one in arms if one.name.startswith("random")]
    change = f"{100 * (arm.accuracy - off.accuracy):+.1f} points ({arm.fixed} fixed, {arm.broken} broken)"
    significant = arm.p_value < 0.05
    if significant and arm.broken > arm.fixed:
        return f"steering harms: {change}, p = {arm.p_value:.2g}."
    if not significant:
        return f"no gain shown: {change}, p = {arm.p_value:.2g}."
    if not random:
        return f"{change}, p = {arm.p_value:.2g}; not a claim, because no random-neuron control was run."
    if max(random) >= arm.accuracy or by_name["flipped"].accuracy >= arm.accuracy:
        return f"{change}, p = {arm.p_value:.2g}, but a control does as well: the choice of neurons is not what helps."
    return (
        f"steering helps: {change}, p = {arm.p_value:.2g}; random neurons of the same norm reach "
        f"{min(random):.1%} to {max(random):.1%} (off: {off.accuracy:.1%})."
    )


def arms_table(arms: Sequence[Arm]) -> str:
    """Arms for a person, one line each."""
    width = max(len(arm.name) for arm in arms)
    head = f"{'':{width}}  accuracy   95 % interval     fixed  broken  McNemar p"
    lines = [
        f"{arm.name:{width}}  {arm.accuracy:7.1%}   {arm.low:6.1%} - {arm.high:6.1%}  {arm.fixed:5d}  {arm.broken:6d}  "
        f"{arm.p_value:9.2g}"
        for arm in arms
    ]
    return "\n".join([head, *lines])


def _ordered(verdicts: dict[str, Array]) -> list[str]:
    first = [name for name in ("off", "always", "gated", "flipped") if name in verdicts]
    return first + [name for name in verdicts if name not in first]


def require_fresh(questions: Sequence[Question], used: Sequence[str]) -> None:
    """Refuse questions whose digests are among the used ones.

    Raises:
        TraceError: names the first of them.
    """
    known = set(used)
    seen = [question.id for question in questions if digest(question.prompt) in known]
    if seen:
        raise TraceError(
            f"questions: {len(seen)} of {len(questions)} were used before, to find neurons, gate or strength "
            f"(first: {seen[0]}); expected fresh ones; give others, or say --allow-seen and do not call it a test"
        )
