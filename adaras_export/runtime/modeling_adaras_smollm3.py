"""SmolLM3 with adaptive steering in its MLPs. Everything that is not SmolLM3's own is in steering_adaras.py."""

from transformers import GenerationMixin
from transformers.models.smollm3.configuration_smollm3 import SmolLM3Config
from transformers.models.smollm3.modeling_smollm3 import SmolLM3ForCausalLM, SmolLM3MLP, SmolLM3Model

from .steering_adaras import SteeredGatedMLP, SteeredGeneration, SteeredModel


class AdaRASSmolLM3Config(SmolLM3Config):
    """SmolLM3's configuration; the steering is in its entry "adaras"."""

    model_type = "adaras_smollm3"


class SteeredSmolLM3MLP(SteeredGatedMLP, SmolLM3MLP):
    """SmolLM3's MLP; its down projection output is steered."""


class AdaRASSmolLM3Model(SteeredModel, SmolLM3Model):
    """The decoder."""

    config_class = AdaRASSmolLM3Config
    steered_mlp_class = SteeredSmolLM3MLP


class AdaRASSmolLM3ForCausalLM(SteeredGeneration, SmolLM3ForCausalLM, GenerationMixin):
    """The decoder with its language model head."""

    config_class = AdaRASSmolLM3Config
    steered_model_class = AdaRASSmolLM3Model
