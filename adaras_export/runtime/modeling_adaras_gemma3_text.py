"""Gemma3 with adaptive steering in its MLPs. Everything that is not Gemma3's own is in steering_adaras.py."""

from transformers import GenerationMixin
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForCausalLM, Gemma3MLP, Gemma3TextModel

from .steering_adaras import OwnModelType, SteeredGatedMLP, SteeredGeneration, SteeredModel


class AdaRASGemma3Config(Gemma3TextConfig):
    """Gemma3's configuration; the steering is in its entry "adaras"."""

    model_type = OwnModelType("adaras_gemma3_text")


class SteeredGemma3MLP(SteeredGatedMLP, Gemma3MLP):
    """Gemma3's MLP; its down projection output is steered."""


class AdaRASGemma3Model(SteeredModel, Gemma3TextModel):
    """The decoder."""

    config_class = AdaRASGemma3Config
    steered_mlp_class = SteeredGemma3MLP
    base_model_prefix = "model"  # Transformers 4.57 uses the multimodal model's, and would find no weights


class AdaRASGemma3ForCausalLM(SteeredGeneration, Gemma3ForCausalLM, GenerationMixin):
    """The decoder with its language model head."""

    config_class = AdaRASGemma3Config
    steered_model_class = AdaRASGemma3Model
    base_model_prefix = "model"
