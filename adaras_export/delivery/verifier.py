"""Verify an artifact: files, tensors, card and parity with the rule. Writes no file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adaras_export import exporters
from adaras_export.core.base_model import BaseModel
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.rule import SteeringRule
from adaras_export.delivery import documents, integrity, vllm_runtime
from adaras_export.delivery.receipt import Receipt, read, version_checks
from adaras_export.errors import ArtifactError, ExportError, first_line
from adaras_export.exporters import manifest
from adaras_export.exporters.base import ExportContext, Exporter, Remaking, Runner
from adaras_export.exporters.checks import Check, Inspection, ParityReport
from adaras_export.exporters.manifest import RULE_FILE
from adaras_export.exporters.parity import Artifact, compare, rehearse
from adaras_export.files import hub

Runtime = Literal["own", "vllm"]
"""What computes an artifact's outputs: the runtime of its target, or a server's engine."""


def verify(
    path: str | Path,
    base: str | Path | None = None,
    *,
    receipt: str | None = None,
    key: str | Path | None = None,
    runtime: Runtime = "own",
) -> ParityReport:
    """Check an exported folder: its files, its tensors and settings, and its outputs.

    Code of the artifact runs only if it equals this library's own, byte for byte.

    Args:
        path: the folder.
        base: the base model, if it is no longer at the receipt's location; a model that is at that location, or in the
            Hub's cache under that name, must be the same.
        receipt: the SHA-256 that ``receipt.json`` must have, as its author published it elsewhere.
        key: PEM file of the public key that the folder must be signed with.
        runtime: what computes the outputs: the runtime of the target, or "vllm", which serves targets hf and hf-thin.

    Raises:
        ArtifactError: the folder has no receipt, or the base cannot be found.
        ExportError: the runtime does not run exports to this target.
        MissingExtraError: the runtime is not in this environment.

    Example:
        report = verify("steered")
        assert report.ok
        print([check.line() for check in report.checks])
    """
    folder = Path(path)
    recorded = read(folder)
    exporter = exporter_of(recorded)
    checks = [*integrity.origin_checks(folder, receipt, key), *integrity.content_checks(folder, recorded)]
    checks += version_checks(recorded)
    if any(check.name in integrity.FATAL and not check.ok for check in checks):
        return ParityReport((*checks, Check("not looked into, because of that", 1, 0)))
    place = _Place.of(folder, recorded, base)
    checks += documents.checks(folder, recorded, exporter, place.rule, place.base)
    checks += documents.name_checks(recorded, exporter, place.rule, place.base, place.found)
    exporter = exporter.with_context(place.context)
    stored = _inspected(exporter, folder, place.rule, place.base)
    runner = exporter if runtime == "own" else vllm_runtime.runner_of(exporter.spec.name)
    ran = _compared(runner, folder, place.rule, place.base, stored)
    if isinstance(exporter, Remaking) and isinstance(stored, Inspection) and stored.harmless:
        checks += exporter.made_anew(folder, place.rule, place.base)
    if ran.ok and runtime == "own":  # the receipt's checks were made in it
        checks += documents.claim_checks(recorded, exporter, place.rule, ran)
    return ParityReport((*checks, *ran.checks))


def open_artifact(path: str | Path, base: str | Path | None = None) -> tuple[Artifact, SteeringRule, Receipt]:
    """Open an exported folder to run it; return the artifact, its rule and its receipt.

    Its code runs only if it equals this library's own, byte for byte.

    Args:
        path: the folder.
        base: the base model, if it is no longer at the receipt's location.

    Raises:
        ArtifactError: the folder has no receipt, has changed since the export, or the base cannot be found.
    """
    folder = Path(path)
    recorded = read(folder)
    exporter = exporter_of(recorded)
    _require_own(folder, integrity.content_checks(folder, recorded))
    place = _Place.of(folder, recorded, base)
    _require_own(folder, exporter.inspect(folder, place.rule, place.base).checks)
    return exporter.with_context(place.context).load(folder), place.rule, recorded


def _require_own(folder: Path, checks: Sequence[Check]) -> None:
    if wrong := next((check for check in checks if not check.ok), None):
        raise ArtifactError(f"{folder}: {wrong.name}: {wrong.detail}; expected an unchanged export; see verify")


@dataclass(frozen=True)
class _Place:
    """The rule of an exported folder, its base, the base's identity, and the context of its exporter."""

    rule: SteeringRule
    base: Checkpoint
    found: BaseModel
    context: ExportContext

    @classmethod
    def of(cls, folder: Path, recorded: Receipt, base: str | Path | None) -> "_Place":
        rule = SteeringRule.load(folder / RULE_FILE)
        place, revision = recorded.source if base is None else base, recorded.base.revision
        checkpoint = Checkpoint(hub.fetch(place, revision))
        found = BaseModel.of_checkpoint(checkpoint, place)
        rule.base.require_same(found)
        elsewhere = None if base is None else checkpoint.folder
        context = ExportContext(recorded.source, revision, elsewhere, options=recorded.options)
        return cls(rule, checkpoint, found, context)


def exporter_of(receipt: Receipt) -> Exporter:
    """The exporter that wrote a folder, with the options of its receipt.

    Raises:
        ExportError: the receipt names an unknown target or option.
    """
    try:
        exporter = exporters.load(receipt.target)
        _refuse_options(exporter, receipt.options)
        return exporter.with_context(ExportContext(receipt.source, receipt.base.revision, options=receipt.options))
    except ExportError as error:
        raise ExportError(f"{manifest.RECEIPT_FILE}: {error}; export again") from error


def verified(exporter: Exporter, folder: Path, rule: SteeringRule, base: Checkpoint) -> ParityReport:
    """Inspect an artifact; if it is harmless, run it and compare it with the reference."""
    return _compared(exporter, folder, rule, base, _inspected(exporter, folder, rule, base))


def _inspected(exporter: Exporter, folder: Path, rule: SteeringRule, base: Checkpoint) -> Inspection | Check:
    try:
        return exporter.inspect(folder, rule, base)
    except ArtifactError as error:
        return Check("what it stores cannot be read", 1, 0, str(error))


def _compared(
    runner: Runner, folder: Path, rule: SteeringRule, base: Checkpoint, stored: Inspection | Check
) -> ParityReport:
    if isinstance(stored, Check):
        return ParityReport((stored,))
    if not stored.harmless:
        return ParityReport((*stored.checks, Check("not run, because its code or its settings differ", 1, 0)))
    try:
        script = rehearse(runner.reference(folder, rule, base))  # one model in memory at a time
        return ParityReport((*stored.checks, *compare(script, runner.load(folder))))
    except ArtifactError as error:
        return ParityReport((*stored.checks, Check("it does not open or run", 1, 0, str(error))))
    except Exception as error:  # libraries raise many kinds of errors on damaged files
        if all(check.ok for check in stored.checks):
            raise
        return ParityReport((*stored.checks, Check("it does not open or run", 1, 0, first_line(error))))


def _refuse_options(exporter: Exporter, options: Mapping[str, Any]) -> None:
    if unknown := sorted(options.keys() - exporter.spec.options):
        known = ", ".join(sorted(exporter.spec.options)) or "none"
        raise ExportError(f"{exporter.spec.name}: has no option {', '.join(unknown)}; expected of: {known}")
