"""Mistral with adaptive steering in its MLPs. Everything that is not Mistral's own is in steering_adaras.py."""

from transformers import GenerationMixin
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM, MistralMLP, MistralModel

from .steering_adaras import SteeredGatedMLP, SteeredGeneration, SteeredModel


class AdaRASMistralConfig(MistralConfig):
    """Mistral's configuration; the steering is in its entry "adaras"."""

    model_type = "adaras_mistral"


class SteeredMistralMLP(SteeredGatedMLP, MistralMLP):
    """Mistral's MLP; its down projection output is steered."""


class AdaRASMistralModel(SteeredModel, MistralModel):
    """The decoder."""

    config_class = AdaRASMistralConfig
    steered_mlp_class = SteeredMistralMLP


class AdaRASMistralForCausalLM(SteeredGeneration, MistralForCausalLM, GenerationMixin):
    """The decoder with its language model head."""

    config_class = AdaRASMistralConfig
    steered_model_class = AdaRASMistralModel
