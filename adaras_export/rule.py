"""The steering rule: which neurons, by how much, from which token on, and for which prompts.

A rule is a frozen value that is valid from birth, so whatever receives one need not check it again.
It knows nothing of torch, of model code or of export formats. The method is AdaRAS (arXiv 2601.19847).

Symbols: L layers, M MLP neurons of a layer, D model width, K chosen neurons, F gate features, H gate width.
Layers and neuron indices are 0-based everywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from adaras_export import reference, storage
from adaras_export.errors import RuleError
from adaras_export.models import BaseModel
from adaras_export.storage import Array
from adaras_export.values import (
    Value,
    check_axes,
    check_choice,
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

Start = Literal["last_prompt_token", "first_generated_token"]
Ranking = Literal["given", "paper", "absolute", "cohen_d", "t", "attribution"]


@dataclass(frozen=True, eq=False)
class NeuronSet(Value):
    """Chosen neurons, best first, and the amount that belongs to each.

    Attributes:
        layer: (K,) decoder layers.
        index: (K,) neurons, counted within their layer.
        delta: (K,) what strength 1 adds to the neuron's activation; in activation units.
        mean_correct: (K,) mean activation over correct traces; None where it is not known.
        mean_incorrect: (K,) the same over incorrect traces.
        score: (K,) what the ranking sorted by.
        ranking: how the neurons were chosen; "given" for neurons from elsewhere.
        base: the model that they belong to; None where it is not known.
        questions: identities of the questions that they were found with (`question_identity`); as all below.
    """

    layer: Array
    index: Array
    delta: Array
    mean_correct: Array | None = None
    mean_incorrect: Array | None = None
    score: Array | None = None
    ranking: Ranking = "given"
    base: BaseModel | None = None
    questions: tuple[str, ...] = ()

    kind: ClassVar[str] = "neurons"
    _optional: ClassVar[tuple[str, ...]] = ("mean_correct", "mean_incorrect", "score")

    def __post_init__(self) -> None:
        set_vectors(self, "neurons", {"layer": np.int64, "index": np.int64, "delta": np.float32})
        set_vectors(
            self,
            "neurons",
            {name: np.float32 for name in self._optional if getattr(self, name) is not None},
        )
        same_length(self, "neurons", ("layer", "index", "delta", *self._optional))
        check_choice("neurons", "ranking", self.ranking, get_args(Ranking))
        check_places("neurons", self.layer, self.index, self.base)
        set_questions(self, "neurons")

    def __len__(self) -> int:
        return len(self.layer)

    def top(self, count: int) -> "NeuronSet":
        """The first ``count`` neurons.

        Raises:
            RuleError: there are fewer.
        """
        if not 0 <= count <= len(self):
            raise RuleError(f"neurons: {count} wanted; the set has {len(self)}")
        return self._take(np.arange(count))

    def in_order(self) -> "NeuronSet":
        """The same neurons sorted by (layer, index)."""
        return self._take(np.lexsort((self.index, self.layer)))

    def _take(self, rows: Array) -> "NeuronSet":
        names = ("layer", "index", "delta", *self._optional)
        present = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **{name: values[rows] for name, values in present.items()})

    @classmethod
    def from_reference_csv(
        cls, path: str | Path, *, top: int | None = None, base: BaseModel | None = None
    ) -> "NeuronSet":
        """Neurons that the reference code published (`top_200.csv`), in the order of the file.

        Columns: overall_neuron_index (= layer * M + index), layer, neuron_index_in_layer, weight (= delta);
        others are ignored. Of some published sets the questions are known (`reference.questions_of`).

        Raises:
            RuleError: a column is missing, a row is not of that form or contradicts itself (path:line),
                or the file has fewer than ``top`` rows.
        """
        rows = reference.neuron_rows(Path(path))
        layer, index, delta = (np.array(column) for column in zip(*rows, strict=True))
        try:
            neurons = cls(layer, index, delta, base=base, questions=reference.questions_of(rows))
        except RuleError as error:
            raise RuleError(f"{path}: {error}") from error
        return neurons if top is None else neurons.top(top)

    def _arrays(self) -> dict[str, Array]:
        optional = {name: getattr(self, name) for name in self._optional if getattr(self, name) is not None}
        return {"layer": self.layer, "index": self.index, "delta": self.delta, **optional}

    def _record(self) -> dict[str, Any]:
        base = None if self.base is None else self.base.as_record()
        return {
            "version": 1,
            "ranking": self.ranking,
            "base": base,
            "questions": list(self.questions),
        }

    @classmethod
    def _restore(cls, arrays: Mapping[str, Array], record: Mapping[str, Any], subject: str) -> "NeuronSet":
        check_version(record, subject)
        return cls(
            **arrays,
            ranking=record["ranking"],
            base=restore_base(record, subject),
            questions=record["questions"],
        )


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
        base: the model whose activations it reads; None where it is not known.
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
            raise RuleError(f"gate: threshold {self.threshold} is no probability; expected a number from 0 to 1")
        check_places("gate", self.layer, self.index, self.base)
        set_questions(self, "gate")
        order = np.lexsort((self.index, self.layer))
        for name in ("layer", "index", "attention_weight", "hidden_weight"):
            freeze(self, name, getattr(self, name)[..., order])

    def weights(self) -> dict[str, Array]:
        """The six arrays of the classifier, by name."""
        return {name: getattr(self, name) for name in _GATE_SHAPES}

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


@dataclass(frozen=True, eq=False)
class SteeringRule(Value):
    """At a steered token: h[layer, index] += strength * g * delta, with g in {0, 1} for the whole sequence.

    h is what enters the down projection of a layer. The gate decides g once, from the prompt, unsteered;
    without a gate g is 1. Neurons are kept sorted by (layer, index).

    Attributes:
        neurons: which neurons and how much.
        strength: factor on every delta; negative reverses the direction, 0 is the base model, bit for bit.
        start: the first steered token. "last_prompt_token" is the paper's: the last prompt token and every
            generated one. "first_generated_token" leaves the prompt alone. Defined over tokens, not calls.
        gate: None steers every sequence.
        base: the model that the rule belongs to.
        questions: identities of all questions that neurons, gate and strength were fitted on; an honest
            evaluation uses none of them.
    """

    neurons: NeuronSet
    strength: float
    base: BaseModel
    start: Start = "last_prompt_token"
    gate: Gate | None = None
    questions: tuple[str, ...] = ()

    kind: ClassVar[str] = "rule"

    def __post_init__(self) -> None:
        check_number("rule", "strength", self.strength)
        check_choice("rule", "start", self.start, get_args(Start))
        set_questions(self, "rule")
        for part in (self.neurons, self.gate):
            if part is not None and part.base is not None:
                part.base.require_same(self.base)
        object.__setattr__(self, "strength", float(self.strength))
        object.__setattr__(self, "neurons", replace(self.neurons, base=self.base).in_order())
        gate_questions = () if self.gate is None else self.gate.questions
        seen = {*self.questions, *self.neurons.questions, *gate_questions}
        object.__setattr__(self, "questions", tuple(sorted(seen)))
        if self.gate is not None:
            object.__setattr__(self, "gate", replace(self.gate, base=self.base))
            self._check_causal(self.gate)

    def _check_causal(self, gate: Gate) -> None:
        if self.start == "last_prompt_token" and not self.causal and len(self.neurons):
            raise RuleError(
                f"rule: the gate reads layer {gate.layer.max()}, steering begins in layer {self.layers()[0]}; with "
                "start 'last_prompt_token' the gate must read lower layers only (it decides in the same pass); "
                "use start 'first_generated_token', or train the gate below the neurons"
            )

    @property
    def causal(self) -> bool:
        """Whether one forward pass knows the decision before it reaches the first steered layer."""
        return self.gate is None or not len(self.neurons) or int(self.gate.layer.max()) < self.layers()[0]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the rule's file: its identity in artifacts, cards and receipts."""
        return storage.sha256(self.to_bytes())

    def layers(self) -> list[int]:
        """The steered layers, ascending."""
        return sorted(set(self.neurons.layer.tolist()))

    def neurons_of(self, layer: int) -> tuple[Array, Array]:
        """Indices and deltas of one layer's chosen neurons, (K_l,) each, without the strength."""
        rows = self.neurons.layer == layer
        return self.neurons.index[rows], self.neurons.delta[rows]

    def with_strength(self, strength: float) -> "SteeringRule":
        """The same rule at another strength."""
        return replace(self, strength=strength)

    def ungated(self) -> "SteeringRule":
        """The same rule for every prompt."""
        return replace(self, gate=None)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Put the rule into a repository of the Hub, with a short card, and return the commit.

        Args:
            repo_id: USER/NAME; a new repository, or one that holds no exported model.
            private: None makes a new repository private, and leaves an existing one as it is.
            revision: a branch, new or not; default: main.
            token: another one than HF_TOKEN or that of `hf auth login`.
            commit_message: default: names the rule.

        Raises:
            HubError: the Hub refuses, or the repository is not private or public as ``private`` says.
        """
        from adaras_export import rule_repository

        how: dict[str, Any] = {"private": private, "revision": revision, "token": token, "message": commit_message}
        return rule_repository.push(self, repo_id, **how).oid

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> "SteeringRule":
        """The rule in a folder, or in a repository of the Hub: one of its own, or any exported model's.

        Args:
            path_or_id: a folder or file, or USER/NAME.
            revision: branch, tag or commit of the repository; a commit pins the rule.
            token: another one than HF_TOKEN or that of `hf auth login`.

        Raises:
            HubError: the repository, or the file in it, cannot be had.
            ArtifactError: the file is missing, damaged or of another kind.
            RuleError: its content contradicts itself.
        """
        from adaras_export import rule_repository

        return cls.load(rule_repository.pull(path_or_id, revision, token))

    def _arrays(self) -> dict[str, Array]:
        parts = {f"neurons.{name}": values for name, values in self.neurons._arrays().items()}
        if self.gate is not None:
            parts |= {f"gate.{name}": values for name, values in self.gate._arrays().items()}
        return parts

    def _record(self) -> dict[str, Any]:
        return {
            "version": 1,
            "strength": self.strength,
            "start": self.start,
            "base": self.base.as_record(),
            "questions": list(self.questions),
            "ranking": self.neurons.ranking,
            "threshold": None if self.gate is None else self.gate.threshold,
        }

    @classmethod
    def _restore(cls, arrays: Mapping[str, Array], record: Mapping[str, Any], subject: str) -> "SteeringRule":
        check_version(record, subject)
        parts: dict[str, dict[str, Any]] = {"neurons": {}, "gate": {}}
        for name, values in arrays.items():
            part, _, field = name.partition(".")
            parts[part][field] = values
        base = BaseModel.from_record(record["base"], subject)
        return cls(
            neurons=NeuronSet(**parts["neurons"], ranking=record["ranking"], base=base),
            strength=record["strength"],
            base=base,
            start=record["start"],
            gate=Gate(**parts["gate"], threshold=record["threshold"], base=base) if parts["gate"] else None,
            questions=record["questions"],
        )
