"""Granite with adaptive steering in its MLPs. Everything that is not Granite's own is in steering_adaras.py."""

from transformers import GenerationMixin
from transformers.models.granite.configuration_granite import GraniteConfig
from transformers.models.granite.modeling_granite import GraniteForCausalLM, GraniteMLP, GraniteModel

from .steering_adaras import SteeredGatedMLP, SteeredGeneration, SteeredModel


class AdaRASGraniteConfig(GraniteConfig):
    """Granite's configuration; the steering is in its entry "adaras"."""

    model_type = "adaras_granite"


class SteeredGraniteMLP(SteeredGatedMLP, GraniteMLP):
    """Granite's MLP; its down projection output is steered."""


class AdaRASGraniteModel(SteeredModel, GraniteModel):
    """The decoder."""

    config_class = AdaRASGraniteConfig
    steered_mlp_class = SteeredGraniteMLP


class AdaRASGraniteForCausalLM(SteeredGeneration, GraniteForCausalLM, GenerationMixin):
    """The decoder with its language model head."""

    config_class = AdaRASGraniteConfig
    steered_model_class = AdaRASGraniteModel
