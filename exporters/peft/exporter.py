"""Target `peft`: by its options a stock LoRA adapter, an adapter of our own method, or biases merged into the base."""

from dataclasses import dataclass

from adaras_export.errors import ExportError
from adaras_export.exporters.base import Commission, Exporter
from adaras_export.exporters.peft.lora import PeftExporter


@dataclass(frozen=True)
class PeftTarget(PeftExporter):
    """The stock adapter, until options choose another form."""

    def commissioned(self, commission: Commission) -> Exporter:
        """As `Exporter` says."""
        chosen = {name: commission.options.get(name, False) for name in ("adaptive", "merge")}
        if strange := [f"{name} {value!r}" for name, value in chosen.items() if not isinstance(value, bool)]:
            raise ExportError(f"peft: {', '.join(strange)}; expected true or false")
        if all(chosen.values()):
            raise ExportError("peft: adaptive and merge exclude each other; a merged bias has no gate")
        if chosen["adaptive"]:
            from adaras_export.exporters.peft.adaptive import AdaptiveExporter

            return AdaptiveExporter(commission=commission)
        if chosen["merge"]:
            from adaras_export.exporters.peft.merge import MergeExporter

            return MergeExporter(copy=commission.copy)
        return PeftTarget(commission=commission)


EXPORTER = PeftTarget()
