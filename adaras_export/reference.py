"""Files of the reference code (github.com/cat-sk/AdaRAS), read without it."""

import csv
from pathlib import Path

from adaras_export.errors import RuleError


def neuron_rows(path: Path) -> list[tuple[int, int, float]]:
    """Layer, index and delta of every row of a `top_200.csv`.

    Raises:
        RuleError: a column is missing, or a row is not of that form or contradicts the others (path:line).
    """
    columns = ("overall_neuron_index", "layer", "neuron_index_in_layer", "weight")
    rows, sizes = [], set()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
                raise RuleError(f"{path}: columns {missing} are missing; expected {', '.join(columns)}")
            for row in reader:
                try:
                    overall, layer, index = (int(row[name]) for name in columns[:3])
                    delta = float(row["weight"])
                except (TypeError, ValueError) as error:
                    raise RuleError(f"{path}:{reader.line_num}: {error}; expected numbers") from error
                rows.append((layer, index, delta))
                if layer:
                    sizes.add((overall - index) / layer)
                if len(sizes) > 1 or (not layer and overall != index):
                    raise RuleError(
                        f"{path}:{reader.line_num}: overall_neuron_index {overall} contradicts the rows above; "
                        "expected layer * neurons per layer + neuron_index_in_layer"
                    )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RuleError(f"{path}: {error}; expected a CSV file of the reference") from error
    if not rows:
        raise RuleError(f"{path}: has no rows; expected one neuron a row")
    return rows
