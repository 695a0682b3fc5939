"""GPT-NeoX with adaptive steering in its MLPs. Everything that is not GPT-NeoX's own is in steering_adaras.py."""

from torch import Tensor
from transformers import GenerationMixin
from transformers.models.gpt_neox.configuration_gpt_neox import GPTNeoXConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM, GPTNeoXMLP, GPTNeoXModel

from .steering_adaras import OwnModelType, SteeredGeneration, SteeredMLP, SteeredModel


class AdaRASGPTNeoXConfig(GPTNeoXConfig):
    """GPT-NeoX's configuration; the steering is in its entry "adaras"."""

    model_type = OwnModelType("adaras_gpt_neox")


class SteeredGPTNeoXMLP(SteeredMLP, GPTNeoXMLP):
    """GPT-NeoX's MLP; its down projection output is steered."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Compute what the base computes, with a steered down projection."""
        return self.steered_down(self.act(self.dense_h_to_4h(hidden_states)), self.dense_4h_to_h)


class AdaRASGPTNeoXModel(SteeredModel, GPTNeoXModel):
    """The decoder."""

    config_class = AdaRASGPTNeoXConfig
    steered_mlp_class = SteeredGPTNeoXMLP


class AdaRASGPTNeoXForCausalLM(SteeredGeneration, GPTNeoXForCausalLM, GenerationMixin):
    """The decoder with its language model head."""

    config_class = AdaRASGPTNeoXConfig
    steered_model_class = AdaRASGPTNeoXModel
