"""Train and calibrate a gate: from the prompts of labelled traces, predict whether the model will be right.

The forward maths is the runtime's own (`SteeringGate`); this file only finds its weights. Standardisation is folded
into them, so that the runtime needs none.

N prompts, T tokens, F features, H gate width, M MLP neurons.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaras_export.activations import MAX_ROWS, Reading, read, row_means
from adaras_export.errors import RuleError, TraceError, require
from adaras_export.generation import batches, encode_prompt
from adaras_export.models import BaseModel
from adaras_export.rule import Gate
from adaras_export.runtime.steering_adaras import SteeringGate
from adaras_export.steering import gate_module
from adaras_export.storage import Array
from adaras_export.traces import Prompt, Trace, by_question, digest, split

Pooling = Literal["logistic", "attention"]


@dataclass(frozen=True)
class GateReport:
    """A gate and how well it separates the validation questions, none of which it was fitted on."""

    gate: Gate
    auc: float
    auc_low: float
    auc_high: float
    sensitivity: float
    specificity: float
    train_questions: int
    validation_questions: int

    def line(self) -> str:
        """One line for a person."""
        return (
            f"{len(self.gate.layer)} features of layers {self.gate.layer.min()} to {self.gate.layer.max()}, "
            f"AUC {self.auc:.3f} [{self.auc_low:.3f}, {self.auc_high:.3f}] on {self.validation_questions} questions; "
            f"steers below {self.gate.threshold:.3f}: {self.sensitivity:.0%} of the wrong answers, "
            f"{1 - self.specificity:.0%} of the right ones"
        )

    def as_record(self) -> dict[str, Any]:
        """JSON values."""
        return {"threshold": self.gate.threshold, **{k: v for k, v in vars(self).items() if k != "gate"}}


def train_gate(  # noqa: PLR0913 - one decision of the researcher each
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    base: BaseModel,
    *,
    below_layer: int,
    features: int = 64,
    pooling: Pooling = "logistic",
    validation_share: float = 0.4,
    seed: int = 0,
    reading: Reading | None = None,
) -> GateReport:
    """Train on some questions, calibrate the threshold on the others.

    A question counts as correct where most of its traces are. Features are the neurons of layers below
    ``below_layer`` whose mean over the prompt has the highest ANOVA F-score on the training questions.

    Args:
        model: the model to steer; it reads the prompts.
        tokenizer: its tokenizer.
        traces: labelled traces; several attempts at a question are welcome.
        base: the model's identity.
        below_layer: the gate reads layers 0 to ``below_layer - 1``: at most the first steered layer, for a
            decision in the same pass.
        features: number of features (F).
        pooling: "logistic" is logistic regression on the mean over the prompt tokens; "attention" is the paper's
            classifier, with a softmax over the tokens and one hidden layer.
        validation_share: share of the questions that calibrate and judge.
        seed: of the split by question, and of the attention gate's training.
        reading: batch size and progress.

    Raises:
        TraceError: a part of the questions has one label only, or activations are not finite.
        RuleError: there are fewer neurons than features, no feature, or no such layer.
        MissingExtraError: scikit-learn is not installed.
    """
    linear = require("sklearn.linear_model", "identify", "training a gate")
    if features < 1 or not 1 <= below_layer <= base.layers:
        raise RuleError(
            f"gate: {features} features below layer {below_layer}; expected one or more, below layer 1 to {base.layers}"
        )
    reading = reading or Reading()
    prompts, labels = labelled_prompts(traces)
    parts = split([str(row) for row in range(len(prompts))], _shares(validation_share), seed)
    train, validation = (np.array(sorted(map(int, parts[name]))) for name in ("train", "validation"))
    require_both(labels[train], "training")
    require_both(labels[validation], "validation")
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    means_NLM = np.stack(row_means(model, rows, range(below_layer), reading))
    if bad := sorted({int(layer) for layer in np.argwhere(~np.isfinite(means_NLM))[:, 1]}):
        raise TraceError(f"prompts: activations of layers {bad[:5]} are NaN or infinite; load the model in float32")
    layer, index = _best_features(means_NLM[train], labels[train], features)
    chosen_NF = means_NLM[:, layer, index]
    scaling = _Scaling.of(chosen_NF[train])
    if pooling == "logistic":
        weights = _logistic(linear, scaling.apply(chosen_NF[train]), labels[train])
    else:
        tokens = _prompt_features(model, [rows[row] for row in train], layer, index, reading)
        weights = _attention([scaling.apply(one) for one in tokens], labels[train], seed)
    names = tuple(digest(prompt) for prompt in prompts)
    gate = Gate(layer, index, **scaling.fold(weights), threshold=0.5, base=base, questions=names)
    held_out = [prompts[row] for row in validation]
    p_correct = gate_probabilities(model, tokenizer, gate, held_out, reading)
    return _calibrated(gate, p_correct, labels[validation], len(train))


def gate_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    gate: Gate,
    prompts: Sequence[Prompt],
    reading: Reading | None = None,
) -> Array:
    """p(correct) of every prompt, (N,) float32, from one forward pass up to the gate's last layer."""
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    module, found = gate_module(gate), np.zeros(len(rows), np.float32)
    with torch.no_grad():
        for position, features_TF in enumerate(
            _prompt_features(model, rows, gate.layer, gate.index, reading or Reading())
        ):
            features_1TF = torch.tensor(features_TF).unsqueeze(0)
            pooled, weight = module.pool(features_1TF, torch.ones(features_1TF.shape[:2]))
            found[position] = module(pooled / weight).item()
    return found


def labelled_prompts(traces: Sequence[Trace]) -> tuple[list[Prompt], Array]:
    """The prompts, and whether most of their traces are correct, (N,) bool; a tie counts as incorrect."""
    by_prompt: dict[str, list[Trace]] = {}  # one prompt under two ids must not be in both parts
    for group in by_question(traces).values():
        by_prompt.setdefault(digest(group[0].prompt), []).extend(group)
    groups = list(by_prompt.values())
    shares = [sum(trace.correct for trace in group) / len(group) for group in groups]
    return [group[0].prompt for group in groups], np.array(shares) > 0.5


def _shares(validation: float) -> dict[str, float]:
    return {"train": 1 - validation, "validation": validation}


def require_both(labels: Array, part: str) -> None:
    """Refuse labels that no threshold can be fitted to.

    Raises:
        TraceError: there are less than two of either kind.
    """
    correct = int(labels.sum())
    if not 2 <= correct <= len(labels) - 2:
        raise TraceError(
            f"traces: {correct} of {len(labels)} {part} questions are answered correctly; expected two or more of "
            "either kind; give more questions, or easier and harder ones"
        )


def _prompt_features(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], layer: Array, index: Array, reading: Reading
) -> list[Array]:
    """The features (sorted by layer) at every token of each prompt: N arrays (T, F) float32."""
    layers = np.unique(layer).tolist()
    chosen = {one: torch.tensor(index[layer == one]) for one in layers}
    features: list[Any] = [None] * len(rows)
    for indices in batches([len(row) for row in rows], reading.token_budget, MAX_ROWS):
        pieces: list[Tensor] = []

        def keep(at: int, h_BTM: Tensor, _mask_BT: Tensor, pieces: list[Tensor] = pieces) -> None:
            pieces.append(h_BTM.index_select(-1, chosen[at].to(h_BTM.device)).float().cpu())

        read(model, [rows[row] for row in indices], layers, keep)
        for row, features_TF in zip(indices, torch.cat(pieces, dim=-1).numpy(), strict=True):
            features[row] = features_TF[: len(rows[row])]
    return features


def _best_features(means_NLM: Array, correct_N: Array, count: int) -> tuple[Array, Array]:
    """Layer and index of the neurons with the highest ANOVA F-score, sorted by (layer, index)."""
    flat = means_NLM.reshape(len(means_NLM), -1)
    if count > flat.shape[1]:
        raise RuleError(f"gate: {count} features wanted; the layers that it may read have {flat.shape[1]} neurons")
    score = f_scores(flat, correct_N)
    best = np.sort(np.lexsort((np.arange(len(score)), -score))[:count])
    return best // means_NLM.shape[2], best % means_NLM.shape[2]


def f_scores(values_NM: Array, correct_N: Array) -> Array:
    """One-way ANOVA F-score of every column for two classes, (M,); 0 where a column is constant.

    Infinite where it is constant in either class and differs between them. In pieces of columns, because
    scikit-learn's would need the whole matrix in float64.
    """
    scores = np.zeros(values_NM.shape[1])
    for first in range(0, values_NM.shape[1], 1 << 14):
        piece = values_NM[:, first : first + (1 << 14)].astype(np.float64)
        classes = [piece[correct_N], piece[~correct_N]]
        between = sum(len(one) * (one.mean(0) - piece.mean(0)) ** 2 for one in classes)
        within = sum(((one - one.mean(0)) ** 2).sum(0) for one in classes) / (len(piece) - 2)
        # By the range: the mean of equal numbers may miss them by a rounding, which would leave noise over noise.
        varying, within_varies = (np.ptp(piece, axis=0) > 0, sum(np.ptp(one, axis=0) for one in classes) > 0)
        found = np.where(varying, np.inf, 0.0)
        scores[first : first + (1 << 14)] = np.divide(between, within, out=found, where=varying & within_varies)
    return scores


@dataclass(frozen=True)
class _Scaling:
    """Standardisation of features, (F,) each."""

    mean: Array
    deviation: Array

    @classmethod
    def of(cls, values_NF: Array) -> "_Scaling":
        deviation = values_NF.std(0, dtype=np.float64)
        return cls(values_NF.mean(0, dtype=np.float64), np.where(deviation > 0, deviation, 1.0))

    def apply(self, values: Array) -> Array:
        standardised: Array = (values - self.mean) / self.deviation
        return standardised

    def fold(self, weights: dict[str, Array]) -> dict[str, Array]:
        """Weights on raw features that do what ``weights`` do on standardised ones."""
        folded = dict(weights)
        for weight, bias in (("attention_weight", "attention_bias"), ("hidden_weight", "hidden_bias")):
            folded[weight] = weights[weight] / self.deviation
            folded[bias] = weights[bias] - folded[weight] @ self.mean
        return folded


def _logistic(linear: Any, values_NF: Array, correct_N: Array) -> dict[str, Array]:  # noqa: ANN401 - a module
    """Logistic regression in the gate's form: no attention, and z carried as relu(z) - relu(-z)."""
    folds = max(2, min(5, int(min(correct_N.sum(), (~correct_N).sum()))))
    selection = require("sklearn.model_selection", "identify", "training a gate")
    candidates = {"C": np.logspace(-4, 0, 9).tolist()}
    model = linear.LogisticRegression(max_iter=1000)
    search = selection.GridSearchCV(model, candidates, cv=folds, scoring="neg_log_loss")
    fitted = search.fit(values_NF, correct_N).best_estimator_
    weight_F, bias = fitted.coef_[0], fitted.intercept_[0]
    return {
        "attention_weight": np.zeros_like(weight_F),
        "attention_bias": np.zeros(()),
        "hidden_weight": np.stack([weight_F, -weight_F]),
        "hidden_bias": np.array([bias, -bias]),
        "output_weight": np.array([1.0, -1.0]),
        "output_bias": np.zeros(()),
    }


_HIDDEN = 16
_EPOCHS = 400
_PATIENCE = 40


def _attention(tokens: Sequence[Array], correct_N: Array, seed: int) -> dict[str, Array]:
    """The paper's classifier, trained with Adam; the epoch that is best on a fifth of the prompts."""
    generator = torch.Generator().manual_seed(seed)
    module = SteeringGate(tokens[0].shape[1], _HIDDEN)
    for parameter in module.parameters():
        fan_in = parameter.shape[-1] if parameter.ndim else 1
        parameter.data.normal_(0, 1 / math.sqrt(fan_in), generator=generator)
        parameter.requires_grad_()
    width = max(map(len, tokens))
    features_NTF = torch.stack([torch.tensor(np.pad(one, ((0, width - len(one)), (0, 0)))) for one in tokens]).float()
    mask_NT = torch.tensor([[1.0] * len(one) + [0.0] * (width - len(one)) for one in tokens])
    target_N = torch.tensor(correct_N).float()
    order = torch.randperm(len(tokens), generator=generator)
    held, fitted = torch.tensor_split(order, [max(1, len(order) // 5)])

    def loss_on(rows: Tensor) -> Tensor:
        pooled, weight = module.pool(features_NTF[rows], mask_NT[rows])
        return torch.nn.functional.binary_cross_entropy(module(pooled / weight), target_N[rows])

    _fit(module, lambda: loss_on(fitted), lambda: loss_on(held))
    return {name: value.detach().double().numpy() for name, value in module.state_dict().items()}


def _fit(module: SteeringGate, loss: Callable[[], Tensor], held_loss: Callable[[], Tensor]) -> None:
    """Train until the held-out loss has not improved for a while; leaves the best weights in ``module``."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.1)
    best, best_at, kept = math.inf, 0, {}
    for epoch in range(_EPOCHS):
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            held = held_loss().item()
        if held < best:
            best, best_at = held, epoch
            kept = {name: value.clone() for name, value in module.state_dict().items()}
        if epoch - best_at > _PATIENCE:
            break
    module.load_state_dict(kept)


def _calibrated(gate: Gate, p_correct: Array, correct: Array, train_count: int) -> GateReport:
    threshold = youden_threshold(p_correct, correct)
    auc, low, high = auc_interval(p_correct, correct)
    return GateReport(
        gate=replace(gate, threshold=threshold),
        auc=auc,
        auc_low=low,
        auc_high=high,
        sensitivity=float((p_correct[~correct] < threshold).mean()),
        specificity=float((p_correct[correct] >= threshold).mean()),
        train_questions=train_count,
        validation_questions=len(correct),
    )


def youden_threshold(p_correct: Array, correct: Array) -> float:
    """The threshold t, midway between two scores, that maximises Youden's J of the test "p < t means incorrect".

    J = share of incorrect below t - share of correct below t. The lowest such t, so that ties steer less.
    """
    p_correct = p_correct.astype(np.float32)
    cuts = _cuts(p_correct)
    wrong, right = p_correct[~correct], p_correct[correct]
    # J times both counts, in integers: fractions would round ties apart.
    j = [int((wrong < cut).sum()) * len(right) - int((right < cut).sum()) * len(wrong) for cut in cuts]
    return float(cuts[int(np.argmax(j))])


def agreeing_threshold(p_correct: Array, is_steered: Array) -> float:
    """The threshold t, midway between two scores, for which "p < t" is most often what ``is_steered`` (N,) says.

    The lowest such t, so that ties steer less.
    """
    p_correct = p_correct.astype(np.float32)
    cuts = _cuts(p_correct)
    agreeing = [int(((p_correct < cut) == is_steered).sum()) for cut in cuts]
    return float(cuts[int(np.argmax(agreeing))])


def _cuts(p_correct: Array) -> Array:
    """0 and a number between every two neighbouring scores, float32, ascending."""
    scores = np.unique(p_correct)
    # Runtimes compare in float32, where the middle of two neighbours would round to either; the upper one separates.
    middle = ((scores[1:].astype(np.float64) + scores[:-1]) / 2).astype(np.float32)
    return np.concatenate([[np.float32(0)], np.where(middle > scores[:-1], middle, scores[1:])])


def auc_interval(p_correct: Array, correct: Array) -> tuple[float, float, float]:
    """Area under the ROC curve with its 95 % interval by DeLong, Biometrics 44 (1988) 837, within [0, 1]."""
    positive, negative = p_correct[correct].astype(np.float64), p_correct[~correct].astype(np.float64)
    wins = (positive[:, None] > negative).astype(np.float64) + 0.5 * (positive[:, None] == negative)
    auc = float(wins.mean())
    variance = wins.mean(1).var(ddof=1) / len(positive) + wins.mean(0).var(ddof=1) / len(negative)
    margin = 1.959964 * math.sqrt(variance)
    return auc, max(0.0, auc - margin), min(1.0, auc + margin)
