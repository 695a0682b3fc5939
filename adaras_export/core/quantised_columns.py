"""Columns of quantised down projections, from the tensors that quantisers write; knows no config and no layer.

Only the chosen columns are dequantised, with the arithmetic of each format's own library: the values are equal to those
that the library computes. The tensors are untrusted. One that a format does not have is refused, since it would be a
setting that nobody has looked at.

D model width, M MLP neurons, K chosen neurons, G blocks or groups, B bytes of a block.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaras_export.errors import ArtifactError
from adaras_export.files import safe_read
from adaras_export.files.safe_read import UnreadableError

if TYPE_CHECKING:
    from torch import Tensor

_REAL = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Linear:
    """The stored tensors of one linear map from M to D.

    Attributes:
        subject: folder and module, for messages.
        shape: (D, M), as config.json says.
        parts: the tensors by name below the module, such as "weight" and "weight_scale"; without the bias.
    """

    subject: str
    shape: tuple[int, int]
    parts: Mapping[str, "Tensor"]

    def require_parts(self, *names: str) -> None:
        """Refuse a missing or an unknown tensor.

        Raises:
            ArtifactError: there is one.
        """
        if wrong := sorted(self.parts.keys() ^ {*names}):
            raise ArtifactError(
                f"{self.subject}: tensors missing or unknown: {', '.join(wrong)}; expected {', '.join(names)}"
            )

    def part(self, name: str, dtypes: str | tuple[str, ...], *shape: int) -> "Tensor":
        """A tensor of one of these types, by their names in PyTorch, and of this shape.

        Raises:
            ArtifactError: it has another type or shape.
        """
        tensor = self.parts[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        allowed = (dtypes,) if isinstance(dtypes, str) else dtypes
        if dtype not in allowed or tensor.shape != shape:
            raise ArtifactError(
                f"{self.subject}.{name}: is {dtype} {[*tensor.shape]}; expected {' or '.join(allowed)} {[*shape]}"
            )
        return tensor


def fp8_blocks(block: tuple[int, int], linear: Linear, index_K: "Tensor") -> "Tensor":
    """FP8 (E4M3) with a scale for each block of rows and columns."""
    import torch

    linear.require_parts("weight", "weight_scale_inv")
    # Transformers divides the rows evenly among the scales on a CPU; kernels take blocks of the size in the config.
    if [size for size, length in zip(linear.shape, block, strict=True) if size > length and size % length]:
        raise ArtifactError(f"{linear.subject}: is {[*linear.shape]}; expected multiples of the blocks {[*block]}")
    scale_GG = linear.part("weight_scale_inv", _REAL, *map(_count, linear.shape, block))
    weight_DM = linear.part("weight", "float8_e4m3fn", *linear.shape)
    scale_DK = scale_GG.float()[torch.arange(linear.shape[0]) // block[0]][:, index_K // block[1]]
    return weight_DM[:, index_K].float() * scale_DK


def rows(dtype: str, linear: Linear, index_K: "Tensor") -> "Tensor":
    """Numbers of one type with a scale for each row."""
    linear.require_parts("weight", "weight_scale")
    scale_D1 = linear.part("weight_scale", _REAL, linear.shape[0], 1)
    return linear.part("weight", dtype, *linear.shape)[:, index_K].float() * scale_D1.float()


def packed(bits: int, group: int | None, linear: Linear, index_K: "Tensor") -> "Tensor":
    """Integers packed into int32, the first in the lowest bits; a scale for each group of a row, None: for the row."""
    import torch

    linear.require_parts("weight_packed", "weight_scale", "weight_shape")
    (height, width), each = linear.shape, 32 // bits
    size = group or width
    if width % size:
        raise ArtifactError(f"{linear.subject}: has {width} columns; expected a multiple of the groups of {size}")
    if (shape := linear.part("weight_shape", ("int64", "int32"), 2).tolist()) != [height, width]:
        raise ArtifactError(f"{linear.subject}.weight_shape: is {shape}; expected {[height, width]}")
    scale_DG = linear.part("weight_scale", _REAL, height, width // size)
    word_DK = linear.part("weight_packed", "int32", height, _count(width, each))[:, index_K // each]
    shift_K = (index_K % each * bits).to(torch.int32)
    value_DK = (word_DK >> shift_K & (1 << bits) - 1) - (1 << bits - 1)
    return value_DK.float() * scale_DG.float()[:, index_K // size]


def bitsandbytes_int8(linear: Linear, index_K: "Tensor") -> "Tensor":
    """int8 with the largest absolute value of each row."""
    linear.require_parts("weight", "SCB", "weight_format")
    if layout := int(linear.part("weight_format", "uint8")):
        raise ArtifactError(f"{linear.subject}.weight_format: is {layout}; expected 0, rows one after the other")
    largest_D = linear.part("SCB", "float32", linear.shape[0])
    return linear.part("weight", "int8", *linear.shape)[:, index_K] * largest_D[:, None] * _INT8


_INT8 = 7.874015718698502e-3  # 1 / 127 in float32, as bitsandbytes has it


def bitsandbytes_4bit(kind: str, linear: Linear, index_K: "Tensor") -> "Tensor":
    """Codes of a table, in pairs, the first in the high bits; a scale for each block of the flattened matrix."""
    import torch

    state, (height, width) = _state(kind, linear), linear.shape
    place_DK = torch.arange(height)[:, None] * width + index_K
    byte_DK = linear.part("weight", "uint8", _count(height * width, 2), 1)[place_DK // 2, 0]
    code_DK = torch.where(place_DK % 2 == 0, byte_DK >> 4, byte_DK & 15).long()
    value_DK = linear.part("weight.quant_map", "float32", 16)[code_DK]
    value_DK = value_DK * _largest(linear, state)[place_DK // state["blocksize"]]
    return value_DK.to(getattr(torch, state["dtype"])).float()


def _state(kind: str, linear: Linear) -> dict[str, Any]:
    """The settings that bitsandbytes stores as JSON in a tensor."""
    name, nested = f"weight.quant_state.bitsandbytes__{kind}", "weight.nested_absmax" in linear.parts
    more = ("weight.nested_absmax", "weight.nested_quant_map") if nested else ()
    linear.require_parts("weight", "weight.absmax", "weight.quant_map", name, *more)
    try:
        state = safe_read.parsed(bytes(linear.part(name, "uint8", linear.parts[name].numel()).tolist()))
    except UnreadableError as error:
        raise ArtifactError(f"{linear.subject}.{name}: {error}; expected the settings of bitsandbytes") from error
    found = state if isinstance(state, dict) else {}
    sizes = [found.get(key) for key in ("blocksize", "nested_blocksize")[: 1 + nested]]
    is_whole = all(type(size) is int and size > 0 for size in sizes)
    if found.get("shape") != [*linear.shape] or found.get("dtype") not in _REAL or not is_whole:
        raise ArtifactError(
            f"{linear.subject}.{name}: is {reprlib.repr(state)}; expected shape {[*linear.shape]}, a block size, and a "
            f"dtype of {', '.join(_REAL)}"
        )
    return found


def _largest(linear: Linear, state: Mapping[str, Any]) -> "Tensor":
    """The largest absolute value of each block, float32; with double quantisation it is stored in blocks, too."""
    blocks = _count(math.prod(linear.shape), state["blocksize"])
    if "weight.nested_absmax" not in linear.parts:
        return linear.part("weight.absmax", "float32", blocks)
    size, offset = state["nested_blocksize"], state.get("nested_offset")
    if not isinstance(offset, float):
        raise ArtifactError(f"{linear.subject}: nested_offset is {reprlib.repr(offset)}; expected a fraction")
    code_G = linear.part("weight.absmax", "uint8", blocks).long()
    share_G = linear.part("weight.nested_quant_map", "float32", 256)[code_G]
    scale_G = linear.part("weight.nested_absmax", "float32", _count(blocks, size)).repeat_interleave(size)[:blocks]
    return share_G * scale_G + offset


def torchao_int8(linear: Linear, index_K: "Tensor") -> "Tensor":
    """int8 with a zero point and a scale for each row."""
    linear.require_parts("_weight_qdata", "_weight_scale", "_weight_zero_point")
    height = linear.shape[0]
    zero_D1 = linear.part("_weight_zero_point", "int8", height, 1)
    scale_D1 = linear.part("_weight_scale", _REAL, height, 1)
    value_DK = linear.part("_weight_qdata", "int8", *linear.shape)[:, index_K]
    return (value_DK.float() - zero_D1.float()) * scale_D1.float()


def mxfp4(blocks_DGB: "Tensor", scales_DG: "Tensor", index_K: "Tensor") -> "Tensor":
    """Columns (D, K) float32 of the down projection of one expert in MXFP4, as gpt_oss stores it.

    ``blocks_DGB`` are bytes of two numbers of four bits, the first in the low bits. ``scales_DG`` are exponents plus
    127, one for each block of 2 * B neurons.

    Raises:
        ArtifactError: a tensor has another type, or they do not fit each other.
    """
    import torch

    types, shape = {blocks_DGB.dtype, scales_DG.dtype}, blocks_DGB.shape
    if types != {torch.uint8} or len(shape) != 3 or scales_DG.shape != shape[:2]:
        found = " and ".join(f"{tensor.dtype} {[*tensor.shape]}" for tensor in (blocks_DGB, scales_DG))
        raise ArtifactError(f"MXFP4 blocks and scales: are {found}; expected torch.uint8 [D, G, B] and [D, G]")
    size = 2 * shape[2]
    byte_DK = blocks_DGB[:, index_K // size, index_K % size // 2]
    code_DK = torch.where(index_K % 2 == 0, byte_DK & 15, byte_DK >> 4).long()
    exponent_DK = scales_DG[:, index_K // size].int() - 127
    return torch.ldexp(torch.tensor(_E2M1)[code_DK], exponent_DK)


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _count(size: int, length: int) -> int:
    """The number of blocks of a length that hold ``size`` numbers."""
    return -(-size // length)
