"""The KL divergence of next-token distributions along a given text.

B rows, S tokens of the text, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaras_export.core import families
from adaras_export.modeling.activations import inputs_after
from adaras_export.modeling.generation import Prefilled
from adaras_export.runtime.steering_adaras import Scope, here


def next_token_divergence(one_V: Tensor, other_V: Tensor) -> Tensor:
    """KL(one || other) of next-token distributions given as logits (..., V), in nats, (...)."""
    one_V, other_V = one_V.double().log_softmax(-1), other_V.double().log_softmax(-1)
    return (one_V.exp() * (one_V - other_V)).sum(-1).clamp(min=0)


@torch.no_grad()
def forced_logits(model: PreTrainedModel, prompts: Prefilled, texts: Sequence[Sequence[int]]) -> Tensor:
    """Logits after every prompt and after each token of its text, (B, S + 1, V); ``prompts`` is not changed.

    Rows with shorter texts have meaningless values after their end. A caller may steer the model: the prompt ends
    where it would in `generate`.
    """
    own = prompts.repeated(range(len(prompts.ids)))
    scope = Scope(families.decoder(model), own.ids.shape[1])
    scope.place = 1, None  # the cache lacks the prompt's last token
    with here(scope=scope):
        logits_BSV: Tensor = model(**inputs_after(own, texts)).logits
    return logits_BSV
