"""The report on a gate: how well it separates right from wrong answers, its calibration, and what it adds to baselines.

Knows no model; everything is computed from probabilities and labels of questions that the gate was not fitted on.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from adaras_export.core.gate import Gate
from adaras_export.core.intervals import Estimate, auc_difference, auc_interval
from adaras_export.discovery.gate_metrics import Bin, Costs, cross_fitted, rates, reliability
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.gate import is_below, youden_threshold

Pooling = Literal["logistic", "attention"]


@dataclass(frozen=True)
class GateSetting:
    """One setting of the selection on training questions.

    Attributes:
        features: number of features.
        regularisation: C of the logistic regression; None for attention, which stops early instead.
        log_loss: mean over the folds that were held out; None where nothing was to be chosen.
    """

    features: int
    regularisation: float | None
    log_loss: float | None


@dataclass(frozen=True)
class Decider:
    """One way to decide which questions to steer, on the validation questions.

    Attributes:
        name: "gate", "length" (of the prompt, in tokens), "always" or "never".
        auc: of its p(correct); None where it has none.
        sensitivity: share of the wrong answers that it steers.
        specificity: share of the right ones that it leaves alone.
        cost: of its decisions, a question; None without costs.
    """

    name: str
    auc: Estimate | None
    sensitivity: float
    specificity: float
    cost: float | None

    def row(self) -> str:
        """A line of the table."""
        auc = "" if self.auc is None else f"{self.auc.value:.3f} [{self.auc.low:.3f}, {self.auc.high:.3f}]"
        cost = "" if self.cost is None else f"{self.cost:8.3f}"
        return f"{self.name:8}{auc:24}{self.sensitivity:14.1%}{1 - self.specificity:14.1%}{cost}"


@dataclass(frozen=True)
class GateReport:
    """A gate and how well it separates the validation questions, none of which it was fitted on.

    Attributes:
        gate: with a threshold that was chosen on all validation questions.
        auc: with its interval; the gate's weights have not seen these questions.
        sensitivity: share of the wrong answers below the threshold, cross-fitted: each question is judged by a
            threshold that was chosen on others.
        specificity: share of the right answers at or above it, cross-fitted.
        train_questions: that chose features, regularisation and weights.
        validation_questions: that chose the threshold, and that all figures are of.
        apparent_sensitivity: of the threshold on the questions that it was chosen on, so too good.
        apparent_specificity: of the same.
        brier: mean squared error of p(correct) on the validation questions.
        brier_of_share: the same of a constant, the share of right answers among the training questions.
        over_length: by how much the gate's AUC exceeds that of the prompt's length alone.
        chosen: number of features and regularisation.
        tried: all settings of the selection.
        calibration: the calibration curve.
        deciders: the gate, and beside it the other ways to decide.
        pooling: how the gate pools tokens.
        costs: that the threshold was chosen by; None: by Youden's J.
    """

    gate: Gate
    auc: float
    auc_low: float
    auc_high: float
    sensitivity: float
    specificity: float
    train_questions: int
    validation_questions: int
    apparent_sensitivity: float
    apparent_specificity: float
    brier: float
    brier_of_share: float
    over_length: Estimate
    chosen: GateSetting
    tried: tuple[GateSetting, ...]
    calibration: tuple[Bin, ...]
    deciders: tuple[Decider, ...]
    pooling: Pooling
    costs: Costs | None

    def line(self) -> str:
        """One line for a person."""
        length = next(decider.auc for decider in self.deciders if decider.name == "length")
        assert length is not None  # it has a p(correct)
        return (
            f"{len(self.gate.layer)} features of layers {self.gate.layer.min()} to {self.gate.layer.max()}, "
            f"AUC {self.auc:.3f} [{self.auc_low:.3f}, {self.auc_high:.3f}] on {self.validation_questions} questions "
            f"(length of the prompt alone: {length.value:.3f}), Brier {self.brier:.3f} (a constant: "
            f"{self.brier_of_share:.3f}); steers below {self.gate.threshold:.3f}: {self.sensitivity:.0%} of the wrong "
            f"answers, {1 - self.specificity:.0%} of the right ones, by thresholds of other questions"
            + "".join(f"; {doubt}" for doubt in self.doubts())
        )

    def doubts(self) -> list[str]:
        """Reasons not to use this gate."""
        doubts = []
        if self.auc_low <= 0.5:
            doubts.append("NOT DISTINGUISHABLE FROM CHANCE")
        if self.over_length.low <= 0:
            doubts.append("NOT DISTINGUISHABLE FROM THE LENGTH OF THE PROMPT")
        if self.gate.threshold in (0, 1):
            doubts.append(f"THE THRESHOLD STEERS {'NO' if self.gate.threshold == 0 else 'EVERY'} PROMPT")
        return doubts

    def table(self) -> str:
        """The gate beside the other ways to decide, for a person."""
        cost = "" if self.costs is None else f"{'cost':>8}"
        head = f"{'':8}{'AUC':24}{'steers wrong':>14}{'steers right':>14}{cost}"
        return "\n".join([head, *(decider.row() for decider in self.deciders)])

    def as_record(self) -> dict[str, Any]:
        """JSON values."""
        nested = {"chosen", "tried", "calibration", "deciders", "over_length", "costs"}
        plain = {name: value for name, value in vars(self).items() if name not in {*nested, "gate"}}
        return {
            "threshold": self.gate.threshold,
            **plain,
            "threshold_by": "youden" if self.costs is None else "cost",
            "costs": None if self.costs is None else asdict(self.costs),
            "features": self.chosen.features,
            "regularisation": self.chosen.regularisation,
            "selection": {"tried": [asdict(setting) for setting in self.tried]},
            "calibration": {"bins": [asdict(bin_) for bin_ in self.calibration]},
            "deciders": {decider.name: asdict(decider) for decider in self.deciders},
            "auc_over_length": asdict(self.over_length),
        }


@dataclass(frozen=True)
class ValidationScores:
    """Probabilities and labels of the validation questions.

    Attributes:
        p_correct: the gate's, (N,).
        by_length: of a logistic regression on the prompt's length, fitted on the training questions, (N,).
        correct: labels, (N,) bool.
        train_share: share of right answers among the training questions.
        train_questions: how many there are.
    """

    p_correct: Array
    by_length: Array
    correct: Array
    train_share: float
    train_questions: int


def calibrated(
    gate: Gate, scores: ValidationScores, tried: Sequence[GateSetting], pooling: Pooling, costs: Costs | None, seed: int
) -> GateReport:
    """The gate with its threshold and its figures on the validation questions; the best of ``tried`` was chosen."""
    from sklearn.metrics import brier_score_loss

    p_correct, correct = scores.p_correct, scores.correct
    fit = youden_threshold if costs is None else costs.threshold
    threshold = fit(p_correct, correct)
    apparent = rates(is_below(p_correct, threshold), correct)
    deciders = _deciders(scores, costs, seed)
    own = deciders[0].auc
    assert own is not None  # of the gate
    return GateReport(
        gate=replace(gate, threshold=threshold),
        auc=own.value,
        auc_low=own.low,
        auc_high=own.high,
        sensitivity=deciders[0].sensitivity,
        specificity=deciders[0].specificity,
        train_questions=scores.train_questions,
        validation_questions=len(correct),
        apparent_sensitivity=apparent[0],
        apparent_specificity=apparent[1],
        brier=brier_score_loss(correct, p_correct),
        brier_of_share=brier_score_loss(correct, np.full(len(correct), scores.train_share)),
        over_length=auc_difference(p_correct, scores.by_length, correct),
        chosen=best_of(tried),
        tried=tuple(tried),
        calibration=reliability(p_correct, correct),
        deciders=deciders,
        pooling=pooling,
        costs=costs,
    )


def best_of(tried: Sequence[GateSetting]) -> GateSetting:
    """The setting with the lowest loss; ties go to fewer features, then to more regularisation."""
    return min(tried, key=lambda setting: (setting.log_loss or 0.0, setting.features, setting.regularisation or 0.0))


def _deciders(scores: ValidationScores, costs: Costs | None, seed: int) -> tuple[Decider, ...]:
    correct, fit = scores.correct, youden_threshold if costs is None else costs.threshold
    by_name = {"gate": scores.p_correct, "length": scores.by_length}
    steered = {name: cross_fitted(p_correct, correct, fit, seed) for name, p_correct in by_name.items()}
    everyone = np.ones(len(correct), bool)
    return tuple(
        Decider(
            name,
            Estimate(*auc_interval(by_name[name], correct)) if name in by_name else None,
            *rates(is_steered, correct),
            None if costs is None else costs.of(is_steered, correct),
        )
        for name, is_steered in {**steered, "always": everyone, "never": ~everyone}.items()
    )
