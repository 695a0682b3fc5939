"""Exported artifacts as arms of an evaluation: they answer the questions in the way users run them.

One artifact is open at a time. The exporters know the formats.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from adaras_export.core.rule import SteeringRule
from adaras_export.delivery.receipt import Receipt
from adaras_export.delivery.verifier import open_artifact
from adaras_export.errors import ArtifactError, ExportError
from adaras_export.evaluation.task import ArtifactCondition
from adaras_export.exporters.manifest import RECEIPT_FILE
from adaras_export.exporters.parity import Answering
from adaras_export.files import atomic
from adaras_export.modeling.generation import Sampling


@contextmanager
def artifact_arm(
    folder: Path, rule: SteeringRule, tokenizer: PreTrainedTokenizerBase, base: str | Path | None = None
) -> Iterator[ArtifactCondition]:
    """The arm "TARGET FOLDER" of an exported folder, until the context ends.

    Raises:
        ArtifactError: the folder is not an export of this rule, has changed since the export, or does not open.
        ExportError: another program runs its format.
    """
    artifact, own, receipt = open_artifact(folder, base)
    _require_same(folder, own, rule)
    if not isinstance(artifact, Answering):
        raise ExportError(
            f"{folder}: target {receipt.target} is not run here; expected hf, hf-thin, peft, stock or onnx; serve it, "
            "and collect greedily from the server"
        )

    def complete(rows: Sequence[Sequence[int]], sampling: Sampling, keys: Sequence[str]) -> list[list[int]]:
        return artifact.answer(tokenizer, rows, sampling, keys)

    yield ArtifactCondition(_name(folder, receipt), atomic.sha256((folder / RECEIPT_FILE).read_bytes()), complete)


def _name(folder: Path, receipt: Receipt) -> str:
    return f"{receipt.target} {folder.resolve().name}"


def _require_same(folder: Path, own: SteeringRule, rule: SteeringRule) -> None:
    """Refuse an artifact of another rule; thresholds may differ, since some formats recalibrate them."""
    own_gate, gate = (None if each.gate is None else each.gate.weights() for each in (own, rule))
    same = own.neurons == rule.neurons and (own.strength, own.start) == (rule.strength, rule.start)
    if not same or (own_gate is None) != (gate is None):
        raise ArtifactError(
            f"{folder}: carries rule {own.fingerprint[:12]}; expected {rule.fingerprint[:12]}, which is evaluated; "
            "export that one"
        )
