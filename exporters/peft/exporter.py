"""Target `peft`: a stock LoRA adapter, or by options an adapter of our method or biases merged into the base."""

from dataclasses import dataclass

from adaras_export.errors import ExportError
from adaras_export.exporters.base import ExportContext, Exporter
from adaras_export.exporters.peft.lora import PeftExporter


@dataclass(frozen=True)
class PeftTarget(PeftExporter):
    """The stock adapter, unless options choose another form."""

    def with_context(self, context: ExportContext) -> Exporter:
        """Choose the form of the adapter by the options."""
        chosen = {name: context.options.get(name, False) for name in ("adaptive", "merge")}
        if strange := [f"{name} {value!r}" for name, value in chosen.items() if not isinstance(value, bool)]:
            raise ExportError(f"peft: {', '.join(strange)}; expected true or false")
        start_at = context.options.get("start_at")
        if start_at is not None and not (isinstance(start_at, str) and start_at):
            raise ExportError(f"peft: start_at {start_at!r}; expected the text that every prompt ends with")
        given = [name for name, value in {**chosen, "start_at": start_at}.items() if value]
        if len(given) > 1:
            raise ExportError(f"peft: {' and '.join(given)} exclude each other; choose one of them")
        if chosen["adaptive"]:
            from adaras_export.exporters.peft.adaptive import AdaptiveExporter

            return AdaptiveExporter(context=context)
        if chosen["merge"]:
            from adaras_export.exporters.peft.merge import MergeExporter

            return MergeExporter(copy=context.copy)
        if start_at is not None:
            from adaras_export.exporters.peft.start import StartExporter

            return StartExporter(context, start_at)
        return PeftTarget(context=context)


EXPORTER = PeftTarget()
