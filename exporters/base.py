"""What every export target shares: what it promises, and how weights get into an artifact without a copy."""

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from adaras_export.parity import Artifact, Check, Player, ReferencePlayer
from adaras_export.rule import SteeringRule

Feature = Literal["gate", "start", "dial"]


@dataclass(frozen=True)
class Commission:
    """What an exporter is told besides the rule and the folders.

    Attributes:
        base_id: what from_pretrained finds the base by: its Hub id, or the absolute path of its folder.
        base_revision: the commit of a Hub id.
        base_elsewhere: the base's folder for `Exporter.load`, where it is no longer at that place.
        copy: copy weight files, also where they could be linked.
        options: what else the user chose, by name; only of the target's own `Exporter.options`.
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


class Exporter(Protocol):
    """One target: writes an artifact, looks it over without running it, and opens it for the comparison."""

    @property
    def name(self) -> str:
        """The target."""
        ...

    @property
    def drops(self) -> frozenset[Feature]:
        """What the format cannot express."""
        ...

    @property
    def library(self) -> str:
        """What the Hub is to say that opens it."""
        ...

    @property
    def options(self) -> frozenset[str]:
        """Names of the options that are this target's own."""
        ...

    def commissioned(self, commission: Commission) -> "Exporter":
        """This exporter with what it needs of ``commission``.

        Raises:
            ExportError: an option has no such value, or options exclude each other.
        """
        ...

    def recorded(self) -> Mapping[str, Any]:
        """The options that `verify` must know, for the receipt."""
        ...

    def write(self, rule: SteeringRule, base: Path, out: Path) -> Written:
        """Write the artifact of ``rule`` on the checkpoint in ``base`` into the empty folder ``out``.

        Raises:
            ExportError: the checkpoint cannot carry it.
        """
        ...

    def inspect(self, folder: Path, rule: SteeringRule, base: Path) -> Sequence[Check]:
        """Compare what is stored, tensor by tensor and file by file.

        The first two checks say whether its code and its settings are this library's; unless both hold, nothing of
        the artifact runs, here or later.
        """
        ...

    def reference(self, folder: Path, rule: SteeringRule, base: Path) -> tuple[Player, int]:
        """What the artifact in ``folder`` must equal, and the size of its vocabulary."""
        ...

    def load(self, folder: Path) -> Artifact:
        """Open the artifact as its users would, in float32.

        Raises:
            ArtifactError: it does not open.
        """
        ...

    def tags(self) -> Sequence[str]:
        """Tags of the model card that are this target's own."""
        ...

    def weights(self) -> str:
        """A sentence for the card: what became of the base's weights."""
        ...

    def usage(self) -> str:
        """How to load it, in Markdown; ``{repo}`` stands for the repository's name."""
        ...


def stock_reference(rule: SteeringRule, base: Path) -> tuple[Player, int]:
    """The base model in float32, steered by hooks, and the size of its vocabulary."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return ReferencePlayer(model.eval(), rule), int(model.config.vocab_size)


# What belongs to a checkpoint besides its weights and its config: tokenizer, chat templates, generation settings,
# licence. Never code, never pickles.
_COMPANIONS = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "LICENSE*",
    "NOTICE*",
    "additional_chat_templates/*.jinja",
)
# The last one would send from_pretrained, where peft is installed, to another repository and its code.
_NOT_COMPANIONS = {"config.json", "model.safetensors.index.json", "receipt.json", "adapter_config.json"}


def companions(base: Path) -> dict[str, Path]:
    """The small files that belong to a checkpoint, by their name below its folder."""
    found = [path for pattern in _COMPANIONS for path in sorted(base.glob(pattern)) if path.is_file()]
    return {str(path.relative_to(base)): path for path in found if path.name not in _NOT_COMPANIONS}


def copy_companions(base: Path, out: Path) -> None:
    """Copy the small files that belong to a checkpoint."""
    for name, source in companions(base).items():
        target = out / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)


def link_or_copy(source: Path, target: Path, *, copy: bool = False) -> None:
    """Give ``source`` a second name without rewriting it; a copy where that is asked for or the file systems differ."""
    source = source.resolve()  # a Hub snapshot holds links into its blobs
    if copy:
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError as error:
        # Another file system, none that links, too many links, or a file of another user.
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        shutil.copyfile(source, target)
