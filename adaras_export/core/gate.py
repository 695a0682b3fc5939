"""The gate: a small classifier that predicts from a prompt's activations whether the model would fail.

F gate features, H gate width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from adaras_export.core.base_model import BaseModel
from adaras_export.core.value import (
    Value,
    check_axes,
    check_number,
    check_places,
    check_version,
    freeze,
    restore_base,
    same_length,
    set_array,
    set_questions,
    set_vectors,
)
from adaras_export.errors import RuleError
from adaras_export.files.safetensors_record import Array

_GATE_SHAPES = {
    "attention_weight": ("F",),
    "attention_bias": (),
    "hidden_weight": ("H", "F"),
    "hidden_bias": ("H",),
    "output_weight": ("H",),
    "output_bias": (),
}


@dataclass(frozen=True, eq=False)
class Gate(Value):
    """A small classifier that reads the prompt and predicts whether the model will be right.

    Its features x_t (F) are activations that enter the down projection, at every prompt token t.
    s_t = tanh(attention_weight . x_t + attention_bias); a softmax of s over the prompt tokens pools x;
    p(correct) = sigmoid(output_weight . relu(hidden_weight @ pooled + hidden_bias) + output_bias).
    The rule steers where p(correct) < threshold. Weights are float32. Source: section 2 of the design.

    Attributes:
        layer: (F,) layers of the features, sorted together with ``index``.
        index: (F,) neurons, counted within their layer.
        attention_weight: (F,); zero pools by the mean.
        attention_bias: ().
        hidden_weight: (H, F).
        hidden_bias: (H,).
        output_weight: (H,).
        output_bias: ().
        threshold: in [0, 1].
        base: the model whose activations it reads; None where it is unknown.
        questions: identities of the questions that it was trained and calibrated on.
    """

    layer: Array
    index: Array
    attention_weight: Array
    attention_bias: Array
    hidden_weight: Array
    hidden_bias: Array
    output_weight: Array
    output_bias: Array
    threshold: float
    base: BaseModel | None = None
    questions: tuple[str, ...] = ()

    kind: ClassVar[str] = "gate"

    def __post_init__(self) -> None:
        set_vectors(self, "gate", {"layer": np.int64, "index": np.int64})
        same_length(self, "gate", ("layer", "index"))
        sizes: dict[str, int] = {"F": len(self.layer)}
        for name, axes in _GATE_SHAPES.items():
            set_array(self, "gate", name, np.float32)
            check_axes("gate", name, getattr(self, name).shape, axes, sizes)
        if not sizes["F"] or not sizes["H"]:
            raise RuleError(f"gate: {sizes['F']} features and {sizes['H']} hidden units; expected at least one of each")
        check_number("gate", "threshold", self.threshold)
        if not 0 <= self.threshold <= 1:
            raise RuleError(f"gate: threshold {self.threshold} is not a probability; expected a number from 0 to 1")
        check_places("gate", self.layer, self.index, self.base)
        set_questions(self, "gate")
        order = np.lexsort((self.index, self.layer))
        for name in ("layer", "index", "attention_weight", "hidden_weight"):
            freeze(self, name, getattr(self, name)[..., order])

    def weights(self) -> dict[str, Array]:
        """The six arrays of the classifier, by name."""
        return {name: getattr(self, name) for name in _GATE_SHAPES}

    def sizes(self) -> dict[str, Any]:
        """The layers that it reads, ascending, the number of features of each, and its hidden size, as configs have."""
        layers, features = np.unique(self.layer, return_counts=True)
        return {"layers": layers.tolist(), "features": features.tolist(), "hidden_size": len(self.hidden_bias)}

    def _arrays(self) -> dict[str, Array]:
        return {"layer": self.layer, "index": self.index, **self.weights()}

    def _record(self) -> dict[str, Any]:
        base = None if self.base is None else self.base.as_record()
        return {
            "version": 1,
            "threshold": self.threshold,
            "base": base,
            "questions": list(self.questions),
        }

    @classmethod
    def _restore(cls, arrays: Mapping[str, Array], record: Mapping[str, Any], subject: str) -> "Gate":
        check_version(record, subject)
        return cls(
            **arrays,
            threshold=record["threshold"],
            base=restore_base(record, subject),
            questions=record["questions"],
        )
