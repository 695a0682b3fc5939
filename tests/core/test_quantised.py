"""Columns of quantised weights from hand-made tensors, and the formats and files that are refused.

What the quantisers themselves write is in tests/exporters/test_quantised.py.
"""

import json
from copy import deepcopy

import pytest
import quantised as toys
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from adaras_export.core import quantised, quantised_columns
from adaras_export.core.base_model import BaseModel
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.quantised_columns import Linear
from adaras_export.errors import ArtifactError, UnsupportedModelError

INDEX = torch.tensor([5, 0, 127, 64, 47, 5])


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def columns(settings, parts, shape=(64, 128)):
    form = quantised.format_of({"quantization_config": settings}, "base")
    return form.columns(Linear("base: down", shape, parts), INDEX)


@pytest.mark.parametrize("block", [(32, 32), (64, 32), (128, 128)], ids=str)
def test_fp8_columns_are_those_of_transformers(block):
    """A matrix that is smaller than a block is one block."""
    smaller = tuple(map(min, block, (64, 128)))
    parts = toys.fp8_parts(drawn(64, 128), smaller)
    expected = Fp8Dequantize(None)._dequantize_one(*parts.values(), output_dtype=torch.float32)
    assert torch.equal(columns(toys.FP8 | {"weight_block_size": [*block]}, parts), expected[:, INDEX])


def test_mxfp4_columns_are_those_of_transformers():
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 64, 4, 16), generator=draw, dtype=torch.uint8)
    scales = torch.randint(118, 136, (3, 64, 4), generator=draw, dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # (experts, M, D)
    for expert in range(3):
        found = quantised_columns.mxfp4(blocks[expert], scales[expert], INDEX)
        assert torch.equal(found, expected[expert, INDEX].T)


@pytest.mark.parametrize(
    ("blocks", "scales"),
    [
        (torch.zeros(64, 4, 16, dtype=torch.uint8), torch.zeros(64, 3, dtype=torch.uint8)),
        (torch.zeros(64, 4, 16, dtype=torch.uint8), torch.zeros(64, 4)),
        (torch.zeros(64, 64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)),
    ],
)
def test_mxfp4_tensors_that_do_not_fit_are_refused(blocks, scales):
    with pytest.raises(
        ArtifactError, match=r"MXFP4 blocks and scales: are torch.uint8 .*; expected torch.uint8 \[D, G"
    ):
        quantised_columns.mxfp4(blocks, scales, INDEX)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, None), (8, None), (8, 64)])
def test_packed_integers_are_unpacked(bits, group):
    weight, step = drawn(64, 128), group or 128
    parts = toys.packed_parts(weight, bits, group)
    scale_DM = parts["weight_scale"].repeat_interleave(step, 1)
    settings = toys.compressed("pack-quantized", toys.weights(bits, "group" if group else "channel", group))
    found = columns(settings, parts)
    assert torch.equal(
        (found / scale_DM[:, INDEX]).round(), (weight / scale_DM).round()[:, INDEX].clamp(max=(1 << bits - 1) - 1)
    )
    assert float((found - weight[:, INDEX]).abs().max()) <= float(scale_DM.max()) / 2 * 1.001


# What is refused, by its name.

WEIGHTS = toys.weights(4, "group", 32)
UNKNOWN = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "aqlm": {"quant_method": "aqlm"},
    "hqq": {"quant_method": "hqq"},
    "mxfp4": {"quant_method": "mxfp4"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "None": {"bits": 4},
    "['fp8']": {"quant_method": ["fp8"]},
    "fp8 with weight_block_size None": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "fp8 with weight_block_size [128]": {**toys.FP8, "weight_block_size": [128]},
    "fp8 with weight_block_size [128, 0]": {**toys.FP8, "weight_block_size": [128, 0]},
    "fp8 with activation_scheme 'static'": {**toys.FP8, "activation_scheme": "static"},
    "symmetric False": toys.compressed("pack-quantized", {**WEIGHTS, "symmetric": False}),
    "actorder 'group'": toys.compressed("pack-quantized", {**WEIGHTS, "actorder": "group"}),
    "compressed-tensors int4 by group, marlin-24": toys.compressed("marlin-24", WEIGHTS),
    "compressed-tensors FP8 by tensor": toys.compressed("float-quantized", toys.weights(8, "tensor", kind="float")),
    "compressed-tensors int3 by group": toys.compressed("pack-quantized", toys.weights(3, "group", 32)),
    "nvfp4-pack-quantized": toys.compressed("nvfp4-pack-quantized", toys.weights(4, "tensor_group", 16, kind="float")),
    "transform_config": {
        **toys.compressed("pack-quantized", WEIGHTS),
        "transform_config": {"config_groups": {}, "x": 1},
    },
    "quantization_status 'frozen'": {**toys.compressed("pack-quantized", WEIGHTS), "quantization_status": "frozen"},
    "without config_groups": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "without settings of the weights": toys.compressed("pack-quantized", None),
    "bitsandbytes with load_in_4bit or load_in_8bit: [4], 'int4'": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "int4",
    },
    "bitsandbytes with load_in_4bit or load_in_8bit: [], None": {"quant_method": "bitsandbytes"},
    "torchao 'Int4WeightOnlyConfig'": {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}},
    },
    "torchao {'re:down': 1}": {"quant_method": "torchao", "quant_type": {"re:down": 1}},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_format_that_was_not_tried_is_refused_by_name(name):
    with pytest.raises(UnsupportedModelError) as caught:
        quantised.format_of({"quantization_config": UNKNOWN[name]}, "base")
    assert name in str(caught.value)
    assert "; expected plain weights, or a format that was tried: fp8 in blocks; compressed-" in str(caught.value)


def test_groups_of_several_formats_are_refused_and_groups_of_one_are_read():
    settings = toys.compressed("pack-quantized", WEIGHTS)
    groups = settings["config_groups"]
    groups["group_1"] = {**deepcopy(groups["group_0"]), "targets": ["re:.*down_proj"]}
    expected = "compressed-tensors int4 by group"
    assert quantised.format_of({"quantization_config": settings}, "base").name == expected
    groups["group_1"]["weights"]["group_size"] = 64
    with pytest.raises(UnsupportedModelError, match="compressed-tensors in 2 formats, one for each group of layers"):
        quantised.format_of({"quantization_config": settings}, "base")


@pytest.mark.parametrize("value", [None, ...])
def test_a_config_without_quantisation_is_plain(value):
    assert quantised.format_of({} if value is ... else {"quantization_config": value}, "base") is None


# Damaged files: the settings of a format, its tensors, what is wrong with them, and the message.

FP8 = toys.fp8_parts(drawn(64, 128), (32, 32))
PACKED = toys.packed_parts(drawn(64, 128), 4, 32)
NF4, INT8, TORCHAO = toys.NF4, toys.INT8, toys.TORCHAO
DAMAGED = {
    "no scale": (toys.FP8, FP8, {"weight_scale_inv": None}, "tensors missing or unknown: weight_scale_inv"),
    "static": (toys.FP8, FP8, {"activation_scale": torch.ones(1)}, "missing or unknown: activation_scale"),
    "scales": (toys.FP8, FP8, {"weight_scale_inv": torch.ones(2, 3)}, r"is float32 \[2, 3\]; expected .*\[2, 4\]"),
    "scale type": (toys.FP8, FP8, {"weight_scale_inv": torch.ones(2, 4).byte()}, "weight_scale_inv: is uint8"),
    "short": (toys.FP8, FP8, {"weight": FP8["weight"][:32]}, r"weight: is float8_e4m3fn \[32, 128\]; expected"),
    "uneven": (toys.FP8 | {"weight_block_size": [48, 32]}, FP8, {}, "expected multiples of the blocks"),
    "zero point": (
        toys.compressed("pack-quantized", WEIGHTS),
        PACKED,
        {"weight_zero_point": torch.zeros(8, 4).int()},
        "missing or unknown: weight_zero_point",
    ),
    "act order": (toys.compressed("pack-quantized", WEIGHTS), PACKED, {"weight_g_idx": INDEX}, "weight_g_idx"),
    "lying shape": (
        toys.compressed("pack-quantized", WEIGHTS),
        PACKED,
        {"weight_shape": torch.tensor([64, 120])},
        r"weight_shape: is \[64, 120\]; expected \[64, 128\]",
    ),
    "narrow": (
        toys.compressed("pack-quantized", WEIGHTS),
        PACKED,
        {"weight_packed": PACKED["weight_packed"][:, :8]},
        r"is int32 \[64, 8\]; expected int32 \[64, 16\]",
    ),
    "group": (
        toys.compressed("pack-quantized", toys.weights(4, "group", 48)),
        PACKED,
        {},
        "expected a multiple of the groups of 48",
    ),
    "layout": (toys.INT8_SETTINGS, INT8, {"weight_format": torch.tensor(1).byte()}, "weight_format: is 1; expected 0"),
    "SCB": (toys.INT8_SETTINGS, INT8, {"SCB": torch.ones(63)}, r"SCB: is float32 \[63\]"),
    "state": (
        toys.NF4_SETTINGS,
        NF4,
        {toys.STATE: toys.as_bytes("{")},
        "is not JSON .*; expected the settings of bits",
    ),
    "list": (toys.NF4_SETTINGS, NF4, {toys.STATE: toys.as_bytes("[1]")}, r"is \[1\]; expected shape"),
    "other shape": (
        toys.NF4_SETTINGS,
        NF4,
        {toys.STATE: toys.as_bytes(json.dumps({**toys.NF4_STATE, "shape": [128, 64]}))},
        r"expected shape \[64, 128\]",
    ),
    "blocksize": (
        toys.NF4_SETTINGS,
        NF4,
        {toys.STATE: toys.as_bytes(json.dumps({**toys.NF4_STATE, "blocksize": 0}))},
        "a block size",
    ),
    "map": (toys.NF4_SETTINGS, NF4, {"weight.quant_map": torch.ones(15)}, r"quant_map: is float32 \[15\]"),
    "nested": (toys.NF4_SETTINGS, NF4, {"weight.nested_absmax": torch.ones(1)}, "unknown: weight.nested_quant_map"),
    "offset": (
        toys.NF4_SETTINGS,
        NF4,
        {
            "weight.nested_absmax": torch.ones(1),
            "weight.nested_quant_map": torch.ones(256),
            toys.STATE: toys.as_bytes(json.dumps({**toys.NF4_STATE, "nested_blocksize": 256, "nested_offset": "x"})),
        },
        "nested_offset is 'x'; expected a fraction",
    ),
    "qdata": (toys.TORCHAO_SETTINGS, TORCHAO, {"_weight_qdata": torch.zeros(64, 64).char()}, "_weight_qdata: is int8"),
    "group scale": (toys.TORCHAO_SETTINGS, TORCHAO, {"_weight_scale": torch.ones(64, 4)}, "_weight_scale: is float32"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_tensors_are_refused(name):
    settings, parts, changes, message = DAMAGED[name]
    if changes:
        columns(settings, parts)  # they are right before
    damaged = {key: value for key, value in {**parts, **changes}.items() if value is not None}
    with pytest.raises(ArtifactError, match=message):
        columns(settings, damaged)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("fp8")
    return toys.fp8(toys.base(root / "plain"), root / "fp8")


def test_layers_that_are_left_out_are_plain(folder):
    plain = load_file(folder.parent / "plain" / "model.safetensors")[f"{toys.LEFT_OUT}.weight"]
    assert torch.equal(Checkpoint(folder).down_columns(3, INDEX), plain[:, INDEX])
    quantised_columns = Checkpoint(folder).down_columns(2, INDEX)
    assert quantised_columns.dtype == torch.float32


def test_sizes_of_a_quantised_base_come_from_its_config(folder):
    base = BaseModel.of(folder)
    assert (base.layers, base.mlp_size, base.hidden_size) == (4, toys.MLP_SIZE, toys.WIDTH)


def test_quantised_tensors_without_a_quantization_config_are_refused(folder, tmp_path):
    """Configs of before 2024 have compression_config, which Transformers does not read."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["compression_config"] = config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ArtifactError, match=r"F8_E4M3 \[64, 128\]; expected one plain weight \[64, 128\], or a quantization_c"
    ):
        Checkpoint(tmp_path).down_columns(2, INDEX)
    tensors = load_file(folder / "model.safetensors")
    name = f"{toys.LEFT_OUT}.weight"
    save_file({**tensors, f"{name}_scale_inv": torch.ones(2, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"has .*weight_scale_inv, F32 \[64, 128\]; expected one plain weight"):
        Checkpoint(tmp_path).down_columns(3, INDEX)


def test_a_plain_layer_of_another_shape_is_refused(folder, tmp_path):
    """The shapes of quantised checkpoints are compared nowhere else."""
    tensors = load_file(folder / "model.safetensors")
    name = f"{toys.LEFT_OUT}.weight"
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({**tensors, name: tensors[name][:, :100].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"F32 \[64, 100\]; expected one plain weight \[64, 128\]"):
        Checkpoint(tmp_path).down_columns(3, INDEX)
