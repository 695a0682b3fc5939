"""Target `hf-thin`: a repository of some kilobytes that loads the base's weights from the base.

It has the classes and the rule of target `hf`, but no weight files. The config names the base, by Hub id and commit or
by the path of its folder, and the fingerprint that its tensors must have.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.rule import SteeringRule
from adaras_export.errors import ExportError
from adaras_export.exporters.base import ExportContext, Exporter, TargetSpec, Written, stock_reference
from adaras_export.exporters.checkpoint import (
    STEERING_FILE,
    buildable_config,
    disclosed,
    stores,
    strange_names,
    unknown_files,
    write_tensors,
)
from adaras_export.exporters.checks import Check, Inspection
from adaras_export.exporters.hf import exporter
from adaras_export.exporters.parity import Artifact, Reference
from adaras_export.files.safetensors_record import Array

_LOADER = "thin_adaras.py"
_LOADERS = {
    "AutoConfig": "thin_adaras.ThinConfig",
    "AutoModel": "thin_adaras.ThinModel",
    "AutoModelForCausalLM": "thin_adaras.ThinModelForCausalLM",
}


@dataclass(frozen=True)
class ThinExporter:
    """The exporter of target `hf-thin`; without a context, the config names the base's folder."""

    context: ExportContext | None = None

    @property
    def spec(self) -> TargetSpec:
        """The target's name, card and tags."""
        return TargetSpec(
            "hf-thin",
            "exporters/hf/card_thin.md",
            disclosed,
            relation="adapter",
            tags=("custom_code",),
            fetches_base=True,
        )

    def with_context(self, context: ExportContext) -> Exporter:
        """A copy of this exporter with the location of the base."""
        return replace(self, context=context)

    def write(self, rule: SteeringRule, base: Checkpoint, out: Path) -> Written:
        """Write the steering tensors, the code, and a config that names the base."""
        if (base.folder / "adapter_config.json").exists():
            raise ExportError(
                f"{base}: has an adapter_config.json, which from_pretrained would follow; expected a plain model: "
                "remove the file, or choose target hf"
            )
        buildable_config(base, images=True)
        write_tensors(out, _tensors(rule, base))
        config = exporter.steered_config(base.config, rule)
        exporter.write_repository(out, base, self._fetching(config, base), payload())
        return Written(rule)

    def refresh(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> None:
        """Write today's code and config again."""
        config = exporter.steered_config(base.config, rule)
        exporter.refresh_repository(folder, base, self._fetching(config, base), payload())

    def inspect(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Inspection:
        """Compare code, config, tensors and files with those that `write` writes."""
        config, own = exporter.form_of(folder, rule, base)
        own |= exporter.payload(_LOADER)
        code, settings, *files = exporter.repository_checks(folder, base, self._fetching(config, base), own)
        expected, path = _tensors(rule, base), folder / STEERING_FILE
        wrong = [name for name, value in expected.items() if not stores(path, name, value)]
        strange = strange_names(path, expected)
        rest = (
            *files,
            Check.empty("steering tensors that differ", wrong),
            Check.empty("tensors missing or unknown", strange),
            unknown_files(folder, base.folder, {*own, *exporter.REPOSITORY_FILES, STEERING_FILE}),
        )
        return Inspection(code, settings, rest)

    def reference(self, folder: Path, rule: SteeringRule, base: Checkpoint) -> Reference:  # noqa: ARG002
        """The base, steered in memory by the rule."""
        return stock_reference(rule, base)

    def load(self, folder: Path) -> Artifact:
        """Open the repository with its own code, which `inspect` has compared with this library's."""
        elsewhere = None if self.context is None else self.context.base_elsewhere
        return (
            exporter.open_repository(folder)
            if elsewhere is None
            else exporter.open_repository(folder, base=str(elsewhere))
        )

    def _fetching(self, config: dict[str, Any], base: Checkpoint) -> dict[str, Any]:
        """A config of target hf with the classes that fetch the base; "base" holds the entries that they restore."""
        place = self.context or ExportContext(str(base.folder.resolve()))
        record = {
            "id": place.base_id,
            "revision": place.base_revision,
            "fingerprint": base.fingerprint,
            "auto_map": config["auto_map"],
        }
        loaders = {auto: _LOADERS.get(auto, _LOADERS["AutoModelForCausalLM"]) for auto in config["auto_map"]}
        return {**config, "auto_map": loaders, "adaras": config["adaras"] | {"base": record}}


EXPORTER = ThinExporter()


def payload() -> dict[str, bytes]:
    """The code files of an export."""
    return exporter.payload() | exporter.payload(_LOADER)


def _tensors(rule: SteeringRule, base: Checkpoint) -> dict[str, Array]:
    """The steering tensors without the decoder's prefix: valid for `AutoModel` and `AutoModelForCausalLM`."""
    prefix = base.decoder_key
    return {name.removeprefix(prefix): value for name, value in exporter.steering_tensors(rule, base).items()}
