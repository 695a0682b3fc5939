"""The YAML header of a model card, which the Hub reads; and the file of results that benchmarks read.

Values in, text out. What of it the Hub shows how, and what is left out for honesty, is in docs/decisions/029.
"""

from collections.abc import Mapping
from typing import Any

from adaras_export.core.base_model import BaseModel
from adaras_export.core.markdown import Markdown, as_yaml, front_matter
from adaras_export.delivery.receipt import Receipt
from adaras_export.errors import ArtifactError
from adaras_export.evaluation.arms import Arm
from adaras_export.evaluation.record import Evaluation
from adaras_export.exporters.base import TargetSpec
from adaras_export.files.hub import is_hub_id

TAGS = ("activation-steering", "adaras")
_TASK = "text-generation"
_INHERITED = ("license", "license_name", "license_link", "language")
_ORDER = (
    *_INHERITED,
    "base_model",
    "base_model_relation",
    "library_name",
    "pipeline_tag",
    "tags",
    "datasets",
    "metrics",
    "model-index",
)


def header(receipt: Receipt, target: TargetSpec, base: BaseModel, measured: tuple[Evaluation, Arm] | None) -> Markdown:
    """The header with its fences.

    Args:
        receipt: of the artifact.
        target: what it was exported to.
        base: the base model; only one with a revision is known to be on the Hub.
        measured: the evaluation, and the arm of it that the artifact computes; None where there is none.
    """
    from huggingface_hub import ModelCardData

    entries: dict[str, Any] = inherited(receipt.base_card, "base_card")
    if is_on_the_hub(base):
        entries |= {"base_model": base.id, "base_model_relation": target.relation}
        if "://" not in (link := entries.get("license_link", "://")):  # a file beside the base's card
            entries["license_link"] = f"https://huggingface.co/{base.id}/blob/{base.revision}/{link}"
    if measured is not None:
        entries |= _results(receipt.repository, *measured)
    data: Any = ModelCardData(
        **entries,
        library_name=target.library,
        pipeline_tag=_TASK,
        tags=sorted({*TAGS, *target.tags}),
        datasets=list(receipt.datasets) or None,
    )
    known = data.to_dict()
    return front_matter({name: known[name] for name in _ORDER if name in known})


def _results(repository: str, measured: Evaluation, arm: Arm) -> dict[str, Any]:
    from huggingface_hub import EvalResult

    result = EvalResult(
        task_type=_TASK,
        task_name="Text Generation",
        # The Hub wants some type; "unknown" is what Sentence Transformers write where there is none to name.
        dataset_type=measured.dataset or "unknown",
        dataset_name=measured.dataset or f"{measured.questions} questions, not published under a name",
        metric_type="accuracy",
        metric_name=f"Accuracy, {measured.decoding} ({_interval(measured, arm)})",
        metric_value=round(arm.accuracy, 6),
    )
    return {"model_name": repository, "eval_results": [result], "metrics": ["accuracy"]}


def results_file(measured: Evaluation | None, arm: Arm | None) -> str | None:
    """The file for `.eval_results`: where the questions are a task of a benchmark on the Hub; None elsewhere."""
    if measured is None or arm is None or measured.dataset is None or measured.task is None:
        return None
    notes = f"adaras-export eval, arm {arm.name}, {measured.decoding}, {_interval(measured, arm)}"
    dataset = {"id": measured.dataset, "task_id": measured.task}
    entry = {"dataset": dataset, "value": round(arm.accuracy, 6), "notes": notes}
    return as_yaml([entry])


def inherited(metadata: Mapping[str, Any], subject: str) -> dict[str, Any]:
    """What the card of a base says that ours repeats: license and languages.

    Raises:
        ArtifactError: an entry is no text.
    """
    found = {name: metadata[name] for name in _INHERITED if metadata.get(name) not in (None, "", [])}
    if "language" in found:
        listed = found["language"] if isinstance(found["language"], list) else [found["language"]]
        # YAML takes the code of Norwegian for a truth value.
        found["language"] = ["no" if one is False else one for one in listed]
    for name, value in found.items():
        if not all(isinstance(one, str) for one in (value if isinstance(value, list) else [value])):
            raise ArtifactError(f"{subject}: {name} is {value!r}; expected text")
    return found


def is_on_the_hub(base: BaseModel) -> bool:
    """Whether the base has a commit and an id that the Hub could know; the name of a folder is none."""
    return base.revision is not None and is_hub_id(base.id)


def _interval(measured: Evaluation, arm: Arm) -> str:
    return f"n = {measured.questions}, 95 % {measured.interval} interval {arm.low:.3f} to {arm.high:.3f}"
