"""The protocol of export targets, and the reference that most artifacts must equal."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from transformers import PreTrainedTokenizerBase

from adaras_export.core import families, quantised
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.rule import SteeringRule
from adaras_export.errors import ExportError
from adaras_export.exporters.checkpoint import opened
from adaras_export.exporters.checks import Check, Inspection
from adaras_export.exporters.manifest import Disclosed
from adaras_export.exporters.parity import Artifact, Mode, Play, Reference, ReferencePlayer, generate_logits, play_model
from adaras_export.modeling.generation import Sampling, complete_ids

Feature = Literal["gate", "start", "dial"]


@dataclass(frozen=True)
class ExportContext:
    """Settings of an export, besides the rule and the folders.

    Attributes:
        base_id: the name that from_pretrained gets: a Hub id, or the absolute path of the base's folder.
        base_revision: the commit of a Hub id.
        base_elsewhere: the base's folder for `Exporter.load`, if it has moved.
        copy: copy weight files instead of linking them.
        options: the target's options, by name; see `TargetSpec.options`.
    """

    base_id: str
    base_revision: str | None = None
    base_elsewhere: Path | None = None
    copy: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """The result of `Exporter.write`.

    Attributes:
        rule: the rule of the artifact: the given one, possibly with another threshold.
        notes: figures for the card that were measured while writing.
    """

    rule: SteeringRule
    notes: tuple[Check, ...] = ()


@dataclass(frozen=True)
class TargetSpec:
    """The properties of a target with its chosen options, independent of rule and base.

    Attributes:
        name: the target.
        card: the template of its model card, by its path in this package; it fills the blocks of `delivery/card.md`:
            ``weights``, what happened to the base's weights; ``usage``, every way to load it, with complete code;
            ``off``, how to switch the steering off, which continues the code of ``usage``; ``limits``, a list of what
            the format cannot do and of silent failures.
        entries: lists every tensor of an artifact that the base lacks or has with other bytes. Its arguments are the
            folder and the SHA-256 of each tensor of the base. It reads the files as data, and raises `ArtifactError`
            if it cannot.
        drops: features of a rule that the format cannot express.
        options: names of the target's options.
        recorded: returns the options that `verify` needs, for the receipt; may read a file to record its hash.
        library: the library that opens the artifact, by the Hub's name.
        relation: the relation to the base, by the Hub's name: finetune, adapter, ...
        tags: the target's tags for the model card.
        fetches_base: whether the artifact names its base and loads it from there.
        rounded: whether it computes with rounded weights, so that measurements on the base's weights do not apply.
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


class Runner(Protocol):
    """What runs an artifact and its reference."""

    def reference(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Reference:
        """The reference that the artifact in ``folder`` must equal."""
        ...

    def load(self, folder: Path) -> Artifact:
        """Open the artifact as its users would, in float32.

        Raises:
            ArtifactError: the artifact cannot be opened.
        """
        ...


class Exporter(Runner, Protocol):
    """One target: writes an artifact, inspects it without running it, and opens it for the comparison."""

    @property
    def spec(self) -> TargetSpec:
        """The properties of the target, with the options of the context."""
        ...

    def with_context(self, context: ExportContext) -> "Exporter":
        """A copy of this exporter with the settings of ``context``.

        Raises:
            ExportError: an option has an invalid value, or two options exclude each other.
        """
        ...

    def write(self, rule: SteeringRule, base: Checkpoint, out: Path) -> Written:
        """Write the artifact of ``rule`` and the checkpoint ``base`` into the empty folder ``out``.

        Raises:
            ExportError: the target cannot express the rule or the checkpoint.
        """
        ...

    def inspect(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Inspection:
        """Compare the artifact, tensor by tensor and file by file; runs nothing of it unless it is harmless."""
        ...


@runtime_checkable
class Refreshing(Protocol):
    """An exporter whose artifacts contain code of this library, which a later version may have fixed."""

    def refresh(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> None:
        """Replace code and settings of an artifact with those that `write` writes today; keeps its tensors."""
        ...


@runtime_checkable
class Remaking(Protocol):
    """An exporter whose artifacts are compared with a new export, which may take minutes."""

    def made_anew(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Sequence[Check]:
        """Compare an artifact that `Exporter.inspect` has found harmless with a new export."""
        ...


def require_effect(rule: SteeringRule, target: str) -> None:
    """Refuse a rule without effect.

    Raises:
        ExportError: the rule has no neurons, or strength 0.
    """
    if not len(rule.neurons) or rule.strength == 0:
        cause = "no neurons" if not len(rule.neurons) else "strength 0"
        raise ExportError(f"{target}: the rule has {cause}; expected an effect, or there is nothing to put into a file")


class SteeredModel:
    """An opened artifact that is a model of Transformers or PEFT; subclasses override `set_to`."""

    model: Any

    def set_to(self, mode: Mode) -> AbstractContextManager[Any]:  # noqa: ARG002 - no dial here
        """Steer the model in ``mode`` inside the context, with the dials that users have."""
        return nullcontext()

    def play(self, rows: Sequence[Sequence[int]], mode: Mode, follow_BS: torch.Tensor | None) -> Play:
        """Run prompts in ``mode``; see `parity.Player`."""
        with self.set_to(mode):
            return play_model(self.model, rows, follow_BS)

    def generate(self, rows: Sequence[Sequence[int]], mode: Mode, follow_BS: torch.Tensor) -> torch.Tensor:
        """The logits of `generate()` in ``mode``; see `parity.Generating`."""
        with self.set_to(mode):
            return generate_logits(self.model, rows, follow_BS)

    def answer(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Sequence[int]],
        sampling: Sampling,
        keys: Sequence[str],
    ) -> list[list[int]]:
        """New ids of every row; see `parity.Answering`."""
        return complete_ids(self.model, tokenizer, rows, sampling, keys)


def stock_reference(
    rule: SteeringRule, base: Checkpoint, *, everywhere: bool = False, attention: str | None = None
) -> Reference:
    """The base model in float32, steered by hooks; ``everywhere`` ignores gate and start.

    A quantised base stays quantised, or is dequantised, as Transformers does on a CPU.

    ``attention`` is the implementation of attention, by its name in Transformers; None: its default.

    Raises:
        ArtifactError: the config describes no model, or other shapes than the weights have, or it cannot be opened.
        MissingExtraError: the library that opens the base's quantised weights is not installed.
        UnsupportedModelError: the weights are quantised in a format that was not tried.
    """
    base.require_buildable()
    stored = quantised.required(base.config, str(base))
    model, _ = opened(base.folder, base.family.auto_class, attn_implementation=attention)
    whole = ReferencePlayer(model, rule)
    player = ReferencePlayer(model, rule, everywhere=True) if everywhere else whole
    return Reference(player, *sizes_of(model), whole if everywhere else None, stored=stored)


def sizes_of(model: Any) -> tuple[int, int]:  # noqa: ANN401 - a class of Transformers
    """The vocabulary size and the context length of a model."""
    config = families.text_config(model)
    return int(config.vocab_size), int(config.max_position_embeddings)
