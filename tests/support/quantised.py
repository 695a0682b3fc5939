"""Tiny quantised checkpoints: written by hand from the formats' documentation, or by the quantisers themselves.

Their down projection of layer 3 is left out of the quantisation, so that rules steer a quantised layer and a plain one.
"""

import json
import shutil

import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

WIDTH, MLP_SIZE = 64, 128  # multiples of 64, the block of 4-bit weights
LEFT_OUT = "model.layers.3.mlp.down_proj"
SKIPPED = ["lm_head", LEFT_OUT, "transformer.h.3.mlp.c_proj"]


def base(folder, name="llama"):
    """The plain checkpoint that the others are made from."""
    mlp = "n_inner" if name == "gpt2" else "intermediate_size"
    return folder if folder.exists() else tiny.save_base(name, folder, hidden_size=WIDTH, **{mlp: MLP_SIZE})


def by_hand(plain, out, settings, quantise):
    """A copy of a plain checkpoint in which ``quantise`` has replaced each linear weight, and its settings."""
    shutil.copytree(plain, out)
    tensors = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        is_linear = tensor.dim() == 2 and name.startswith("model.layers.") and not name.startswith(LEFT_OUT)
        module = name.removesuffix(".weight")
        parts = quantise(tensor) if is_linear else {"weight": tensor}
        tensors |= {f"{module}.{part}": value for part, value in parts.items()} if name != module else {name: tensor}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return out


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}


def fp8(plain, out):
    """FP8 in blocks, as DeepSeek and Qwen publish it; 128 by 128 there."""
    settings = {**FP8, "modules_to_not_convert": SKIPPED}
    return by_hand(plain, out, settings, lambda weight: fp8_parts(weight, (32, 32)))


def fp8_parts(weight, block):
    rows, columns = weight.shape
    blocks = weight.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    scale = blocks.abs().amax((1, 3)) / 448
    return {
        "weight": (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).reshape(rows, columns),
        "weight_scale_inv": scale,
    }


def compressed(form, weights, **more):
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": SKIPPED,
        "config_groups": {"group_0": {**scheme, **more}},
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def weights(bits, strategy, group=None, kind="int"):
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "group_size": group,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
    }


def compressed_packed(plain, out, bits=4, group=32):
    """compressed-tensors, integers in symmetric groups, or with a scale for each row, several to an int32."""
    settings = compressed("pack-quantized", weights(bits, "group" if group else "channel", group))
    return by_hand(plain, out, settings, lambda weight: packed_parts(weight, bits, group))


def packed_parts(weight, bits, group):
    groups, half, each = weight.unflatten(1, (-1, group or weight.shape[1])), 1 << bits - 1, 32 // bits
    scale = groups.abs().amax(2) / (half - 0.5)
    values = (groups / scale[..., None]).round().clamp(-half, half - 1).reshape(weight.shape).to(torch.int32)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    packed = ((values + half).unflatten(1, (-1, each)) << shifts).sum(2, dtype=torch.int32)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}


def compressed_int8(plain, out):
    """compressed-tensors, int8 with a scale for each row; activations are quantised as well."""
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    settings = compressed("int-quantized", weights(8, "channel"), input_activations=activations)
    return by_hand(plain, out, settings, int8_row_parts)


def int8_row_parts(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def compressed_fp8(plain, out):
    """compressed-tensors, FP8 with a scale for each row; activations are quantised as well."""
    activations = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    settings = compressed("float-quantized", weights(8, "channel", kind="float"), input_activations=activations)
    return by_hand(plain, out, settings, fp8_row_parts)


def fp8_row_parts(weight):
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def saved(plain, out, settings):
    """What Transformers writes with a quantiser of its own."""
    shutil.copytree(plain, out)
    (out / "model.safetensors").unlink()
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype="auto", quantization_config=settings)
    model.save_pretrained(out)
    return out


def nf4(plain, out, **how):
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        **{"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32, **how},
        llm_int8_skip_modules=SKIPPED,
    )
    return saved(plain, out, settings)


def int8(plain, out):
    return saved(
        plain,
        out,
        transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=SKIPPED),
    )


def torchao_int8(plain, out):
    from torchao.quantization import Int8WeightOnlyConfig

    settings = transformers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=SKIPPED)
    return saved(plain, out, settings)


def as_bytes(text):
    """A text as bitsandbytes stores its settings."""
    return torch.tensor([*text.encode()], dtype=torch.uint8)


# Settings and tensors of a linear map from 128 to 64, as bitsandbytes and torchao write them.
NF4_SETTINGS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
NF4_STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 128]}
STATE = "weight.quant_state.bitsandbytes__nf4"
NF4 = {
    "weight": torch.zeros(4096, 1, dtype=torch.uint8),
    "weight.absmax": torch.ones(128),
    "weight.quant_map": torch.linspace(-1, 1, 16),
    STATE: as_bytes(json.dumps(NF4_STATE)),
}
INT8_SETTINGS = {"quant_method": "bitsandbytes", "load_in_8bit": True}
INT8 = {
    "weight": torch.zeros(64, 128, dtype=torch.int8),
    "SCB": torch.ones(64),
    "weight_format": torch.tensor(0, dtype=torch.uint8),
}
TORCHAO_SETTINGS = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}
TORCHAO = {
    "_weight_qdata": torch.zeros(64, 128, dtype=torch.int8),
    "_weight_scale": torch.ones(64, 1),
    "_weight_zero_point": torch.zeros(64, 1, dtype=torch.int8),
}

# Name -> what writes it, the library that it takes besides the package's own, and whether its kernels round more than
# float32 sums: weights, or activations.
FORMATS = {
    "fp8": (fp8, "accelerate", False),
    "compressed-int4": (compressed_packed, "compressed_tensors", False),
    "compressed-int8-packed": (lambda plain, out: compressed_packed(plain, out, 8, None), "compressed_tensors", False),
    "compressed-int8": (compressed_int8, "compressed_tensors", True),
    "compressed-fp8": (compressed_fp8, "compressed_tensors", True),
    "nf4": (nf4, "bitsandbytes", True),
    "nf4-double": (lambda plain, out: nf4(plain, out, bnb_4bit_use_double_quant=True), "bitsandbytes", True),
    "fp4": (lambda plain, out: nf4(plain, out, bnb_4bit_quant_type="fp4"), "bitsandbytes", True),
    "int8": (int8, "bitsandbytes", True),
    "torchao": (torchao_int8, "torchao", False),
}


def opened(folder, *, run=True, **how):
    """A quantised model, and the loading report; ``run`` it where it takes a call until all weights are there."""
    auto = transformers.AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **how)
    if run and any(name.endswith("weight_scale") for name, _ in model.named_parameters()):
        with torch.no_grad():
            model(torch.tensor([[1]]))  # compressed-tensors unpacks them in the first call
    return model.eval(), {kind: names for kind, names in report.items() if names}


def weight_of(linear):
    """The weight of a linear map, dequantised by the library that opened it."""
    kind = type(linear.weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()
    if kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(linear.weight.data, linear.weight.SCB).float()
    return linear.weight.dequantize(torch.float32) if kind == "Int8Tensor" else linear.weight.detach().float()


def dequantised(folder, plain):
    """The plain model with the weights of a quantised one, as its library dequantises them."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32), opened(folder)[0]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = weight_of(found.get_submodule(name)).clone()
    return model.eval()
