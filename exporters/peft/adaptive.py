"""Target `peft` with `adaptive`: an adapter of our PEFT method ADARAS, which carries gate and start.

It carries the whole rule, with a dial for the strength. Opening it needs this library besides PEFT:
`adaras_export.exporters.peft.method` adds the method to PEFT.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from adaras_export.core import families
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.folding import vectors
from adaras_export.core.rule import SteeringRule
from adaras_export.exporters.base import TargetSpec, stock_reference
from adaras_export.exporters.parity import Artifact, Mode, Reference
from adaras_export.exporters.peft.lora import Adapted, PeftExporter, base_entries, open_adapted
from adaras_export.exporters.peft.method import METHOD
from adaras_export.files.safetensors_record import Array


@dataclass(frozen=True)
class AdaptiveExporter(PeftExporter):
    """The exporter of target `peft` with option `adaptive`."""

    unopened = frozenset({"weight_packed"})

    @property
    def spec(self) -> TargetSpec:
        """The spec of target `peft`, with gate and start."""
        return replace(
            super().spec,
            card="exporters/peft/card_adaptive.md",
            drops=frozenset(),
            recorded=lambda: {"adaptive": True},
            tags=(),
        )

    def reference(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Reference:  # noqa: ARG002
        """The base, steered in memory by the whole rule."""
        return stock_reference(rule, base)

    def load(self, folder: Path) -> Artifact:
        """Open the base with the adapter."""
        return _Adaptive(open_adapted(folder, self.context), folder)

    def tensors(self, rule: SteeringRule, base: Checkpoint) -> dict[str, Array]:
        """The adapter's tensors: the folded vectors, without the strength, and the gate."""
        tensors = {f"{_key(rule, layer)}.adaras_vector": vector for layer, vector in vectors(rule, base).items()}
        if rule.gate is not None:
            gate = f"{_key(rule, int(rule.gate.layer.min()))}.adaras_gate"
            tensors |= {f"{gate}.{name}": np.asarray(value) for name, value in rule.gate.weights().items()}
        return tensors

    def config(self, rule: SteeringRule, base: Checkpoint) -> dict[str, Any]:
        """The adapter_config.json, with the fields of `AdarasConfig`."""
        gate, family = rule.gate, rule.base.family
        read = [] if gate is None else np.unique(gate.layer).tolist()
        features = {} if gate is None else {layer: gate.index[gate.layer == layer].tolist() for layer in read}
        return {
            **base_entries(self.context, base),
            "peft_type": METHOD,
            "target_modules": [families.down_name(family, layer) for layer in sorted({*rule.layers(), *read})],
            "steered": [families.down_name(family, layer) for layer in rule.layers()],
            "features": {families.down_name(family, layer): index for layer, index in features.items()},
            "gate_module": families.down_name(family, read[0]) if read else None,
            "gate_size": 0 if gate is None else len(gate.hidden_bias),
            "hidden_size": rule.base.hidden_size,
            "strength": rule.strength,
            "threshold": 1.0 if gate is None else gate.threshold,
            "start": rule.start,
            "rule": rule.fingerprint,
        }


def _key(rule: SteeringRule, layer: int) -> str:
    return f"base_model.model.{families.down_name(rule.base.family, layer)}"


class _Adaptive(Adapted):
    """The base with an adaptive adapter."""

    @contextmanager
    def set_to(self, mode: Mode) -> Iterator[None]:
        dials = self.model.steering
        threshold = dials.threshold
        if mode not in ("rule", "off"):
            dials.threshold = 2.0 if mode == "always" else mode  # every p(correct) is below 2
        try:
            with super().set_to(mode):
                yield
        finally:
            dials.threshold = threshold
