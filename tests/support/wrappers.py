"""Tiny models that read images around the decoders of `tiny`, with random weights."""

from typing import Any

import tiny
import torch
import transformers

IMAGE, START, END = 250, 251, 252  # the placeholder of an image's tokens, and what stands around it
SIDE = 16  # pixels

_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "initializer_range": 0.3}
_IDS = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": 253}
_SIGLIP = {**_TOWER, "num_hidden_layers": 2, "image_size": SIDE, "patch_size": 4}
_QWEN = {**_TOWER, "depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 1, "spatial_merge_size": 2}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}

# Name -> the decoder of `tiny.SPECS` or (model_type, settings), and what is around it.
WRAPPERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {}, {"vision_config": _SIGLIP, "mm_tokens_per_image": 4, "image_token_index": IMAGE}),
    "gemma4": (
        "gemma4_text",
        {},
        {
            "vision_config": {
                **_TOWER,
                "num_hidden_layers": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "patch_size": 4,
            },
            "image_token_id": IMAGE,
            "audio_config": None,
        },
    ),
    "mistral3": (
        "mistral",
        {},
        {
            "vision_config": {
                **_TOWER,
                "model_type": "pixtral",
                "num_hidden_layers": 2,
                "image_size": SIDE,
                "patch_size": 4,
            },
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
        },
    ),
    "qwen2_5_vl": (
        "qwen2",
        {"rope_parameters": _MROPE},
        {
            "vision_config": {
                **_QWEN,
                "out_hidden_size": tiny.HIDDEN_SIZE,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            **_IDS,
        },
    ),
    "qwen3_vl": (
        "qwen3",
        {"rope_parameters": {**_MROPE, "mrope_section": [4, 2, 2]}},
        {
            "vision_config": {
                **_QWEN,
                "out_hidden_size": tiny.HIDDEN_SIZE,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            **_IDS,
        },
    ),
    "qwen3_5": (
        "qwen3_5_text",
        {},
        {"vision_config": {**_QWEN, "out_hidden_size": tiny.HIDDEN_SIZE, "num_position_embeddings": 16}, **_IDS},
    ),
}


def build_model(name: str) -> Any:
    """A model of `WRAPPERS`, seeded; the tower and the biases are no zeros."""
    inner, more, around = WRAPPERS[name]
    family, own = tiny.SPECS[inner]
    text = {key: value for key, value in {**tiny._SIZES, **own, **more}.items() if value is not ...}
    text["model_type"] = {"qwen2": "qwen2_5_vl_text", "qwen3": "qwen3_vl_text"}.get(family, family)
    config = transformers.AutoConfig.for_model(name, text_config=text, tie_word_embeddings=False, **around)
    with torch.random.fork_rng():
        torch.manual_seed([*WRAPPERS].index(name))
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or (parameter.dim() == 1 and "norm" in parameter_name):
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def save_base(name: str, folder: Any) -> Any:
    """A checkpoint folder of a model of `WRAPPERS`, with the tokenizer of `tiny`."""
    model = build_model(name)
    model.generation_config.max_new_tokens = 6
    model.save_pretrained(folder)
    tiny.build_tokenizer().save_pretrained(folder)
    return folder


ROW = [39, 72, START, *[IMAGE] * 4, END, 71, 64, 83]
"""A prompt with an image."""


def image(name: str, seed: int) -> dict[str, torch.Tensor]:
    """A random picture, as the processor of a model gives it."""
    draw = torch.Generator().manual_seed(seed)
    if name.startswith("qwen"):  # 16 patches of 4 x 4 pixels, merged by four
        inputs = {"pixel_values": torch.randn(16, 48, generator=draw), "image_grid_thw": torch.tensor([[1, 4, 4]])}
        return {**inputs, "mm_token_type_ids": (torch.tensor([ROW]) == IMAGE).long()}
    sizes = {"image_sizes": torch.tensor([[SIDE, SIDE]])} if name == "mistral3" else {}
    return {"pixel_values": torch.randn(1, 3, SIDE, SIDE, generator=draw), **sizes}


class Seeing:
    """A model that is always given the same picture with its first tokens, for the oracle."""

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor]) -> None:
        self.config, self.model = model.config, model.model
        self._model, self._inputs = model, inputs

    def __call__(self, ids: torch.Tensor, **how: Any) -> Any:
        kinds = self._inputs.get("mm_token_type_ids")
        more = ids.shape[1] - len(ROW)  # tokens of text
        own = {} if kinds is None else {"mm_token_type_ids": torch.nn.functional.pad(kinds, (0, more))}
        return self._model(ids, **{**self._inputs, **own}, **how)
