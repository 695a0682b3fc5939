"""Target `peft`: a stock LoRA adapter with biases only, which any PEFT >= 0.18 opens without this library.

W_down[:, idx] @ delta is a constant, so a LoRA with `lora_bias` and A = B = 0 holds it exactly. It has no gate and no
start: every token of every sequence is steered. Options choose another form: `start_at` an adapter with a start
(start.py), `merge` an ordinary checkpoint (merge.py), `adaptive` an adapter of our method, with gate and start
(adaptive.py).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors.numpy import save

from adaras_export.core import families
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.folding import vectors
from adaras_export.core.quantised import format_of
from adaras_export.core.rule import SteeringRule
from adaras_export.errors import ExportError
from adaras_export.exporters import adapters
from adaras_export.exporters.adapters import ADAPTER_FILE, CONFIG_FILE, adapted
from adaras_export.exporters.base import (
    ExportContext,
    Exporter,
    SteeredModel,
    TargetSpec,
    Written,
    require_effect,
    stock_reference,
)
from adaras_export.exporters.checkpoint import (
    buildable_config,
    differing_keys,
    disclosed,
    opened,
    stored_names,
    stores,
    strange_names,
    unknown_files,
    write_json,
)
from adaras_export.exporters.checks import Check, Inspection
from adaras_export.exporters.parity import FLOAT32, Artifact, Mode, Reference
from adaras_export.files import atomic
from adaras_export.files.safetensors_record import Array

_CODE = {".py", ".bin", ".pt", ".pth", ".pkl"}  # files that could run when a folder is opened, including pickles


OPTIONS = frozenset({"adaptive", "merge", "start_at"})
"""Options of target `peft`, in all its forms."""


@dataclass(frozen=True)
class PeftExporter:
    """The exporter of target `peft`; without a context, the adapter names the base's folder."""

    context: ExportContext | None = None
    # Where PEFT's LoRA has no bias, or no weight to look at before the model has run.
    unopened: ClassVar[frozenset[str]] = frozenset({"_weight_qdata", "weight_packed"})

    @property
    def spec(self) -> TargetSpec:
        """The target's name, card, options and tags."""
        return TargetSpec(
            "peft",
            "exporters/peft/card.md",
            disclosed,
            drops=frozenset({"gate", "start"}),
            options=OPTIONS,
            library="peft",
            relation="adapter",
            tags=("lora",),
            fetches_base=True,
        )

    def with_context(self, context: ExportContext) -> Exporter:
        """A copy of this exporter with the location of the base."""
        return replace(self, context=context)

    def write(self, rule: SteeringRule, base: Checkpoint, out: Path) -> Written:
        """Write the adapter's tensors and its config."""
        require_effect(rule, "peft")
        buildable_config(base)
        self._require_adaptable(base)
        atomic.replace_file(out / ADAPTER_FILE, save(self.tensors(rule, base), metadata={"format": "pt"}))
        write_json(out / CONFIG_FILE, self.config(rule, base))
        return Written(rule)

    def inspect(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Inspection:
        """Compare config, tensors and files with those that `write` writes; no code is allowed."""
        expected, found = self.config(rule, base), atomic.read_json(folder / CONFIG_FILE)
        settings = differing_keys(found, expected)
        tensors, path = self.tensors(rule, base), folder / ADAPTER_FILE
        wrong = [name for name, value in tensors.items() if not stores(path, name, value)]
        strange = strange_names(path, tensors)
        return Inspection(
            _code_check(folder),
            Check.empty("adapter_config.json entries that differ", settings),
            (
                Check.empty("adapter tensors that differ", wrong),
                Check.empty("tensors missing or unknown", strange),
                unknown_files(folder, None, {ADAPTER_FILE, CONFIG_FILE}),
            ),
        )

    def reference(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Reference:  # noqa: ARG002
        """The base, steered in memory at every token."""
        return stock_reference(rule, base, everywhere=True)

    def load(self, folder: Path) -> Artifact:
        """Open the base with the adapter."""
        return Adapted(open_adapted(folder, self.context), folder)

    def _require_adaptable(self, base: Checkpoint) -> None:
        stored = format_of(base.config, str(base))
        if stored is not None and stored.weight in self.unopened:
            raise ExportError(
                f"{base}: is stored in {stored.name}, where PEFT does not open this adapter; expected another format: "
                "choose target hf"
            )

    def tensors(self, rule: SteeringRule, base: Checkpoint) -> dict[str, Array]:
        """The adapter's tensors: per steered layer A = 0 (1, M), B = 0 (D, 1), and the bias (D,)."""
        width, tensors = rule.base.hidden_size, {}
        for layer, vector in vectors(rule, base).items():
            name = f"base_model.model.{families.down_name(rule.base.family, layer)}"
            tensors[f"{name}.lora_A.weight"] = np.zeros((1, rule.base.width(layer)), np.float32)
            tensors[f"{name}.lora_B.weight"] = np.zeros((width, 1), np.float32)
            tensors[f"{name}.lora_B.bias"] = np.float32(rule.strength) * vector
        return tensors

    def config(self, rule: SteeringRule, base: Checkpoint) -> dict[str, Any]:
        """The adapter_config.json, with entries that PEFT 0.18 knows; it warns about others."""
        return {
            **base_entries(self.context, base),
            "peft_type": "LORA",
            "r": 1,
            "lora_alpha": 1,
            "lora_dropout": 0.0,
            "lora_bias": True,
            "bias": "none",
            "fan_in_fan_out": families.FAMILIES[rule.base.family].transposed,
            "target_modules": [families.down_name(rule.base.family, layer) for layer in rule.layers()],
        }


def base_entries(context: ExportContext | None, base: Checkpoint) -> dict[str, Any]:
    """The entries of an adapter_config.json that do not depend on its method."""
    place = context or ExportContext(str(base.folder.resolve()))
    return {
        "base_model_name_or_path": place.base_id,
        "revision": place.base_revision,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
    }


def _code_check(folder: Path) -> Check:
    """Check that a folder has no files that could run."""
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in _CODE)
    return Check.empty("code files that are not the library's", found)


def open_adapted(folder: Path, context: ExportContext | None) -> Any:  # noqa: ANN401 - PEFT's class
    """The stock base in float32 with the adapter, opened as users open it.

    Raises:
        ArtifactError: the base or the adapter cannot be opened.
    """
    place = atomic.read_json(folder / CONFIG_FILE)
    elsewhere = None if context is None else context.base_elsewhere
    name, commit = (place["base_model_name_or_path"], place["revision"]) if elsewhere is None else (elsewhere, None)
    model = adapted(opened(name, revision=commit or "main")[0], folder)
    # PEFT freezes the base, and PyTorch sums products with frozen weights in another order: a difference of 1e-6.
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # quantised ones cannot have gradients
    return model


class Adapted(SteeredModel):
    """The base with the adapter."""

    tolerance = FLOAT32
    switchable = True

    def __init__(self, model: Any, folder: Path) -> None:  # noqa: ANN401 - PEFT's class
        self.model = model
        self.path = folder / ADAPTER_FILE

    def findings(self) -> Sequence[Check]:
        """Check that PEFT loaded all tensors, since loading is known to lose biases silently."""
        marked = {name: value for name, value in self.model.state_dict().items() if ".default" in name}
        loaded = {name.replace(".default", ""): value.numpy() for name, value in marked.items()}
        lost = stored_names(self.path) ^ loaded.keys()
        lost |= {name for name, value in loaded.items() if not stores(self.path, name, value)}
        return [Check.empty("adapter tensors that PEFT did not take", sorted(lost))]

    def set_to(self, mode: Mode) -> AbstractContextManager[Any]:
        """Disable the adapter inside the context if ``mode`` is "off"."""
        return adapters.set_to(self.model, mode)
