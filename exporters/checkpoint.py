"""What the targets do alike with the checkpoint of a base: fold a rule from it, carry its files along, compare them."""

import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import save

from adaras_export.core import checkpoint, families
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.rule import SteeringRule
from adaras_export.errors import ArtifactError, ExportError, first_line
from adaras_export.exporters.manifest import DESCRIBING, Disclosed, What, entries, files_of, shown
from adaras_export.exporters.parity import Check
from adaras_export.files import atomic, safe_read
from adaras_export.files.safe_read import UnreadableError
from adaras_export.files.safetensors_record import Array


def plain_config(base: Checkpoint) -> dict[str, Any]:
    """The config.json of a base, which Transformers can build, and which has the shapes of its weights.

    Raises:
        ArtifactError: it is not so.
        ExportError: its weights are quantised.
    """
    config = base.config
    if "quantization_config" in config:
        raise ExportError(f"{base}: is quantised; expected plain weights, which the vectors are folded from")
    base.require_buildable()
    return config


def vectors(rule: SteeringRule, base: Checkpoint) -> dict[int, Array]:
    """W_down[:, idx] @ delta of each steered layer, (D,) float32: folded in float64 from the stored weights.

    Without the strength, which stays a dial.
    """
    folded = {}
    for layer in rule.layers():
        index, delta = rule.neurons_of(layer)
        columns_DK = base.down_columns(layer, torch.tensor(index))
        folded[layer] = (columns_DK.double().numpy() @ delta.astype(np.float64)).astype(np.float32)
    return folded


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
_NOT_COMPANIONS = {"config.json", "model.safetensors.index.json", "adapter_config.json", *DESCRIBING}


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


STEERING_FILE = "model-steering.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def linked_name(path: Path) -> str:
    """What a weight file of the base is called in an artifact: beginning with "model", as converters want it."""
    # from_pretrained prefers model.safetensors to an index, and would then miss the steering file.
    taken = {"model.safetensors": "model-base.safetensors", STEERING_FILE: "model-base-steering.safetensors"}
    name = path.name if path.name.startswith("model") else f"model-{path.name}"
    return taken.get(name, name)


def write_index(out: Path, weight_map: dict[str, str]) -> None:
    """Write the index that tells from_pretrained which file holds which tensor."""
    write_json(out / INDEX_FILE, _index(out, weight_map))


def index_check(folder: Path, weight_map: dict[str, str]) -> Check:
    """Compare what `write_index` wrote."""
    differing = not same_json(atomic.read_json(folder / INDEX_FILE), _index(folder, weight_map))
    return Check("index of the weights that differs", float(differing), 0, INDEX_FILE if differing else "")


def _index(folder: Path, weight_map: dict[str, str]) -> dict[str, Any]:
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    size = sum(sizes.get(name, 0) for name in {*weight_map.values()})
    return {"metadata": {"total_size": size}, "weight_map": weight_map}


def write_tensors(out: Path, tensors: dict[str, Array]) -> None:
    """Write the file of the steering tensors."""
    atomic.replace_file(out / STEERING_FILE, save(tensors, metadata={"format": "pt"}))


def opened(folder: str | Path, **how: Any) -> tuple[Any, list[str]]:
    """The model in a folder, or of a Hub id, in float32, and what its loading report names.

    ``how`` goes to its `from_pretrained`.

    Raises:
        ArtifactError: it does not open.
    """
    from transformers import AutoModelForCausalLM

    try:
        found: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **how)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: cannot be opened ({first_line(error)})") from error
    model, report = found
    # Transformers 4 leaves a tensor without values that the index names and the file lacks.
    if lost := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise ArtifactError(f"{folder}: cannot be opened (no values for {', '.join(lost)})")
    return model.eval(), sorted(f"{key} {name}" for key, names in report.items() for name in names)


def changed_companions(folder: Path, base: Path, tokenizers: Collection[str] = ()) -> list[str]:
    """Files carried from the base that are not as they were there; one of these tokenizer classes may be named."""
    changed = {name for name, source in companions(base).items() if not same_content(folder / name, source)}
    if _TOKENIZER_SETTINGS in changed and (folder / _TOKENIZER_SETTINGS).exists():
        found, expected = (atomic.read_json(path / _TOKENIZER_SETTINGS) for path in (folder, base))
        name = found.get("tokenizer_class")
        if name in tokenizers and same_json(found, {**expected, "tokenizer_class": name}):
            changed.remove(_TOKENIZER_SETTINGS)
    return sorted(changed)


def unknown_files(folder: Path, base: Path | None, own: Iterable[str]) -> Check:
    """What an artifact holds besides ``own``, the base's small files and the receipt's: a chat template, say."""
    known = {*own, *DESCRIBING, *(() if base is None else companions(base))}
    strange = [shown(name) for name in sorted(entries(folder).keys() - known)]
    return Check.empty("files that neither the library nor the base has", strange)


# Texts on which tokenizers that were set up differently disagree: digits, spaces, case, accents, other scripts.
_SAMPLES = (
    "What is 1234 + 56?",
    "  two  spaces\n\tand a tab",
    "Naïve façade, 東京 and emoji 🙂",
    "<|im_start|>user\nhi",
)


_TOKENIZER_SETTINGS = "tokenizer_config.json"


def tokenizer_classes(base: Path) -> list[str]:
    """The class of a base's tokenizer, as Transformers 4 finds it, then others that may open the same one in version 5.

    Version 5 goes by the config's model_type, too, which an artifact may not have. All are names of version 4: 5 knows
    them.
    """
    path, config = base / _TOKENIZER_SETTINGS, atomic.read_json(base / "config.json")
    settings = atomic.read_json(path) if path.exists() else {}
    family = families.family_of(config, str(base)).tokenizer
    named = settings.get("tokenizer_class") or config.get("tokenizer_class")
    return [named or family, family, "PreTrainedTokenizerFast"]


def name_tokenizer_class(out: Path, name: str) -> None:
    """Name the tokenizer's class, if there is a tokenizer."""
    path = out / _TOKENIZER_SETTINGS
    settings = atomic.read_json(path) if path.exists() else {}
    if (out / "tokenizer.json").exists() and settings.get("tokenizer_class") != name:
        write_json(path, {**settings, "tokenizer_class": name})


def tokenised_differently(one: Any, other: Any) -> int:  # noqa: ANN401 - tokenizers of Transformers
    """On how many of a few hard texts two tokenizers disagree."""
    return sum(one(text)["input_ids"] != other(text)["input_ids"] for text in _SAMPLES)


def stores(path: Path | None, name: str, value: Array) -> bool:
    """Whether a safetensors file holds this tensor with these values."""
    if path is None:  # not in the index
        return False
    try:
        with safe_read.tensors(path) as file:
            # The shape first: a foreign tensor may be larger than memory.
            if name not in file.keys() or tuple(file.get_slice(name).get_shape()) != value.shape:
                return False
            return np.array_equal(file.get_tensor(name), value)
    except (UnreadableError, TypeError):  # truncated, missing, or of a type that NumPy lacks
        return False


def disclosed(folder: Path, base_tensors: Mapping[str, str]) -> tuple[Disclosed, ...]:
    """As `Exporter.disclosed` says, of an artifact whose tensors are in safetensors files."""
    found = []
    for file, path in files_of(folder).items():
        if path.suffix == ".safetensors" and file not in DESCRIBING:
            for name, entry in sorted(checkpoint.header(path).items()):
                digest = checkpoint.tensor_hash(path, entry)
                if digest != base_tensors.get(name):
                    what: What = "changed" if name in base_tensors else "added"
                    found.append(Disclosed(name, file, entry["dtype"], tuple(entry["shape"]), digest, what))
    return tuple(found)


def stored_names(path: Path) -> set[str]:
    """The tensors of a safetensors file; none where it is truncated or missing."""
    try:
        with safe_read.tensors(path) as file:
            return set(file.keys())
    except UnreadableError:
        return set()


def strange_names(path: Path, expected: Iterable[str]) -> list[str]:
    """What a file of `write_tensors` has besides these tensors, or lacks of them; all, where it is truncated."""
    try:
        with safe_read.tensors(path) as file:
            metadata = [] if file.metadata() == {"format": "pt"} else [f"{path.name}:__metadata__"]
            return sorted({*file.keys()} ^ {*expected}) + metadata
    except UnreadableError:
        return sorted(expected)


def stored(located: Mapping[str, Path], name: str) -> Array:
    """A tensor of a checkpoint in float64; ``located`` as `models.shards` gives it.

    Raises:
        ExportError: there is no such tensor.
    """
    if name not in located:
        folder = next(iter(located.values())).parent
        raise ExportError(f"{folder}: no tensor {name}; expected the biases that its config names")
    with safe_read.tensors(located[name], "pt") as file:
        found: torch.Tensor = file.get_tensor(name)
    return found.double().numpy()


def differing_keys(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The entries that only one of two mappings has, or that differ."""
    one, other = ({key: [value] for key, value in values.items()} for values in (found, expected))
    return [key for key in sorted({*found, *expected}) if not same_json(one.get(key, []), other.get(key, []))]


def same_json(one: Any, other: Any) -> bool:  # noqa: ANN401 - JSON
    """Whether two values are the same: Python takes true for 1 and 1 for 1.0, other readers of a config do not."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_json(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return bool(one == other)


def same_content(path: Path, other: Path) -> bool:
    """Whether two files hold the same bytes; two names of one file, as links are, need no reading."""
    if not path.is_file():
        return False
    return path.samefile(other) or atomic.sha256_file(path) == atomic.sha256_file(other)


def holds(path: Path, content: bytes) -> bool:
    """Whether a file holds just these bytes."""
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON as all files of an artifact have it."""
    path.unlink(missing_ok=True)  # not written into: it may be a link to a file of another folder
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
