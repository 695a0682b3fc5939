"""The formats of quantised checkpoints whose columns are read, by quantization_config; others are refused by name.

Knows no tensor: `quantised_columns` reads them.
"""

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from adaras_export.core import quantised_columns
from adaras_export.core.quantised_columns import Linear
from adaras_export.errors import UnsupportedModelError, require

if TYPE_CHECKING:
    from torch import Tensor

PLAIN = frozenset({"F64", "F32", "BF16", "F16"})
"""Types of weights that are not quantised, by their names in safetensors files."""


@dataclass(frozen=True)
class Format:
    """A way of storing weights that was tried.

    Attributes:
        name: as messages and cards have it.
        library: the module that Transformers needs to open it.
        weight: the tensor that holds the numbers, by its name below the linear map.
        columns: (linear map, index of K neurons) -> the columns (D, K), float32.
        rounded: what its kernels round besides the stored weights: "activations", "weights", or "" for nothing.
    """

    name: str
    library: str
    weight: str
    columns: Callable[[Linear, "Tensor"], "Tensor"]
    rounded: str = ""


def format_of(config: Mapping[str, Any], subject: str) -> Format | None:
    """The format of the weights that a config.json describes; None if they are plain.

    Raises:
        UnsupportedModelError: the format was not tried.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if not isinstance(method, str) or method not in _METHODS:
        _refuse(subject, reprlib.repr(method))
    return _METHODS[method](settings, subject)


def required(config: Mapping[str, Any], subject: str) -> Format | None:
    """`format_of` a config, after importing the library that opens the format.

    Raises:
        MissingExtraError: it is not installed.
        UnsupportedModelError: the format was not tried.
    """
    stored = format_of(config, subject)
    if stored is not None:
        require(stored.library, "quantize", f"a base in {stored.name}")
    return stored


def _refuse(subject: str, found: str) -> NoReturn:
    raise UnsupportedModelError(
        f"{subject}: is quantised by {found}; expected plain weights, or a format that was tried: {_TRIED}; take "
        "another checkpoint of the model"
    )


def _fp8(settings: Mapping[str, Any], subject: str) -> Format:
    block, scheme = settings.get("weight_block_size"), settings.get("activation_scheme")
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        _refuse(subject, f"fp8 with weight_block_size {reprlib.repr(block)}")
    if scheme != "dynamic":
        _refuse(subject, f"fp8 with activation_scheme {reprlib.repr(scheme)}")
    return Format("FP8 in blocks", "accelerate", "weight", partial(quantised_columns.fp8_blocks, tuple(block)))


def _compressed(settings: Mapping[str, Any], subject: str) -> Format:
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        _refuse(subject, "compressed-tensors without config_groups")
    schemes = {_scheme(settings, group, subject) for group in groups.values()}
    if len(schemes) > 1:
        _refuse(subject, f"compressed-tensors in {len(schemes)} formats, one for each group of layers")
    form, kind, bits, strategy, size, activations = schemes.pop()
    name = f"compressed-tensors {'FP8' if kind == 'float' else f'int{bits}'} by {strategy}"
    columns = {
        ("pack-quantized", "int", 4): partial(quantised_columns.packed, 4, size),
        ("pack-quantized", "int", 8): partial(quantised_columns.packed, 8, size),
        ("int-quantized", "int", 8): partial(quantised_columns.rows, "int8"),
        ("float-quantized", "float", 8): partial(quantised_columns.rows, "float8_e4m3fn"),
    }.get((form, kind, bits))
    is_grouped = strategy == "group" and form == "pack-quantized" and type(size) is int and size > 0
    if columns is None or not (is_grouped or (strategy == "channel" and size is None)):
        _refuse(subject, f"{name}, {form}, in groups of {size}")
    weight = "weight_packed" if form == "pack-quantized" else "weight"
    return Format(name, "compressed_tensors", weight, columns, "activations" if activations else "")


def _scheme(settings: Mapping[str, Any], group: Any, subject: str) -> tuple[Any, ...]:  # noqa: ANN401 - JSON
    """How a group of layers is stored: format, type, bits, strategy, group size, whether activations are rounded."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        _refuse(subject, "compressed-tensors without settings of the weights")
    # In the other orders, the columns of a group are not stored beside each other.
    odd = {"symmetric": (True,), "actorder": (None, "static", "weight"), "dynamic": (None, False)}
    if wrong := [
        f"{key} {reprlib.repr(weights.get(key))}" for key, known in odd.items() if weights.get(key) not in known
    ]:
        _refuse(subject, f"compressed-tensors with {', '.join(wrong)}")
    if more := [key for key in ("sparsity_config", "transform_config") if settings.get(key)]:
        _refuse(subject, f"compressed-tensors with {', '.join(more)}")
    if (status := settings.get("quantization_status", "compressed")) != "compressed":  # then weights are rounded anew
        _refuse(subject, f"compressed-tensors with quantization_status {reprlib.repr(status)}")
    form, keys = group.get("format") or settings.get("format"), ("type", "num_bits", "strategy", "group_size")
    found = [form, *map(weights.get, keys)]
    if not all(isinstance(value, str | int | None) for value in found):
        _refuse(subject, f"compressed-tensors with {reprlib.repr(found)}")
    return (*found, bool(group.get("input_activations")))


def _bitsandbytes(settings: Mapping[str, Any], subject: str) -> Format:
    kind, library = settings.get("bnb_4bit_quant_type"), "bitsandbytes"
    bits = [n for n in (4, 8) if settings.get(f"load_in_{n}bit") is True]
    if bits == [8]:
        return Format("bitsandbytes int8", library, "weight", quantised_columns.bitsandbytes_int8, "activations")
    if bits != [4] or kind not in ("nf4", "fp4"):
        _refuse(subject, f"bitsandbytes with load_in_4bit or load_in_8bit: {bits}, {reprlib.repr(kind)}")
    columns = partial(quantised_columns.bitsandbytes_4bit, kind)
    return Format(f"bitsandbytes {kind}", library, "weight", columns, "weights")


def _torchao(settings: Mapping[str, Any], subject: str) -> Format:
    kinds = settings.get("quant_type")
    kind = kinds.get("default") if isinstance(kinds, dict) and len(kinds) == 1 else None
    name = kind.get("_type") if isinstance(kind, dict) else None
    if name != "Int8WeightOnlyConfig":
        _refuse(subject, f"torchao {reprlib.repr(name or kinds)}")
    return Format("torchao int8, weights only", "torchao", "_weight_qdata", quantised_columns.torchao_int8)


_METHODS: dict[str, Callable[[Mapping[str, Any], str], Format]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
}
_TRIED = (
    "fp8 in blocks; compressed-tensors int4, int8 or FP8, symmetric; bitsandbytes nf4, fp4 or int8; torchao int8, "
    "weights only"
)
