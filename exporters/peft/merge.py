"""Target `peft` with `merge`: the biases of the adapter added to those of the base, in an ordinary checkpoint.

For a base with biases this is the result of PEFT's `merge_and_unload`, and what target `stock` writes. All other
tensors are unchanged. The biases are float32; PEFT would round them to the base's type.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.rule import SteeringRule
from adaras_export.errors import ExportError
from adaras_export.exporters.base import ExportContext, Exporter, TargetSpec, Written
from adaras_export.exporters.peft.lora import OPTIONS
from adaras_export.exporters.stock.exporter import StockExporter


@dataclass(frozen=True)
class MergeExporter(StockExporter):
    """The exporter of target `peft` with option `merge`."""

    @property
    def spec(self) -> TargetSpec:
        """The spec of target `stock`, with the name and options of `peft`."""
        return replace(
            super().spec,
            name="peft",
            card="exporters/peft/card_merge.md",
            options=OPTIONS,
            recorded=lambda: {"merge": True},
        )

    def with_context(self, context: ExportContext) -> Exporter:
        """A copy of this exporter that copies or links weight files, by the context."""
        return replace(self, copy=context.copy)

    def write(self, rule: SteeringRule, base: Checkpoint, out: Path) -> Written:
        """Write a checkpoint whose biases include the steering."""
        _require_biases(rule, base)
        return super().write(rule, base, out)


def _require_biases(rule: SteeringRule, base: Checkpoint) -> None:
    located, family, layers = base.files, base.family, base.layers_key
    names = [f"{layers}.{layer}.{family.down}.bias" for layer in rule.layers()]
    if missing := [name for name in names if name not in located]:
        raise ExportError(
            f"{base}: has no {missing[0]} to merge into; expected biases on the down projections: write an ordinary "
            "checkpoint with --to stock, or the adapter without --merge"
        )
