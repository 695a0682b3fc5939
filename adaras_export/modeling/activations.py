"""Streams the inputs of down projections (h) to hooks; no activation is kept.

B rows, T tokens, L layers, M MLP neurons.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from adaras_export.core import families
from adaras_export.core.neuron_stats import Tokens
from adaras_export.core.traces import Trace
from adaras_export.errors import TraceError
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.generation import CACHE, Prefilled, batches, encode_trace

Sink = Callable[[int, Tensor], None]
Progress = Callable[[int, int], None]
"""Called with the number of finished items and of all items."""
TooLong = Literal["refuse", "skip", "read"]

MAX_ROWS = 64  # in one batch


@contextmanager
def capture(model: nn.Module, layers: Sequence[int], sink: Sink) -> Iterator[None]:
    """Call ``sink(layer, h_BTM)`` for every forward pass through the given layers; removes its hooks in the end."""
    with ExitStack() as undo:
        for layer in layers:
            down = families.down_projection(model, layer)
            undo.callback(down.register_forward_pre_hook(partial(_call, sink, layer)).remove)
        yield


def _call(sink: Sink, layer: int, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
    sink(layer, args[0])


def right_pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (B, T). In a causal model padding on the right changes nothing on its left."""
    width = max(map(len, rows))
    ids = [[*row, *[0] * (width - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def inputs_after(prompts: Prefilled, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Arguments of one forward pass over a text after each prompt; the pass consumes the prompts' cache.

    The pass begins with the prompt's last token, which the cache lacks; rows are padded on the right.
    """
    last_ids = prompts.ids[:, -1].tolist()
    rows = [[last, *text] for last, text in zip(last_ids, texts, strict=True)]
    ids_BS, own_BS = right_pad(rows, prompts.ids.device)
    mask_BT = torch.cat([prompts.mask[:, :-1], own_BS], dim=1)
    return {
        "input_ids": ids_BS,
        "attention_mask": mask_BT,
        "position_ids": (mask_BT.cumsum(1) - 1)[:, -ids_BS.shape[1] :],
        CACHE: prompts.cache,
        "use_cache": True,
    }


class _Enough(Exception):  # noqa: N818 - a signal, not an error
    """The last requested layer has been read."""


@torch.no_grad()
def read(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    layers: Sequence[int],
    sink: Callable[..., None],
    chunk_tokens: int | None = None,
) -> None:
    """One forward pass over right-padded rows, up to the last requested layer.

    Calls ``sink(layer, h_BTM, mask_BT)``; the mask is int64 and 1 on real tokens. Rows of more than ``chunk_tokens``
    are read in pieces of that many columns, and the sink is called for each piece in order. If attention needs no mask
    over the whole row, only the MLPs, which treat each token separately, run piece by piece. Otherwise the whole model
    does, with a KV cache.
    """
    ids_BT, mask_BT = right_pad(rows, families.input_device(model))
    width = ids_BT.shape[1]
    step = width if chunk_tokens is None else min(chunk_tokens, width)
    cache = _cache(model) if step < width else None
    stride = width if cache is None else step
    seen: Counter[int] = Counter()

    def pass_on(layer: int, h_BSM: Tensor) -> None:
        start, seen[layer] = seen[layer], seen[layer] + h_BSM.shape[1]
        sink(layer, h_BSM, mask_BT[:, start : seen[layer]].to(h_BSM.device))
        if layer == max(layers) and seen[layer] in (width, end):
            raise _Enough

    pieces = _mlps_in_pieces(model, layers, step) if cache is None and step < width else nullcontext()
    with capture(model, layers, pass_on), pieces:
        for end in range(stride, width + stride, stride):
            own = {"input_ids": ids_BT[:, end - stride : end], "attention_mask": mask_BT[:, :end]}
            _run(families.decoder(model), {**own, CACHE: cache, "use_cache": cache is not None})


def _run(decoder: nn.Module, inputs: dict[str, Any]) -> None:
    """Run the decoder until the last requested layer has been read."""
    try:
        decoder(**inputs)
    except _Enough:
        return


def _cache(model: nn.Module) -> Cache | None:
    """An empty cache if attention would need a T * T mask (sliding windows, or no fused kernel); else None."""
    config = cast("PreTrainedModel", model).config
    cache = DynamicCache(config=config)
    return cache if any(cache.is_sliding) or config._attn_implementation == "eager" else None


@contextmanager
def _mlps_in_pieces(model: nn.Module, layers: Sequence[int], step: int) -> Iterator[None]:
    """Let the MLPs up to the last of these layers process ``step`` tokens at a time."""
    with ExitStack() as undo:
        for layer in range(max(layers) + 1):
            mlp = families.mlp(model, layer)
            undo.callback(_restore, mlp, vars(mlp).get("forward"))
            mlp.forward = partial(_in_pieces, mlp.forward, step)
        yield


def _in_pieces(forward: Callable[[Tensor], Tensor], step: int, hidden_BTD: Tensor) -> Tensor:
    width = hidden_BTD.shape[1]
    pieces = (hidden_BTD[:, start : start + step].contiguous() for start in range(0, width, step))
    return torch.cat([forward(piece_BSD) for piece_BSD in pieces], dim=1)


def _restore(module: nn.Module, forward: Any) -> None:  # noqa: ANN401 - None, or Accelerate's wrapper
    if forward is None:
        del module.forward
    else:
        module.forward = forward


@dataclass(frozen=True)
class Reading:
    """How texts are read.

    Attributes:
        token_budget: tokens of one batch, padding included.
        progress: whom to tell about what is done.
        chunk_tokens: rows of more tokens are read in pieces of so many, so that activations take no more memory.
        tokens: which tokens of a trace count: "all", or those of the "completion".
        too_long: what becomes of traces that exceed the model's context: "refuse", "skip" or "read".
        warn: called with a sentence about what makes the result doubtful; default: the log.
    """

    token_budget: int = 4096
    progress: Progress | None = None
    chunk_tokens: int = 4096
    tokens: Tokens = "all"
    too_long: TooLong = "refuse"
    warn: Callable[[str], None] = logging.getLogger(__name__).warning

    def __post_init__(self) -> None:
        for name in ("token_budget", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise TraceError(f"reading: {name} is {getattr(self, name)}; expected 1 or more")


def token_means(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    layers: Sequence[int],
    skipped: Sequence[int] | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Mean of h over each row's tokens, without its first ``skipped`` ones, (B, len(layers), M) float32 on the CPU.

    Sums are float32 for every model type, and accumulate over the pieces of `read`.
    """
    means: dict[int, Tensor] = {}
    counts = [len(row) - skip for row, skip in zip(rows, skipped or [0] * len(rows), strict=True)]
    assert min(counts) > 0  # a completion has tokens
    seen: Counter[int] = Counter()

    def average(layer: int, h_BTM: Tensor, mask_BT: Tensor) -> None:
        place_T = torch.arange(seen[layer], seen[layer] + mask_BT.shape[1], device=mask_BT.device)
        seen[layer] += mask_BT.shape[1]
        count_B1 = torch.tensor(counts, device=mask_BT.device).unsqueeze(1)
        first_B1 = torch.tensor([len(row) for row in rows], device=mask_BT.device).unsqueeze(1) - count_B1
        weight_B1T = (mask_BT * (place_T >= first_B1) / count_B1).unsqueeze(1)
        part_BM = torch.bmm(weight_B1T, h_BTM.float()).squeeze(1)
        means[layer] = part_BM if layer not in means else means[layer] + part_BM

    read(model, rows, layers, average, chunk_tokens)
    return of_layers(model, [means[layer].cpu() for layer in layers])


def of_layers(model: nn.Module, parts: Sequence[Tensor]) -> Tensor:
    """Tensors of some layers, (B, M) each, as one of (B, len(parts), M); zeros where layers are narrower."""
    mlp_size = families.sizes_of(model)[2]
    widest = mlp_size if isinstance(mlp_size, int) else max(mlp_size)
    return torch.stack([pad(part_BM, (0, widest - part_BM.shape[-1])) for part_BM in parts], dim=1)


def row_means(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    layers: Sequence[int],
    reading: Reading,
    skipped: Sequence[int] | None = None,
) -> list[Array]:
    """`token_means` of any number of rows, read in batches of similar length: an array (len(layers), M) per row."""
    means: list[Any] = [None] * len(rows)
    skipped = skipped or [0] * len(rows)
    done = 0
    for indices in batches_of(rows, reading):
        chosen = [rows[index] for index in indices]
        batch = token_means(model, chosen, layers, [skipped[index] for index in indices], reading.chunk_tokens).numpy()
        for index, mean in zip(indices, batch, strict=True):
            means[index] = mean
        done += len(indices)
        if reading.progress is not None:
            reading.progress(done, len(rows))
    return means


def batches_of(rows: Sequence[Sequence[int]], reading: Reading) -> Iterator[list[int]]:
    """Indices of rows of similar length to read together; a row that is read in pieces is a batch of one.

    Padding beside it would need a mask of T * T entries.
    """
    for group in batches([len(row) for row in rows], reading.token_budget, MAX_ROWS):
        is_long = max(len(rows[index]) for index in group) > reading.chunk_tokens
        yield from ([index] for index in group) if is_long else [group]


def trace_means(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, traces: Sequence[Trace], reading: Reading
) -> dict[str, Array]:
    """Mean of h over the tokens of each trace that ``reading.tokens`` selects, teacher-forced: (L, M) by trace id."""
    encoded = [encode_trace(tokenizer, trace) for trace in traces]
    rows = [[*prompt, *completion] for prompt, completion in encoded]
    skipped = [0 if reading.tokens == "all" else len(prompt) for prompt, _ in encoded]
    means = row_means(model, rows, range(families.sizes_of(model)[1]), replace(reading, progress=None), skipped)
    return {trace.id: mean for trace, mean in zip(traces, means, strict=True)}


class Recorder:
    """Means of h over the tokens of each row, collected while prompts are run and continued, (B, L, M).

    Counts every prompt token and every generated token before the end-of-sequence token, as a teacher-forced pass over
    prompt and completion does.
    """

    def __init__(self, model: nn.Module, end_ids: Collection[int]) -> None:
        self._model = model
        self._sums: list[Tensor | None] = [None] * families.sizes_of(model)[1]
        self._end_ids = end_ids
        self._given: dict[str, Any] = {}
        self._weight_BT: Tensor | None = None
        self._alive_B: Tensor | None = None
        self._count_B: Tensor | None = None

    def means(self) -> Tensor:
        """The means, (B, L, M) float32 on the CPU."""
        assert self._count_B is not None  # a model ran
        sums = of_layers(self._model, [sum_BM.cpu() for sum_BM in self._sums if sum_BM is not None])
        return sums / self._count_B[:, None, None].cpu()

    def repeat(self, rows: Sequence[int]) -> None:
        """Select rows as `Prefilled.repeated` does; the next call brings the last prompt token of each."""
        self._alive_B = None
        if self._count_B is not None:  # prompts of one token are not prefilled
            index_R = torch.tensor(rows, device=self._count_B.device)
            self._count_B = self._count_B[index_R]
            self._sums = [None if sum_BM is None else sum_BM[index_R.to(sum_BM.device)] for sum_BM in self._sums]

    def begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Decoder pre-hook: determine which tokens of this call count."""
        given = self._given if kwargs.get("input_ids") is None else kwargs
        ids_BT = given["input_ids"]
        if self._alive_B is None:  # prompt tokens
            mask = given.get("attention_mask")
            self._weight_BT = (torch.ones_like(ids_BT) if mask is None else mask[:, -ids_BT.shape[1] :]).float()
            self._alive_B = torch.ones(len(ids_BT), device=ids_BT.device)
        else:
            ended = torch.isin(ids_BT[:, 0], torch.tensor(sorted(self._end_ids), device=ids_BT.device))
            self._alive_B = self._alive_B * ~ended
            self._weight_BT = self._alive_B[:, None]
        count_B = self._weight_BT.sum(1)
        self._count_B = count_B if self._count_B is None else self._count_B + count_B
        return args, families.for_all_tokens(kwargs)

    def note(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Model pre-hook: keep ids and mask, as a model that reads images gives its decoder embeddings."""
        self._given = kwargs

    def add(self, layer: int, h_BTM: Tensor) -> None:
        """Add the activations of one layer; the sink of `capture`."""
        assert self._weight_BT is not None
        total = torch.bmm(self._weight_BT.unsqueeze(1).to(h_BTM.device), h_BTM.float()).squeeze(1)
        before = self._sums[layer]
        self._sums[layer] = total if before is None else before + total


@contextmanager
def recording(model: nn.Module, end_ids: Collection[int]) -> Iterator[Recorder]:
    """Record one batch that `complete`, or `prefill` and `continue_ids`, run inside the context."""
    layers = families.sizes_of(model)[1]
    recorder = Recorder(model, end_ids)
    with capture(model, range(layers), recorder.add):
        handles = [
            model.register_forward_pre_hook(recorder.note, with_kwargs=True),
            families.decoder(model).register_forward_pre_hook(recorder.begin, with_kwargs=True),
        ]
        try:
            yield recorder
        finally:
            for handle in handles:
                handle.remove()
