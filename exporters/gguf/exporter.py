"""Target `gguf`: a control vector for llama.cpp, or with ``into`` a GGUF model that carries the vectors as biases.

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
from adaras_export.core.folding import vectors
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
from adaras_export.exporters.checkpoint import differing_keys, opened, plain_config
from adaras_export.exporters.checks import Check, Inspection
from adaras_export.exporters.gguf import files as gguf_files
from adaras_export.exporters.gguf import reader
from adaras_export.exporters.gguf.model import BIAS, FILE, biases, checks, require_carrier, stored_biases
from adaras_export.exporters.gguf.reader import Entry
from adaras_export.exporters.manifest import DESCRIBING, Disclosed, files_of
from adaras_export.exporters.parity import FLOAT32, Artifact, Mode, Play, Reference, play_model
from adaras_export.files.safetensors_record import Array

VECTOR_FILE = "control-vector.gguf"

# What llama.cpp calls the families whose block ends with h + mlp(h) and, in Granite, a factor on mlp(h).
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
}


@dataclass(frozen=True)
class GgufExporter:
    """The exporter of target `gguf`; ``into`` is a GGUF model, or what the receipt says of it."""

    into: Path | Mapping[str, str] | None = None
    context: ExportContext | None = None

    @property
    def spec(self) -> TargetSpec:
        """As `Exporter` says."""
        return TargetSpec(
            "gguf",
            f"exporters/gguf/{'card' if self.into is None else 'card_into'}.md",
            self._entries,
            # The scale of a control vector is a dial, a bias has none.
            drops=frozenset({"gate", "start"} if self.into is None else {"gate", "start", "dial"}),
            options=frozenset({"into"}),
            recorded=self._recorded,
            library="llama.cpp",
            relation="adapter" if self.into is None else "finetune",
            tags=("gguf", "llama.cpp", *(["control-vector"] if self.into is None else [])),
        )

    def with_context(self, context: ExportContext) -> Exporter:
        """As `Exporter` says."""
        into = context.options.get("into")
        if into is None or isinstance(into, Mapping):
            if into is not None and (into.keys() != {"file", "content"} or not all(map(_is_text, into.values()))):
                raise ArtifactError(f"receipt: says of --into {sorted(into)}; expected content and file; export again")
            return replace(self, into=into, context=context)
        if not isinstance(into, str | Path) or not Path(into).is_file():
            raise ExportError(f"gguf: --into {into}: no such file; expected a GGUF model")
        return replace(self, into=Path(into), context=context)

    def _recorded(self) -> Mapping[str, Any]:
        return {} if self.into is None else {"into": {"file": self._carrier_name, "content": self._carrier_content}}

    def write(self, rule: SteeringRule, base: Checkpoint, out: Path) -> Written:
        """As `Exporter` says."""
        require_effect(rule, "gguf")
        _require_expressible(rule)
        config = plain_config(base)
        if self.into is None:
            _require_no_layer_0(rule)
            gguf_files.write(out / VECTOR_FILE, _metadata(rule), _directions(rule, base, config))
        else:
            assert isinstance(self.into, Path), "a receipt's record is not written from"
            require_carrier(self.into, rule, _ARCHITECTURES[rule.base.family])
            gguf_files.copy_with(self.into, out / FILE, biases(rule, base))
        return Written(rule)

    def inspect(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Inspection:
        """As `Exporter` says."""
        path = folder / (VECTOR_FILE if self.into is None else FILE)
        strange = sorted(files_of(folder).keys() - DESCRIBING - {path.name})
        files = Check.empty("files that are not the library's", strange)
        found = (
            _vector_checks(path, rule, base) if self.into is None else checks(path, rule, base, self._carrier_content)
        )
        return Inspection(files, found[0], tuple(found[1:]))

    def reference(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Reference:  # noqa: ARG002
        """As `Exporter` says."""
        return stock_reference(rule, base, everywhere=True)

    def load(self, folder: Path) -> Artifact:
        """As `Exporter` says: the stock base, with the vectors of the file added where the format says.

        Of a GGUF model, whose weights may be quantised, only the biases are played.
        """
        place = self.context
        assert place is not None, "only a context says where the base is"
        name, commit = (place.base_elsewhere, None) if place.base_elsewhere else (place.base_id, place.base_revision)
        model, _ = opened(name, revision=commit)
        if self.into is None:
            directions, where = _stored_directions(folder / VECTOR_FILE), families.decoder_layer
        else:
            directions, where = stored_biases(folder / FILE), families.down_projection
        changes = {where(model, layer): torch.from_numpy(vector) for layer, vector in directions.items()}
        return _Player(model, changes, switchable=self.into is None)

    def _entries(self, folder: Path, _base_tensors: Mapping[str, str]) -> Sequence[Disclosed]:
        if self.into is None:
            return gguf_files.disclosed(folder, VECTOR_FILE)
        return gguf_files.disclosed(folder, FILE, ending=BIAS)

    @property
    def _carrier_name(self) -> str:
        assert self.into is not None
        return self.into.name if isinstance(self.into, Path) else self.into["file"]

    @cached_property  # a model's file may have many gigabytes
    def _carrier_content(self) -> str:
        assert self.into is not None
        return gguf_files.content_digest(self.into) if isinstance(self.into, Path) else self.into["content"]


EXPORTER = GgufExporter()


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _require_expressible(rule: SteeringRule) -> None:
    if rule.base.family not in _ARCHITECTURES:
        raise ExportError(
            f"gguf: {rule.base.family} normalises what leaves its MLP, which a vector behind the block would evade; "
            f"expected one of: {', '.join(_ARCHITECTURES)}; choose target hf, onnx or peft"
        )


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


def _directions(rule: SteeringRule, base: Checkpoint, config: Mapping[str, Any]) -> dict[str, Array]:
    """The tensors of a control vector: without the strength, which is its scale."""
    factor = np.float32(config.get("residual_multiplier", 1.0) if rule.base.family == "granite" else 1.0)
    return {f"direction.{layer}": factor * vector for layer, vector in vectors(rule, base).items()}


def _vector_checks(path: Path, rule: SteeringRule, base: Checkpoint) -> list[Check]:
    file, expected_entries = reader.opened(path), _metadata(rule)
    expected = _directions(rule, base, base.config)
    other = differing_keys(file.entries, expected_entries)
    other += sorted({tensor.name for tensor in file.tensors} - expected.keys())
    other += gguf_files.strange(file, expected)
    wrong = gguf_files.differing(gguf_files.vectors(file), expected)
    return [
        Check.empty("metadata entries or tensors that differ", other),
        Check.empty("directions that differ", wrong),
    ]


def _stored_directions(path: Path) -> dict[int, Array]:
    """The vectors of a control vector by 0-based layer, times the scale that it is meant for."""
    file = reader.opened(path)
    scale = np.float32(file.entries["adaras.strength"][1])
    return {int(name.removeprefix("direction.")): scale * value for name, value in gguf_files.vectors(file).items()}


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
