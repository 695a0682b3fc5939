"""Encode prompts and complete them, reproducibly over batches and runs.

A caller may steer the model around any function here. Completing neither reads nor changes the global random state:
the samples of a row depend only on its key and the seed, up to the rounding of another batch shape.

B rows of a batch, T prompt tokens with padding, V vocabulary.
"""

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from adaras_export.core import families
from adaras_export.core.traces import Prompt, Trace
from adaras_export.errors import TraceError
from adaras_export.files.atomic import sha256

_NAMES = signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _NAMES else "past_key_values"
"""The name of the KV cache argument in this Transformers; 5.24 changed it."""


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens; temperature 0 is greedy and ignores ``top_p`` and ``seed``.

    A completion ends before the first token whose text contains ``stop``, as it does before EOS.

    Raises:
        TraceError: a value is outside its range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: str | None = None

    def __post_init__(self) -> None:
        wrong = [
            f"{name} {value} (expected {expected})"
            for name, value, expected, holds in (
                ("max_new_tokens", self.max_new_tokens, "1 or more", self.max_new_tokens >= 1),
                ("temperature", self.temperature, "0 or more", 0 <= self.temperature < math.inf),
                ("top_p", self.top_p, "above 0, at most 1", 0 < self.top_p <= 1),
            )
            if not holds
        ]
        if wrong:
            raise TraceError(f"sampling: {'; '.join(wrong)}")


@dataclass(frozen=True, eq=False)
class Prefilled:
    """Left-padded prompts, ids and mask (B, T), and the cache of all tokens except the last."""

    ids: Tensor
    mask: Tensor
    cache: Cache

    def repeated(self, rows: Sequence[int]) -> "Prefilled":
        """A copy with the given rows; a row may be given several times."""
        index_R = torch.tensor(rows, device=self.ids.device)
        cache: Any = copy.deepcopy(self.cache)
        cache.reorder_cache(index_R)  # any rows; `batch_select_indices` would leave the states of linear attention
        return Prefilled(self.ids[index_R], self.mask[index_R], cache)


def sampled_by(
    backend: str, sampling: Sampling, *, dtype: str | None = None, template: str | None = None
) -> dict[str, str | int | float | None]:
    """The settings that completions depend on, besides prompt and model, as traces record them; None is unknown."""
    return {"backend": backend, **vars(sampling), "dtype": dtype, "template": template}


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """16 hex digits of the chat template's SHA-256; None without a template."""
    template = tokenizer.chat_template
    return None if template is None else sha256(json.dumps(template, sort_keys=True).encode())[:16]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, with special tokens.

    Chat messages go through the chat template with its generation prompt.

    Raises:
        TraceError: the tokenizer has no chat template or its template refuses the messages, or the prompt gives no
            token.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        ids = _chat_ids(tokenizer, [dict(message) for message in prompt])
    if not ids:
        raise TraceError(f"prompt {prompt!r}: gives no token; expected a prompt that the tokenizer knows")
    return list(ids)


def room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> int:
    """How many tokens the model's context has left after the longest prompt."""
    longest = max((len(encode_prompt(tokenizer, prompt)) for prompt in prompts), default=0)
    return int(families.text_config(model).max_position_embeddings) - longest


def encode_trace(tokenizer: PreTrainedTokenizerBase, trace: Trace) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the completion, which is encoded separately and gets no EOS.

    Raises:
        TraceError: `encode_prompt` refuses the prompt, or the completion gives no token.
    """
    completion = list(tokenizer(trace.completion, add_special_tokens=False)["input_ids"])
    if not completion:
        raise TraceError(f"trace {trace.id}: completion gives no token; drop it")
    return encode_prompt(tokenizer, trace.prompt), completion


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Rows of token ids as int64 (B, T), padded on the left, and the mask that is 1 on real tokens."""
    width = max(len(row) for row in rows)
    ids_BT = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids_BT.to(device), mask_BT.to(device)


def batches(lengths: Sequence[int], token_budget: int, max_rows: int) -> list[list[int]]:
    """Indices of rows to run together: rows of similar length, longest first.

    The number of rows times the longest length stays within ``token_budget``; a longer row is a batch of one.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        rows = len(groups[-1]) + 1 if groups else 0
        if 0 < rows <= max_rows and rows * lengths[groups[-1][0]] <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding id: the tokenizer's pad token, or else its EOS.

    Raises:
        TraceError: the tokenizer has neither.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    raise TraceError(f"tokenizer {tokenizer.name_or_path}: has no pad and no EOS token; set pad_token")


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    sampling: Sampling,
    keys: Sequence[str],
) -> list[str]:
    """Continue every row of prompt ids as one batch; returns texts without special tokens. See `complete_ids`."""
    return [decode(tokenizer, ids) for ids in complete_ids(model, tokenizer, rows, sampling, keys)]


def complete_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    sampling: Sampling,
    keys: Sequence[str],
) -> list[list[int]]:
    """Continue every row of prompt ids as one batch; returns the new ids before EOS.

    ``keys`` names each row: its random numbers come from the seed and the key. Generation runs one token further than
    ``max_new_tokens`` and drops that token, so that every kept token has been an input of the model. Recorded
    activations therefore equal those of a teacher-forced pass over the same ids. (A finished row gets padding until
    its batch ends.)

    Raises:
        TraceError: a prompt leaves no room for the new tokens in the model's context.
    """
    ids_BT, mask_BT = left_pad(rows, pad_id(tokenizer), model.device)
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    return _generate(model, tokenizer, inputs, sampling, keys)


def continue_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefilled: Prefilled,
    sampling: Sampling,
    keys: Sequence[str],
) -> list[list[int]]:
    """Like `complete_ids` for prefilled prompts, up to rounding; consumes their cache."""
    inputs = {
        "input_ids": prefilled.ids,
        "attention_mask": prefilled.mask,
        CACHE: prefilled.cache,
    }
    return _generate(model, tokenizer, inputs, sampling, keys)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of completion ids, without special tokens and with every space as it was written."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


@torch.no_grad()
def prefill(model: PreTrainedModel, rows: Sequence[Sequence[int]], pad_id: int) -> Prefilled:
    """Run all tokens except the last of every prompt, once for many continuations."""
    ids_BT, mask_BT = left_pad(rows, pad_id, model.device)
    cache: Cache = DynamicCache(config=model.config)
    if ids_BT.shape[1] > 1:
        past_BT = mask_BT[:, :-1]
        model(
            input_ids=ids_BT[:, :-1],
            attention_mask=past_BT,
            position_ids=(past_BT.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,  # not used; all logits would be T * V numbers a row
            **{CACHE: cache},
        )
    return Prefilled(ids_BT, mask_BT, cache)


def row_seed(seed: int, key: str, bits: int = 63) -> int:
    """The seed of one row; 63 bits, since torch takes a signed integer."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") >> (64 - bits)


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: str | None) -> list[int]:
    """All tokens that end a completion: EOS, and the tokens whose text contains ``stop``.

    Raises:
        TraceError: no token contains ``stop``.
    """
    return [*_eos_ids(model, tokenizer), *(stop_ids(tokenizer, stop) if stop else ())]


@lru_cache(maxsize=4)
def stop_ids(tokenizer: PreTrainedTokenizerBase, stop: str) -> tuple[int, ...]:
    """The tokens whose text contains ``stop``.

    Raises:
        TraceError: no token contains ``stop``.
    """
    texts = tokenizer.batch_decode([[id_] for id_ in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    ids = tuple(id_ for id_, text in enumerate(texts) if stop in text)
    if not ids:
        raise TraceError(f"stop {stop!r}: no token of the tokenizer contains it; expected a shorter text")
    return ids


def _processors(sampling: Sampling, keys: Sequence[str], device: torch.device) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        processors.append(TopPLogitsWarper(float(sampling.top_p)))
        processors.append(_GumbelNoise(sampling.seed, keys, device))
    return processors


class _GumbelNoise(LogitsProcessor):
    """Adds noise so that the argmax is an exact sample of the softmax.

    Each row has a separate generator, so that its sample does not depend on the other rows.
    """

    def __init__(self, seed: int, keys: Sequence[str], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(row_seed(seed, key)) for key in keys]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 - the protocol
        noise_BV = torch.empty_like(scores, dtype=torch.float32)
        for row_V, generator in zip(noise_BV, self.generators, strict=True):
            row_V.exponential_(generator=generator)
        # A zero would become +inf, and NaN on a token that top-p put at -inf.
        return scores - noise_BV.clamp_min_(torch.finfo(torch.float32).tiny).log_()


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Any],
    sampling: Sampling,
    keys: Sequence[str],
) -> list[list[int]]:
    """The new ids of every row: at most ``max_new_tokens``, up to the first end token."""
    max_new_tokens = sampling.max_new_tokens
    width = inputs["input_ids"].shape[1]
    context = families.text_config(model).max_position_embeddings
    if width + max_new_tokens > context:
        raise TraceError(
            f"prompt of {width} tokens: {max_new_tokens} new ones exceed the context of {context}; "
            f"expected max_new_tokens of at most {context - width}, or a shorter prompt"
        )
    ends = end_ids(model, tokenizer, sampling.stop)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens + 1,
        do_sample=False,
        num_beams=1,
        eos_token_id=ends or None,
        pad_token_id=pad_id(tokenizer),
    )
    out_BT = with_defaults(model, config).generate(
        generation_config=config, logits_processor=_processors(sampling, keys, model.device), **inputs
    )
    kept = [row[width : width + max_new_tokens] for row in out_BT.tolist()]
    return [row[: next((at for at, id_ in enumerate(row) if id_ in ends), None)] for row in kept]


def with_defaults(model: PreTrainedModel, config: GenerationConfig) -> Any:  # noqa: ANN401 - `generate` is not typed
    """A shallow copy of the model with ``config`` as its generation defaults.

    `generate` takes missing settings (penalties, banned words, temperatures) from the model's defaults. Changing those
    on the caller's model would affect other threads.
    """
    handle = copy.copy(model)
    handle.generation_config = config
    return handle


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The EOS ids of the model's generation config, or else of the tokenizer."""
    for ids in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def _chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    if not tokenizer.chat_template:
        raise TraceError(
            f"tokenizer {tokenizer.name_or_path}: has no chat template for a prompt of messages; "
            "give the prompt as text, or set a chat template"
        )
    try:
        encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except TemplateError as error:
        raise TraceError(
            f"chat template of {tokenizer.name_or_path}: refuses the messages ({error}); "
            f"found roles {', '.join(message['role'] for message in messages)}"
        ) from error
    return list(encoded["input_ids"])
