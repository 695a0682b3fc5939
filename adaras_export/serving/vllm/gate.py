"""The gate as one more attention layer of vLLM's, and the amount of steering of every token of a forward pass.

For a prompt token the key is s = tanh(w.x + b), for a generated one -300, so that its weight is 0; the query is
constant, and the value is W x, the gate's hidden layer before its bias. What attention gives at any token at or behind
the last prompt token is then the softmax-pooled hidden layer, whose pages vLLM keeps like those of any layer: through
chunked prefill, prefix caching, preemption and CUDA graphs. Restates `SteeringGate` of the exports' code.

T tokens of a pass, R rules, F features of a gate, H its hidden size. Buffers are of a fixed size, as CUDA graphs want.
"""

import copy
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import Attention

from adaras_export.serving.vllm.dials import Rule, gates_of, rules_of

_MASK = -300.0  # exp(-300 - 1) is 0 in float32, and fp16 and bf16 caches hold it


class Gate(nn.Module):
    """p(correct) of the tokens of a pass. Parameters have the names and shapes of `SteeringGate`'s."""

    query: Tensor
    key_high: Tensor
    key_low: Tensor
    rest: Tensor  # zeros, which fill a value behind the hidden layer
    masked: Tensor  # the score of a generated token
    pooled: Tensor  # 0-based columns of attention's output
    columns: Tensor | None  # 0-based columns of its features among those of all gates; None: all

    def __init__(self, settings: Mapping[str, Any], vllm_config: Any, layer: int, prefix: str) -> None:
        super().__init__()
        width, self.hidden_size = sum(settings["features"]), int(settings["hidden_size"])
        self.attention_weight, self.attention_bias = parameter(width), parameter()
        self.hidden_weight, self.hidden_bias = parameter(self.hidden_size, width), parameter(self.hidden_size)
        self.output_weight, self.output_bias = parameter(self.hidden_size), parameter()
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        self.heads, self.kv_heads = model.get_num_attention_heads(parallel), model.get_num_kv_heads(parallel)
        self.head_size, self.dtype = model.get_head_size(), model.dtype
        # Pages of 16 bits hold a number as the sum of two.
        self.parts = 1 if self.dtype == torch.float32 else 2
        if self.parts * self.hidden_size > self.kv_heads * self.head_size:
            raise ValueError(
                f"the gate's hidden size is {self.hidden_size}; expected at most "
                f"{self.kv_heads * self.head_size // self.parts}, what one KV entry of this model holds on each device"
            )
        # FlashInfer plans one scale and one soft cap for all layers: the gate's layer has the model's, and undoes them.
        layers = vllm_config.compilation_config.static_forward_context.values()
        own = next(one for one in layers if isinstance(one, Attention))
        scale = float(own.impl.scale)
        self.soft_cap = float(getattr(own.impl, "logits_soft_cap", 0) or 0)
        cache_config = copy.copy(vllm_config.cache_config)
        cache_config.sliding_window = None  # the gate reads the whole prompt
        self.attn = Attention(
            self.heads,
            self.head_size,
            scale,
            num_kv_heads=self.kv_heads,
            cache_config=cache_config,
            logits_soft_cap=self.soft_cap or None,
            prefix=f"{prefix}.layers.{layer}.steering_gate.attn",
        )
        query, key_high, key_low = self._constants(1 / scale)
        self.register_buffer("query", query.to(self.dtype), persistent=False)
        self.register_buffer("key_high", key_high.to(self.dtype), persistent=False)
        self.register_buffer("key_low", key_low.to(self.dtype), persistent=False)
        # The query heads of a KV head are equal: the first one's output has the values of the KV head.
        first = torch.arange(self.heads).reshape(self.kv_heads, -1)[:, :1] * self.head_size
        columns = (first + torch.arange(self.head_size)).flatten()[: self.parts * self.hidden_size]
        self.register_buffer("pooled", columns, persistent=False)
        rest = torch.zeros(1, len(key_high) - len(columns), dtype=self.dtype)
        self.register_buffer("rest", rest, persistent=False)
        self.register_buffer("masked", torch.tensor(_MASK, dtype=torch.float32), persistent=False)

    def _constants(self, size: float) -> tuple[Tensor, Tensor, Tensor]:
        """The query, (heads * head size,), and the factors of the parts of s in keys, (KV heads * head size,).

        size * s is q_high k_high + q_high k_low + q_low k_high, exact to 2**-16 of it.
        """
        high = float(torch.tensor(size).to(self.dtype))
        query = torch.zeros(self.heads, self.head_size)
        key_high, key_low = torch.zeros(2, self.kv_heads, self.head_size)
        query[:, : self.parts] = high
        key_high[:, 0] = 1
        if self.parts == 2:
            query[:, 2] = size - high
            key_low[:, 1] = key_high[:, 2] = 1
        return query.flatten(), key_high.flatten(), key_low.flatten()

    def _split(self, x: Tensor) -> list[Tensor]:
        """``x`` as ``parts`` tensors of the cache's type, whose sum it is."""
        high = x.to(self.dtype)
        return [high] if self.parts == 1 else [high, (x - high.float()).to(self.dtype)]

    def forward(self, features_TF: Tensor, prompt_T: Tensor) -> Tensor:
        """p(correct) from the prompt tokens up to each token, (T,); right at and behind the last prompt token."""
        count = features_TF.shape[0]
        if self.columns is not None:
            features_TF = features_TF.index_select(1, self.columns)
        score_T = torch.tanh(torch.addmv(self.attention_bias, features_TF, self.attention_weight))
        if self.soft_cap:
            score_T = self.soft_cap * torch.atanh(score_T / self.soft_cap)
        high_T, *low = self._split(torch.where(prompt_T, score_T, self.masked))
        key_TK = high_T[:, None] * self.key_high
        if low:
            key_TK = torch.addcmul(key_TK, low[0][:, None], self.key_low)
        value_TV = torch.cat([*self._split(features_TF @ self.hidden_weight.T), self.rest.expand(count, -1)], -1)
        out_TQ = self.attn(self.query.expand(count, -1).contiguous(), key_TK, value_TV)
        pooled_TH = out_TQ.index_select(1, self.pooled).float()
        if low:
            pooled_TH = pooled_TH.view(count, 2, -1).sum(1)
        hidden_TH = torch.relu(pooled_TH + self.hidden_bias)
        return torch.sigmoid(torch.addmv(self.output_bias, hidden_TH, self.output_weight))


class Steering(nn.Module):
    """The state of one forward pass: who is prompt, who is steered and how much; filled by `place` before the pass.

    ``prompt``, ``scale``, ``threshold``, ``rule`` and ``probability`` are (T,); ``gate_of`` is (R,), the 0-based gate
    of each rule, or -1. Lists hold what a pass has computed so far, which costs no operation, and are empty between
    passes: ``features`` has those of each layer, (T, F of the layer), and ``amounts`` strength * g, (T, 1).
    """

    prompt: Tensor
    scale: Tensor
    threshold: Tensor
    rule: Tensor
    probability: Tensor
    gate_of: Tensor

    def __init__(self, vllm_config: Any, layers: int, prefix: str) -> None:
        super().__init__()
        settings = vllm_config.model_config.hf_config.adaras
        self.rules: tuple[Rule, ...] = rules_of(settings)
        gates = gates_of(settings)
        own = _columns(gates)
        self.width = sum(map(len, own))
        self.gates = nn.ModuleList(Gate(gate, vllm_config, layers + at, prefix) for at, gate in enumerate(gates))
        for gate, columns in zip(self.gates, own, strict=True):
            is_all = columns == [*range(self.width)]
            gate.register_buffer("columns", None if is_all else torch.tensor(columns), persistent=False)
        self.rank, self.ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("prompt", torch.zeros(tokens, dtype=torch.bool), persistent=False)
        for name in ("scale", "threshold", "probability"):
            self.register_buffer(name, torch.zeros(tokens, dtype=torch.float32), persistent=False)
        self.register_buffer("rule", torch.zeros(tokens, dtype=torch.int64), persistent=False)
        self.features: list[Tensor] = []
        self.amounts: list[Tensor] = []
        gate_of = [-1 if rule.gate is None else rule.gate for rule in self.rules]
        self.register_buffer("gate_of", torch.tensor(gate_of, dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def place(self, position_T: Tensor, dials: Mapping[str, Tensor]) -> None:
        """Fill the buffers for a pass.

        ``position_T`` is the 0-based position of each token in its request, and ``dials`` has the fields of the
        request's `Dials` for each token, (T,).
        """
        count = len(position_T)
        self.prompt[:count] = position_T < dials["prompt_length"]
        self.scale[:count] = torch.where(position_T >= dials["first"], dials["strength"], 0.0)
        self.threshold[:count] = dials["threshold"]
        if len(self.rules) > 1:
            self.rule[:count] = dials["rule"]
        self.prompt[count:].zero_()
        self.scale[count:].zero_()  # padding behind the tokens is not steered

    def read(self, hidden: Tensor, index_F: Tensor) -> None:
        """Keep the features of one layer: neurons ``index_F``, 0-based, of h, or of this rank's part of h."""
        if self.ranks == 1:
            self.features.append(hidden.index_select(-1, index_F))
            return
        width = hidden.shape[-1]
        local_F = index_F - self.rank * width
        here_F = (local_F >= 0) & (local_F < width)
        self.features.append(hidden.index_select(-1, local_F.clamp(0, width - 1)) * here_F)

    def settle(self, count: int) -> None:
        """Let the gates judge the features, and put strength * g of every token into ``amounts``."""
        scale_T = self.scale[:count]
        if not self.gates:
            self.amounts.append(scale_T[:, None])
            return
        features_TF = torch.cat(self.features, -1).float().view(count, self.width)
        self.features.clear()
        if self.ranks > 1:
            features_TF = tensor_model_parallel_all_reduce(features_TF)
        prompt_T = self.prompt[:count]
        judged = [gate(features_TF, prompt_T) for gate in self.gates]
        probability_T, steered_T = judged[0], judged[0] < self.threshold[:count]
        if len(self.rules) > 1:
            gate_T = self.gate_of[self.rule[:count]]
            for at, other_T in enumerate(judged):
                probability_T = torch.where(gate_T == at, other_T, probability_T)
            steered_T = (gate_T < 0) | (probability_T < self.threshold[:count])
        self.probability[:count] = probability_T
        self.amounts.append((scale_T * steered_T)[:, None])


def features_of(gates: list[Mapping[str, Any]]) -> Counter[int]:
    """How many features the gates read of each layer."""
    return Counter(layer for gate in gates for layer in _layers(gate))


def _columns(gates: list[Mapping[str, Any]]) -> list[list[int]]:
    """By gate, the 0-based columns of its features among those of all gates, which are by layer and then by gate."""
    places = [[(layer, at, place) for place, layer in enumerate(_layers(gate))] for at, gate in enumerate(gates)]
    columns = {place: column for column, place in enumerate(sorted(chain(*places)))}
    return [[columns[place] for place in own] for own in places]


def _layers(gate: Mapping[str, Any]) -> list[int]:
    """The layer of each feature of a gate."""
    layers: list[int] = np.repeat(gate["layers"], gate["features"]).tolist()
    return layers


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Zeros that a checkpoint fills and nothing trains."""
    return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
