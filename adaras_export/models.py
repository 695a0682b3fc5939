"""What this project knows of model architectures, and what identifies a base model.

The only file that names modules of a model. Knows nothing of steering. An architecture that is
not in the table is refused: a guessed module path would steer the wrong thing without an error.
"""

import hashlib
import json
import re
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adaras_export import foreign
from adaras_export.errors import ArtifactError, HubError, RuleError, UnsupportedModelError
from adaras_export.foreign import UnreadableError
from adaras_export.repositories import translated
from adaras_export.storage import read_json

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps its MLP.

    Attributes:
        model_type: the name in config.json.
        stem: what the family's classes are called: Qwen3 in Qwen3ForCausalLM.
        decoder: the module that holds the decoder layers, below the language model; checkpoints of the decoder alone
            leave it out of their keys.
        layers: the list of decoder layers, below the decoder.
        down: path of the down projection, below one decoder layer.
        transposed: whether its weight is stored (M, D), as GPT-2's Conv1D does, instead of (D, M).
        sizes: the keys of config.json for L, M and D.
        mlp_ratio: M / D where the config says null for M.
        tokenizer: the tokenizer's class where a checkpoint leaves that to its model_type: what Transformers 4 opens.
    """

    model_type: str
    stem: str
    decoder: str = "model"
    layers: str = "layers"
    down: str = "mlp.down_proj"
    transposed: bool = False
    sizes: tuple[str, str, str] = ("num_hidden_layers", "intermediate_size", "hidden_size")
    mlp_ratio: int | None = None
    tokenizer: str = "LlamaTokenizer"

    @property
    def payload(self) -> str:
        """The file of `adaras_export.runtime` that carries this family's steered classes."""
        return f"modeling_adaras_{self.model_type}.py"

    def sizes_in(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """L, M and D of a config that has these keys."""
        layers, mlp_size, hidden_size = (config[key] for key in self.sizes)
        if mlp_size is None and self.mlp_ratio is not None and isinstance(hidden_size, int):
            mlp_size = self.mlp_ratio * hidden_size
        return layers, mlp_size, hidden_size


_TABLE = (
    Family("llama", "Llama"),
    Family("mistral", "Mistral"),
    Family("qwen2", "Qwen2", tokenizer="Qwen2Tokenizer"),
    Family("qwen3", "Qwen3", tokenizer="Qwen2Tokenizer"),
    Family("gemma2", "Gemma2", tokenizer="GemmaTokenizer"),
    Family("gemma3_text", "Gemma3", tokenizer="GemmaTokenizer"),
    Family("olmo2", "Olmo2", tokenizer="GPTNeoXTokenizer"),
    Family("granite", "Granite", tokenizer="GPT2Tokenizer"),
    Family("smollm3", "SmolLM3", tokenizer="PreTrainedTokenizerFast"),
    Family("phi3", "Phi3"),
    Family("gpt_neox", "GPTNeoX", decoder="gpt_neox", down="mlp.dense_4h_to_h", tokenizer="GPTNeoXTokenizer"),
    Family(
        "gpt2",
        "GPT2",
        decoder="transformer",
        layers="h",
        down="mlp.c_proj",
        transposed=True,
        sizes=("n_layer", "n_inner", "n_embd"),
        mlp_ratio=4,
        tokenizer="GPT2Tokenizer",
    ),
)
FAMILIES = {family.model_type: family for family in _TABLE}

_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def family_of(config: Mapping[str, Any], subject: str) -> Family:
    """The table entry for a config.json.

    Raises:
        UnsupportedModelError: a mixture of experts, or an architecture that is not in the table.
    """
    model_type = str(config.get("model_type"))
    experts = [key for key in _EXPERT_KEYS if config.get(key)]
    if experts:
        raise UnsupportedModelError(
            f"{subject}: {model_type} is a mixture of experts ({experts[0]} = {config[experts[0]]}); a neuron of an "
            f"expert has no constant contribution to fold; expected a dense model of: {', '.join(FAMILIES)}"
        )
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{subject}: model_type {model_type} is not supported; expected one of: {', '.join(FAMILIES)}; a new "
            "family is one entry in adaras_export/models.py and one payload file"
        )
    return FAMILIES[model_type]


@dataclass(frozen=True)
class BaseModel:
    """The identity of the model that a rule is made for: what it is, not its weights.

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
        """Read a model folder, or fetch one from the Hub into its cache first.

        Raises:
            ArtifactError: no config.json or no safetensors weights there, or the Hub cannot be reached.
            UnsupportedModelError: the architecture is not in the table.
        """
        folder = fetch(path_or_id, revision)
        local = folder == Path(path_or_id)
        path = folder / "config.json"
        config = read_json(path)
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
                fingerprint=tensor_fingerprint(folder),
            )
        except RuleError as error:
            raise RuleError(f"{path}: {error}") from error
        _require_sizes(base, folder, packed="quantization_config" in config)
        return base

    def require_same(self, other: "BaseModel") -> None:
        """Refuse ``other`` where it is not this model; an unrecorded fingerprint matches any.

        Raises:
            RuleError: family, sizes or weights differ; names every difference.
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
            ArtifactError: the record is not of that form.
        """
        try:
            return cls(**record)
        except TypeError as error:  # other keys, or no object
            raise ArtifactError(f"{subject}: damaged base record ({error})") from error


def fetch(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: the given one, or the Hub's snapshot in the local cache.

    Raises:
        HubError: there is neither.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    if not is_hub_id(str(path_or_id)):
        raise HubError(f"{path_or_id}: no such folder; expected that of a model, or a name of the Hub: USER/NAME")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*", "NOTICE*"]
    with translated(f"{path_or_id}: neither a folder nor a model that the Hub gave"):
        return Path(snapshot_download(str(path_or_id), revision=revision, allow_patterns=patterns))


def version_of(path_or_id: str | Path, revision: str | None = None) -> str:
    """What tells two models of one name apart: the commit of a Hub id, the fingerprint of a folder's tensors.

    Raises:
        HubError: there is neither.
        ArtifactError: the folder has no tensors.
    """
    folder = fetch(path_or_id, revision)
    return tensor_fingerprint(folder)[:16] if folder == Path(path_or_id) else folder.name


def cached(hub_id: str, revision: str) -> Path | None:
    """The snapshot of a commit in the Hub's cache; None where it is not there. Fetches nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if not is_hub_id(hub_id) or not is_commit(revision):  # a branch is another commit tomorrow
        return None
    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def is_commit(revision: str) -> bool:
    """Whether a revision is one for ever."""
    return re.fullmatch("[0-9a-f]{40}", revision) is not None


def is_hub_id(text: str) -> bool:
    """Whether the Hub could have a repository of this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


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
    # Links are followed: a snapshot of the Hub's cache consists of them.
    if strange := sorted(
        file for file in files if not _FILE_NAME.fullmatch(file) or not (index.parent / file).is_file()
    ):
        raise ArtifactError(
            f"{index}: names files that are not in the folder: {', '.join(strange[:5])}; expected plain names of "
            "safetensors files beside it"
        )
    return {name: index.parent / str(file) for name, file in weight_map.items()}


# No way out of the folder, on any system.
_FILE_NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,200}\.safetensors")

_SAMPLE_BYTES = 4096


def tensor_fingerprint(folder: Path, only: set[str] | None = None) -> str:
    """SHA-256 over every tensor's name, type, shape and a sample of its bytes: its head, middle and tail.

    Tells one checkpoint from another in milliseconds, whatever its size; that no byte of a file was
    changed is for the file hashes of a receipt to say. ``only`` limits it to some tensor names.
    """
    digest = hashlib.sha256()
    located = shards(folder)
    entries = _entries(located)
    for name in sorted(located if only is None else only & located.keys()):
        path, entry = located[name], entries[name]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        start = data_start(path)
        first, last = (start + offset for offset in entry["data_offsets"])
        with path.open("rb") as file:
            for position in (first, (first + last - _SAMPLE_BYTES) // 2, last - _SAMPLE_BYTES):
                file.seek(max(first, position))
                digest.update(file.read(min(_SAMPLE_BYTES, last - max(first, position))))
    return digest.hexdigest()


def tensor_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the bytes of every tensor of a checkpoint, by tensor name; reads them all."""
    located = shards(folder)
    entries = _entries(located)
    return {name: tensor_hash(located[name], entries[name]) for name in sorted(located)}


def tensor_hash(path: Path, entry: Mapping[str, Any]) -> str:
    """SHA-256 of the bytes of one tensor; ``entry`` is its entry of `header`."""
    digest, start, (first, last) = hashlib.sha256(), data_start(path), entry["data_offsets"]
    for piece in foreign.pieces(path, start + first, start + last):
        digest.update(piece)
    return digest.hexdigest()


def data_start(path: Path) -> int:
    """Where the tensors of a safetensors file begin, in bytes; it is one, as `header` has found."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def header(path: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file, checked by the library itself, without the metadata.

    Raises:
        ArtifactError: it is no safetensors file.
    """
    try:
        entries, _ = foreign.header(path)
    except UnreadableError as error:
        raise ArtifactError(f"{path}: {error}; expected a safetensors file") from error
    return entries


def _entries(located: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Type, shape and offsets of each tensor of a checkpoint; ``located`` as `shards` gives it."""
    headers = {path: header(path) for path in sorted({*located.values()})}
    for name, path in located.items():
        if name not in headers[path]:
            raise ArtifactError(f"{path}: tensor {name} is missing; the index names it")
    return {name: headers[path][name] for name, path in located.items()}


def _require_sizes(base: BaseModel, folder: Path, *, packed: bool) -> None:
    """Refuse a config whose sizes are not those of the weights: whoever believed it would make room for them.

    The matrices of quantised weights are ``packed`` into other shapes.
    """
    family, located = FAMILIES[base.family], shards(folder)
    below = f"{layers_key(base.family, located)}."
    found = {name.removeprefix(below).partition(".")[0] for name in located if name.startswith(below)}
    if len(found) != base.layers:
        raise ArtifactError(
            f"{folder}: has weights of {len(found)} layers; expected {base.layers}, as its config.json says"
        )
    expected = [base.mlp_size, base.hidden_size] if family.transposed else [base.hidden_size, base.mlp_size]
    entries = _entries(located)
    for layer in range(0 if packed else base.layers):
        name = f"{below}{layer}.{family.down}.weight"
        if name not in located:
            raise _no_tensor(name, folder, base.family)
        if (shape := entries[name]["shape"]) != expected:
            raise ArtifactError(f"{located[name]}: {name} has shape {shape}; expected {expected}, as config.json says")


def _no_tensor(name: str, folder: Path, family: str) -> ArtifactError:
    return ArtifactError(f"{folder}: no tensor {name}; expected the plain weights of a {family} model")


def decoder(model: "nn.Module") -> "nn.Module":
    """The module of a causal language model that runs the decoder layers (without the LM head).

    Raises:
        UnsupportedModelError: the architecture is not in the table.
    """
    module: nn.Module = reduce(getattr, _family(model).decoder.split("."), model)
    return module


def input_device(model: "nn.Module") -> Any:  # noqa: ANN401 - torch is not imported here
    """The torch.device that token ids go to; Accelerate's, where it moves weights about while the model runs."""
    embedding = cast("Any", model).get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)  # only where there is a device map
    placed = None if hook is None else getattr(hook, "execution_device", None)
    return embedding.weight.device if placed is None else placed


def decoder_layer(model: "nn.Module", layer: int) -> "nn.Module":
    """A decoder layer, counted from 0; the hidden states are what leaves it, or the first of several values."""
    layers: Any = getattr(decoder(model), _family(model).layers)
    module: nn.Module = layers[layer]
    return module


def down_projection(model: "nn.Module", layer: int) -> "nn.Module":
    """The down projection of a 0-based decoder layer; what enters it is h."""
    module: nn.Module = reduce(getattr, _family(model).down.split("."), decoder_layer(model, layer))
    return module


def mlp(model: "nn.Module", layer: int) -> "nn.Module":
    """The module that holds the down projection of a 0-based decoder layer; it treats every token alone."""
    parent, _, _ = _family(model).down.rpartition(".")
    module: nn.Module = reduce(getattr, parent.split("."), decoder_layer(model, layer))
    return module


def down_name(family: str, layer: int) -> str:
    """The name that the down projection of a 0-based decoder layer has in a causal language model of a family."""
    known = FAMILIES[family]
    return f"{known.decoder}.{known.layers}.{layer}.{known.down}"


def down_columns(family: str, located: Mapping[str, Path], layer: int, index: "Tensor") -> "Tensor":
    """W_down[:, index] of a layer of a checkpoint, (D, K), in its stored type; ``located`` as `shards` gives it.

    Raises:
        ArtifactError: there is no such tensor.
    """
    name = f"{layers_key(family, located)}.{layer}.{FAMILIES[family].down}.weight"
    if name not in located:
        raise _no_tensor(name, next(iter(located.values())).parent, family)
    with foreign.tensors(located[name], "pt") as file:
        weight: Tensor = file.get_tensor(name)
    return weight[index].T if FAMILIES[family].transposed else weight[:, index]


def decoder_key(family: str, names: Collection[str]) -> str:
    """What the keys of a checkpoint's decoder begin with: "model." or the like, nothing where it holds no more."""
    prefix = f"{FAMILIES[family].decoder}."
    return prefix if any(name.startswith(prefix) for name in names) else ""


def layers_key(family: str, names: Collection[str]) -> str:
    """The key of the list of decoder layers in a checkpoint with these tensor names."""
    return f"{decoder_key(family, names)}{FAMILIES[family].layers}"


def sizes_of(model: "nn.Module") -> tuple[str, int, int, int]:
    """Family, L, M and D of a model in memory."""
    config: Any = model.config
    return _family(model).model_type, *_family(model).sizes_in(config.to_dict())


def _family(model: "nn.Module") -> Family:
    config: Any = model.config
    return family_of(config.to_dict(), config.name_or_path or type(model).__name__)
