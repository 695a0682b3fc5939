"""From a rule to an artifact under its final name, and back to the proof that it behaves like the rule.

Written beside its destination, verified, given card and receipt, and only then renamed: what fails never gets
its name. Knows no format; the exporters do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from adaras_export import description, exporters, integrity, models, receipts, storage
from adaras_export.checks import Check, ParityReport
from adaras_export.errors import ArtifactError, ExportError, ParityError, first_line
from adaras_export.exporters.base import Commission, Exporter, Feature, Refreshing, Remaking
from adaras_export.models import BaseModel
from adaras_export.parity import Artifact, compare, rehearse
from adaras_export.payload_history import known
from adaras_export.receipts import EVALUATION_FILE, RULE_FILE, SIGNATURE_FILE, Receipt
from adaras_export.rule import SteeringRule
from adaras_export.staging import revised, staged


@dataclass(frozen=True)
class ExportReport:
    """What `export` delivered: the folder, the SHA-256 of its files, what the format left out, the checks."""

    path: Path
    target: str
    files: dict[str, str]
    drops: tuple[str, ...]
    parity: ParityReport


def export(  # noqa: PLR0913 - one job with the options that the command line has
    rule: SteeringRule,
    *,
    base: str | Path,
    to: str,
    out: str | Path,
    accept_loss: Sequence[str] = (),
    evaluation: str | Path | None = None,
    strength: float | None = None,
    copy: bool = False,
    **options: Any,
) -> ExportReport:
    """Write ``rule`` on ``base`` as an artifact of target ``to`` into the new folder ``out``, and verify it.

    Args:
        rule: what to steer.
        base: folder or Hub id of the model that the rule belongs to.
        to: a target of `adaras_export.exporters.TARGETS`.
        out: a folder that does not exist yet.
        accept_loss: features ("gate", "start", "dial") that the format may leave out.
        evaluation: JSON file of `adaras-export eval`, for the card.
        strength: another strength than the rule's.
        copy: copy weight files that would be hard-linked to the base's.
        options: what the target offers besides, see `Exporter.options`: onnx has precision, inline, genai, page and
            calibration; peft has adaptive and merge; stock has switchable; gguf has into.

    Raises:
        ExportError: the target cannot express the rule or has no such option, or ``out`` exists, is being written by
            another process, lies in the base's folder, or cannot be written.
        RuleError: the rule belongs to another model.
        ParityError: the artifact does not behave like the rule.
    """
    out, exporter, given = Path(out), exporters.load(to), rule.fingerprint
    rule = rule if strength is None else rule.with_strength(strength)
    _refuse_options(exporter, options)
    exporter = exporter.commissioned(Commission(str(base), copy=copy, options=options))
    dropped = _refuse_loss(rule, exporter, accept_loss)
    folder = models.fetch(base, rule.base.revision)
    found = BaseModel.of(base, rule.base.revision)
    rule.base.require_same(found)
    origin = found.id if found.revision else str(folder.resolve())
    exporter = exporter.commissioned(Commission(origin, found.revision, copy=copy, options=options))
    measured = None if evaluation is None else description.evaluation_of(Path(evaluation), rule)
    with staged(out, folder) as stage:
        written = exporter.write(rule, folder, stage)
        rule = written.rule
        (stage / RULE_FILE).write_bytes(rule.to_bytes())
        if measured is not None:
            (stage / EVALUATION_FILE).write_bytes(measured)
        parity = ParityReport((*written.notes, *_verified(exporter, stage, rule, folder).checks))
        if not parity.ok:
            raise ParityError(f"{out}: not written: " + "; ".join(check.line().strip() for check in parity.failed()))
        base_tensors = models.tensor_hashes(folder)
        receipt = Receipt(
            target=to,
            options=dict(exporter.recorded()),
            repository=out.name,
            drops=dropped,
            rule=rule.fingerprint,
            given_rule=given,
            base=found,
            source=origin,
            base_tensors=base_tensors,
            base_card=description.base_card(folder),
            chat_template=description.has_chat_template(folder),
            parity=parity,
            files={},
            tensors=tuple(exporter.disclosed(stage, base_tensors)),
            versions=receipts.current_versions(to),
        )
        files = description.describe(stage, receipt, exporter, rule).files
    return ExportReport(out, to, dict(files), dropped, parity)


def rewrite_card(
    path: str | Path,
    repository: str | None = None,
    evaluation: str | Path | None = None,
    datasets: Sequence[str] | None = None,
) -> Receipt:
    """Write card and receipt of an exported folder anew; nothing else of it changes.

    Args:
        path: the folder.
        repository: what the card is to call it, a Hub id for one; default: as before.
        evaluation: JSON file of `adaras-export eval`; default: the one that the artifact has.
        datasets: Hub ids of the datasets that the rule was made with; default: as before.

    Raises:
        ArtifactError: the folder is no export, or its files are not those of its receipt.
        ExportError: the evaluation is of another rule, or the folder is signed.
    """
    folder = Path(path)
    receipts.read(folder)  # refuses what is no export, before a copy is made of it
    with revised(folder) as stage:
        receipt = receipts.read_whole(folder)
        _refuse_signed(folder)
        rule = SteeringRule.load(folder / RULE_FILE)
        named = tuple(receipt.datasets if datasets is None else datasets)
        if strange := [name for name in named if not models.is_hub_id(name)]:
            raise ExportError(f"datasets: {', '.join(map(repr, strange))} could be on no Hub; expected USER/NAME")
        if evaluation is not None:
            storage.replace_file(stage / EVALUATION_FILE, description.evaluation_of(Path(evaluation), rule))
        renamed = replace(receipt, repository=repository or receipt.repository, datasets=named)
        return description.describe(stage, renamed, exporter_of(receipt), rule)


def refresh(path: str | Path, base: str | Path | None = None) -> ExportReport:
    """Give an exported folder of an earlier version the code and settings of this one, and verify it anew.

    Its weights stay as they are, and the files that share them. Earlier code is replaced and never run.

    Args:
        path: the folder, of target hf or hf-thin.
        base: the base model, where it is no longer at the place that the receipt names.

    Raises:
        ArtifactError: the folder is no export, its files are not those of its receipt, or the base cannot be found.
        ExportError: it is signed, its code was never this library's, or its target carries none.
        ParityError: with the new code it does not behave like its rule; then nothing was changed.
    """
    folder = Path(path)
    exporter = exporter_of(receipts.read(folder))
    if not isinstance(exporter, Refreshing):
        raise ExportError(f"{folder}: target {exporter.name} carries no code that could be refreshed; export again")
    with revised(folder) as stage:
        receipt = receipts.read_whole(folder)
        _refuse_signed(folder)
        if foreign := [name for name in receipt.files if name.endswith(".py") and not known(folder, name)]:
            raise ExportError(f"{folder}: {', '.join(foreign)}: was never code of this library; export again")
        place = _Place.of(folder, receipt, base)
        exporter.refresh(stage, place.rule, place.base)
        parity = _verified(exporter.commissioned(place.commission), stage, place.rule, place.base)
        if not parity.ok:
            found = "; ".join(check.line().strip() for check in parity.failed())
            raise ParityError(f"{folder}: not refreshed: {found}; export again")
        renewed = replace(
            receipt,
            chat_template=description.has_chat_template(place.base),
            parity=parity,
            versions=receipts.current_versions(receipt.target),
        )
        files = description.describe(stage, renewed, exporter, place.rule).files
    return ExportReport(folder, receipt.target, dict(files), tuple(receipt.drops), parity)


def verify(
    path: str | Path,
    base: str | Path | None = None,
    *,
    receipt: str | None = None,
    key: str | Path | None = None,
) -> ParityReport:
    """Check an exported folder: its files, what it stores, and what it computes.

    Code of the artifact runs only after it was found to be, byte for byte, this library's own.

    Args:
        path: the folder.
        base: the base model, where it is no longer at the place that the receipt names; what is at that place, or in
            the Hub's cache under that name, must be the same.
        receipt: the SHA-256 that ``receipt.json`` must have, as its author told it elsewhere.
        key: PEM file of the public key that the folder must be signed with.

    Raises:
        ArtifactError: the folder is no export, or the base cannot be found.
    """
    folder = Path(path)
    recorded = receipts.read(folder)
    exporter = exporter_of(recorded)
    checks = [*integrity.origin_checks(folder, receipt, key), *integrity.content_checks(folder, recorded)]
    checks += receipts.version_checks(recorded)
    if any(check.name in integrity.FATAL and not check.ok for check in checks):
        return ParityReport((*checks, Check("not looked into, because of that", 1, 0)))
    place = _Place.of(folder, recorded, base)
    checks += description.checks(folder, recorded, exporter, place.rule, place.base)
    checks += description.name_checks(recorded, exporter, place.rule, place.base, place.found)
    exporter = exporter.commissioned(place.commission)
    ran = _verified(exporter, folder, place.rule, place.base)
    if isinstance(exporter, Remaking) and all(check.ok for check in ran.checks[:2]):
        checks += exporter.made_anew(folder, place.rule, place.base)
    if ran.ok:
        checks += description.claim_checks(recorded, exporter, place.rule, ran)
    return ParityReport((*checks, *ran.checks))


def open_artifact(path: str | Path, base: str | Path | None = None) -> tuple[Artifact, SteeringRule, Receipt]:
    """Open an exported folder to run it, with the rule that it carries and its receipt.

    Its code runs only after it was found to be, byte for byte, this library's own.

    Args:
        path: the folder.
        base: the base model, where it is no longer at the place that the receipt names.

    Raises:
        ArtifactError: the folder is no export, is not as it was written, or the base cannot be found.
    """
    folder = Path(path)
    recorded = receipts.read(folder)
    exporter = exporter_of(recorded)
    _require_own(folder, integrity.content_checks(folder, recorded))
    place = _Place.of(folder, recorded, base)
    _require_own(folder, exporter.inspect(folder, place.rule, place.base))
    return exporter.commissioned(place.commission).load(folder), place.rule, recorded


def _refuse_signed(folder: Path) -> None:
    if (folder / SIGNATURE_FILE).exists():
        raise ExportError(f"{folder}: is signed, and a new card would break that; remove {SIGNATURE_FILE}, sign again")


def _require_own(folder: Path, checks: Sequence[Check]) -> None:
    if wrong := next((check for check in checks if not check.ok), None):
        raise ArtifactError(f"{folder}: {wrong.name}: {wrong.detail}; expected it as it was written; see verify")


@dataclass(frozen=True)
class _Place:
    """The rule of an exported folder, its base, the folder of the base, and the commission of its exporter."""

    rule: SteeringRule
    base: Path
    found: BaseModel
    commission: Commission

    @classmethod
    def of(cls, folder: Path, recorded: Receipt, base: str | Path | None) -> "_Place":
        rule = SteeringRule.load(folder / RULE_FILE)
        place, revision = recorded.source if base is None else base, recorded.base.revision
        base_folder, found = models.fetch(place, revision), BaseModel.of(place, revision)
        rule.base.require_same(found)
        elsewhere = None if base is None else base_folder
        told = Commission(recorded.source, revision, elsewhere, options=recorded.options)
        return cls(rule, base_folder, found, told)


def exporter_of(receipt: Receipt) -> Exporter:
    """The exporter that wrote a folder, as it was commissioned.

    Raises:
        ExportError: there is no such target, or it has no such option.
    """
    try:
        exporter = exporters.load(receipt.target)
        _refuse_options(exporter, receipt.options)
        return exporter.commissioned(Commission(receipt.source, receipt.base.revision, options=receipt.options))
    except ExportError as error:
        raise ExportError(f"{receipts.RECEIPT_FILE}: {error}; export again") from error


def _verified(exporter: Exporter, folder: Path, rule: SteeringRule, base: Path) -> ParityReport:
    """Look the artifact over; where its code and settings are the library's, run it against the reference."""
    try:
        stored = list(exporter.inspect(folder, rule, base))
    except ArtifactError as error:
        return ParityReport((Check("what it stores cannot be read", 1, 0, str(error)),))
    if not all(check.ok for check in stored[:2]):  # never run code that is not ours, or that its settings name
        return ParityReport((*stored, Check("not run, because its code or its settings differ", 1, 0)))
    try:
        script = rehearse(exporter.reference(folder, rule, base))  # one model in memory at a time
        return ParityReport((*stored, *compare(script, exporter.load(folder))))
    except ArtifactError as error:
        return ParityReport((*stored, Check("it does not open or run", 1, 0, str(error))))
    except Exception as error:  # of damaged files libraries say all kinds of things
        if all(check.ok for check in stored):
            raise
        return ParityReport((*stored, Check("it does not open or run", 1, 0, first_line(error))))


def _refuse_loss(rule: SteeringRule, exporter: Exporter, accepted: Sequence[str]) -> tuple[str, ...]:
    if unknown := sorted({*accepted} - {*get_args(Feature)}):
        raise ExportError(
            f"--accept-loss: no feature {', '.join(unknown)}; expected of: {', '.join(get_args(Feature))}"
        )
    dropped = description.dropped(rule, exporter)
    if refused := [feature for feature in dropped if feature not in accepted]:
        raise ExportError(
            f"{exporter.name}: cannot express {', '.join(refused)}; drop it with --accept-loss "
            f"{','.join(sorted({*accepted, *refused}))}, or choose target hf"
        )
    return dropped


def _refuse_options(exporter: Exporter, options: Mapping[str, Any]) -> None:
    if unknown := sorted(options.keys() - exporter.options):
        known = ", ".join(sorted(exporter.options)) or "none"
        raise ExportError(f"{exporter.name}: has no option {', '.join(unknown)}; expected of: {known}")
