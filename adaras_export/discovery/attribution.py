"""The causal effect of every neuron on whether completions come out right: one gradient per question.

For a question, margin(c) = mean log p(correct completions) - mean log p(incorrect completions), teacher-forced, with
a constant c (L, M) added to h at the steered tokens; its gradient, at c = 0 unless another point is asked for, is what
this module computes. Goes beyond the paper, whose ranking is a difference of means (see `rankings`).

Long completions are exact, too: layers are run again in the backward pass instead of being remembered, and logits are
made of a few tokens at a time. Whatever the weights are, the gradient is summed up in float32.

B rows (traces), T tokens after the cached prompt, L layers, M MLP neurons.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, PreTrainedModel

from adaras_export.core import families
from adaras_export.core.rule import Start
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.activations import inputs_after, of_layers
from adaras_export.modeling.generation import CACHE, Prefilled


@dataclass(frozen=True)
class WeightedCompletion:
    """A completion, the row of its prompt among the prefilled ones, and its weight in the margin."""

    prompt_row: int
    ids: Sequence[int]
    weight: float


def margin_gradients(
    model: PreTrainedModel,
    prompts: Prefilled,
    completions: Sequence[WeightedCompletion],
    start: Start,
    *,
    longest: int = 4096,
    at: Array | None = None,
) -> Tensor:
    """The part of each completion in the gradient of its question's margin, (B, L, M) float32 on the CPU.

    Only the last prompt token and the completion are run with gradients: no earlier token is steered, so the cached
    rest of the prompt, computed once for all completions of a question, cannot depend on c.

    Args:
        model: the model; its weights ask for no gradient meanwhile.
        prompts: prefilled; they stay as they are.
        completions: B of them.
        start: the first steered token.
        at: where the gradient is taken, c (L, M); None: 0, no steering.
        longest: where completions have more tokens, the activations of one layer are in memory at a time.
    """
    device = prompts.ids.device
    own = prompts.repeated([completion.prompt_row for completion in completions])
    inputs: Mapping[str, Any] = inputs_after(own, [completion.ids for completion in completions])
    inputs = {**inputs, CACHE: _UnchangingCache.of(inputs[CACHE])}
    ids_BT = inputs["input_ids"]
    own_BT = inputs["attention_mask"][:, -ids_BT.shape[1] :]
    steered_BT = own_BT.clone()
    if start == "first_generated_token":
        steered_BT[:, 0] = 0
    recomputing = _recomputing(model) if ids_BT.shape[1] > longest else nullcontext()
    with _offsets(model, steered_BT, at) as offsets_B1M, torch.enable_grad(), recomputing:
        log_p_BT = _log_probabilities(model, inputs, min(longest, _HEAD_TOKENS)) * own_BT[:, 1:]
        weights_B = torch.tensor([completion.weight for completion in completions], device=device)
        gradients = torch.autograd.grad((log_p_BT.sum(1) * weights_B).sum(), offsets_B1M)
    return of_layers(model, [gradient.squeeze(1).float().cpu() for gradient in gradients])


_HEAD_TOKENS = 1024


def _log_probabilities(model: PreTrainedModel, inputs: Mapping[str, Any], most: int) -> Tensor:
    """log p of every token but the first, (B, T - 1) float32; logits of at most ``most`` tokens at a time."""
    ids_BT = inputs["input_ids"]
    if ids_BT.numel() <= most:
        return _chosen(model(**inputs).logits[:, :-1], ids_BT[:, 1:])
    outputs = model.base_model(**inputs)
    hidden_BTD, made_of = outputs.last_hidden_state, type(outputs)

    def piece(hidden_BSD: Tensor, ids_BS: Tensor) -> Tensor:
        return _chosen(_head(model, made_of(last_hidden_state=hidden_BSD)), ids_BS)

    size = max(1, most // len(ids_BT))
    parts = zip(hidden_BTD[:, :-1].split(size, 1), ids_BT[:, 1:].split(size, 1), strict=True)
    return torch.cat([_again(piece, hidden, ids) for hidden, ids in parts], dim=1)


def _chosen(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    logits_BTV = logits_BTV.float()
    chosen_BT = logits_BTV.gather(-1, ids_BT.unsqueeze(-1)).squeeze(-1)
    return chosen_BT - logits_BTV.logsumexp(-1)


def _head(model: PreTrainedModel, outputs: Any) -> Tensor:  # noqa: ANN401 - each decoder has its own class
    """Logits of the decoder's output; some families scale or cap them, which only their own forward pass knows."""
    decoder: Any = model.base_model
    decoder.forward = lambda *_args, **_kwargs: outputs
    try:
        logits: Tensor = model(inputs_embeds=outputs.last_hidden_state, use_cache=False).logits
    finally:
        del decoder.forward  # the class has the real one
    return logits


def _again(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any function of tensors
    """Its result; what lies between is computed again in the backward pass."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


@contextmanager
def _recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Layers that are computed again in the backward pass."""
    with ExitStack() as undo:
        for number in range(families.sizes_of(model)[1]):
            layer: Any = families.decoder_layer(model, number)
            layer.forward = partial(_again, layer.forward)
            undo.callback(delattr, layer, "forward")
        yield


class _UnchangingCache(DynamicCache):
    """The keys, values and states of a prefix; every layer sees what follows it, and nothing is kept of that.

    A layer that is computed again sees the same, and nothing is overwritten that the backward pass needs.
    """

    @classmethod
    def of(cls, cache: Cache) -> "_UnchangingCache":
        own = cls()
        vars(own).update(vars(cache))
        return own

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the base class has it
        layer: Any = copy.copy(self.layers[layer_idx])
        return layer.update(key_states, value_states, *args, **kwargs)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return self._copy(layer_idx).update_conv_state(conv_states, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return self._copy(layer_idx).update_recurrent_state(recurrent_states, *args, **kwargs)

    def _copy(self, layer_idx: int) -> Any:  # noqa: ANN401 - a layer of Transformers
        """A layer of linear attention with states of its own, which it keeps by number and overwrites in place."""
        layer: Any = copy.copy(self.layers[layer_idx])
        for name, states in vars(layer).items():
            if isinstance(states, dict):
                setattr(
                    layer, name, {at: one.clone() if isinstance(one, Tensor) else one for at, one in states.items()}
                )
        return layer


@contextmanager
def _offsets(model: nn.Module, steered_BT: Tensor, at: Array | None) -> Iterator[list[Tensor]]:
    """Constants (B, 1, M) per layer that take part in the forward pass; no weight asks for a gradient meanwhile."""
    _, layers, mlp_size, _ = families.sizes_of(model)
    widths = [mlp_size] * layers if isinstance(mlp_size, int) else mlp_size
    steered_BT1 = steered_BT.unsqueeze(-1)
    offsets = []
    with ExitStack() as undo:
        for parameter in model.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)  # noqa: FBT003 - torch's signature
        for layer, width in enumerate(widths):
            down = families.down_projection(model, layer)
            weight = next(down.parameters())
            kind: dict[str, Any] = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
            point_M = torch.zeros(width, **kind) if at is None else torch.tensor(at[layer][:width], **kind)
            offset = point_M.repeat(len(steered_BT), 1, 1).requires_grad_()

            def add(_module: nn.Module, args: tuple[Tensor, ...], offset: Tensor = offset) -> tuple[Tensor, ...]:
                return (args[0] + (offset * steered_BT1.to(offset)).to(args[0].dtype), *args[1:])

            undo.callback(down.register_forward_pre_hook(add).remove)
            offsets.append(offset)
        yield offsets
