"""Train and calibrate a gate: from the prompts of labelled traces, predict whether the model will be right.

The forward maths is the runtime's own (`SteeringGate`); this file only brings together what finds its weights.
Standardisation is folded into them, so that the runtime needs none.

N prompts, T tokens, F features, M MLP neurons.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaras_export.core.base_model import BaseModel
from adaras_export.core.gate import Gate
from adaras_export.core.question_identity import identity
from adaras_export.core.traces import Trace, labelled_prompts, require_both, split
from adaras_export.discovery.gate_features import PromptReader, means_file, tokens_file
from adaras_export.discovery.gate_fitting import Fitted, by_length, fit_attention, fit_logistic
from adaras_export.discovery.gate_metrics import Costs
from adaras_export.discovery.gate_report import GateReport, Pooling, ValidationScores, calibrated
from adaras_export.discovery.gate_selection import Training, sizes
from adaras_export.errors import RuleError, require
from adaras_export.files.memory_mapped import KeptRows
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.activations import Reading
from adaras_export.modeling.gate import gate_module, probability_of
from adaras_export.modeling.generation import encode_prompt

_FOLDS = {"logistic": 5, "attention": 3}


@dataclass(frozen=True)
class GateOptions:
    """What the gate reads, what it is, and how its threshold is chosen.

    Attributes:
        below_layer: the gate reads layers 0 to ``below_layer - 1``: at most the first steered layer, for a
            decision in the same pass; None: half of the layers.
        features: number of features (F); None: the best of 8, 16, 32, 64 and 128.
        pooling: "logistic" is logistic regression on the mean over the prompt tokens; "attention" is the paper's
            classifier, with a softmax over the tokens and one hidden layer.
        costs: of wrong decisions, for the threshold that costs least; None: the threshold of Youden's J.
        validation_share: share of the questions, above 0 and below 1, that calibrate and judge.
        seed: of the splits of questions, and of the attention gate's training.
    """

    below_layer: int | None = None
    features: int | None = None
    pooling: Pooling = "logistic"
    costs: Costs | None = None
    validation_share: float = 0.4
    seed: int = 0


_DEFAULT = GateOptions()


def train_gate(  # noqa: PLR0913 - what the job is made of
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    base: BaseModel,
    options: GateOptions = _DEFAULT,
    *,
    reading: Reading | None = None,
    out: str | Path | None = None,
) -> GateReport:
    """Train a gate on some questions, calibrate its threshold on the others, and judge it there.

    A question counts as correct where most of its traces are. Features are the neurons of the layers that the gate
    reads whose mean over the prompt has the highest ANOVA F-score on the training questions. Their number and the
    regularisation are chosen together by cross-validation there, each fold with scores and scaling of its own.

    Args:
        model: the model to steer; it reads the prompts.
        tokenizer: its tokenizer.
        traces: labelled traces; several attempts at a question are welcome.
        base: the model's identity.
        options: layers, features, classifier and threshold; default: a logistic gate on the lower half of the layers.
        reading: tokens of one batch, and progress.
        out: file to write the gate to. What was read is kept beside it until then, so that a killed run goes on.

    Returns:
        the gate (layers and indices from 0), and how it does on the validation questions, with 95 % intervals.

    Raises:
        TraceError: the training or the validation questions have fewer than two of a label, an activation is not
            finite, or the disk is full.
        RuleError: ``features`` or ``below_layer`` is outside the range that the model allows.
        MissingExtraError: scikit-learn is not installed.

    Source: the paper (arXiv 2601.19847); the logistic gate is this library's.

    Example:
        traces, base = read_traces("traces.jsonl"), BaseModel.of("Qwen/Qwen3-1.7B")
        report = train_gate(model, tokenizer, traces, base, GateOptions(features=64), out="gate.safetensors")
        print(report.line())
    """
    if out is None:
        with tempfile.TemporaryDirectory(prefix="adaras-gate-") as folder:
            return _trained(model, tokenizer, traces, base, options, reading or Reading(), Path(folder) / "means")
    partial = Path(out).with_name(f"{Path(out).name}.partial")
    report = _trained(model, tokenizer, traces, base, options, reading or Reading(), partial)
    report.gate.save(out)
    for kept in partial_files(partial):
        kept.unlink(missing_ok=True)
    return report


def _trained(  # noqa: PLR0913 - the arguments of `train_gate`
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    base: BaseModel,
    options: GateOptions,
    reading: Reading,
    partial: Path,
) -> GateReport:
    require("sklearn.linear_model", "identify", "training a gate")
    below_layer = base.layers // 2 if options.below_layer is None else options.below_layer
    if not 1 <= below_layer <= base.layers:
        raise RuleError(f"gate: reads layers below {below_layer}; expected 1 to {base.layers}, the layers of {base.id}")
    layer, index = base.places(0, below_layer)  # of the columns of the means
    counts = sizes(options.features, len(layer))
    prompts, labels = labelled_prompts(traces)
    parts = split([str(row) for row in range(len(prompts))], _shares(options.validation_share), options.seed)
    train, validation = (np.array(sorted(map(int, parts[name]))) for name in ("train", "validation"))
    require_both(labels[train], "training")
    require_both(labels[validation], "validation")
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    reader = PromptReader(model, base, rows, reading, partial)
    means = reader.means(below_layer)
    training = Training.of(means, train, labels[train], _FOLDS[options.pooling], options.seed)
    if options.pooling == "logistic":
        fitted = fit_logistic(training, counts)
    else:
        fitted = fit_attention(
            training,
            counts,
            lambda places: reader.tokens(layer[places], index[places]),
            options.seed,
        )
    names = tuple(identity(prompt) for prompt in prompts)
    gate = Gate(layer[fitted.places], index[fitted.places], **fitted.weights, threshold=0.5, base=base, questions=names)
    p_correct = _probabilities(gate, fitted, means, validation)
    length = by_length(np.array([len(row) for row in rows]), train, labels[train], validation)
    scores = ValidationScores(p_correct, length, labels[validation], float(labels[train].mean()), len(train))
    return calibrated(gate, scores, fitted.tried, options.pooling, options.costs, options.seed)


def partial_files(partial: Path) -> tuple[Path, Path]:
    """The files that `train_gate` keeps."""
    return means_file(partial), tokens_file(partial)


def _probabilities(gate: Gate, fitted: Fitted, means: KeptRows, rows: Array) -> Array:
    """p(correct) of prompts that were read for the training, (N,) float32, without reading them again."""
    module = gate_module(gate)
    return np.array([probability_of(module, fitted.features(means, row)) for row in rows], np.float32)


def _shares(validation: float) -> dict[str, float]:
    return {"train": 1 - validation, "validation": validation}
