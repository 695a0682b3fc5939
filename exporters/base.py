"""What every export target promises: the protocol, and the reference that most artifacts must equal."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from transformers import PreTrainedTokenizerBase

from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.rule import SteeringRule
from adaras_export.errors import ExportError
from adaras_export.exporters.checks import Inspection
from adaras_export.exporters.manifest import Disclosed
from adaras_export.exporters.parity import (
    Artifact,
    Check,
    Mode,
    Play,
    Reference,
    ReferencePlayer,
    generate_logits,
    play_model,
)
from adaras_export.modeling.generation import Sampling, complete_ids

Feature = Literal["gate", "start", "dial"]


@dataclass(frozen=True)
class ExportContext:
    """What an exporter needs to know besides the rule and the folders.

    Attributes:
        base_id: what from_pretrained finds the base by: its Hub id, or the absolute path of its folder.
        base_revision: the commit of a Hub id.
        base_elsewhere: the base's folder for `Exporter.load`, where it is no longer at that place.
        copy: copy weight files, also where they could be linked.
        options: what else the user chose, by name; only those of `TargetSpec.options`.
    """

    base_id: str
    base_revision: str | None = None
    base_elsewhere: Path | None = None
    copy: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """What `Exporter.write` delivered.

    Attributes:
        rule: the rule that the artifact carries: the given one, or that with a threshold of its own.
        notes: figures for the card that only writing could measure.
    """

    rule: SteeringRule
    notes: tuple[Check, ...] = ()


@dataclass(frozen=True)
class TargetSpec:
    """What a target is, with the options that the user chose, whatever the rule and the base.

    Attributes:
        name: the target.
        card: the template of its model card, by its path in this package; it fills the blocks of `delivery/card.md`:
            ``weights``, what became of the base's weights; ``usage``, every way to load it, with code that runs as it
            stands; ``off``, how to switch the steering off, which goes on from the code of ``usage``; ``limits``, what
            the format cannot do and what goes wrong in silence, as a list.
        entries: lists every tensor in the files of an artifact that is not the base's, from the folder and the SHA-256
            of each tensor of the base; reads the files as data, and raises `ArtifactError` where it cannot.
        drops: what the format cannot express.
        options: names of the options that are this target's own.
        recorded: gives the options that `verify` must know, for the receipt; may read a file to name it by its hash.
        library: what opens it, as the Hub names it.
        relation: what the artifact is to its base, as the Hub names it: finetune, adapter, ...
        tags: tags of the model card that are this target's own.
        fetches_base: whether the artifact says where its base is, and opens what is there.
        rounded: whether it computes with rounded weights, so that a measurement with the base's own is not about it.
    """

    name: str
    card: str
    entries: Callable[[Path, Mapping[str, str]], Sequence[Disclosed]]
    drops: frozenset[Feature] = frozenset()
    options: frozenset[str] = frozenset()
    recorded: Callable[[], Mapping[str, Any]] = dict
    library: str = "transformers"
    relation: str = "finetune"
    tags: tuple[str, ...] = ()
    fetches_base: bool = False
    rounded: bool = False


class Exporter(Protocol):
    """One target: writes an artifact, inspects it without running it, and opens it for the comparison."""

    @property
    def spec(self) -> TargetSpec:
        """What the target is, with the options of the context."""
        ...

    def with_context(self, context: ExportContext) -> "Exporter":
        """This exporter with what it needs of ``context``.

        Raises:
            ExportError: an option has no such value, or options exclude each other.
        """
        ...

    def write(self, rule: SteeringRule, base: Checkpoint, out: Path) -> Written:
        """Write the artifact of ``rule`` on the checkpoint in ``base`` into the empty folder ``out``.

        Raises:
            ExportError: the checkpoint cannot carry it.
        """
        ...

    def inspect(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Inspection:
        """Compare what is stored, tensor by tensor and file by file; unless it is harmless, nothing of it runs."""
        ...

    def reference(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Reference:
        """What the artifact in ``folder`` must equal."""
        ...

    def load(self, folder: Path) -> Artifact:
        """Open the artifact as its users would, in float32.

        Raises:
            ArtifactError: it does not open.
        """
        ...


@runtime_checkable
class Refreshing(Protocol):
    """An exporter whose artifacts carry code of this library, which a later version may have mended."""

    def refresh(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> None:
        """Replace code and settings of an artifact by those that `write` writes today; its tensors stay."""
        ...


@runtime_checkable
class Remaking(Protocol):
    """An exporter whose artifacts can only be checked against a fresh export, which may take minutes."""

    def made_anew(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Sequence[Check]:
        """Compare what is stored, which `Exporter.inspect` has found harmless, with what is written here and now."""
        ...


def require_effect(rule: SteeringRule, target: str) -> None:
    """Refuse a rule that would give an artifact without effect.

    Raises:
        ExportError: it has no neurons, or strength 0.
    """
    if not len(rule.neurons) or rule.strength == 0:
        found = "no neurons" if not len(rule.neurons) else "strength 0"
        raise ExportError(f"{target}: the rule has {found}; expected an effect, or there is nothing to put into a file")


class SteeredModel:
    """An opened artifact that is a model of Transformers or PEFT; `set_to` is what its kinds differ in."""

    model: Any

    def set_to(self, mode: Mode) -> AbstractContextManager[Any]:  # noqa: ARG002 - this one has no dial
        """The model steered as ``mode`` says, with the dials that users have, while the context lasts."""
        return nullcontext()

    def play(self, rows: Sequence[Sequence[int]], mode: Mode, follow_BS: torch.Tensor | None) -> Play:
        """As `parity.Player` says."""
        with self.set_to(mode):
            return play_model(self.model, rows, follow_BS)

    def generate(self, rows: Sequence[Sequence[int]], mode: Mode, follow_BS: torch.Tensor) -> torch.Tensor:
        """As `parity.Generating` says."""
        with self.set_to(mode):
            return generate_logits(self.model, rows, follow_BS)

    def answer(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Sequence[int]],
        sampling: Sampling,
        keys: Sequence[str],
    ) -> list[list[int]]:
        """As `parity.Answering` says."""
        return complete_ids(self.model, tokenizer, rows, sampling, keys)


def stock_reference(rule: SteeringRule, base: Checkpoint, *, everywhere: bool = False) -> Reference:
    """The base model in float32, steered by hooks; ``everywhere`` leaves out gate and start."""
    from transformers import AutoModelForCausalLM

    base.require_buildable()
    model: Any = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    whole = ReferencePlayer(model.eval(), rule)
    player = ReferencePlayer(model, rule, everywhere=True) if everywhere else whole
    return Reference(player, *sizes_of(model), whole if everywhere else None)


def sizes_of(model: Any) -> tuple[int, int]:  # noqa: ANN401 - a class of Transformers
    """How many token ids a model knows, and how many tokens it takes."""
    return int(model.config.vocab_size), int(model.config.max_position_embeddings)
