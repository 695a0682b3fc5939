"""Qwen3 with adaptive steering in its MLPs. Everything that is not Qwen3's own is in steering_adaras.py."""

from transformers import GenerationMixin
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3MLP, Qwen3Model

from .steering_adaras import SteeredGatedMLP, SteeredGeneration, SteeredModel


class AdaRASQwen3Config(Qwen3Config):
    """Qwen3's configuration; the steering is in its entry "adaras"."""

    model_type = "adaras_qwen3"


class SteeredQwen3MLP(SteeredGatedMLP, Qwen3MLP):
    """Qwen3's MLP; its down projection output is steered."""


class AdaRASQwen3Model(SteeredModel, Qwen3Model):
    """The decoder."""

    config_class = AdaRASQwen3Config
    steered_mlp_class = SteeredQwen3MLP


class AdaRASQwen3ForCausalLM(SteeredGeneration, Qwen3ForCausalLM, GenerationMixin):
    """The decoder with its language model head."""

    config_class = AdaRASQwen3Config
    steered_model_class = AdaRASQwen3Model
