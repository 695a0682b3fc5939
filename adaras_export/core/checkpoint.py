"""A checkpoint on disk: its config, its tensors by file, their hashes, and whether Transformers can build it.

The config is untrusted: Transformers would allocate memory for any size in it, and raises errors of many types for bad
values. So the model is first built on the meta device, which allocates nothing.
"""

import copy
import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaras_export.core import quantised
from adaras_export.core.families import Family, family_of
from adaras_export.core.quantised_columns import Linear
from adaras_export.errors import ArtifactError, first_line
from adaras_export.files import safe_read
from adaras_export.files.atomic import read_json
from adaras_export.files.hub import fetch
from adaras_export.files.safe_read import UnreadableError

if TYPE_CHECKING:
    from torch import Tensor

# A plain name cannot point out of the folder, on any system.
_FILE_NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,200}\.safetensors")
_SAMPLE_BYTES = 4096

# What config classes, module constructors and PyTorch raise for a text, a zero or a list in place of a size.
_BAD_SIZES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Checkpoint:
    """A model folder; each part is read when it is first used, and only once.

    Attributes:
        folder: where config.json and the safetensors files are.
    """

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json.

        Raises:
            ArtifactError: the file is missing or holds no JSON object.
        """
        return copy.deepcopy(self._config)

    @cached_property
    def _config(self) -> dict[str, Any]:
        return read_json(self.folder / "config.json")

    @property
    def family(self) -> Family:
        """The model family that the config names.

        Raises:
            UnsupportedModelError: the architecture is not in the table.
        """
        return family_of(self._config, str(self.folder))

    @property
    def is_quantised(self) -> bool:
        """Whether the config says that weights are quantised, in whatever format."""
        return self._config.get("quantization_config") is not None

    @cached_property
    def files(self) -> dict[str, Path]:
        """The file of each tensor, by tensor name; see `shards`."""
        return shards(self.folder)

    @cached_property
    def entries(self) -> dict[str, dict[str, Any]]:
        """The header entry of each tensor: type, shape and offsets.

        Raises:
            ArtifactError: a file lacks a tensor that the index names.
        """
        headers = {path: header(path) for path in sorted({*self.files.values()})}
        for name, path in self.files.items():
            if name not in headers[path]:
                raise ArtifactError(f"{path}: tensor {name} is missing; the index names it")
        return {name: headers[path][name] for name, path in self.files.items()}

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the bytes of each tensor; reads the whole checkpoint."""
        return {name: tensor_hash(self.files[name], self.entries[name]) for name in sorted(self.files)}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every tensor's name, type, shape and a sample of its bytes: see `fingerprint_of`."""
        return self.fingerprint_of(self.files)

    def fingerprint_of(self, names: Collection[str]) -> str:
        """SHA-256 over name, type, shape and a sample of the bytes (head, middle, tail) of these tensors.

        Distinguishes checkpoints in milliseconds, at any size. It does not detect every changed byte; the file hashes
        of a receipt do.
        """
        digest = hashlib.sha256()
        for name in sorted(self.files.keys() & {*names}):
            path, entry = self.files[name], self.entries[name]
            digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
            start = data_start(path)
            first, last = (start + offset for offset in entry["data_offsets"])
            with path.open("rb") as file:
                for position in (first, (first + last - _SAMPLE_BYTES) // 2, last - _SAMPLE_BYTES):
                    file.seek(max(first, position))
                    digest.update(file.read(min(_SAMPLE_BYTES, last - max(first, position))))
        return digest.hexdigest()

    @property
    def decoder_key(self) -> str:
        """The prefix of the decoder's tensor names, such as "model."; may be empty."""
        places = (f"{self.family.decoder}.", *(("language_model.model.", "model.") if self.family.images else ()))
        below = f"{self.family.layers}.0."
        return next((one for one in places if any(name.startswith(one + below) for name in self.files)), "")

    @property
    def layers_key(self) -> str:
        """The name of the list of decoder layers, such as "model.layers"."""
        return f"{self.decoder_key}{self.family.layers}"

    def down_columns(self, layer: int, index: "Tensor") -> "Tensor":
        """W_down[:, index] of a 0-based layer: (D, K), in its stored type, or float32 if it is quantised.

        Raises:
            ArtifactError: the checkpoint lacks a tensor, or one has another type or shape than its format has.
            UnsupportedModelError: the format was not tried.
        """
        form = quantised.format_of(self._config, str(self.folder))
        module = f"{self.layers_key}.{layer}.{self.family.down}"
        name, stored = f"{module}.weight", self._stored(module)
        _, mlp_size, hidden_size = self.family.sizes_in(self._config)
        # Some layers of a quantised checkpoint are plain. Their tensors say so; the lists in a config hold patterns of
        # strangers, which can take forever to match.
        if form is None or (name in stored and self.entries[name]["dtype"] in quantised.PLAIN):
            return self._plain_columns(name, stored, (hidden_size, mlp_size), index)
        assert mlp_size is not None  # `BaseModel` refuses quantised models whose layers differ
        parts = {key.removeprefix(f"{module}."): self._tensor(key) for key in stored}
        return form.columns(Linear(f"{self.folder}: {module}", (hidden_size, mlp_size), parts), index)

    def _plain_columns(self, name: str, stored: list[str], shape: tuple[int, int | None], index: "Tensor") -> "Tensor":
        if name not in stored:
            raise self.no_tensor(name)
        found, is_turned = self.entries[name], self.family.transposed
        hidden_size, mlp_size = shape  # None: the weights say it
        expected = [hidden_size, found["shape"][-1] if mlp_size is None else mlp_size]
        expected = expected[::-1] if is_turned else expected
        if stored != [name] or found["dtype"] not in quantised.PLAIN or found["shape"] != expected:
            raise ArtifactError(
                f"{self.files[name]}: has {', '.join(stored)}, {found['dtype']} {found['shape']}; expected one plain "
                f"weight {expected}, or a quantization_config in config.json that says what they are"
            )
        weight = self._tensor(name)
        return weight[index].T if is_turned else weight[:, index]

    def _stored(self, module: str) -> list[str]:
        """The names of the tensors of a linear map, without its bias."""
        return sorted(name for name in self.files if name.startswith(f"{module}.") and name != f"{module}.bias")

    def _tensor(self, name: str) -> "Tensor":
        try:
            with safe_read.tensors(self.files[name], "pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except UnreadableError as error:
            raise ArtifactError(
                f"{self.files[name]}: {error}; expected a tensor {name} that PyTorch can hold"
            ) from error
        return tensor

    def no_tensor(self, name: str) -> ArtifactError:
        """The error for a missing tensor that every model of the family has."""
        return ArtifactError(
            f"{self.folder}: no tensor {name}; expected the plain weights of a {self.family.model_type} model"
        )

    def require_buildable(self) -> None:
        """Refuse a config that Transformers cannot build, or whose shapes differ from those of the weights.

        Raises:
            ArtifactError: the config describes no model, or other shapes than the weights have.
            UnsupportedModelError: the architecture is not in the table.
        """
        if self._misfit is not None:
            raise ArtifactError(self._misfit)

    @cached_property
    def _misfit(self) -> str | None:
        """The first tensor whose shape is not the one that the config gives it, in words."""
        expected = _shapes(self.folder / "config.json", self._config, self.family)
        if self.is_quantised:  # packed into other shapes
            return None
        prefix = "" if self.decoder_key else f"{self.family.decoder}."
        for name, entry in self.entries.items():
            built = expected.get(prefix + name, expected.get(name, entry["shape"]))
            if entry["shape"] != built:
                file = self.files[name]
                return f"{file}: {name} has shape {entry['shape']}; expected {built}, as config.json says"
        return None


def _shapes(path: Path, config: dict[str, Any], family: Family) -> dict[str, list[int]]:
    """The shape of each tensor of the model that a config describes, by tensor name."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import __version__

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = family.auto_class.from_config(config_object(plain, family.model_type))
    except (*_BAD_SIZES, OSError, StrictDataclassError) as error:
        raise ArtifactError(
            f"{path}: {first_line(error)}; expected a config that transformers {__version__} can build a "
            f"{family.model_type} from"
        ) from error
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def config_object(config: Mapping[str, Any], family: str) -> Any:  # noqa: ANN401 - a config class of Transformers
    """A config.json as an object of the family's config class, with its defaults."""
    from transformers import CONFIG_MAPPING

    plain = {key: value for key, value in config.items() if key not in ("auto_map", "model_type")}
    return CONFIG_MAPPING[family].from_dict(_with_infinities(plain))


def _with_infinities(value: Any) -> Any:  # noqa: ANN401 - JSON
    """A JSON value in which {"__float__": "Infinity"}, as Transformers 5 writes it, is that number."""
    if isinstance(value, dict):
        found = value.get("__float__") if len(value) == 1 else None
        return {key: _with_infinities(one) for key, one in value.items()} if found is None else float(found)
    return [_with_infinities(one) for one in value] if isinstance(value, list) else value


def shards(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a checkpoint, by tensor name.

    Raises:
        ArtifactError: there are no safetensors weights, or the index names a file that is missing.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        return _indexed(index)
    if single.exists():
        return dict.fromkeys(header(single), single)
    if pickles := sorted(path.name for path in folder.glob("pytorch_model*.bin*")):
        raise ArtifactError(
            f"{folder}: has its weights as pickles only ({pickles[0]}); expected safetensors: open it with "
            "from_pretrained and write it with save_pretrained first"
        )
    raise ArtifactError(f"{folder}: no model.safetensors and no index; expected safetensors weights")


def _indexed(index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"{index}: has no weight_map; expected tensor names and their files")
    files = {str(file) for file in weight_map.values()}
    # is_file follows links: a snapshot in the Hub's cache consists of them.
    if strange := sorted(
        file for file in files if not _FILE_NAME.fullmatch(file) or not (index.parent / file).is_file()
    ):
        raise ArtifactError(
            f"{index}: names files that are not in the folder: {', '.join(strange[:5])}; expected plain names of "
            "safetensors files beside it"
        )
    return {name: index.parent / str(file) for name, file in weight_map.items()}


def tensor_hash(path: Path, entry: Mapping[str, Any]) -> str:
    """SHA-256 of the bytes of one tensor; ``entry`` is its entry of `header`."""
    digest, start, (first, last) = hashlib.sha256(), data_start(path), entry["data_offsets"]
    for piece in safe_read.pieces(path, start + first, start + last):
        digest.update(piece)
    return digest.hexdigest()


def data_start(path: Path) -> int:
    """The offset in bytes where the tensors of a safetensors file begin; `header` has checked the file."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def header(path: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file without its metadata; the library has checked it.

    Raises:
        ArtifactError: the file is not safetensors.
    """
    try:
        entries, _ = safe_read.header(path)
    except UnreadableError as error:
        raise ArtifactError(f"{path}: {error}; expected a safetensors file") from error
    return entries


def version_of(path_or_id: str | Path, revision: str | None = None) -> str:
    """The version of a model: the commit of a Hub id, or the fingerprint of a folder's tensors.

    Raises:
        HubError: there is no such folder and no such repository, or the download failed.
        ArtifactError: the folder has no tensors.
    """
    folder = fetch(path_or_id, revision)
    return Checkpoint(folder).fingerprint[:16] if folder == Path(path_or_id) else folder.name
