"""Target `stock`: an ordinary checkpoint with the steering in the biases of its down projections.

Opens with plain `from_pretrained` without custom code, and in every server that knows its architecture. It steers every
token of every sequence, without gate and dial. Weights do not change; see `families` for the classes. With `switchable`
the checkpoint computes the same as the base, and an ordinary LoRA in a subfolder turns the steering on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.rule import SteeringRule
from adaras_export.errors import require
from adaras_export.exporters.base import (
    ExportContext,
    Exporter,
    SteeredModel,
    TargetSpec,
    Written,
    require_effect,
    stock_reference,
)
from adaras_export.exporters.checkpoint import disclosed, opened, unknown_files
from adaras_export.exporters.checks import Check, Inspection
from adaras_export.exporters.hf import exporter
from adaras_export.exporters.parity import FLOAT32, Artifact, Reference
from adaras_export.exporters.stock import switchable as stock_switchable
from adaras_export.exporters.stock.plan import StockPlan


@dataclass(frozen=True)
class StockExporter:
    """The exporter of target `stock`."""

    copy: bool = False
    switchable: bool = False

    @property
    def spec(self) -> TargetSpec:
        """The target's name, card, options and tags."""
        return TargetSpec(
            "stock",
            f"exporters/stock/{'card_switchable' if self.switchable else 'card'}.md",
            disclosed,
            drops=frozenset({"gate", "start"} if self.switchable else {"gate", "start", "dial"}),  # PEFT has a dial
            options=frozenset({"switchable"}),
            recorded=lambda: {"switchable": True} if self.switchable else {},
            tags=("peft", "lora") if self.switchable else (),
        )

    def with_context(self, context: ExportContext) -> Exporter:
        """A copy of this exporter with `switchable`, which copies or links weight files, by the context."""
        switchable = bool(context.options.get("switchable", False))
        if switchable:
            require("peft", "peft", "target stock with --switchable")
        return replace(self, copy=context.copy, switchable=switchable)

    def write(self, rule: SteeringRule, base: Checkpoint, out: Path) -> Written:
        """Write the checkpoint, and with `switchable` its adapter."""
        require_effect(rule, self.spec.name)
        plan = StockPlan.of(rule, base, switchable=self.switchable)
        plan.write(out, copy=self.copy)
        exporter.write_repository(out, base, plan.config, {})
        if self.switchable:
            stock_switchable.write(rule, base, out)
        return Written(rule)

    def inspect(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Inspection:
        """Compare config, tensors and files with those that `write` writes; no code is allowed."""
        plan = StockPlan.of(rule, base, switchable=self.switchable)
        code, config, *checks = [*exporter.repository_checks(folder, base, plan.config, {}), *plan.checks(folder)]
        if self.switchable:
            wrong = stock_switchable.changed_settings(rule, folder)
            detail = " ".join([config.detail, *wrong]).strip()
            config = replace(config, figure=config.figure + len(wrong), detail=detail)
            checks += stock_switchable.checks(rule, base, folder)
        adapter = stock_switchable.FILES if self.switchable else ()
        own = {*exporter.REPOSITORY_FILES, *exporter.SHARED_FILES, *plan.names.values(), *adapter}
        return Inspection(code, config, (*checks, unknown_files(folder, base.folder, own)))

    def reference(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Reference:  # noqa: ARG002
        """The base, steered in memory at every token."""
        return stock_reference(rule, base, everywhere=True)

    def load(self, folder: Path) -> Artifact:
        """Open the checkpoint, and with `switchable` its adapter."""
        return stock_switchable.SwitchableCheckpoint(folder) if self.switchable else _Checkpoint(*opened(folder))


EXPORTER = StockExporter()


class _Checkpoint(SteeredModel):
    """An opened artifact; it cannot be switched off."""

    tolerance = FLOAT32
    switchable = False

    def __init__(self, model: Any, loading_report: list[str]) -> None:  # noqa: ANN401 - a class of Transformers
        self.model = model
        self.loading_report = loading_report

    def findings(self) -> Sequence[Check]:
        return [Check.empty("keys in the loading report", self.loading_report)]
