"""Export a rule to a verified artifact, rewrite its card, and refresh its code.

An export is written beside its destination, verified, given card and receipt, and only then renamed, so a failed export
never gets the final name. The exporters know the formats.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, get_args

from adaras_export import exporters
from adaras_export.core.base_model import BaseModel
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.rule import SteeringRule
from adaras_export.delivery import documents
from adaras_export.delivery.receipt import Receipt, current_versions, read, read_whole
from adaras_export.delivery.verifier import _Place, _refuse_options, exporter_of, verified
from adaras_export.errors import ExportError, ParityError
from adaras_export.exporters.base import ExportContext, Exporter, Feature, Refreshing
from adaras_export.exporters.checks import ParityReport
from adaras_export.exporters.manifest import EVALUATION_FILE, RULE_FILE, SIGNATURE_FILE
from adaras_export.exporters.payload_history import known
from adaras_export.files import atomic, hub
from adaras_export.files.staging import revised, staged

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class ExportReport:
    """The result of `export`: the folder, the SHA-256 of its files, the dropped features, the checks."""

    path: Path
    target: str
    files: dict[str, str]
    drops: tuple[str, ...]
    parity: ParityReport


class TargetOptions(TypedDict, total=False):
    """Options that one target has and the others refuse.

    Attributes:
        precision: onnx: number type of the weights.
        inline: onnx: no functions in the graph, for OpenVINO.
        genai: onnx: the graph of ONNX Runtime GenAI's builder.
        page: onnx: a web page beside the graph, with libraries from npm.
        calibration: onnx: JSONL file of prompts, for the gate's threshold.
        adaptive: peft: with gate and start; needs this library.
        merge: peft: merged into a base that has the biases.
        start_at: peft: the text that every prompt ends with; steering starts at its last token.
        switchable: stock, and gguf with ``into``: steering as a LoRA, per request.
        into: gguf: a GGUF model; the artifact is a copy of it with steering.
    """

    precision: Literal["fp32", "fp16", "int8", "int4"]
    inline: bool
    genai: bool
    page: bool
    calibration: str | Path
    adaptive: bool
    merge: bool
    start_at: str
    switchable: bool
    into: str | Path


def export(  # noqa: PLR0913 - the options of the command line
    rule: SteeringRule,
    *,
    base: str | Path,
    to: str,
    out: str | Path,
    accept_loss: Sequence[str] = (),
    evaluation: str | Path | None = None,
    strength: float | None = None,
    copy: bool = False,
    **options: "Unpack[TargetOptions]",
) -> ExportReport:
    """Write ``rule`` on ``base`` as an artifact of target ``to`` into the new folder ``out``, and verify it.

    Args:
        rule: the steering rule.
        base: folder or Hub id of the model that the rule belongs to.
        to: a target of `adaras_export.exporters.TARGETS`.
        out: a folder that does not exist yet.
        accept_loss: features ("gate", "start", "dial") that the format may leave out.
        evaluation: JSON file of `adaras-export eval`, for the card.
        strength: a strength that replaces the rule's.
        copy: copy weight files instead of hard-linking the base's.
        options: the target's own options, see `TargetOptions`.

    Returns:
        the folder, the SHA-256 of its files by path, the dropped features, and the passed checks.

    Raises:
        ExportError: the target cannot express the rule or has no such option, or ``out`` exists, is being written by
            another process, lies in the base's folder, or cannot be written.
        RuleError: the rule belongs to another model.
        ParityError: the artifact does not behave like the rule.

    Example:
        rule = SteeringRule.load("rule.safetensors")
        report = export(rule, base="Qwen/Qwen3-1.7B", to="onnx", out="steered-onnx", precision="int8")
        print(sorted(report.files), report.parity.ok)
    """
    out, exporter, given = Path(out), exporters.load(to), rule.fingerprint
    rule = rule if strength is None else rule.with_strength(strength)
    _refuse_options(exporter, options)
    exporter = exporter.with_context(ExportContext(str(base), copy=copy, options=options))
    dropped = _refuse_loss(rule, exporter, accept_loss)
    checkpoint = Checkpoint(hub.fetch(base, rule.base.revision))
    found = BaseModel.of_checkpoint(checkpoint, base)
    rule.base.require_same(found)
    origin = found.id if found.revision else str(checkpoint.folder.resolve())
    exporter = exporter.with_context(ExportContext(origin, found.revision, copy=copy, options=options))
    measured = None if evaluation is None else documents.evaluation_of(Path(evaluation), rule)
    with staged(out, checkpoint.folder) as stage:
        written = exporter.write(rule, checkpoint, stage)
        rule = written.rule
        (stage / RULE_FILE).write_bytes(rule.to_bytes())
        if measured is not None:
            (stage / EVALUATION_FILE).write_bytes(measured)
        parity = ParityReport((*written.notes, *verified(exporter, stage, rule, checkpoint).checks))
        if not parity.ok:
            raise ParityError(f"{out}: not written: " + "; ".join(check.line().strip() for check in parity.failed()))
        receipt = Receipt(
            target=to,
            options=dict(exporter.spec.recorded()),
            repository=out.name,
            drops=dropped,
            rule=rule.fingerprint,
            given_rule=given,
            base=found,
            source=origin,
            base_tensors=checkpoint.hashes,
            base_card=documents.base_card(checkpoint.folder),
            chat_template=documents.has_chat_template(checkpoint.folder),
            parity=parity,
            files={},
            tensors=tuple(exporter.spec.entries(stage, checkpoint.hashes)),
            versions=current_versions(to),
        )
        files = documents.describe(stage, receipt, exporter, rule).files
    return ExportReport(out, to, dict(files), dropped, parity)


def rewrite_card(
    path: str | Path,
    repository: str | None = None,
    evaluation: str | Path | None = None,
    datasets: Sequence[str] | None = None,
) -> Receipt:
    """Rewrite card and receipt of an exported folder; other files change only with a new evaluation.

    Args:
        path: the folder.
        repository: the artifact's name in the card, such as a Hub id; default: unchanged.
        evaluation: JSON file of `adaras-export eval`; default: the artifact's own.
        datasets: Hub ids of the datasets that the rule was made with; default: unchanged.

    Raises:
        ArtifactError: the folder has no receipt, or its files differ from the receipt.
        ExportError: the evaluation is of another rule, or the folder is signed.
    """
    folder = Path(path)
    read(folder)  # refuses a folder that is not an export before copying it
    with revised(folder) as stage:
        receipt = read_whole(folder)
        _refuse_signed(folder)
        rule = SteeringRule.load(folder / RULE_FILE)
        named = tuple(receipt.datasets if datasets is None else datasets)
        if strange := [name for name in named if not hub.is_hub_id(name)]:
            raise ExportError(f"datasets: {', '.join(map(repr, strange))} cannot be Hub ids; expected USER/NAME")
        if evaluation is not None:
            atomic.replace_file(stage / EVALUATION_FILE, documents.evaluation_of(Path(evaluation), rule))
        renamed = replace(receipt, repository=repository or receipt.repository, datasets=named)
        return documents.describe(stage, renamed, exporter_of(receipt), rule)


def refresh(path: str | Path, base: str | Path | None = None) -> ExportReport:
    """Replace code and settings of an export by those of this library's version, and verify the folder again.

    Weights and links to them do not change. Earlier code is replaced and never run.

    Args:
        path: the folder, of target hf or hf-thin.
        base: the base model, if it is no longer at the receipt's location.

    Raises:
        ArtifactError: the folder has no receipt, its files differ from the receipt, or the base cannot be found.
        ExportError: the folder is signed, its code was never this library's, or its target contains no code.
        ParityError: with the new code it does not behave like its rule; the folder is unchanged.
    """
    folder = Path(path)
    exporter = exporter_of(read(folder))
    if not isinstance(exporter, Refreshing):
        raise ExportError(
            f"{folder}: target {exporter.spec.name} carries no code that could be refreshed; export again"
        )
    with revised(folder) as stage:
        receipt = read_whole(folder)
        _refuse_signed(folder)
        if foreign := [name for name in receipt.files if name.endswith(".py") and not known(folder, name)]:
            raise ExportError(f"{folder}: {', '.join(foreign)}: was never code of this library; export again")
        place = _Place.of(folder, receipt, base)
        exporter.refresh(stage, place.rule, place.base)
        parity = verified(exporter.with_context(place.context), stage, place.rule, place.base)
        if not parity.ok:
            failures = "; ".join(check.line().strip() for check in parity.failed())
            raise ParityError(f"{folder}: not refreshed: {failures}; export again")
        renewed = replace(
            receipt,
            chat_template=documents.has_chat_template(place.base.folder),
            parity=parity,
            versions=current_versions(receipt.target),
        )
        files = documents.describe(stage, renewed, exporter, place.rule).files
    return ExportReport(folder, receipt.target, dict(files), tuple(receipt.drops), parity)


def _refuse_signed(folder: Path) -> None:
    if (folder / SIGNATURE_FILE).exists():
        raise ExportError(f"{folder}: is signed, and a new card would break that; remove {SIGNATURE_FILE}, sign again")


def _refuse_loss(rule: SteeringRule, exporter: Exporter, accepted: Sequence[str]) -> tuple[str, ...]:
    if unknown := sorted({*accepted} - {*get_args(Feature)}):
        raise ExportError(
            f"--accept-loss: no feature {', '.join(unknown)}; expected of: {', '.join(get_args(Feature))}"
        )
    dropped = documents.dropped(rule, exporter)
    if refused := [feature for feature in dropped if feature not in accepted]:
        raise ExportError(
            f"{exporter.spec.name}: cannot express {', '.join(refused)}; drop it with --accept-loss "
            f"{','.join(sorted({*accepted, *refused}))}, or choose target hf"
        )
    return dropped
