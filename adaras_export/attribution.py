"""The causal effect of every neuron on whether completions come out right: one gradient per question.

For a question, margin(c) = mean log p(correct completions) - mean log p(incorrect completions), teacher-forced, with
a constant c (L, M) added to h at the steered tokens; its gradient at c = 0 is what this module computes. Goes beyond
the paper, whose ranking is a difference of means (see `neurons`).

B rows (traces), T tokens after the cached prompt, L layers, M MLP neurons.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adaras_export import models
from adaras_export.activations import behind
from adaras_export.generation import Prefilled
from adaras_export.rule import Start


@dataclass(frozen=True)
class WeightedCompletion:
    """A completion, the row of its prompt among the prefilled ones, and its weight in the margin."""

    prompt_row: int
    ids: Sequence[int]
    weight: float


def margin_gradients(
    model: nn.Module, prompts: Prefilled, completions: Sequence[WeightedCompletion], start: Start
) -> Tensor:
    """The part of each completion in the gradient of its question's margin, (B, L, M) float32 on the CPU.

    Only the last prompt token and the completion are run with gradients: no earlier token is steered, so the cached
    rest of the prompt, computed once for all completions of a question, cannot depend on c.
    """
    device = prompts.ids.device
    own = prompts.repeated([completion.prompt_row for completion in completions])
    inputs = behind(own, [completion.ids for completion in completions])
    ids_BT = inputs["input_ids"]
    own_BT = inputs["attention_mask"][:, -ids_BT.shape[1] :]
    steered_BT = own_BT.clone()
    if start == "first_generated_token":
        steered_BT[:, 0] = 0
    with _offsets(model, steered_BT) as offsets_B1M, torch.enable_grad():
        logits_BTV = model(**inputs).logits
        log_p_BT = _log_probabilities(logits_BTV[:, :-1], ids_BT[:, 1:]) * own_BT[:, 1:]
        weights_B = torch.tensor([completion.weight for completion in completions], device=device)
        gradients = torch.autograd.grad((log_p_BT.sum(1) * weights_B).sum(), offsets_B1M)
    return torch.cat([gradient.float().cpu() for gradient in gradients], dim=1)


def _log_probabilities(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    logits_BTV = logits_BTV.float()
    chosen_BT = logits_BTV.gather(-1, ids_BT.unsqueeze(-1)).squeeze(-1)
    return chosen_BT - logits_BTV.logsumexp(-1)


@contextmanager
def _offsets(model: nn.Module, steered_BT: Tensor) -> Iterator[list[Tensor]]:
    """Zeros (B, 1, M) per layer that take part in the forward pass; no weight asks for a gradient meanwhile."""
    _, layers, mlp_size, _ = models.sizes_of(model)
    steered_BT1 = steered_BT.unsqueeze(-1)
    offsets = []
    with ExitStack() as undo:
        for parameter in model.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)  # noqa: FBT003 - torch's signature
        for layer in range(layers):
            down = models.down_projection(model, layer)
            weight = next(down.parameters())
            offset = torch.zeros(
                len(steered_BT),
                1,
                mlp_size,
                dtype=weight.dtype,
                device=weight.device,
                requires_grad=True,
            )

            def add(_module: nn.Module, args: tuple[Tensor, ...], offset: Tensor = offset) -> tuple[Tensor, ...]:
                return (args[0] + offset * steered_BT1.to(offset), *args[1:])

            undo.callback(down.register_forward_pre_hook(add).remove)
            offsets.append(offset)
        yield offsets
