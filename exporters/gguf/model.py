"""A GGUF model that carries the folded vectors as biases of its down projections, behind `--into`.

llama.cpp loads such a bias, which no converter writes, in its architectures `llama` and `granite`, and in none of the
others that this project knows. Everything else of the model stays as it is, byte for byte.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from adaras_export.core.base_model import BaseModel
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.folding import vectors
from adaras_export.core.rule import SteeringRule
from adaras_export.errors import ExportError
from adaras_export.exporters.checks import Check
from adaras_export.exporters.gguf import files, reader
from adaras_export.files.safetensors_record import Array

FILE = "model-steered.gguf"
BIAS = ".ffn_down.bias"
CARRIERS = ("llama", "granite")


def require_carrier(
    path: Path,
    rule: SteeringRule,
    architecture: str,
    carriers: Iterable[str] = CARRIERS,
    added: Iterable[str] = (BIAS,),
) -> None:
    """Refuse a GGUF model that is not of the base, or of an architecture that cannot carry the steering.

    Args:
        path: the model.
        rule: the rule.
        architecture: what llama.cpp calls the rule's base.
        carriers: architectures that can carry the steering.
        added: endings of tensor names that the model may not have yet.

    Raises:
        ExportError: as above.
    """
    file = reader.opened(path)
    entries = file.entries
    found = str(entries.get("general.architecture", (None, "none"))[1])
    if found != architecture or found not in carriers:
        raise ExportError(
            f"{path}: is of architecture {found}, and the base of {architecture}; expected the same, of: "
            f"{', '.join(carriers)}, where llama.cpp loads biases of the MLP; leave out --into"
        )
    if "split.count" in entries:
        raise ExportError(f"{path}: is one file of several; expected a whole model")
    shapes = {tensor.name: [*tensor.shape] for tensor in file.tensors}
    if biased := sorted(name for name in shapes if name.endswith(tuple(added))):
        raise ExportError(f"{path}: has {biased[0]} already; expected a model without: leave out --into")
    _require_sizes(path, shapes, rule.base)


def _require_sizes(path: Path, shapes: dict[str, list[int]], base: BaseModel) -> None:
    size = [base.widest, base.hidden_size]
    expected = {f"blk.{layer}.ffn_down.weight": size for layer in range(base.layers)}
    found = {name: shape for name, shape in shapes.items() if name.endswith(".ffn_down.weight")}
    if found != expected:
        sizes = " ".join(sorted({str(shape) for shape in found.values()}))
        raise ExportError(
            f"{path}: has {len(found)} down projections {sizes}; expected {base.layers} of {size}, a GGUF of {base.id}"
        )


def folded(rule: SteeringRule, base: Checkpoint) -> dict[int, Array]:
    """strength * vector of each steered layer, (D,) float32."""
    scaled = {layer: rule.strength * vector.astype(np.float64) for layer, vector in vectors(rule, base).items()}
    return {layer: vector.astype(np.float32) for layer, vector in scaled.items()}


def biases(rule: SteeringRule, base: Checkpoint) -> dict[str, Array]:
    """The tensors that are added, by name."""
    return {f"blk.{layer}{BIAS}": vector for layer, vector in folded(rule, base).items()}


def checks(path: Path, rule: SteeringRule, base: Checkpoint, content: str) -> list[Check]:
    """Compare a model with what it was written from, by `content_digest`, and its biases with the rule's."""
    expected, file = biases(rule, base), reader.opened(path)
    other = files.strange(file, expected)
    if files.content_digest(path, without=expected) != content:
        other.append("the model")
    wrong = files.differing(files.floats(file), expected)
    return [
        Check.empty("metadata or tensors of the GGUF model that differ", other),
        Check.empty("biases that differ", wrong),
        Check("tensors compared, not played: the base's weights are", len(file.tensors) - len(expected), None),
    ]


def stored_biases(path: Path) -> dict[int, Array]:
    """The biases of a model by 0-based layer."""
    found = files.floats(reader.opened(path))
    return {int(name.split(".")[1]): np.array(value) for name, value in found.items() if name.endswith(BIAS)}
