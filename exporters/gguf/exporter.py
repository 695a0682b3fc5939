"""Target `gguf`: a control vector for llama.cpp, or with ``into`` a GGUF model that carries the vectors.

The model has them as biases, or with ``switchable`` as a LoRA beside it, which a request can turn on and off.

llama.cpp adds tensor ``direction.l`` of a control vector to what leaves block l, counted from 0. Where only a residual
sum stands between the down projection and there, that is the folded vector of layer l, exactly. Static: every token
of every sequence is steered. That llama.cpp reads the files so is for tests/system/servers to prove; `load`
plays what the format says with PyTorch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFValueType

from adaras_export.core import families
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.rule import SteeringRule
from adaras_export.errors import ArtifactError, ExportError
from adaras_export.exporters.base import (
    ExportContext,
    Exporter,
    TargetSpec,
    Written,
    require_effect,
    stock_reference,
)
from adaras_export.exporters.checkpoint import (
    differing_keys,
    opened,
    plain_config,
    require_residual_sum,
    residual_vectors,
)
from adaras_export.exporters.checks import Check, Inspection
from adaras_export.exporters.gguf import files as gguf_files
from adaras_export.exporters.gguf import reader
from adaras_export.exporters.gguf import switchable as gguf_switchable
from adaras_export.exporters.gguf.model import BIAS, FILE, biases, checks, require_carrier, stored_biases
from adaras_export.exporters.gguf.reader import Entry
from adaras_export.exporters.manifest import DESCRIBING, Disclosed, files_of
from adaras_export.exporters.parity import FLOAT32, Artifact, Mode, Play, Reference, play_model
from adaras_export.files.safetensors_record import Array

VECTOR_FILE = "control-vector.gguf"
_TAGS = {"": ("control-vector",), "_into": (), "_switchable": ("lora",)}

# What llama.cpp calls the families with which it has been run here, steered by a control vector.
_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "granite": "granite",
    "smollm3": "smollm3",
    "phi3": "phi3",
    "gpt_neox": "gptneox",
    "gpt2": "gpt2",
    "seed_oss": "seed_oss",
    "cohere2": "cohere2",
    "arcee": "arcee",
    "nemotron": "nemotron",
    "hunyuan_v1_dense": "hunyuan-dense",
    "ernie4_5": "ernie4_5",
    "starcoder2": "starcoder2",
    "stablelm": "stablelm",
    "gemma": "gemma",
    "olmo": "olmo",
    "phi": "phi2",
}


@dataclass(frozen=True)
class GgufExporter:
    """The exporter of target `gguf`; ``into`` is a GGUF model, or what the receipt says of it."""

    into: Path | Mapping[str, str] | None = None
    switchable: bool = False
    context: ExportContext | None = None

    @property
    def spec(self) -> TargetSpec:
        """As `Exporter` says."""
        form = "" if self.into is None else "_switchable" if self.switchable else "_into"
        return TargetSpec(
            "gguf",
            f"exporters/gguf/card{form}.md",
            self._entries,
            # The scale of a control vector or a LoRA is a dial, a bias has none.
            drops=frozenset({"gate", "start", "dial"} if form == "_into" else {"gate", "start"}),
            options=frozenset({"into", "switchable"}),
            recorded=self._recorded,
            library="llama.cpp",
            relation="adapter" if self.into is None else "finetune",
            tags=("gguf", "llama.cpp", *_TAGS[form]),
        )

    def with_context(self, context: ExportContext) -> Exporter:
        """As `Exporter` says."""
        into, switchable = context.options.get("into"), bool(context.options.get("switchable", False))
        if switchable and into is None:
            raise ExportError(
                "gguf: --switchable needs --into, too: a GGUF model of the base, such as llama.cpp's "
                "convert_hf_to_gguf.py writes, quantised or not"
            )
        if into is None or isinstance(into, Mapping):
            if into is not None and (into.keys() != {"file", "content"} or not all(map(_is_text, into.values()))):
                raise ArtifactError(f"receipt: says of --into {sorted(into)}; expected content and file; export again")
            return replace(self, into=into, switchable=switchable, context=context)
        if not isinstance(into, str | Path) or not Path(into).is_file():
            raise ExportError(f"gguf: --into {into}: no such file; expected a GGUF model")
        return replace(self, into=Path(into), switchable=switchable, context=context)

    def _recorded(self) -> Mapping[str, Any]:
        if self.into is None:
            return {}
        switchable = {"switchable": True} if self.switchable else {}
        return {"into": {"file": self._carrier_name, "content": self._carrier_content}, **switchable}

    def write(self, rule: SteeringRule, base: Checkpoint, out: Path) -> Written:
        """As `Exporter` says."""
        require_effect(rule, "gguf")
        require_residual_sum(rule, "gguf")
        architecture = _architecture(rule.base.family)
        if self.switchable:
            gguf_switchable.require_form(architecture)
        plain_config(base)
        if self.into is None:
            _require_no_layer_0(rule)
            gguf_files.write(out / VECTOR_FILE, _metadata(rule), _directions(rule, base))
            return Written(rule)
        assert isinstance(self.into, Path), "a receipt's record is not written from"
        if self.switchable:
            gguf_switchable.write(rule, base, self.into, out, architecture)
        else:
            require_carrier(self.into, rule, architecture)
            gguf_files.copy_with(self.into, out / FILE, biases(rule, base))
        return Written(rule)

    def inspect(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Inspection:
        """As `Exporter` says."""
        strange = sorted(files_of(folder).keys() - DESCRIBING - {*self._files})
        files = Check.empty("files that are not the library's", strange)
        found = self._checks(folder, rule, base)
        return Inspection(files, found[0], tuple(found[1:]))

    @property
    def _files(self) -> tuple[str, ...]:
        if self.into is None:
            return (VECTOR_FILE,)
        return (gguf_switchable.FILE, gguf_switchable.LORA_FILE) if self.switchable else (FILE,)

    def _checks(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> list[Check]:
        if self.into is None:
            return _vector_checks(folder / VECTOR_FILE, rule, base)
        if self.switchable:
            architecture = _ARCHITECTURES[rule.base.family]
            return gguf_switchable.checks(folder, rule, base, self._carrier_content, architecture)
        return checks(folder / FILE, rule, base, self._carrier_content)

    def reference(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Reference:  # noqa: ARG002
        """As `Exporter` says."""
        return stock_reference(rule, base, everywhere=True)

    def load(self, folder: Path) -> Artifact:
        """As `Exporter` says: the stock base, with the vectors of the file added where the format says.

        Of a GGUF model, whose weights may be quantised, only biases or LoRA are played.
        """
        place = self.context
        assert place is not None, "only a context says where the base is"
        name, commit = (place.base_elsewhere, None) if place.base_elsewhere else (place.base_id, place.base_revision)
        model, _ = opened(name, revision=commit)
        where = families.down_projection
        if self.into is None:
            directions, where = _stored_directions(folder / VECTOR_FILE), families.decoder_layer
        elif self.switchable:
            directions = gguf_switchable.stored_vectors(folder)
        else:
            directions = stored_biases(folder / FILE)
        changes = {where(model, layer): torch.from_numpy(vector) for layer, vector in directions.items()}
        return _Player(model, changes, switchable=self.into is None or self.switchable)

    def _entries(self, folder: Path, _base_tensors: Mapping[str, str]) -> Sequence[Disclosed]:
        if self.into is None:
            return gguf_files.disclosed(folder, VECTOR_FILE)
        if self.switchable:
            return gguf_switchable.disclosed(folder)
        return gguf_files.disclosed(folder, FILE, lambda name: "added" if name.endswith(BIAS) else None)

    @property
    def _carrier_name(self) -> str:
        assert self.into is not None
        return self.into.name if isinstance(self.into, Path) else self.into["file"]

    @cached_property  # a model's file may have many gigabytes
    def _carrier_content(self) -> str:
        assert self.into is not None
        return gguf_files.content_digest(self.into) if isinstance(self.into, Path) else self.into["content"]


EXPORTER = GgufExporter()


def _architecture(family: str) -> str:
    """What llama.cpp calls a family.

    Raises:
        ExportError: llama.cpp has not been run with it here.
    """
    if family not in _ARCHITECTURES:
        raise ExportError(
            f"gguf: {family} has not been tried in llama.cpp, which may add a control vector elsewhere; expected one "
            f"of: {', '.join(_ARCHITECTURES)}; choose target hf or peft"
        )
    return _ARCHITECTURES[family]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _require_no_layer_0(rule: SteeringRule) -> None:
    if 0 in rule.layers():
        raise ExportError(
            "gguf: the rule steers layer 0, where llama.cpp applies no control vector; expected layers from 1 on: "
            "identify with --min-layer 1, or write the vectors into a GGUF model with --into, where that is possible"
        )


def _metadata(rule: SteeringRule) -> dict[str, Entry]:
    return {
        "general.architecture": (GGUFValueType.STRING, "controlvector"),
        "controlvector.model_hint": (GGUFValueType.STRING, _ARCHITECTURES[rule.base.family]),
        "controlvector.layer_count": (GGUFValueType.INT32, len(rule.layers())),  # as llama.cpp's own tool counts
        "adaras.rule": (GGUFValueType.STRING, rule.fingerprint),
        "adaras.strength": (GGUFValueType.FLOAT64, rule.strength),
    }


def _directions(rule: SteeringRule, base: Checkpoint) -> dict[str, Array]:
    """The tensors of a control vector: without the strength, which is its scale."""
    return {f"direction.{layer}": vector for layer, vector in residual_vectors(rule, base).items()}


def _vector_checks(path: Path, rule: SteeringRule, base: Checkpoint) -> list[Check]:
    file, expected_entries = reader.opened(path), _metadata(rule)
    expected = _directions(rule, base)
    other = differing_keys(file.entries, expected_entries)
    other += sorted({tensor.name for tensor in file.tensors} - expected.keys())
    other += gguf_files.strange(file, expected)
    wrong = gguf_files.differing(gguf_files.floats(file), expected)
    return [
        Check.empty("metadata entries or tensors that differ", other),
        Check.empty("directions that differ", wrong),
    ]


def _stored_directions(path: Path) -> dict[int, Array]:
    """The vectors of a control vector by 0-based layer, times the scale that it is meant for."""
    file = reader.opened(path)
    scale = np.float32(file.entries["adaras.strength"][1])
    return {int(name.removeprefix("direction.")): scale * value for name, value in gguf_files.floats(file).items()}


class _Player:
    """The stock base with a vector added to what leaves some of its modules."""

    tolerance = FLOAT32

    def __init__(self, model: Any, changes: Mapping[torch.nn.Module, torch.Tensor], *, switchable: bool) -> None:  # noqa: ANN401
        self.model = model
        self.changes = changes
        self.switchable = switchable

    def findings(self) -> Sequence[Check]:
        return []

    def play(self, rows: Sequence[Sequence[int]], mode: Mode, follow_BS: torch.Tensor | None) -> Play:
        if mode == "off":
            return play_model(self.model, rows, follow_BS)
        with self.steered():
            return play_model(self.model, rows, follow_BS)

    @contextmanager
    def steered(self) -> Iterator[None]:
        """Steer the model while the context lasts."""
        with ExitStack() as undo:
            for module, change_D in self.changes.items():
                undo.callback(module.register_forward_hook(partial(_add, change_D)).remove)
            yield


def _add(change_D: torch.Tensor, _module: torch.nn.Module, _args: Any, output: Any) -> Any:  # noqa: ANN401 - hidden states, alone or first
    if isinstance(output, tuple):  # decoder layers of some families, in older versions
        return (output[0] + change_D, *output[1:])
    return output + change_D
