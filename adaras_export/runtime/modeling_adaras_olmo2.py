"""Olmo2 with adaptive steering in its MLPs. Everything that is not Olmo2's own is in steering_adaras.py."""

from transformers import GenerationMixin
from transformers.models.olmo2.configuration_olmo2 import Olmo2Config
from transformers.models.olmo2.modeling_olmo2 import Olmo2ForCausalLM, Olmo2MLP, Olmo2Model

from .steering_adaras import SteeredGatedMLP, SteeredGeneration, SteeredModel


class AdaRASOlmo2Config(Olmo2Config):
    """Olmo2's configuration; the steering is in its entry "adaras"."""

    model_type = "adaras_olmo2"


class SteeredOlmo2MLP(SteeredGatedMLP, Olmo2MLP):
    """Olmo2's MLP; its down projection output is steered."""


class AdaRASOlmo2Model(SteeredModel, Olmo2Model):
    """The decoder."""

    config_class = AdaRASOlmo2Config
    steered_mlp_class = SteeredOlmo2MLP


class AdaRASOlmo2ForCausalLM(SteeredGeneration, Olmo2ForCausalLM, GenerationMixin):
    """The decoder with its language model head."""

    config_class = AdaRASOlmo2Config
    steered_model_class = AdaRASOlmo2Model
