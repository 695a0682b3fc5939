"""Target `stock`: an ordinary checkpoint whose down projections have the steering as their bias.

Opens with plain `from_pretrained`, without custom code, and in every server that knows its architecture. Static: every
token of every sequence is steered; no gate, no dial. Weights stay as they are, see `stock_families` for the classes.
With `switchable` the checkpoint computes what the base does, and an ordinary LoRA beside it turns the steering on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaras_export.disclosure import Disclosed
from adaras_export.errors import require
from adaras_export.exporters import hf, steering_lora
from adaras_export.exporters.base import (
    Commission,
    Exporter,
    Feature,
    Generating,
    Written,
    require_effect,
    stock_reference,
)
from adaras_export.exporters.checkpoint import disclosed, opened, unknown_files
from adaras_export.exporters.stock_plan import Plan
from adaras_export.parity import FLOAT32, Artifact, Check, Reference
from adaras_export.rule import SteeringRule


@dataclass(frozen=True)
class StockExporter:
    """The exporter of target `stock`."""

    name: str = "stock"
    options: frozenset[str] = frozenset({"switchable"})
    library: str = "transformers"
    relation: str = "finetune"
    fetches_base: bool = False
    rounded: bool = False
    copy: bool = False
    switchable: bool = False

    @property
    def drops(self) -> frozenset[Feature]:
        """As `Exporter` says: PEFT has a dial for adapters, and with it the switchable form."""
        return frozenset({"gate", "start"}) if self.switchable else frozenset({"gate", "start", "dial"})

    @property
    def card(self) -> str:
        """As `Exporter` says."""
        return f"exporters/card_text/{'stock_switchable' if self.switchable else 'stock'}.md"

    def commissioned(self, commission: Commission) -> Exporter:
        """As `Exporter` says."""
        switchable = bool(commission.options.get("switchable", False))
        if switchable:
            require("peft", "peft", "target stock with --switchable")
        return replace(self, copy=commission.copy, switchable=switchable)

    def recorded(self) -> Mapping[str, Any]:
        """As `Exporter` says."""
        return {"switchable": True} if self.switchable else {}

    def write(self, rule: SteeringRule, base: Path, out: Path) -> Written:
        """As `Exporter` says."""
        require_effect(rule, self.name)
        plan = Plan.of(rule, base, switchable=self.switchable)
        plan.write(out, copy=self.copy)
        hf.write_repository(out, base, plan.config, {})
        if self.switchable:
            steering_lora.write(rule, base, out)
        return Written(rule)

    def inspect(self, folder: Path, rule: SteeringRule, base: Path) -> Sequence[Check]:
        """As `Exporter` says."""
        plan = Plan.of(rule, base, switchable=self.switchable)
        checks = [*hf.repository_checks(folder, base, plan.config, {}), *plan.checks(folder)]
        if self.switchable:
            wrong = steering_lora.changed_settings(rule, folder)
            detail = " ".join([checks[1].detail, *wrong]).strip()
            checks[1] = replace(checks[1], figure=checks[1].figure + len(wrong), detail=detail)
            checks += steering_lora.checks(rule, base, folder)
        adapter = steering_lora.FILES if self.switchable else ()
        own = {*hf.REPOSITORY_FILES, *hf.SHARED_FILES, *plan.names.values(), *adapter}
        return [*checks, unknown_files(folder, base, own)]

    def reference(self, folder: Path, rule: SteeringRule, base: Path) -> Reference:  # noqa: ARG002
        """As `Exporter` says."""
        return stock_reference(rule, base, everywhere=True)

    def load(self, folder: Path) -> Artifact:
        """As `Exporter` says."""
        return steering_lora.SwitchableCheckpoint(folder) if self.switchable else _Checkpoint(*opened(folder))

    def disclosed(self, folder: Path, base_tensors: Mapping[str, str]) -> Sequence[Disclosed]:
        """As `Exporter` says."""
        return disclosed(folder, base_tensors)

    def tags(self) -> Sequence[str]:
        """As `Exporter` says."""
        return ("peft", "lora") if self.switchable else ()


EXPORTER = StockExporter()


class _Checkpoint(Generating):
    """An opened artifact, which is always steered."""

    tolerance = FLOAT32
    switchable = False

    def __init__(self, model: Any, loading_report: list[str]) -> None:  # noqa: ANN401 - a class of Transformers
        self.model = model
        self.loading_report = loading_report

    def findings(self) -> Sequence[Check]:
        return [Check.empty("keys in the loading report", self.loading_report)]
