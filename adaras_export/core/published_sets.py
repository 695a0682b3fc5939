"""Neuron files of the reference code (github.com/cat-sk/AdaRAS), and the questions of its published sets."""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

from adaras_export.errors import RuleError
from adaras_export.files import safe_read
from adaras_export.files.atomic import sha256
from adaras_export.files.safe_read import UnreadableError

_COLUMNS = ("overall_neuron_index", "layer", "neuron_index_in_layer", "weight")
_PLAIN = ("layer", "index", "delta")


def neuron_rows(path: Path) -> list[tuple[int, int, float]]:
    """Layer, index and delta of every row of a `top_200.csv`.

    Raises:
        RuleError: a column is missing, or a row is malformed or contradicts the others (path:line).
    """
    rows: list[tuple[int, int, float]] = []
    sizes: set[float] = set()
    try:
        reader = csv.DictReader(io.StringIO(safe_read.text(safe_read.content(path)), newline=""))
        _require_columns(path, reader.fieldnames or ())
        for row in reader:
            overall, layer, index, delta = _numbers(f"{path}:{reader.line_num}", row)
            rows.append((layer, index, delta))
            if layer:
                sizes.add((overall - index) / layer)
            if len(sizes) > 1 or (not layer and overall != index):
                raise RuleError(
                    f"{path}:{reader.line_num}: overall_neuron_index {overall} contradicts the rows above; "
                    "expected layer * neurons per layer + neuron_index_in_layer"
                )
    except (UnreadableError, csv.Error) as error:
        raise RuleError(f"{path}: {error}; expected a CSV file of the reference") from error
    if not rows:
        raise RuleError(f"{path}: has no rows; expected one neuron a row")
    return rows


def is_of_reference(path: Path) -> bool:
    """Whether the first line of a CSV file is a header of the reference code.

    Raises:
        RuleError: the file cannot be read.
    """
    return _COLUMNS[0] in next(_lines(path), [])


def plain_rows(path: Path) -> list[tuple[int, int, float]]:
    """Layer, index and delta of every row of a CSV file with these three columns, under a header or without one.

    Raises:
        RuleError: a row is not of that form (path:line), or there is none.
    """
    rows = []
    for line, row in enumerate(_lines(path), start=1):
        if not row or (line == 1 and [name.strip().lower() for name in row] == [*_PLAIN]):
            continue
        if len(row) != len(_PLAIN):
            raise RuleError(f"{path}:{line}: has {len(row)} columns; expected {', '.join(_PLAIN)}")
        rows.append(_neuron(f"{path}:{line}", row))
    if not rows:
        raise RuleError(f"{path}: has no rows; expected one neuron a row: {', '.join(_PLAIN)}")
    return rows


def _lines(path: Path) -> Iterator[list[str]]:
    try:
        yield from csv.reader(io.StringIO(safe_read.text(safe_read.content(path)), newline=""))
    except (UnreadableError, csv.Error) as error:
        raise RuleError(f"{path}: {error}; expected a CSV file of neurons") from error


def questions_of(rows: Sequence[tuple[int, int, float]]) -> tuple[str, ...]:
    """Identities of the questions that a published set of neurons was found with; empty for other sets.

    A published set is recognised by its first ten neurons, under any file name.
    """
    first = first_neurons(rows)
    known = (entry["questions"] for entry in published().values() if entry["first_neurons"] == first)
    return tuple(chain.from_iterable(known))


def first_neurons(rows: Sequence[tuple[int, int, float]]) -> str:
    """16 hex digits of SHA-256 over layer and index of the first ten neurons."""
    return sha256(json.dumps([[layer, index] for layer, index, _ in rows[:10]]).encode())[:16]


def published() -> dict[str, Any]:
    """The published sets by name: `first_neurons`, and the identities of the questions."""
    sets: dict[str, Any] = json.loads(files("adaras_export.core").joinpath("published_sets.json").read_text())
    return sets


def _require_columns(path: Path, found: Sequence[str]) -> None:
    if missing := [name for name in _COLUMNS if name not in found]:
        raise RuleError(f"{path}: columns {missing} are missing; expected {', '.join(_COLUMNS)}")
    if twice := sorted({name for name in found if found.count(name) > 1}):
        raise RuleError(f"{path}: columns {twice} are given more than once; expected each once")


def _numbers(place: str, row: Mapping[str, str]) -> tuple[int, int, int, float]:
    layer, index, delta = _neuron(place, [row[name] for name in _COLUMNS[1:]])
    overall = _neuron(place, [row[_COLUMNS[0]], "0", "0"])[0]
    return overall, layer, index, delta


def _neuron(place: str, values: Sequence[str]) -> tuple[int, int, float]:
    """Two whole numbers and one that may have a fraction."""
    try:
        layer, index, delta = int(values[0]), int(values[1]), float(values[2])
    except (TypeError, ValueError) as error:
        raise RuleError(f"{place}: {error}; expected numbers") from error
    if max(abs(layer), abs(index)) >= 1 << 53 or not math.isfinite(delta):
        raise RuleError(f"{place}: holds NaN, infinity or a number of more than 53 bits; expected those of a neuron")
    return layer, index, delta
