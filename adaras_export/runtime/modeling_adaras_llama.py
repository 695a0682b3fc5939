"""Llama with adaptive steering in its MLPs. Everything that is not Llama's own is in steering_adaras.py."""

from transformers import GenerationMixin
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaMLP, LlamaModel

from .steering_adaras import SteeredGatedMLP, SteeredGeneration, SteeredModel


class AdaRASLlamaConfig(LlamaConfig):
    """Llama's configuration; the steering is in its entry "adaras"."""

    model_type = "adaras_llama"


class SteeredLlamaMLP(SteeredGatedMLP, LlamaMLP):
    """Llama's MLP; its down projection output is steered."""


class AdaRASLlamaModel(SteeredModel, LlamaModel):
    """The decoder."""

    config_class = AdaRASLlamaConfig
    steered_mlp_class = SteeredLlamaMLP


class AdaRASLlamaForCausalLM(SteeredGeneration, LlamaForCausalLM, GenerationMixin):
    """The decoder with its language model head."""

    config_class = AdaRASLlamaConfig
    steered_model_class = AdaRASLlamaModel
