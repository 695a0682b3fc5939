"""The identity of a base model: its id, revision, sizes and fingerprint."""

import reprlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.families import family_of
from adaras_export.errors import ArtifactError, RuleError
from adaras_export.files.hub import fetch


@dataclass(frozen=True)
class BaseModel:
    """The identity of the model that a rule is made for, without its weights.

    Attributes:
        id: Hub id, or the name of the local folder.
        revision: commit of a Hub id; None for a local folder.
        family: model_type of config.json.
        layers: number of decoder layers (L).
        mlp_size: neurons of one MLP (M), the width that enters the down projection.
        hidden_size: model width (D).
        fingerprint: SHA-256 over names, types, shapes and a sample of every tensor, independent of
            how the tensors are spread over files; None means that the weights are not recorded.
    """

    id: str
    family: str
    layers: int
    mlp_size: int
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
            if type(value) is not int or not 1 <= value < 1 << 31:
                raise RuleError(f"base {self.id}: {name} is {reprlib.repr(value)}; expected a positive integer")

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
        if missing := [key for key in family.sizes if key not in config]:
            raise ArtifactError(f"{path}: has no {', '.join(missing)}; expected the sizes of a model")
        layers, mlp_size, hidden_size = family.sizes_in(config)
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
        return asdict(self)

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
    expected = [base.mlp_size, base.hidden_size] if family.transposed else [base.hidden_size, base.mlp_size]
    for layer in range(base.layers):
        name = f"{below}{layer}.{family.down}.weight"
        if name not in located:
            raise checkpoint.no_tensor(name)
        if (shape := checkpoint.entries[name]["shape"]) != expected:
            raise ArtifactError(f"{located[name]}: {name} has shape {shape}; expected {expected}, as config.json says")
