"""The two classifiers of a gate, fitted on training questions; how many features and what C, by cross-validation.

Knows no model and reads no validation question. N questions, T tokens, F features, H gate width, U features that any
setting uses.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaras_export.discovery.gate_report import GateSetting, best_of
from adaras_export.discovery.gate_selection import Training
from adaras_export.errors import require
from adaras_export.files.memory_mapped import KeptRows
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.generation import batches
from adaras_export.runtime.steering_adaras import SteeringGate

REGULARISATION = tuple(np.logspace(-4, 0, 9).tolist())
"""Candidates of the logistic regression's C."""

_HIDDEN = 16
_EPOCHS = 400
_PATIENCE = 40
_TOKENS = 1 << 17  # that are trained on together, padding included


@dataclass(frozen=True, eq=False)
class Fitted:
    """A classifier: its columns, ascending, and its weights on raw features.

    Attributes:
        places: (F,) columns of the means.
        weights: of `SteeringGate`, by name.
        tried: all settings of the cross-validation.
        tokens: the features at every token of every prompt; None for logistic regression, which needs means only.
        token_places: (U,) their columns.
    """

    places: Array
    weights: dict[str, Array]
    tried: tuple[GateSetting, ...]
    tokens: KeptRows | None = None
    token_places: Array | None = None

    def features(self, means: KeptRows, row: int) -> Array:
        """The features of a prompt that the classifier pools, (T, F); T is 1 where it needs the mean only."""
        if self.tokens is None or self.token_places is None:
            return means[row][self.places][None]
        return _table(self.tokens, row, self.token_places, self.places)


def fit_logistic(training: Training, sizes: Sequence[int]) -> Fitted:
    """Logistic regression on the mean over the prompt's tokens, in the gate's form."""
    without, whole = training.rankings(max(sizes))
    union = np.unique(np.concatenate([*without, whole]))
    values_NU, correct = training.columns(union), training.correct

    def columns(places: Array) -> Array:
        chosen: Array = values_NU[:, np.searchsorted(union, places)]
        return chosen

    folds = list(zip(training.folds, without, strict=True))
    tried = []
    for size in sizes:
        by_fold = [_losses(columns(ranking[:size]), correct, held) for held, ranking in folds]
        mean = np.mean(by_fold, axis=0).tolist()
        tried += [GateSetting(size, c, loss) for c, loss in zip(REGULARISATION, mean, strict=True)]
    best = best_of(tried)
    assert best.regularisation is not None  # one of those
    places = np.sort(whole[: best.features])
    with _one_thread():
        scaler, regression = _classifier(best.regularisation).fit(columns(places), correct)
    return Fitted(places, _unscaled(_logistic(regression), scaler), tuple(tried))


def _losses(values_NF: Array, correct_N: Array, held: Array) -> Array:
    """The log loss on the questions that a fold holds out, for each candidate of C."""
    from sklearn.model_selection import GridSearchCV

    search = GridSearchCV(
        _classifier(),
        {"logisticregression__C": REGULARISATION},
        scoring="neg_log_loss",
        cv=[(np.flatnonzero(~held), np.flatnonzero(held))],
        refit=False,
        error_score="raise",
    )
    with _one_thread():
        loss: Array = -search.fit(values_NF, correct_N).cv_results_["mean_test_score"]
    return loss


def _classifier(c: float = 1.0) -> Any:  # noqa: ANN401 - scikit-learn's
    """Logistic regression on standardised features: a pipeline of scikit-learn."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Linear algebra on one thread.

    On matrices as small as these, two threads on a busy machine of two cores took six times as long as one.
    """
    threads = require("threadpoolctl", "identify", "training a gate")  # scikit-learn brings it
    with threads.threadpool_limits(1, user_api="blas"):
        yield


def _logistic(fitted: Any) -> dict[str, Array]:  # noqa: ANN401 - scikit-learn's
    """Logistic regression in the gate's form: no attention, and z carried as relu(z) - relu(-z)."""
    weight_F, bias = fitted.coef_[0], fitted.intercept_[0]
    return {
        "attention_weight": np.zeros_like(weight_F),
        "attention_bias": np.zeros(()),
        "hidden_weight": np.stack([weight_F, -weight_F]),
        "hidden_bias": np.array([bias, -bias]),
        "output_weight": np.array([1.0, -1.0]),
        "output_bias": np.zeros(()),
    }


def _unscaled(weights: dict[str, Array], scaler: Any) -> dict[str, Array]:  # noqa: ANN401 - scikit-learn's
    """Weights on raw features that do what ``weights`` do on those that ``scaler`` standardised."""
    folded = dict(weights)
    for weight, bias in (("attention_weight", "attention_bias"), ("hidden_weight", "hidden_bias")):
        folded[weight] = weights[weight] / scaler.scale_
        folded[bias] = weights[bias] - folded[weight] @ scaler.mean_
    return folded


def by_length(lengths: Array, train: Array, correct: Array, validation: Array) -> Array:
    """p(correct) of the validation prompts by logistic regression on the length of the training prompts.

    ``lengths`` are of all prompts, in tokens; ``train`` and ``validation`` are rows of them.
    """
    values_N1 = np.asarray(lengths, np.float64)[:, None]
    with _one_thread():
        fitted = _classifier().fit(values_N1[train], correct)
        p_correct: Array = fitted.predict_proba(values_N1[validation])[:, 1]
    return p_correct


def fit_attention(
    training: Training, sizes: Sequence[int], read_tokens: Callable[[Array], KeptRows], seed: int
) -> Fitted:
    """The paper's classifier: attention over the tokens and one hidden layer.

    It is regularised by stopping early. ``read_tokens`` gives the features at every token of all prompts, for columns.
    """
    without, whole = training.rankings(max(sizes))
    if len(sizes) == 1:  # nothing to choose
        without = []
    union = np.unique(np.concatenate([*without, whole]))
    values_NU, tokens = training.columns(union), read_tokens(union)

    def fitted(places: Array, which: Array) -> tuple[Any, dict[str, Array]]:
        """Standardisation, and weights behind it."""
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler().fit(values_NU[which][:, np.searchsorted(union, places)])
        return scaler, _attention(scaled(places, which, scaler), training.correct[which], seed)

    def scaled(places: Array, which: Array, scaler: Any) -> list[Array]:  # noqa: ANN401 - scikit-learn's
        tables = (_table(tokens, row, union, places) for row in training.rows[which])
        return [scaler.transform(table.astype(np.float64)).astype(np.float32) for table in tables]

    losses: dict[int, list[float]] = {size: [] for size in sizes}
    for held, ranking in zip(training.folds, without, strict=False):
        for size in sizes:
            places = np.sort(ranking[:size])
            scaler, weights = fitted(places, ~held)
            module = _module(weights)
            with torch.no_grad():
                loss = _Batches.of(scaled(places, held, scaler), training.correct[held]).loss(module)
            losses[size].append(loss.item())
    tried = tuple(GateSetting(size, None, float(np.mean(loss)) if loss else None) for size, loss in losses.items())
    places = np.sort(whole[: best_of(tried).features])
    scaler, weights = fitted(places, np.ones(len(training.rows), bool))
    return Fitted(places, _unscaled(weights, scaler), tried, tokens, union)


def _table(tokens: KeptRows, row: int, union: Array, places: Array) -> Array:
    """Some features at every token of a prompt, (T, F)."""
    features_TF: Array = tokens[row].reshape(-1, len(union))[:, np.searchsorted(union, places)]
    return features_TF


def _module(weights: dict[str, Array]) -> SteeringGate:
    module = SteeringGate(len(weights["attention_weight"]), len(weights["hidden_bias"]))
    module.load_state_dict({name: torch.tensor(value, dtype=torch.float32) for name, value in weights.items()})
    return module


@dataclass(frozen=True)
class _Batches:
    """Prompts of similar length together, padded: features (B, T, F), mask (B, T), labels (B,)."""

    parts: Sequence[tuple[Tensor, Tensor, Tensor]]

    @classmethod
    def of(cls, tokens: Sequence[Array], correct_N: Array) -> "_Batches":
        parts = []
        for rows in batches([len(features_TF) for features_TF in tokens], _TOKENS, len(tokens)):
            width = max(len(tokens[row]) for row in rows)
            padded = [np.pad(tokens[row], ((0, width - len(tokens[row])), (0, 0))) for row in rows]
            mask = [[1.0] * len(tokens[row]) + [0.0] * (width - len(tokens[row])) for row in rows]
            target_B = torch.tensor(correct_N[rows]).float()
            parts.append((torch.tensor(np.stack(padded)).float(), torch.tensor(mask), target_B))
        return cls(parts)

    def loss(self, module: SteeringGate) -> Tensor:
        """The mean over all prompts."""
        total, count = torch.zeros(()), sum(len(target_B) for _, _, target_B in self.parts)
        for features_BTF, mask_BT, target_B in self.parts:
            probability_B = module(None, (features_BTF, mask_BT))[2]
            entropy = torch.nn.functional.binary_cross_entropy
            total = total + entropy(probability_B, target_B, reduction="sum") / count
        return total


def _attention(tokens: Sequence[Array], correct_N: Array, seed: int) -> dict[str, Array]:
    """The paper's classifier, trained with Adam; the epoch that is best on a fifth of the prompts."""
    generator = torch.Generator().manual_seed(seed)
    module = SteeringGate(tokens[0].shape[1], _HIDDEN)
    for parameter in module.parameters():
        fan_in = parameter.shape[-1] if parameter.ndim else 1
        parameter.data.normal_(0, 1 / math.sqrt(fan_in), generator=generator)
        parameter.requires_grad_()
    order = torch.randperm(len(tokens), generator=generator)
    parts = [part.tolist() for part in torch.tensor_split(order, [max(1, len(order) // 5)])]
    held, fitted = (_Batches.of([tokens[row] for row in rows], correct_N[rows]) for rows in parts)
    _fit(module, lambda: fitted.loss(module), lambda: held.loss(module))
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
