"""What targets share: copy files of the base checkpoint, and compare files and tensors."""

import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import save

from adaras_export.core import checkpoint, families, quantised
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.folding import vectors
from adaras_export.core.rule import SteeringRule
from adaras_export.errors import ArtifactError, ExportError, first_line
from adaras_export.exporters.checks import Check
from adaras_export.exporters.manifest import DESCRIBING, Disclosed, What, entries, files_of, shown
from adaras_export.files import atomic, safe_read
from adaras_export.files.safe_read import UnreadableError
from adaras_export.files.safetensors_record import Array


def buildable_config(base: Checkpoint, *, images: bool = False) -> dict[str, Any]:
    """The config.json of a base, after checking that Transformers can build the model.

    ``images``: whether the target takes models that read images.

    Raises:
        ExportError: the model reads images, and the target does not take such models.
        ArtifactError: Transformers cannot build the config, or its shapes differ from those of the weights.
        UnsupportedModelError: the weights are quantised in a format that was not tried, or this Transformers is too
            old for the family.
    """
    if base.family.images and not images:
        kind = base.family.model_type
        raise ExportError(f"{base}: {kind} reads images; expected a model of text alone; choose target hf or hf-thin")
    families.require_version(base.family.model_type, str(base))
    base.require_buildable()
    quantised.format_of(base.config, str(base))
    return base.config


def plain_config(base: Checkpoint) -> dict[str, Any]:
    """`buildable_config` of a base whose weights are not quantised.

    Raises:
        ArtifactError: Transformers cannot build the config, or its shapes differ from those of the weights.
        ExportError: the weights are quantised.
        UnsupportedModelError: this Transformers is too old for the family.
    """
    if base.is_quantised:
        raise ExportError(f"{base}: is quantised; expected plain weights here; choose target hf, hf-thin or peft")
    return buildable_config(base)


def require_residual_sum(rule: SteeringRule, target: str) -> None:
    """Refuse a rule that no vector behind a decoder layer can express.

    Raises:
        ExportError: the family normalises what leaves its MLP.
    """
    if families.FAMILIES[rule.base.family].behind == "norm":
        fitting = (name for name, family in families.FAMILIES.items() if family.behind != "norm")
        raise ExportError(
            f"{target}: {rule.base.family} normalises what leaves its MLP, which a vector behind the block would "
            f"evade; expected one of: {', '.join(fitting)}; choose target hf, onnx or peft"
        )


def residual_vectors(rule: SteeringRule, base: Checkpoint) -> dict[int, Array]:
    """What `vectors` change behind each steered decoder layer, (D,) float32, also without the strength.

    Only of a rule that `require_residual_sum` accepts.
    """
    factor = np.float32(base.family.factor(base.config))
    return {layer: factor * vector for layer, vector in vectors(rule, base).items()}


# The small files of a checkpoint: tokenizer, chat templates, generation settings, licence. Never code, never pickles.
_COMPANIONS = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "LICENSE*",
    "NOTICE*",
    "additional_chat_templates/*.jinja",
)
# With peft installed, from_pretrained would follow adapter_config.json to another repository and its code.
_NOT_COMPANIONS = {"config.json", "model.safetensors.index.json", "adapter_config.json", *DESCRIBING}


def companions(base: Path) -> dict[str, Path]:
    """The small files of a checkpoint, by path within its folder."""
    paths = [path for pattern in _COMPANIONS for path in sorted(base.glob(pattern)) if path.is_file()]
    return {str(path.relative_to(base)): path for path in paths if path.name not in _NOT_COMPANIONS}


def copy_companions(base: Path, out: Path) -> None:
    """Copy the small files of a checkpoint."""
    for name, source in companions(base).items():
        target = out / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)


STEERING_FILE = "model-steering.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def linked_name(path: Path) -> str:
    """The name of a base's weight file in an artifact; it begins with "model", which converters need."""
    # from_pretrained prefers model.safetensors to an index, and would then miss the steering file.
    taken = {"model.safetensors": "model-base.safetensors", STEERING_FILE: "model-base-steering.safetensors"}
    name = path.name if path.name.startswith("model") else f"model-{path.name}"
    return taken.get(name, name)


def write_index(out: Path, weight_map: dict[str, str]) -> None:
    """Write the index of the weights: the file of each tensor."""
    write_json(out / INDEX_FILE, _index(out, weight_map))


def index_check(folder: Path, weight_map: dict[str, str]) -> Check:
    """Compare the index with the one that `write_index` writes."""
    differing = not same_json(atomic.read_json(folder / INDEX_FILE), _index(folder, weight_map))
    return Check("index of the weights that differs", float(differing), 0, INDEX_FILE if differing else "")


def _index(folder: Path, weight_map: dict[str, str]) -> dict[str, Any]:
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    size = sum(sizes.get(name, 0) for name in {*weight_map.values()})
    return {"metadata": {"total_size": size}, "weight_map": weight_map}


def write_tensors(out: Path, tensors: dict[str, Array]) -> None:
    """Write the file of the steering tensors."""
    atomic.replace_file(out / STEERING_FILE, save(tensors, metadata={"format": "pt"}))


def opened(folder: str | Path, auto: Any = None, **how: Any) -> tuple[Any, list[str]]:  # noqa: ANN401 - a class
    """Open the model of a folder or Hub id in float32; also returns the entries of the loading report.

    ``auto`` is a class of Transformers, by default AutoModelForCausalLM; ``how`` is passed to its `from_pretrained`.

    Raises:
        ArtifactError: the model cannot be opened.
    """
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = (auto or AutoModelForCausalLM).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **how
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: cannot be opened ({first_line(error)})") from error
    model, report = loaded
    # Transformers 4 leaves a tensor without values if the index names it, but the file lacks it.
    if lost := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise ArtifactError(f"{folder}: cannot be opened (no values for {', '.join(lost)})")
    return model.eval(), sorted(f"{key} {name}" for key, names in report.items() for name in names)


def changed_companions(folder: Path, base: Path, tokenizers: Collection[str] = ()) -> list[str]:
    """Names of copied files that differ from the base's; a tokenizer may name one of the classes ``tokenizers``."""
    changed = {name for name, source in companions(base).items() if not same_content(folder / name, source)}
    if _TOKENIZER_SETTINGS in changed and (folder / _TOKENIZER_SETTINGS).exists():
        found, expected = (atomic.read_json(path / _TOKENIZER_SETTINGS) for path in (folder, base))
        name = found.get("tokenizer_class")
        if name in tokenizers and same_json(found, {**expected, "tokenizer_class": name}):
            changed.remove(_TOKENIZER_SETTINGS)
    return sorted(changed)


def unknown_files(folder: Path, base: Path | None, own: Iterable[str]) -> Check:
    """Files besides ``own``, the base's small files and the receipt's; for example, a chat template."""
    known = {*own, *DESCRIBING, *(() if base is None else companions(base))}
    strange = [shown(name) for name in sorted(entries(folder).keys() - known)]
    return Check.empty("files that neither the library nor the base has", strange)


# Texts that differently configured tokenizers split differently: digits, spaces, case, accents, other scripts.
_SAMPLES = (
    "What is 1234 + 56?",
    "  two  spaces\n\tand a tab",
    "Naïve façade, 東京 and emoji 🙂",
    "<|im_start|>user\nhi",
)


_TOKENIZER_SETTINGS = "tokenizer_config.json"


def tokenizer_classes(base: Path) -> list[str]:
    """The tokenizer class that Transformers 4 finds for a base, then others that may open the same one in version 5.

    Version 5 also uses the config's model_type, which an artifact may change. All names are of version 4; version 5
    knows them.
    """
    path, config = base / _TOKENIZER_SETTINGS, atomic.read_json(base / "config.json")
    settings = atomic.read_json(path) if path.exists() else {}
    family = families.family_of(config, str(base)).tokenizer
    named = settings.get("tokenizer_class") or config.get("tokenizer_class")
    return [named or family, family, "PreTrainedTokenizerFast"]


def name_tokenizer_class(out: Path, name: str) -> None:
    """Write the class of the tokenizer into its settings, if there is a tokenizer."""
    path = out / _TOKENIZER_SETTINGS
    settings = atomic.read_json(path) if path.exists() else {}
    if (out / "tokenizer.json").exists() and settings.get("tokenizer_class") != name:
        write_json(path, {**settings, "tokenizer_class": name})


def tokenised_differently(one: Any, other: Any) -> int:  # noqa: ANN401 - tokenizers of Transformers
    """The number of sample texts on which two tokenizers differ."""
    return sum(one(text)["input_ids"] != other(text)["input_ids"] for text in _SAMPLES)


def stores(path: Path | None, name: str, value: Array) -> bool:
    """Whether a safetensors file holds this tensor with these values."""
    if path is None:  # not in the index
        return False
    try:
        with safe_read.tensors(path) as file:
            # The shape first: an untrusted tensor may be larger than memory.
            if name not in file.keys() or tuple(file.get_slice(name).get_shape()) != value.shape:
                return False
            return np.array_equal(file.get_tensor(name), value)
    except (UnreadableError, TypeError):  # truncated, missing, or of a type that NumPy lacks
        return False


def disclosed(folder: Path, base_tensors: Mapping[str, str]) -> tuple[Disclosed, ...]:
    """The added and changed tensors of an artifact with safetensors files; see `TargetSpec.entries`."""
    tensors = []
    for file, path in files_of(folder).items():
        if path.suffix == ".safetensors" and file not in DESCRIBING:
            for name, entry in sorted(checkpoint.header(path).items()):
                digest = checkpoint.tensor_hash(path, entry)
                if digest != base_tensors.get(name):
                    what: What = "changed" if name in base_tensors else "added"
                    tensors.append(Disclosed(name, file, entry["dtype"], tuple(entry["shape"]), digest, what))
    return tuple(tensors)


def stored_names(path: Path) -> set[str]:
    """The tensor names of a safetensors file; empty if it is truncated or missing."""
    try:
        with safe_read.tensors(path) as file:
            return set(file.keys())
    except UnreadableError:
        return set()


def strange_names(path: Path, expected: Iterable[str]) -> list[str]:
    """Tensor names that only the file or only ``expected`` has, and other metadata; all, if the file is truncated."""
    try:
        with safe_read.tensors(path) as file:
            metadata = [] if file.metadata() == {"format": "pt"} else [f"{path.name}:__metadata__"]
            return sorted({*file.keys()} ^ {*expected}) + metadata
    except UnreadableError:
        return sorted(expected)


def stored(located: Mapping[str, Path], name: str) -> Array:
    """A tensor of a checkpoint in float64; ``located`` is `Checkpoint.files`.

    Raises:
        ExportError: the checkpoint lacks the tensor.
    """
    if name not in located:
        folder = next(iter(located.values())).parent
        raise ExportError(f"{folder}: no tensor {name}; expected the biases that its config names")
    with safe_read.tensors(located[name], "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor.double().numpy()


def differing_keys(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Keys that only one mapping has, or whose values differ."""
    one, other = ({key: [value] for key, value in values.items()} for values in (found, expected))
    return [key for key in sorted({*found, *expected}) if not same_json(one.get(key, []), other.get(key, []))]


def same_json(one: Any, other: Any) -> bool:  # noqa: ANN401 - JSON
    """Whether two JSON values are equal and of the same type; Python alone takes true, 1 and 1.0 as equal."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_json(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return bool(one == other)


def same_content(path: Path, other: Path) -> bool:
    """Whether two files have the same bytes; hard links are not read."""
    if not path.is_file():
        return False
    return path.samefile(other) or atomic.sha256_file(path) == atomic.sha256_file(other)


def holds(path: Path, content: bytes) -> bool:
    """Whether a file has exactly these bytes."""
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file of an artifact: indented, with sorted keys."""
    path.unlink(missing_ok=True)  # it may be a hard link to a file of another folder
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
