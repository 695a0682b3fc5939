"""Qwen2 with adaptive steering in its MLPs. Everything that is not Qwen2's own is in steering_adaras.py."""

from transformers import GenerationMixin
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2MLP, Qwen2Model

from .steering_adaras import SteeredGatedMLP, SteeredGeneration, SteeredModel


class AdaRASQwen2Config(Qwen2Config):
    """Qwen2's configuration; the steering is in its entry "adaras"."""

    model_type = "adaras_qwen2"


class SteeredQwen2MLP(SteeredGatedMLP, Qwen2MLP):
    """Qwen2's MLP; its down projection output is steered."""


class AdaRASQwen2Model(SteeredModel, Qwen2Model):
    """The decoder."""

    config_class = AdaRASQwen2Config
    steered_mlp_class = SteeredQwen2MLP


class AdaRASQwen2ForCausalLM(SteeredGeneration, Qwen2ForCausalLM, GenerationMixin):
    """The decoder with its language model head."""

    config_class = AdaRASQwen2Config
    steered_model_class = AdaRASQwen2Model
