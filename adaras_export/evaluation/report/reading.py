"""The files that a report is made of: evaluations, and what `tune` and `gate` print of how the rule was made."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaras_export.errors import ArtifactError
from adaras_export.evaluation.record import LARGEST, Evaluation, evaluation_from_record
from adaras_export.files import safe_read
from adaras_export.files.safe_read import UnreadableError

_MOST_FIGURES = 20


@dataclass(frozen=True)
class TuningSummary:
    """What `tune` tried on validation questions: (setting, questions, accuracy) of each, no steering first."""

    file: str
    rule: str
    settings: tuple[tuple[str, int, float], ...]


@dataclass(frozen=True)
class GateSummary:
    """The figures that `gate` printed, by name."""

    file: str
    figures: Mapping[str, str]


Source = Evaluation | TuningSummary | GateSummary


def read(path: Path) -> Source:
    """The evaluation, the tuning or the gate in a JSON file.

    Raises:
        ArtifactError: the file is none of these, or its figures contradict each other.
    """
    try:
        return _source(path.name, safe_read.parsed(safe_read.content(path, LARGEST)))
    except UnreadableError as error:
        raise ArtifactError(f"{path}: {error}; expected JSON of adaras-export eval, tune or gate") from error


def _source(file: str, record: Any) -> Source:  # noqa: ANN401 - a JSON value
    if not isinstance(record, dict):
        raise UnreadableError(f"holds a {type(record).__name__}")
    if "verdicts" in record:
        return evaluation_from_record(record)
    if "arms" in record and "strength" in record:
        return TuningSummary(file, _of(record, "rule", str), tuple(map(_setting, _of(record, "arms", list))))
    if "auc" in record:
        figures = {key: in_words(value)[:300] for key, value in record.items() if not isinstance(value, dict)}
        return GateSummary(file, dict([*figures.items()][:_MOST_FIGURES]))
    raise UnreadableError("has no verdicts")


def _setting(arm: Any) -> tuple[str, int, float]:  # noqa: ANN401 - a JSON value
    if not isinstance(arm, dict):
        raise UnreadableError("has a setting that is no object")
    accuracy = _of(arm, "accuracy", int | float)
    if not 0 <= accuracy <= 1:
        raise UnreadableError(f"has {accuracy:g} for accuracy, where there should be a share")
    return _of(arm, "name", str), _of(arm, "questions", int), float(accuracy)


def _of(record: Mapping[str, Any], key: str, kind: Any) -> Any:  # noqa: ANN401 - of that kind
    value = record.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UnreadableError(f"has {str(value)[:80]!r} for {key}, where there should be a {kind}")
    return value


def in_words(value: Any) -> str:  # noqa: ANN401 - a JSON value
    """A JSON value on one line; what is null is left out of objects."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {in_words(part)}" for key, part in value.items() if part is not None)
    if isinstance(value, list):
        return ", ".join(map(in_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
