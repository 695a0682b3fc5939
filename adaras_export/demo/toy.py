"""A small reproducible model with random weights, and a rule for it, to check targets with."""

from pathlib import Path
from typing import Any

import numpy as np

from adaras_export.core.base_model import BaseModel
from adaras_export.core.gate import Gate
from adaras_export.core.neurons import NeuronSet
from adaras_export.core.rule import SteeringRule

_VOCABULARY, _MLP_SIZE = 64, 32
_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": _MLP_SIZE,
    "num_hidden_layers": 2,  # the gate reads the first; a control vector can steer the second only
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,  # GenAI's attention needs a multiple of 16
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}


def write_base(folder: Path) -> Path:
    """Write a checkpoint of two Llama layers, with a tokenizer, into the new ``folder``."""
    import torch
    from safetensors.numpy import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_CONFIG)
    with torch.device("meta"):  # only shapes are needed; real weights would change torch's global generator
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    draw = np.random.default_rng(0)
    # The usual deviation of 0.02 gives logits that hardly depend on the tokens.
    weights = {name: draw.normal(scale=0.3, size=shape).astype(np.float32) for name, shape in shapes.items()}
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder)
    return folder


def make_rule(base: Path) -> SteeringRule:
    """A rule with a gate and the default start, for the model of `write_base`."""
    draw = np.random.default_rng(1)
    features, hidden, count = 4, 3, 6
    gate = Gate(
        layer=np.zeros(features, int),
        index=draw.permutation(_MLP_SIZE)[:features],
        attention_weight=draw.normal(size=features),
        attention_bias=np.array(0.25),
        hidden_weight=draw.normal(size=(hidden, features)),
        hidden_bias=np.ones(hidden),  # units that are always off would check nothing
        output_weight=draw.normal(size=hidden),
        output_bias=np.array(0.1),
        threshold=0.5,
    )
    index, delta = draw.permutation(_MLP_SIZE)[:count], draw.normal(size=count) + 1
    neurons = NeuronSet(layer=np.ones(count, int), index=index, delta=delta)
    return SteeringRule(neurons=neurons, strength=2.0, base=BaseModel.of(base), gate=gate)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"word{number}": number for number in range(_VOCABULARY)}
    core = Tokenizer(WordLevel(words, unk_token="word0"))
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(tokenizer_object=core).save_pretrained(folder)
