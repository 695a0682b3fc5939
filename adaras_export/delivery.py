"""From a rule to an artifact under its final name, and back to the proof that it behaves like the rule.

Written beside its destination, verified, given card and receipt, and only then renamed: what fails never gets
its name. Knows no format; the exporters do.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from adaras_export import __version__, exporters, models, storage
from adaras_export.card import CardContext, card
from adaras_export.errors import ArtifactError, ExportError, ParityError
from adaras_export.exporters.base import Commission, Exporter, Feature
from adaras_export.models import BaseModel
from adaras_export.parity import Check, ParityReport, compare, rehearse
from adaras_export.rule import SteeringRule
from adaras_export.staging import staged

_RULE_FILE = "rule.safetensors"
_RECEIPT_FILE = "receipt.json"


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
    measured = None if evaluation is None else _evaluation(Path(evaluation), rule)
    with staged(out, folder) as stage:
        written = exporter.write(rule, folder, stage)
        rule = written.rule
        (stage / _RULE_FILE).write_bytes(rule.to_bytes())
        parity = ParityReport((*written.notes, *_verified(exporter, stage, rule, folder).checks))
        if not parity.ok:
            raise ParityError(f"{out}: not written: " + "; ".join(check.line().strip() for check in parity.failed()))
        own = (exporter.usage(), exporter.weights(), exporter.library, exporter.relation, exporter.tags())
        context = CardContext(out.name, *own, dropped, _license(folder), measured)
        (stage / "README.md").write_text(card(rule, parity, context), encoding="utf-8")
        files = _hashes(stage)
        receipt = _receipt(rule, exporter, parity, files) | {
            "base": found.as_record(),
            "source": origin,
            "options": dict(exporter.recorded()),
            "given_rule": given,
        }
        (stage / _RECEIPT_FILE).write_text(json.dumps(receipt, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return ExportReport(out, to, files, dropped, parity)


def verify(path: str | Path, base: str | Path | None = None) -> ParityReport:
    """Check an exported folder: its files, what it stores, and what it computes.

    Code of the artifact runs only after it was found to be, byte for byte, this library's own.

    Args:
        path: the folder.
        base: the base model, where it is no longer at the place that the receipt names.

    Raises:
        ArtifactError: the folder is no export, or the base cannot be found.
    """
    folder = Path(path)
    receipt = storage.read_json(folder / _RECEIPT_FILE)
    try:
        exporter, recorded = (
            exporters.load(receipt["target"]),
            BaseModel.from_record(receipt["base"], str(folder)),
        )
        checks = _file_checks(folder, receipt["files"])
        rule_hash, origin, options = receipt["rule"], receipt["source"], dict(receipt.get("options", {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{folder / _RECEIPT_FILE}: damaged receipt ({error}); export again") from error
    _refuse_options(exporter, options)
    rule = SteeringRule.load(folder / _RULE_FILE)
    checks.append(Check("rule other than the receipt's", float(rule.fingerprint != rule_hash), 0))
    found = origin if base is None else base
    base_folder = models.fetch(found, recorded.revision)
    rule.base.require_same(BaseModel.of(found, recorded.revision))
    elsewhere = None if base is None else base_folder
    exporter = exporter.commissioned(Commission(origin, recorded.revision, elsewhere, options=options))
    return ParityReport((*checks, *_verified(exporter, folder, rule, base_folder).checks))


def _verified(exporter: Exporter, folder: Path, rule: SteeringRule, base: Path) -> ParityReport:
    """Look the artifact over; where its code and settings are the library's, run it against the reference."""
    stored = list(exporter.inspect(folder, rule, base))
    if not all(check.ok for check in stored[:2]):  # never run code that is not ours, or that its settings name
        return ParityReport((*stored, Check("not run, because its code or its settings differ", 1, 0)))
    try:
        script = rehearse(exporter.reference(folder, rule, base))  # one model in memory at a time
        return ParityReport((*stored, *compare(script, exporter.load(folder))))
    except ArtifactError as error:
        return ParityReport((*stored, Check("it does not open or run", 1, 0, str(error))))


def _refuse_loss(rule: SteeringRule, exporter: Exporter, accepted: Sequence[str]) -> tuple[str, ...]:
    if unknown := sorted({*accepted} - {*get_args(Feature)}):
        raise ExportError(
            f"--accept-loss: no feature {', '.join(unknown)}; expected of: {', '.join(get_args(Feature))}"
        )
    needed = {"start", "dial", *(["gate"] if rule.gate is not None else [])}
    dropped = tuple(sorted(exporter.drops & needed))
    if refused := [feature for feature in dropped if feature not in accepted]:
        raise ExportError(
            f"{exporter.name}: cannot express {', '.join(refused)}; drop it with --accept-loss {','.join(refused)}, "
            "or choose target hf"
        )
    return dropped


def _refuse_options(exporter: Exporter, options: Mapping[str, Any]) -> None:
    if unknown := sorted(options.keys() - exporter.options):
        known = ", ".join(sorted(exporter.options)) or "none"
        raise ExportError(f"{exporter.name}: has no option {', '.join(unknown)}; expected of: {known}")


def _file_checks(folder: Path, expected: dict[str, str]) -> list[Check]:
    found = _hashes(folder)
    changed = sorted(name for name in expected if name in found and found[name] != expected[name])
    missing, unknown = (
        sorted(expected.keys() - found.keys()),
        sorted(found.keys() - expected.keys()),
    )
    return [
        Check(f"files {word}", len(names), 0, " ".join(names))
        for word, names in (("changed", changed), ("missing", missing), ("unknown", unknown))
    ]


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    names = {str(path.relative_to(folder)): path for path in files}
    return {name: storage.sha256_file(path) for name, path in names.items() if name != _RECEIPT_FILE}


def _receipt(rule: SteeringRule, exporter: Exporter, parity: ParityReport, files: dict[str, str]) -> dict[str, Any]:
    libraries = ("torch", "transformers", "safetensors")
    return {
        "version": 1,
        "target": exporter.name,
        "rule": rule.fingerprint,
        "files": files,
        "parity": parity.as_record(),
        "versions": {
            "python": platform.python_version(),
            "adaras-export": __version__,
            **{name: version(name) for name in libraries},
        },
    }


def _evaluation(path: Path, rule: SteeringRule) -> dict[str, Any]:
    evaluation = storage.read_json(path)
    if evaluation.get("rule") != rule.fingerprint:
        raise ExportError(f"{path}: evaluates rule {evaluation.get('rule')}; expected {rule.fingerprint}")
    return evaluation


def _license(base: Path) -> str | None:
    """The licence that the base's own model card names."""
    readme = base / "README.md"
    if not readme.exists():
        return None
    from huggingface_hub import ModelCard

    found = ModelCard.load(readme).data.get("license")
    return None if found is None else str(found)
