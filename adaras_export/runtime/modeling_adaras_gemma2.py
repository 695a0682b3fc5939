"""Gemma2 with adaptive steering in its MLPs. Everything that is not Gemma2's own is in steering_adaras.py."""

from transformers import GenerationMixin
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2ForCausalLM, Gemma2MLP, Gemma2Model

from .steering_adaras import SteeredGatedMLP, SteeredGeneration, SteeredModel


class AdaRASGemma2Config(Gemma2Config):
    """Gemma2's configuration; the steering is in its entry "adaras"."""

    model_type = "adaras_gemma2"


class SteeredGemma2MLP(SteeredGatedMLP, Gemma2MLP):
    """Gemma2's MLP; its down projection output is steered."""


class AdaRASGemma2Model(SteeredModel, Gemma2Model):
    """The decoder."""

    config_class = AdaRASGemma2Config
    steered_mlp_class = SteeredGemma2MLP


class AdaRASGemma2ForCausalLM(SteeredGeneration, Gemma2ForCausalLM, GenerationMixin):
    """The decoder with its language model head."""

    config_class = AdaRASGemma2Config
    steered_model_class = AdaRASGemma2Model
