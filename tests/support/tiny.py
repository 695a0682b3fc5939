"""Tiny real models, a real tokenizer, and rules that fit them: built from configurations, seeded."""

from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from adaras_export.core.base_model import BaseModel
from adaras_export.core.families import FAMILIES
from adaras_export.core.gate import Gate
from adaras_export.core.neurons import NeuronSet
from adaras_export.core.rule import SteeringRule
from adaras_export.modeling.generation import CACHE as CACHE

LAYERS, MLP_SIZE, HIDDEN_SIZE = 4, 48, 32
VOCABULARY = 258  # one token a byte, <pad>, <eos>
PAD, EOS = 256, 257
CONTEXT = 128

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

# Lengths 1 to 11: a prompt that is only its last token, and more tokens than the sliding window holds.
# All are printable ASCII, so that they survive being decoded and encoded: the first is "Hi!".
PROMPTS = ([39, 72, 0], [16], [54, 71, 64, 83, 0, 72, 82], [20, 3, 41, 59, 26, 53, 58, 7, 93, 38, 46])

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": MLP_SIZE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "initializer_range": 0.3,  # the usual 0.02 gives logits that hardly depend on the tokens
}

_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}

# Name -> model_type, and what this one has besides the sizes (an ellipsis: what it has not).
SPECS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"tie_word_embeddings": False, "sliding_window": None}),
    "mistral-window": ("mistral", {"tie_word_embeddings": False, "sliding_window": 4}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False, "head_dim": 16}),
    "qwen3-sharded": ("qwen3", {"tie_word_embeddings": True, "head_dim": 8}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3_text": ("gemma3_text", {"tie_word_embeddings": False, **_GEMMA}),
    "olmo2": ("olmo2", {"tie_word_embeddings": False}),
    "granite": ("granite", {"residual_multiplier": 0.7, "embedding_multiplier": 2.0, "logits_scaling": 0.5}),
    "smollm3": ("smollm3", {"tie_word_embeddings": True, "no_rope_layer_interval": 2}),
    "phi3": ("phi3", {"tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5, "num_key_value_heads": ...}),
    "gpt2": ("gpt2", {"n_inner": MLP_SIZE, "num_key_value_heads": ..., "intermediate_size": ...}),
}
NAMES = tuple(SPECS)
# One of each family, and biases: shards, and a window that is left out, are matters of files and settings.
KINDS = tuple(name for name in NAMES if name not in ("mistral", "qwen3-sharded"))
# With one layer that the gate reads and one that is steered, for what takes seconds a layer. Both kinds of attention;
# biases are those of gpt2, gpt_neox and qwen2.
SHALLOW = tuple(f"{name}-shallow" for name in KINDS if name not in ("llama", "llama-biased"))
_BOTH = {"gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]}}
for _name in sorted(SHALLOW, key="qwen3-shallow".__eq__):  # the last: places in the dict are seeds
    _type, _own = SPECS[_name.removesuffix("-shallow")]
    SPECS[_name] = (_type, {**_own, "num_hidden_layers": 2, **_BOTH.get(_type, {})})

# More families, once each. What is odd about each is switched on, and no factor is 1.
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 8}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
_LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 4}
_SLIDING, _FULL = ["sliding_attention", "full_attention"] * 2, ["linear_attention", "full_attention"] * 2
MORE_SPECS: dict[str, dict[str, Any]] = {
    "ministral3": {"head_dim": 16, "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1}},
    "seed_oss": {"head_dim": 16},
    "olmo3": {"sliding_window": 4},
    "exaone4": {"sliding_window": 4},
    "glm4": {"head_dim": 8},
    "cohere2": {"sliding_window": 4, "logit_scale": 0.5, "layer_types": _SLIDING},
    "apertus": {"rope_parameters": {**_LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    "arcee": {"attention_bias": True},
    "nemotron": {"attention_bias": True},
    "hunyuan_v1_dense": {"head_dim": 16},
    "ernie4_5": {"head_dim": 16},
    "starcoder2": {"sliding_window": 4},
    "stablelm": {"use_parallel_residual": True, "use_qkv_bias": True},
    "gemma": {"head_dim": 8},
    "olmo": {"clip_qkv": 2.0},
    "phi": {"qk_layernorm": True},
    "qwen3_5_text": {"head_dim": 16, "layer_types": _FULL, "rope_parameters": _MROPE, **_LINEAR},
    "gemma4_text": {
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 4,
        "layer_types": _SLIDING,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "final_logit_softcapping": 20.0,
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention"] * 2,
        "intermediate_size": 72,
        "block_multiple_of": 8,  # 48 of them
    },
    "lfm3": {
        "layer_types": ["conv", "sliding_attention", "full_attention", "conv"],
        "head_dim": 16,
        "sliding_window": 4,
    },
    "falcon_h1": {
        "mamba_d_ssm": 32,
        **_MAMBA,
        "mlp_multipliers": [0.7, 1.3],
        "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
        "lm_head_multiplier": 0.8,
        "key_multiplier": 0.9,
        "ssm_out_multiplier": 1.2,
        "attention_out_multiplier": 0.8,
    },
    "granitemoehybrid": {
        "num_local_experts": 0,
        "shared_intermediate_size": MLP_SIZE,
        "intermediate_size": 40,
        **_MAMBA,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 2.0,
        "logits_scaling": 0.5,
        "layer_types": _FULL,
        "attention_multiplier": 0.3,
        "position_embedding_type": "rope",
    },
}
MORE = tuple(name for name in MORE_SPECS if FAMILIES[name].since <= int(transformers.__version__.partition(".")[0]))
SPECS |= {name: (name, own) for name, own in MORE_SPECS.items()}
SPECS["cohere2-shallow"] = ("cohere2", {**MORE_SPECS["cohere2"], "num_hidden_layers": 2, "layer_types": _SLIDING[:2]})


def mostly_slow(cases: Any, quick: tuple[str, ...] = ("llama", "qwen3", "gpt2")) -> list[Any]:
    """Parameters, names of `SPECS` or keys that begin with one, of which all but those of ``quick`` are marked slow."""
    names = [case if isinstance(case, str) else case[0] for case in cases]
    marks = [() if name in quick else pytest.mark.slow for name in names]
    return [pytest.param(case, marks=mark) for case, mark in zip(cases, marks, strict=True)]


def key_id(key: Any) -> str:
    """How pytest names a key of the fixtures."""
    return key if isinstance(key, str) else "-".join(map(str, key))


# Behind a norm after the MLP, a strength of 2 would change few tokens.
STRENGTHS = {
    "gemma2": 20.0,
    "gemma3_text": 20.0,
    "olmo2": 40.0,
    "gpt2": 6.0,
    "olmo3": 80.0,
    "exaone4": 20.0,
    "gemma4_text": 20.0,
    **dict.fromkeys(("apertus", "nemotron", "gemma", "olmo", "phi", "lfm2"), 6.0),
}

# Of `logit_limit`. Its linear attention sums in another order with a cache, and in a longer batch, steered or not:
# measured 3.2, and 1.1 unsteered; one negated delta is 1000 times as much.
SLACK = {"qwen3_5_text": 8}


def build_tokenizer() -> Any:
    """Every byte is a token, so that any text survives the round trip; then <pad> and <eos>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<pad>", "<eos>"])  # in the order of PAD and EOS; Transformers would sort them by role
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_model(name: str, **changes: Any) -> Any:
    """A model of `SPECS` with random weights, seeded by its name; leaves the global generator as it was."""
    model_type, own = SPECS[name]
    settings = {key: value for key, value in {**_SIZES, **own, **changes}.items() if value is not ...}
    config = transformers.AutoConfig.for_model(model_type, **settings)
    with torch.random.fork_rng():
        torch.manual_seed([*SPECS].index(name))
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):  # they begin as zeros, which would test nothing
                torch.nn.init.normal_(parameter, std=0.1)
            elif name in MORE and parameter.dim() == 1 and "norm" in parameter_name:  # and these as ones, or zeros
                parameter.data += 0.3 * torch.randn_like(parameter)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("layer_scalar"):  # of Gemma 4, behind each layer
                buffer.fill_(0.8)
    return model.eval()


def save_base(name: str, folder: Path, **changes: Any) -> Path:
    """A checkpoint folder with tokenizer, chat template and generation settings; "-sharded" ones in several files."""
    shard = {"max_shard_size": "30KB"} if name.endswith("-sharded") else {}
    model = build_model(name, **changes)
    model.generation_config.max_new_tokens = 6
    model.save_pretrained(folder, **shard)
    build_tokenizer().save_pretrained(folder)
    settings = folder / "tokenizer_config.json"  # Transformers 5 writes a name of its own that 4.57 does not know
    settings.write_text(settings.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
    return folder


def make_neurons(seed: int = 0, layers: tuple[int, ...] = (2, 3), count: int = 6) -> NeuronSet:
    """Neurons of some layers, in no order, with deltas that change the greedy tokens of the tiny models."""
    draw = np.random.default_rng(seed)
    places = [(layer, index) for layer in layers for index in draw.permutation(MLP_SIZE).tolist()]
    chosen = draw.permutation(len(places))[:count]
    layer, index = zip(*(places[place] for place in chosen), strict=True)
    return NeuronSet(layer=layer, index=index, delta=draw.normal(size=count) + 1.0)


def make_gate(seed: int = 0, layers: tuple[int, ...] = (0, 1), threshold: float = 0.5) -> Gate:
    """A gate of five features that weighs tokens unevenly."""
    draw = np.random.default_rng(seed)
    features, hidden = 5, 4
    return Gate(
        layer=draw.choice(layers, features),
        index=draw.permutation(MLP_SIZE)[:features],
        attention_weight=draw.normal(size=features),
        attention_bias=0.25,
        hidden_weight=0.25 * draw.normal(size=(hidden, features)),
        hidden_bias=1 + 0.5 * draw.normal(size=hidden),  # units that are always off would test nothing
        output_weight=2 * draw.normal(size=hidden),
        output_bias=-0.1,
        threshold=threshold,
    )


# Which layers a rule steers, and which its gate reads, by the number of layers that the model has.
STEERED = {LAYERS: (2, 3), 2: (1,)}
GATES = {LAYERS: {"causal": (0, 1), "later": (0, 2, 3)}, 2: {"causal": (0,), "later": (0, 1)}}


def make_rule(base: BaseModel, *, gate: Gate | None = None, strength: float = 2.0, **fields: Any) -> SteeringRule:
    """A rule for a tiny model."""
    fields = {"neurons": make_neurons(layers=STEERED.get(base.layers, STEERED[LAYERS])), **fields}
    return SteeringRule(strength=strength, base=base, gate=gate, **fields)


def calibrated_gate(model: Any, kind: str) -> Gate:
    """A gate that steers about half of `PROMPTS`, with its threshold in the widest gap of p(correct) there."""
    layers = GATES[model.config.get_text_config().num_hidden_layers][kind]
    gate = make_gate(layers=layers)
    found = sorted(oracle.p_correct(model, prompt, plain_gate(gate)) for prompt in PROMPTS)
    gaps = [(found[at + 1] - found[at], at) for at in range(len(found) - 1)]
    _, at = max(gaps)
    return make_gate(layers=layers, threshold=(found[at] + found[at + 1]) / 2)


def plain_gate(gate: Gate) -> dict[str, Any]:
    """A gate as the oracle takes it: lists and numbers."""
    numbers = {name: value.tolist() for name, value in gate.weights().items()}
    features = list(zip(gate.layer.tolist(), gate.index.tolist(), strict=True))
    return {"features": features, "threshold": gate.threshold, **numbers}


def plain_rule(rule: SteeringRule) -> dict[str, Any]:
    """A rule as the oracle takes it: lists and numbers."""
    columns = (rule.neurons.layer.tolist(), rule.neurons.index.tolist(), rule.neurons.delta.tolist())
    return {
        "neurons": list(zip(*columns, strict=True)),
        "strength": rule.strength,
        "start": rule.start,
        "gate": None if rule.gate is None else plain_gate(rule.gate),
    }


def answers(model: Any, rule: SteeringRule, steps: int = 6, **how: Any) -> list[dict[str, Any]]:
    """What the oracle says of every prompt of `PROMPTS`, up to the end-of-sequence token."""
    return [oracle.respond(model, prompt, plain_rule(rule), steps, ends=(EOS,), **how) for prompt in PROMPTS]


def answers_everywhere(model: Any, rule: SteeringRule, steps: int = 6) -> list[dict[str, Any]]:
    """What the oracle says where every token of every sequence is steered, as in static artifacts."""
    plain = {**plain_rule(rule), "gate": None, "start": "everywhere"}
    return [oracle.respond(model, prompt, plain, steps, ends=(EOS,)) for prompt in PROMPTS]


def greedy(model: Any, rows: Any = PROMPTS, **how: Any) -> Any:
    """generate() on a left-padded batch, with the raw logits of each step."""
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, **how}
    return model.generate(**left_padded(rows), return_dict_in_generate=True, output_logits=True, **settings)


def require_answers(out: Any, expected: list[dict[str, Any]], slack: float = 1) -> float:
    """Assert that what `greedy` returned are these answers; the largest distance of logits, in limits.

    ``slack``: how many limits are allowed, of what rounds more than float32.
    """
    logits_BSV = torch.stack(out.logits, dim=1).float()
    new = out.sequences[:, -logits_BSV.shape[1] :].tolist()
    worst = 0.0
    for row, logits_SV, answer in zip(new, logits_BSV, expected, strict=True):
        count = len(answer["ids"])
        assert row[:count] == answer["ids"]
        assert set(row[count:]) <= {PAD}
        distance = float((logits_SV[:count] - answer["logits"]).abs().max())
        worst = max(worst, distance / logit_limit(answer["logits"]))
    assert worst <= slack, f"{worst:.2f} times the limit"
    return worst


def left_padded(rows: Any, pad: int = PAD) -> dict[str, torch.Tensor]:
    """Ids and mask, ended flush."""
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def logit_limit(expected: torch.Tensor) -> float:
    """How far float32 logits may lie apart that are the same sums in another order: 64 units of the largest.

    Measured over all families, gates, starts, cached and not, steered by hooks or exported: at most 17.1 units (qwen2);
    one negated delta of six moves the logits by 7 * 10^4 units at least.
    """
    return 64 * torch.finfo(torch.float32).eps * max(1.0, float(expected.abs().max()))


class Lazy(dict):
    """A dict that makes a missing value on first use."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def __missing__(self, key):
        self[key] = self.make(key)
        return self[key]
