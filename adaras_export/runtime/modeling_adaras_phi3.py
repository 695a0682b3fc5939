"""Phi3 with adaptive steering in its MLPs. Everything that is not Phi3's own is in steering_adaras.py."""

from torch import Tensor
from transformers import GenerationMixin
from transformers.models.phi3.configuration_phi3 import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3ForCausalLM, Phi3MLP, Phi3Model

from .steering_adaras import OwnModelType, SteeredGeneration, SteeredMLP, SteeredModel


class AdaRASPhi3Config(Phi3Config):
    """Phi3's configuration; the steering is in its entry "adaras"."""

    model_type = OwnModelType("adaras_phi3")


class SteeredPhi3MLP(SteeredMLP, Phi3MLP):
    """Phi3's MLP; its down projection output is steered."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Compute what the base computes, with a steered down projection."""
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.steered_down(up * self.activation_fn(gate), self.down_proj)


class AdaRASPhi3Model(SteeredModel, Phi3Model):
    """The decoder."""

    config_class = AdaRASPhi3Config
    steered_mlp_class = SteeredPhi3MLP


class AdaRASPhi3ForCausalLM(SteeredGeneration, Phi3ForCausalLM, GenerationMixin):
    """The decoder with its language model head."""

    config_class = AdaRASPhi3Config
    steered_model_class = AdaRASPhi3Model
