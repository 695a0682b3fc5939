"""Target `hf`: a Hugging Face repository with custom code that opens with plain `from_pretrained`.

The base checkpoint's files are hard-linked, one small file holds the folded vectors and the gate, and the code of
`adaras_export.runtime` is copied unchanged. Carries the whole rule: gate, start, and a dial for the strength.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from adaras_export.core import checkpoint, families
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.folding import vectors
from adaras_export.core.rule import SteeringRule
from adaras_export.exporters import payload_history
from adaras_export.exporters.base import (
    ExportContext,
    Exporter,
    SteeredModel,
    TargetSpec,
    Written,
    stock_reference,
)
from adaras_export.exporters.checkpoint import (
    INDEX_FILE,
    STEERING_FILE,
    buildable_config,
    changed_companions,
    copy_companions,
    differing_keys,
    disclosed,
    holds,
    index_check,
    linked_name,
    name_tokenizer_class,
    opened,
    same_content,
    stores,
    strange_names,
    tokenised_differently,
    tokenizer_classes,
    unknown_files,
    write_index,
    write_json,
    write_tensors,
)
from adaras_export.exporters.checks import Check, Inspection
from adaras_export.exporters.parity import FLOAT32, Artifact, Mode, Reference
from adaras_export.files import atomic
from adaras_export.files.atomic import link_or_copy
from adaras_export.files.safetensors_record import Array

_CLASSES, _SHARED_CODE = "modeling_adaras.py", "steering_adaras.py"

# How the classes of a family began in earlier exports.
_EARLIER = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "olmo2": "Olmo2",
    "granite": "Granite",
    "smollm3": "SmolLM3",
    "phi3": "Phi3",
    "gpt_neox": "GPTNeoX",
    "gpt2": "GPT2",
}


@dataclass(frozen=True)
class HuggingFaceExporter:
    """The exporter of target `hf`."""

    copy: bool = False

    @property
    def spec(self) -> TargetSpec:
        """The target's name, card and tags."""
        return TargetSpec("hf", "exporters/hf/card.md", disclosed, tags=("custom_code",))

    def with_context(self, context: ExportContext) -> Exporter:
        """A copy of this exporter that copies or links weight files, by the context."""
        return replace(self, copy=context.copy)

    def write(self, rule: SteeringRule, base: Checkpoint, out: Path) -> Written:
        """Link the base's files; write the steering tensors, the config and the code."""
        config = buildable_config(base, images=True)
        for path in sorted({*base.files.values()}):
            link_or_copy(path, out / linked_name(path), copy=self.copy)
        tensors = steering_tensors(rule, base)
        write_tensors(out, tensors)
        write_index(out, _weight_map(base, tensors))
        write_repository(out, base, steered_config(config, rule), payload())
        return Written(rule)

    def refresh(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> None:
        """Write today's code and config again."""
        refresh_repository(folder, base, steered_config(base.config, rule), payload())

    def inspect(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Inspection:
        """Compare code, config, tensors and files with those that `write` writes."""
        expected, own = form_of(folder, rule, base)
        code, config, *files = repository_checks(folder, base, expected, own)
        weights = {linked_name(path) for path in base.files.values()}
        unknown = unknown_files(folder, base.folder, {*own, *REPOSITORY_FILES, *SHARED_FILES, *weights})
        return Inspection(code, config, (*files, *_tensor_checks(folder, rule, base), unknown))

    def reference(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Reference:  # noqa: ARG002
        """The base, steered in memory by the rule."""
        return stock_reference(rule, base)

    def load(self, folder: Path) -> Artifact:
        """Open the repository with its own code, which `inspect` has compared with this library's."""
        return open_repository(folder)


EXPORTER = HuggingFaceExporter()


REPOSITORY_FILES = frozenset({"config.json", "tokenizer_config.json"})
"""Files that `write_repository` writes besides the code and the base's small files."""

SHARED_FILES = frozenset({INDEX_FILE, STEERING_FILE})


def write_repository(out: Path, base: Checkpoint, config: dict[str, Any], code: dict[str, bytes]) -> None:
    """Write the files of a repository except tensors: config, code, and the base's small files."""
    write_json(out / "config.json", config)
    for name, content in code.items():
        (out / name).write_bytes(content)
    copy_companions(base.folder, out)
    classes = _tokenizer_classes(base.folder, code)
    fitting = classes if code else (name for name in classes if _opens_alike(out, base.folder, name))
    name_tokenizer_class(out, next(iter(fitting), classes[0]))  # if none fits, the checks fail


def refresh_repository(folder: Path, base: Checkpoint, config: dict[str, Any], code: dict[str, bytes]) -> None:
    """Write code, config and tokenizer class again, as `write_repository` does, and remove code of earlier versions."""
    for path in folder.glob("*.py"):
        if path.name not in code and payload_history.known(folder, path.name):
            path.unlink()
    for name, content in code.items():
        atomic.replace_file(folder / name, content)
    write_json(folder / "config.json", config)
    name_tokenizer_class(folder, tokenizer_classes(base.folder)[0])


def repository_checks(folder: Path, base: Checkpoint, config: dict[str, Any], code: dict[str, bytes]) -> list[Check]:
    """Compare the files that `write_repository` writes; the checks of code and config come first."""
    strange = _strange_code(folder, code)
    found = atomic.read_json(folder / "config.json")
    settings = differing_keys(found, config)
    trust = [
        payload_history.check("code files that are not the library's", folder, strange),
        Check.empty("config entries that differ", settings),
    ]
    changed = changed_companions(folder, base.folder, _tokenizer_classes(base.folder, code))
    carried = Check.empty("files of the base that differ", changed)
    # Opening a tokenizer may run code, and a damaged one may not open.
    trusted = all(check.ok for check in (*trust, carried))
    tokens = _tokenizer_checks(folder, base.folder, trust_remote_code=bool(code)) if trusted else []
    return [*trust, carried, *tokens]


def open_repository(folder: Path, **how: str) -> Artifact:
    """Open a repository with its own code, in float32; ``how`` is passed to `from_pretrained`.

    Raises:
        ArtifactError: the repository cannot be opened.
    """
    return _SteeredRepo(*opened(folder, trust_remote_code=True, **how))


def steered_config(config: dict[str, Any], rule: SteeringRule) -> dict[str, Any]:
    """The base's config.json with our classes, the settings of the rule, and a new model_type.

    With the base's model_type, opening without trust_remote_code would give an unsteered model without an error.
    """
    family = families.FAMILIES[rule.base.family]
    return {
        **config,
        "model_type": f"adaras_{family.model_type}",
        "architectures": [f"AdaRAS{family.classes['AutoModelForCausalLM']}"],
        "auto_map": {auto: f"modeling_adaras.AdaRAS{name}" for auto, name in family.classes.items()},
        "adaras": {**settings_of(rule), "down_projection": f"{family.layers}.{{}}.{family.down}"},
    }


def settings_of(rule: SteeringRule) -> dict[str, Any]:
    """The dials of a rule and the sizes of its tensors, for a config.json."""
    return {
        "rule": rule.fingerprint,
        "strength": rule.strength,
        "start": rule.start,
        "layers": rule.layers(),
        "threshold": 1.0 if rule.gate is None else rule.gate.threshold,
        "gate": None if rule.gate is None else rule.gate.sizes(),
    }


def form_of(folder: Path, rule: SteeringRule, base: Checkpoint) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The config and the code that an export has, of today or of an earlier version.

    Earlier versions wrote a code file for each family. Its content is not in this library, but its hash is known.
    """
    config, earlier = base.config, f"modeling_adaras_{rule.base.family}"
    stem = _EARLIER.get(rule.base.family)
    if stem is None or not (folder / f"{earlier}.py").exists():
        return steered_config(config, rule), payload()
    classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    named = {
        "architectures": [f"AdaRAS{stem}ForCausalLM"],
        "auto_map": {auto: f"{earlier}.AdaRAS{stem}{name}" for auto, name in classes.items()},
        "adaras": settings_of(rule),
    }
    return {**steered_config(config, rule), **named}, {**payload(_SHARED_CODE), f"{earlier}.py": b""}


def steering_tensors(rule: SteeringRule, base: Checkpoint) -> dict[str, Array]:
    """The tensors that an export adds, by checkpoint key.

    A vector per steered layer; int64 feature indices per gate layer; the gate's weights, float32.
    """
    mlp = f"{base.layers_key}.{{}}.{base.family.down.rpartition('.')[0]}"
    tensors = {f"{mlp.format(layer)}.steering_vector": vector for layer, vector in vectors(rule, base).items()}
    if rule.gate is not None:
        for layer in np.unique(rule.gate.layer):
            tensors[f"{mlp.format(layer)}.steering_index"] = rule.gate.index[rule.gate.layer == layer]
        gate = f"{base.decoder_key}steering_gate"
        tensors |= {f"{gate}.{name}": value for name, value in rule.gate.weights().items()}
    return tensors


def payload(*names: str) -> dict[str, bytes]:
    """The code files of an export; or those of these names."""
    files = resources.files("adaras_export.runtime")
    return {name: (files / name).read_bytes() for name in names or (_CLASSES, _SHARED_CODE)}


class _SteeredRepo(SteeredModel):
    """An opened export."""

    tolerance = FLOAT32
    switchable = True

    def __init__(self, model: Any, loading_report: list[str]) -> None:  # noqa: ANN401 - a class of the repository
        self.model = model
        self.loading_report = loading_report

    def findings(self) -> Sequence[Check]:
        return [Check.empty("keys in the loading report", self.loading_report)]

    @contextmanager
    def set_to(self, mode: Mode) -> Iterator[None]:
        steering = self.model.steering
        threshold, off = steering.threshold, steering.off() if mode == "off" else nullcontext()
        if mode not in ("rule", "off"):
            steering.threshold = 2.0 if mode == "always" else mode  # every p(correct) is below 2
        try:
            with off:
                yield
        finally:
            steering.threshold = threshold


def _strange_code(folder: Path, own: dict[str, bytes]) -> list[str]:
    """Files not from this library that from_pretrained would run, or that point to other code."""
    changed = [name for name, content in own.items() if not holds(folder / name, content)]
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*.py")) if "__pycache__" not in path.parts]
    pointers = [name for name in ("adapter_config.json",) if (folder / name).exists()]
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.exists() and "auto_map" in atomic.read_json(tokenizer):
        pointers.append("tokenizer_config.json:auto_map")
    return [*changed, *(name for name in names if name not in own), *pointers]


def _tokenizer_classes(base: Path, code: dict[str, bytes]) -> list[str]:
    """The allowed tokenizer classes: with our code, which restores the base's model_type, only the base's class."""
    classes = tokenizer_classes(base)
    return classes[:1] if code else classes


def _opens_alike(out: Path, base: Path, name: str) -> bool:
    """Whether a repository without code opens the base's tokenizer with this class."""
    name_tokenizer_class(out, name)
    return all(check.ok for check in _tokenizer_checks(out, base, trust_remote_code=False))


def _tokenizer_checks(folder: Path, base: Path, *, trust_remote_code: bool) -> list[Check]:
    """Compare the token ids of both folders' tokenizers; no checks for a base without a tokenizer."""
    if not (base / "tokenizer_config.json").exists():
        return []
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    theirs = AutoTokenizer.from_pretrained(base)
    differing = tokenised_differently(theirs, ours)
    unnamed = "tokenizer_class" not in atomic.read_json(base / "tokenizer_config.json")
    remedy = "the base's tokenizer_config.json has no tokenizer_class; name the one that is meant"
    return [Check("sample texts that are tokenised differently", differing, 0, remedy if differing and unnamed else "")]


def _weight_map(base: Checkpoint, tensors: Mapping[str, Array]) -> dict[str, str]:
    """The file of each tensor of the artifact."""
    kept = {name: linked_name(path) for name, path in base.files.items()}
    return kept | dict.fromkeys(tensors, STEERING_FILE)


def _tensor_checks(folder: Path, rule: SteeringRule, base: Checkpoint) -> list[Check]:
    expected = steering_tensors(rule, base)
    located = checkpoint.shards(folder)
    wrong = [name for name, value in expected.items() if not stores(located.get(name), name, value)]
    strange = sorted(located.keys() ^ (expected.keys() | base.files.keys()))
    strange += strange_names(folder / STEERING_FILE, expected)
    names = {linked_name(path): path for path in base.files.values()}
    weights = sorted(name for name, path in names.items() if not same_content(folder / name, path))
    return [
        Check.empty("steering tensors that differ", wrong),
        Check.empty("tensors missing or unknown", strange),
        Check.empty("base weight files that differ", weights),
        index_check(folder, _weight_map(base, expected)),
    ]
