"""From files to one file: the order of the work, and the format that a name asks for."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaras_export.core.intervals import require_statistics
from adaras_export.errors import ArtifactError
from adaras_export.evaluation.report.blocks import Report
from adaras_export.evaluation.report.document import report
from adaras_export.evaluation.report.figures import Result, result_of, sentence, transfer_of
from adaras_export.evaluation.report.markdown import markdown
from adaras_export.evaluation.report.page import page
from adaras_export.evaluation.report.reading import Recorded, read
from adaras_export.files.atomic import replace_file

SUFFIXES = (".html", ".md", ".json")
_VERSION = 1


@dataclass(frozen=True)
class Made:
    """A report, as blocks, as JSON values, and as a line for every evaluation."""

    report: Report
    record: dict[str, Any]
    lines: tuple[str, ...]


def made_of(paths: Sequence[Path]) -> Made:
    """The report of these files.

    Raises:
        ArtifactError: one cannot be read, none is an evaluation, or two are of the same rule and questions.
        MissingExtraError: SciPy is not installed.
    """
    require_statistics()
    sources = [read(path) for path in paths]
    results = [result_of(one) for one in sources if isinstance(one, Recorded)]
    others = [one for one in sources if not isinstance(one, Recorded)]
    if not results:
        raise ArtifactError(f"{', '.join(map(str, paths))}: no evaluation; expected a file of adaras-export eval")
    transfer = transfer_of(results) if len(results) > 1 else None
    record = {
        "version": _VERSION,
        "evaluations": [result.as_record() for result in results],
        **({} if transfer is None else {"transfer": transfer.as_record()}),
        "made": [{"file": one.file, **_settings(one)} for one in others],
    }
    return Made(report(results, transfer, others), record, tuple(map(_line, results)))


def _settings(one: Any) -> dict[str, Any]:  # noqa: ANN401 - Tried or Gated
    values = {key: value for key, value in vars(one).items() if key != "file"}
    return {key: [*map(list, value)] if isinstance(value, tuple) else value for key, value in values.items()}


def _line(result: Result) -> str:
    return f"{result.recorded.file}, {result.lead.name}: {sentence(result)}"


def require_format(path: Path) -> None:
    """Refuse a name that ends with none of the formats.

    Raises:
        ArtifactError: it does.
    """
    if path.suffix not in SUFFIXES:
        raise ArtifactError(
            f"{path}: names no format of a report; expected a name that ends with {', '.join(SUFFIXES)}"
        )


def written(made: Made, path: Path) -> None:
    """Write the format that the name ends with; see `require_format`.

    Raises:
        ArtifactError: the file cannot be written.
    """
    if path.suffix == ".json":
        text = json.dumps(made.record, indent=1, sort_keys=True, allow_nan=False) + "\n"
    else:
        text = markdown(made.report) if path.suffix == ".md" else page(made.report)
    replace_file(path, text.encode())
