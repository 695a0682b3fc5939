"""How an artifact is described: card, evaluation results and receipt, written into its folder or held against it.

Runs nothing. What the texts say is for the exporter, `card` and `receipts` to know.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from adaras_export import disclosure, models, receipts, storage
from adaras_export.card import CardContext, card, results
from adaras_export.card_effect import Measured
from adaras_export.card_header import inherited
from adaras_export.checks import Check
from adaras_export.errors import ArtifactError, ExportError, first_line
from adaras_export.exporters.base import Exporter
from adaras_export.exporters.checkpoint import differing_keys, holds
from adaras_export.receipts import CARD_FILE, EVALUATION_FILE, RECEIPT_FILE, RESULTS_FILE, RULE_FILE, Receipt
from adaras_export.rule import SteeringRule


def describe(folder: Path, receipt: Receipt, exporter: Exporter, rule: SteeringRule) -> Receipt:
    """Write the card, then the receipt, which has the hashes of all the rest."""
    context = _context(folder, receipt, exporter)
    storage.replace_file(folder / CARD_FILE, card(rule, receipt.parity, context).encode())
    _put(folder / RESULTS_FILE, results(rule, context))
    complete = replace(receipt, files=receipts.hashes(folder))
    complete.write(folder)
    return complete


def readdressed(folder: Path, receipt: Receipt, exporter: Exporter, repository: str) -> dict[str, bytes]:
    """Card and receipt of an exported folder as they are under another name, by file; writes nothing."""
    renamed = replace(receipt, repository=repository)
    context = _context(folder, renamed, exporter)
    text = card(SteeringRule.load(folder / RULE_FILE), receipt.parity, context).encode()
    complete = replace(renamed, files={**receipt.files, CARD_FILE: storage.sha256(text)})
    return {CARD_FILE: text, RECEIPT_FILE: complete.to_bytes()}


def checks(folder: Path, receipt: Receipt, exporter: Exporter, rule: SteeringRule, base: Path) -> list[Check]:
    """Whether card and receipt say of base, tensors and rule what these say themselves, and the card what they give."""
    other = differing_keys(receipt.base_card, base_card(base)) if (base / "README.md").exists() else []
    other += ["chat_template"] * (receipt.chat_template != has_chat_template(base))
    left_out = sorted({*receipt.drops} ^ {*dropped(rule, exporter)})
    written = _other_than_written(folder, receipt, exporter, rule)
    return [
        _base_check(receipt, base),
        _disclosure_check(exporter, folder, receipt),
        Check.empty("card other than its receipt's", written),
        Check.empty("statements about the base that differ from its card", other),
        Check.empty("features left out, or not, other than the receipt's", left_out),
    ]


def _other_than_written(folder: Path, receipt: Receipt, exporter: Exporter, rule: SteeringRule) -> list[str]:
    """Which of card and evaluation results are not what receipt, rule and evaluation give."""
    try:
        context = _context(folder, receipt, exporter)
    except ArtifactError:  # an evaluation of another form
        return [EVALUATION_FILE]
    expected = {CARD_FILE: card(rule, receipt.parity, context), RESULTS_FILE: results(rule, context)}
    return [name for name, text in expected.items() if not _has(folder / name, text)]


def _has(path: Path, text: str | None) -> bool:
    return not path.exists() if text is None else holds(path, text.encode())


def dropped(rule: SteeringRule, exporter: Exporter) -> tuple[str, ...]:
    """What a rule has and a format, as commissioned, cannot express."""
    needed = {"start", "dial", *(["gate"] if rule.gate is not None else [])}
    return tuple(sorted(exporter.drops & needed))


def evaluation_of(path: Path, rule: SteeringRule) -> bytes:
    """A file of `adaras-export eval` about ``rule``, as it goes into the artifact.

    Raises:
        ArtifactError: it is none.
        ExportError: it is about another rule.
    """
    evaluation = storage.read_json(path)
    if evaluation.get("rule") != rule.fingerprint:
        raise ExportError(f"{path}: evaluates rule {evaluation.get('rule')}; expected {rule.fingerprint}")
    Measured.from_record(evaluation, str(path))
    return path.read_bytes()


def base_card(base: Path) -> dict[str, Any]:
    """What the base's own model card says that ours repeats.

    Raises:
        ArtifactError: its header is no YAML.
    """
    readme = base / "README.md"
    if not readme.exists():
        return {}
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        return inherited(metadata_load(readme) or {}, str(readme))
    except (ValueError, YAMLError) as error:
        raise ArtifactError(
            f"{readme}: its header cannot be read ({first_line(error)}); expected YAML; mend it"
        ) from error


def has_chat_template(base: Path) -> bool:
    """Whether the base's tokenizer has a chat template that is used where none is named."""
    path = base / "tokenizer_config.json"
    found = storage.read_json(path).get("chat_template") if path.exists() else None
    if isinstance(found, list):  # named ones
        return any(isinstance(one, dict) and one.get("name") == "default" for one in found)
    return found is not None or (base / "chat_template.jinja").exists()


def _context(folder: Path, receipt: Receipt, exporter: Exporter) -> CardContext:
    path = folder / EVALUATION_FILE
    return CardContext(
        repository=receipt.repository,
        usage=exporter.usage(),
        off=exporter.off(),
        limits=exporter.limits(),
        weights=exporter.weights(),
        library=exporter.library,
        relation=exporter.relation,
        tags=exporter.tags(),
        rounded=exporter.rounded,
        drops=receipt.drops,
        base=receipt.base,
        base_card=receipt.base_card,
        datasets=receipt.datasets,
        tensors=receipt.tensors,
        measured=Measured.from_record(storage.read_json(path), str(path)) if path.exists() else None,
        chat_template=receipt.chat_template,
    )


def _put(path: Path, text: str | None) -> None:
    """Write a file that some artifacts have, or see to it that there is none."""
    if text is None:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    storage.replace_file(path, text.encode())


def _disclosure_check(exporter: Exporter, folder: Path, receipt: Receipt) -> Check:
    name = "tensors other than disclosed"
    try:
        found = exporter.disclosed(folder, receipt.base_tensors)
    except ArtifactError as error:
        return Check(name, 1, 0, str(error))
    other = disclosure.differing(found, receipt.tensors)
    return Check.empty(name, other)


def _base_check(receipt: Receipt, base: Path) -> Check:
    found = models.tensor_hashes(base)
    names = {*found, *receipt.base_tensors}
    changed = sorted(name for name in names if found.get(name) != receipt.base_tensors.get(name))
    return Check.empty("tensors of the base that changed since", changed)
