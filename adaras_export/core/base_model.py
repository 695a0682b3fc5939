"""The identity of a base model: its id, revision, sizes and fingerprint."""

import reprlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.families import family_of
from adaras_export.errors import ArtifactError, RuleError
from adaras_export.files.hub import fetch
from adaras_export.files.safetensors_record import Array


@dataclass(frozen=True)
class BaseModel:
    """The identity of the model that a rule is made for, without its weights.

    Attributes:
        id: Hub id, or the name of the local folder.
        revision: commit of a Hub id; None for a local folder.
        family: model_type of config.json.
        layers: number of decoder layers (L).
        mlp_size: neurons of one MLP (M), the width that enters the down projection; where layers differ, of each.
        hidden_size: model width (D).
        fingerprint: SHA-256 over names, types, shapes and a sample of every tensor, independent of
            how the tensors are spread over files; None means that the weights are not recorded.
    """

    id: str
    family: str
    layers: int
    mlp_size: int | tuple[int, ...]
    hidden_size: int
    revision: str | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        family_of({"model_type": self.family}, str(self.id))
        for name in ("id", "revision", "fingerprint"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name == "id" or value is not None):
                raise RuleError(f"base: {name} is {reprlib.repr(value)}; expected text")
        for name in ("layers", "mlp_size", "hidden_size"):
            value = getattr(self, name)
            several = name == "mlp_size" and isinstance(value, list | tuple)
            if not all(type(size) is int and 1 <= size < 1 << 31 for size in (value if several else [value])):
                raise RuleError(f"base {self.id}: {name} is {reprlib.repr(value)}; expected a positive integer")
            if several:
                self._set_widths(value)

    def _set_widths(self, widths: list[int] | tuple[int, ...]) -> None:
        """Keep a width of each layer, or one number if all are equal."""
        if len(widths) != self.layers:
            raise RuleError(f"base {self.id}: mlp_size has {len(widths)} widths; expected {self.layers}, one a layer")
        object.__setattr__(self, "mlp_size", widths[0] if len({*widths}) == 1 else tuple(widths))

    @property
    def widest(self) -> int:
        """The neurons of the widest MLP: M of arrays of shape (L, M), in which narrower layers have places to spare."""
        return self.mlp_size if isinstance(self.mlp_size, int) else max(self.mlp_size)

    def width(self, layer: int) -> int:
        """The neurons of the MLP of a 0-based layer."""
        return self.mlp_size if isinstance(self.mlp_size, int) else self.mlp_size[layer]

    def places(self, first: int = 0, last: int | None = None) -> tuple[Array, Array]:
        """Layer and index of every neuron from layer ``first`` to ``last - 1``, in order; index an (L, M) array."""
        count = self.layers if last is None else last
        width_L1 = np.array([[self.width(layer)] for layer in range(first, count)])
        layer, index = np.nonzero(np.arange(self.widest) < width_L1)
        return first + layer, index

    @classmethod
    def of(cls, path_or_id: str | Path, revision: str | None = None) -> "BaseModel":
        """The identity of a model folder, or of a Hub repository, which is downloaded into the cache.

        Raises:
            ArtifactError: the folder has no config.json or no safetensors weights, or the download failed.
            UnsupportedModelError: the architecture is not in the table.
        """
        return cls.of_checkpoint(Checkpoint(fetch(path_or_id, revision)), path_or_id)

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, path_or_id: str | Path) -> "BaseModel":
        """The identity of a checkpoint; ``path_or_id`` is what the user gave: its folder or its Hub id.

        Raises:
            ArtifactError: the folder has no config.json or no safetensors weights.
            UnsupportedModelError: the architecture is not in the table.
        """
        folder, config = checkpoint.folder, checkpoint.config
        path, local = folder / "config.json", folder == Path(path_or_id)
        family = family_of(config, str(path_or_id))
        if missing := [key for key in family.sizes if key is not None and key not in family.text(config)]:
            raise ArtifactError(f"{path}: has no {', '.join(missing)}; expected the sizes of a model")
        layers, size, hidden_size = family.sizes_in(config)
        mlp_size: Any = _stored_widths(checkpoint) if family.sizes[1] is None else size
        try:
            base = cls(
                id=folder.resolve().name if local else str(path_or_id),
                revision=None if local else folder.name,  # the commit
                family=family.model_type,
                layers=layers,
                mlp_size=mlp_size,
                hidden_size=hidden_size,
                fingerprint=checkpoint.fingerprint,
            )
        except RuleError as error:
            raise RuleError(f"{path}: {error}") from error
        _require_sizes(base, checkpoint)
        return base

    def require_same(self, other: "BaseModel") -> None:
        """Refuse ``other`` if it is another model; a missing fingerprint matches any.

        Raises:
            RuleError: family, sizes or weights differ; the message lists every difference.
        """
        differing = [
            f"{name} {getattr(other, name)} (expected {getattr(self, name)})"
            for name in ("family", "layers", "mlp_size", "hidden_size", "fingerprint")
            if getattr(other, name) != getattr(self, name)
            and not (name == "fingerprint" and None in (self.fingerprint, other.fingerprint))
        ]
        if differing:
            raise RuleError(f"{other.id}: is not the model that this was made for ({self.id}): {'; '.join(differing)}")

    def as_record(self) -> dict[str, Any]:
        """The fields as JSON values."""
        several = {} if isinstance(self.mlp_size, int) else {"mlp_size": list(self.mlp_size)}
        return {**asdict(self), **several}

    @classmethod
    def from_record(cls, record: Any, subject: str) -> "BaseModel":  # noqa: ANN401 - comes from a file
        """The value that `as_record` described.

        Raises:
            ArtifactError: the record has other keys.
        """
        try:
            return cls(**record)
        except TypeError as error:  # other keys, or not an object
            raise ArtifactError(f"{subject}: damaged base record ({error})") from error


def _require_sizes(base: BaseModel, checkpoint: Checkpoint) -> None:
    """Refuse a config whose sizes differ from those of the weights, before memory is allocated for them.

    Quantised weights are not compared: they are packed into other shapes.
    """
    family, located = checkpoint.family, checkpoint.files
    below = f"{checkpoint.layers_key}."
    found = {name.removeprefix(below).partition(".")[0] for name in located if name.startswith(below)}
    if len(found) != base.layers:
        raise ArtifactError(
            f"{checkpoint}: has weights of {len(found)} layers; expected {base.layers}, as its config.json says"
        )
    if checkpoint.is_quantised:
        return
    for layer in range(base.layers):
        expected = [base.hidden_size, base.width(layer)]
        expected = expected[::-1] if family.transposed else expected
        name = f"{below}{layer}.{family.down}.weight"
        if name not in located:
            raise checkpoint.no_tensor(name)
        if (shape := checkpoint.entries[name]["shape"]) != expected:
            raise ArtifactError(f"{located[name]}: {name} has shape {shape}; expected {expected}, as config.json says")


def _stored_widths(checkpoint: Checkpoint) -> tuple[int, ...]:
    """M of each layer that has weights, from the shapes of the down projections, (D, M) each."""
    if "quantization_config" in checkpoint.config:
        raise ArtifactError(
            f"{checkpoint}: is a quantised {checkpoint.family.model_type}; expected plain weights, whose shapes say "
            "how wide its MLPs are"
        )
    before, behind = f"{checkpoint.layers_key}.", f".{checkpoint.family.down}.weight"
    found = {
        int(number): (entry["shape"] or [0])[-1]
        for name, entry in checkpoint.entries.items()
        if name.startswith(before) and (number := name.removeprefix(before).removesuffix(behind)).isdecimal()
    }
    return tuple(found[number] for number in sorted(found))
