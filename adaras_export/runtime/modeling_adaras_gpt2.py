"""GPT-2 with adaptive steering in its MLPs. Everything that is not GPT-2's own is in steering_adaras.py."""

from functools import wraps
from typing import Any

from transformers import GenerationMixin
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2LMHeadModel, GPT2Model

from .steering_adaras import OwnModelType, SteeredGeneration, SteeredMLP, SteeredModel, here


class AdaRASGPT2Config(GPT2Config):
    """GPT-2's configuration; the steering is in its entry "adaras"."""

    model_type = OwnModelType("adaras_gpt2")


class SteeredGPT2MLP(SteeredMLP, GPT2MLP):
    """GPT-2's MLP; its down projection output is steered."""

    def forward(self, hidden_states: Any) -> Any:
        """Compute what the base computes, with a steered down projection."""
        return self.dropout(self.steered_down(self.act(self.c_fc(hidden_states)), self.c_proj))


class AdaRASGPT2Model(SteeredModel, GPT2Model):
    """The decoder."""

    config_class = AdaRASGPT2Config
    steered_mlp_class = SteeredGPT2MLP
    steered_layers = "h"


class AdaRASGPT2ForCausalLM(SteeredGeneration, GPT2LMHeadModel, GenerationMixin):
    """The decoder with its language model head."""

    config_class = AdaRASGPT2Config
    steered_model_class = AdaRASGPT2Model

    @wraps(GPT2LMHeadModel.forward)  # Transformers looks at the signature
    def forward(self, *args: Any, steering_start: Any = None, steering_valid: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As in Transformers; version 4 passes no further arguments to the decoder."""
        with here(handed_on=(steering_start, steering_valid)):
            return super().forward(*args, **kwargs)
