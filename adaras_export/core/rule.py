"""The steering rule: which neurons, by how much, from which token on, and for which prompts.

A rule is a frozen value that is checked when it is made, so code that receives one need not check it again.
The method is AdaRAS (arXiv 2601.19847).

Symbols: L layers, M MLP neurons of a layer, D model width, K chosen neurons, F gate features, H gate width.
Layers and neuron indices are 0-based everywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from adaras_export.core.base_model import BaseModel
from adaras_export.core.gate import Gate
from adaras_export.core.markdown import front_matter, render
from adaras_export.core.neurons import NeuronSet
from adaras_export.core.value import (
    Value,
    check_choice,
    check_number,
    check_version,
    set_questions,
)
from adaras_export.errors import RuleError
from adaras_export.files import atomic
from adaras_export.files.hub import is_hub_id
from adaras_export.files.safetensors_record import Array

Start = Literal["last_prompt_token", "first_generated_token"]


@dataclass(frozen=True, eq=False)
class SteeringRule(Value):
    """At a steered token: h[layer, index] += strength * g * delta, with g in {0, 1} for the whole sequence.

    h is the input of a layer's down projection. The gate decides g once, from the unsteered prompt;
    without a gate g is 1. Neurons are kept sorted by (layer, index).

    Attributes:
        neurons: the steered neurons and their deltas.
        strength: factor on every delta; negative reverses the direction, 0 is the base model, bit for bit.
        start: the first steered token. "last_prompt_token", as in the paper, steers the last prompt token and
            every generated one; "first_generated_token" steers generated tokens only. Independent of how tokens
            are split over calls.
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
        """Whether the gate reads only layers below the first steered one, so that one forward pass suffices."""
        return self.gate is None or not len(self.neurons) or int(self.gate.layer.max()) < self.layers()[0]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the rule's file: its identity in artifacts, cards and receipts."""
        return atomic.sha256(self.to_bytes())

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
        """Push the rule to a repository of the Hub, with a short card, and return the commit.

        Args:
            repo_id: USER/NAME; a new repository, or one that holds no exported model.
            private: None makes a new repository private, and keeps the visibility of an existing one.
            revision: a branch, created if it is missing; default: main.
            token: default: HF_TOKEN, or the token of `hf auth login`.
            commit_message: the default names the rule.

        Raises:
            HubError: the Hub refuses, or the repository has another visibility than ``private``.
        """
        from adaras_export.core import rule_hub

        message = commit_message or f"Steering rule {self.fingerprint[:12]}"
        card = _card(self, repo_id)
        return rule_hub.push(
            repo_id, self.to_bytes(), card, message, private=private, revision=revision, token=token
        ).oid

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> "SteeringRule":
        """Load the rule of a folder or a Hub repository, which may hold only the rule or an exported model.

        Args:
            path_or_id: a folder or file, or USER/NAME.
            revision: branch, tag or commit of the repository; a commit pins the rule.
            token: default: HF_TOKEN, or the token of `hf auth login`.

        Raises:
            HubError: the file cannot be downloaded.
            ArtifactError: the file is missing, damaged or of another kind.
            RuleError: its content contradicts itself.
        """
        from adaras_export.core import rule_hub

        return cls.load(rule_hub.pull(path_or_id, revision, token))

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


def _card(rule: SteeringRule, name: str) -> str:
    """The README.md of a repository that holds only the rule."""
    base, is_known = rule.base, rule.base.revision is not None and is_hub_id(rule.base.id)
    entries = {
        "library_name": "adaras-export",
        **({"base_model": base.id} if is_known else {}),
        "tags": ["activation-steering", "adaras"],
    }
    values = {"header": front_matter(entries), "name": name, "base": base, "rule": rule, "layers": rule.layers()}
    return render("core/rule_card.md", values)
