"""How an artifact is described: card, evaluation results and receipt, written into its folder or held against it.

Runs nothing. What the texts say is for the exporter, `card` and `receipt` to know.
"""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaras_export.core.base_model import BaseModel
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.rule import SteeringRule
from adaras_export.delivery.card import Card
from adaras_export.delivery.card_metadata import inherited
from adaras_export.delivery.receipt import Receipt, hashes
from adaras_export.errors import ArtifactError, ExportError, first_line
from adaras_export.evaluation.record import read_evaluation
from adaras_export.exporters import manifest
from adaras_export.exporters.base import Exporter
from adaras_export.exporters.checkpoint import changed_companions, differing_keys, holds
from adaras_export.exporters.checks import Check, ParityReport
from adaras_export.exporters.manifest import CARD_FILE, EVALUATION_FILE, RECEIPT_FILE, RESULTS_FILE, RULE_FILE
from adaras_export.exporters.onnx.calibration import AGREEMENT
from adaras_export.files import atomic, hub


def describe(folder: Path, receipt: Receipt, exporter: Exporter, rule: SteeringRule) -> Receipt:
    """Write the card, then the receipt, which has the hashes of all the rest."""
    for name, content in _texts(_card(folder, receipt, exporter, rule)).items():
        _put(folder / name, content)
    complete = replace(receipt, files=hashes(folder))
    complete.write(folder)
    return complete


def readdressed(folder: Path, receipt: Receipt, exporter: Exporter, repository: str) -> dict[str, bytes]:
    """Card and receipt of an exported folder as they are under another name, by file; writes nothing."""
    renamed = replace(receipt, repository=repository)
    text = _card(folder, renamed, exporter, SteeringRule.load(folder / RULE_FILE)).text().encode()
    complete = replace(renamed, files={**receipt.files, CARD_FILE: atomic.sha256(text)})
    return {CARD_FILE: text, RECEIPT_FILE: complete.to_bytes()}


def checks(folder: Path, receipt: Receipt, exporter: Exporter, rule: SteeringRule, base: Checkpoint) -> list[Check]:
    """Whether card and receipt say of base, tensors and rule what these say themselves, and the card what they give."""
    other = differing_keys(receipt.base_card, base_card(base.folder))
    other += ["chat_template"] * (receipt.chat_template != has_chat_template(base.folder))
    left_out = sorted({*receipt.drops} ^ {*dropped(rule, exporter)})
    written = _other_than_written(folder, receipt, exporter, rule)
    return [
        Check.empty("tensors of the base that changed since", differing_keys(base.hashes, receipt.base_tensors)),
        _disclosure_check(exporter, folder, receipt),
        Check.empty("card other than its receipt's", written),
        Check.empty("statements about the base that differ from its card", other),
        Check.empty("features left out, or not, other than the receipt's", left_out),
    ]


def name_checks(
    receipt: Receipt, exporter: Exporter, rule: SteeringRule, base: Checkpoint, found: BaseModel
) -> list[Check]:
    """Whether what receipt and rule call the base is ``base``, or has its content; as far as that is on this machine.

    An artifact that fetches its base by name opens that base, even where it was compared with another one.
    """
    places = {}
    for one in (receipt.base, rule.base):
        if one.revision is not None and (one.id, one.revision) != (found.id, found.revision):
            places[_name(one)] = hub.cached(one.id, one.revision)
    source = Path(receipt.source)
    if receipt.base.revision is None and source.resolve() != base.folder.resolve():
        places[receipt.source] = source if source.is_dir() else None
    other = {name: _differing(place, base, receipt) for name, place in places.items() if place is not None}
    wrong = [f"{name}: {' '.join(differing)}" for name, differing in other.items() if differing]
    absent = sorted(places.keys() - other.keys())
    is_followed = exporter.spec.fetches_base and _name(receipt.base) in absent
    remedy = "; the artifact opens what is there: fetch it first" if is_followed else ""
    return [
        Check("names of the base that lead to another", len(wrong), 0, "; ".join(wrong)),
        *([Check(_ABSENT, len(absent), 0 if is_followed else None, "; ".join(absent) + remedy)] if absent else []),
    ]


_ABSENT = "names of the base that lead to nothing on this machine, so not compared"


def _name(base: BaseModel) -> str:
    return f"{base.id} at revision {base.revision}"


def _differing(place: Path, base: Checkpoint, receipt: Receipt) -> list[str]:
    """What the models in two folders differ in: tensors, settings, small files."""
    try:
        other = Checkpoint(place)
        tensors, config = other.hashes, other.config
    except ArtifactError as error:
        return [str(error)]
    settings = differing_keys(config, base.config)
    files = changed_companions(place, base.folder)
    return [*differing_keys(tensors, receipt.base_tensors), *(f"config.json:{key}" for key in settings), *files]


def claim_checks(receipt: Receipt, exporter: Exporter, rule: SteeringRule, ran: ParityReport) -> list[Check]:
    """Whether the checks of a receipt are those that were made now, with their limits; figures are its author's."""
    only_written = {AGREEMENT} if exporter.spec.rounded and rule.gate is not None else set()
    recorded = [check for check in receipt.parity.checks if check.name not in only_written]
    notes = [check for check in receipt.parity.checks if check.name in only_written]
    theirs, ours = (Counter(check.name for check in checks) for checks in (recorded, ran.checks))
    bounds = {check.name: _bound(check) for check in ran.checks}
    different = [c.name for c in recorded if c.name in bounds and not _is_near(_bound(c), bounds[c.name])]
    wrong = [*(theirs - ours), *(ours - theirs), *different]
    return [
        Check("checks of the receipt that verify does not make so", len(wrong), 0, "; ".join(wrong)),
        *(replace(check, name=f"{check.name}: by the receipt, not measured again", limit=None) for check in notes),
    ]


def _bound(check: Check) -> tuple[bool, float]:
    """What says how good an artifact had to be: the limit, or where there is none, the figure that is reported."""
    return (False, check.figure) if check.limit is None else (True, check.limit)


def _is_near(one: tuple[bool, float], other: tuple[bool, float]) -> bool:
    """Up to what another processor rounds otherwise."""
    return one[0] == other[0] and math.isclose(one[1], other[1], rel_tol=0.01, abs_tol=1e-6)


def _other_than_written(folder: Path, receipt: Receipt, exporter: Exporter, rule: SteeringRule) -> list[str]:
    """Which of card and evaluation results are not what receipt, rule and evaluation give."""
    try:
        card = _card(folder, receipt, exporter, rule)
    except ArtifactError:  # an evaluation of another form
        return [EVALUATION_FILE]
    return [name for name, content in _texts(card).items() if not _has(folder / name, content)]


def _has(path: Path, content: bytes | None) -> bool:
    return not path.exists() if content is None else holds(path, content)


def dropped(rule: SteeringRule, exporter: Exporter) -> tuple[str, ...]:
    """What a rule has and its target, with these options, cannot express."""
    needed = {"start", "dial", *(["gate"] if rule.gate is not None else [])}
    return tuple(sorted(exporter.spec.drops & needed))


def evaluation_of(path: Path, rule: SteeringRule) -> bytes:
    """A file of `adaras-export eval` about ``rule``, as it goes into the artifact.

    Raises:
        ArtifactError: it is none.
        ExportError: it is about another rule.
    """
    evaluation = read_evaluation(path)
    if evaluation.rule != rule.fingerprint:
        raise ExportError(f"{path}: evaluates rule {evaluation.rule}; expected {rule.fingerprint}")
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
    found = atomic.read_json(path).get("chat_template") if path.exists() else None
    if isinstance(found, list):  # named ones
        return any(isinstance(one, dict) and one.get("name") == "default" for one in found)
    return found is not None or (base / "chat_template.jinja").exists()


def _card(folder: Path, receipt: Receipt, exporter: Exporter, rule: SteeringRule) -> Card:
    path = folder / EVALUATION_FILE
    measured = read_evaluation(path) if path.exists() else None
    return Card(rule, receipt, exporter.spec, measured)


def _texts(card: Card) -> dict[str, bytes | None]:
    """What card and evaluation results are to hold; None where there are no results."""
    results = card.results()
    return {CARD_FILE: card.text().encode(), RESULTS_FILE: None if results is None else results.encode()}


def _put(path: Path, content: bytes | None) -> None:
    """Write a file that some artifacts have, or see to it that there is none."""
    if content is None:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    atomic.replace_file(path, content)


def _disclosure_check(exporter: Exporter, folder: Path, receipt: Receipt) -> Check:
    name = "tensors other than disclosed"
    try:
        found = exporter.spec.entries(folder, receipt.base_tensors)
    except ArtifactError as error:
        return Check(name, 1, 0, str(error))
    other = manifest.differing(found, receipt.tensors)
    return Check.empty(name, other)
