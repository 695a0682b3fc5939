"""The table of supported model architectures, and where each keeps its decoder layers and MLPs.

The only file that names modules of a model. An architecture that is not in the table is refused: a guessed module path
could steer the wrong module without an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

from adaras_export.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps its MLP.

    Attributes:
        model_type: the name in config.json.
        decoder: the module that holds the decoder layers, below the language model; checkpoints of the decoder alone
            leave it out of their keys.
        layers: the list of decoder layers, below the decoder.
        down: path of the down projection, below one decoder layer.
        transposed: whether its weight is stored (M, D), as GPT-2's Conv1D does, instead of (D, M).
        sizes: the keys of config.json for L, M and D; None for M: its layers differ, or it is computed of several
            keys, so each layer's weights say it.
        mlp_ratio: M / D where the config says null for M.
        behind: what stands between the down projection and the residual sum: None, a "norm", or the key of config.json
            for a factor, with the place in its list behind a dot.
        vllm: the module of vLLM's that has its class, or "transformers" where vLLM serves it with that backend;
            None: our plugin does not serve it.
        images: whether it reads images, too: its config.json keeps the sizes of the decoder in "text_config".
        since: the first Transformers that runs it, by its major version.
        tokenizer: the tokenizer class where a checkpoint names none, that of Transformers 4 if that runs the family.
    """

    model_type: str
    decoder: str = "model"
    layers: str = "layers"
    down: str = "mlp.down_proj"
    transposed: bool = False
    sizes: tuple[str, str | None, str] = ("num_hidden_layers", "intermediate_size", "hidden_size")
    mlp_ratio: int | None = None
    behind: str | None = None
    vllm: str | None = None
    images: bool = False
    since: int = 4
    tokenizer: str = "LlamaTokenizer"

    @property
    def classes(self) -> dict[str, str]:
        """The names of Transformers' classes for it, by auto class: {"AutoConfig": "Qwen3Config", ...}."""
        from transformers.models.auto import modeling_auto
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]

        tables: dict[str, Any] = {"AutoConfig": CONFIG_MAPPING_NAMES, "AutoModel": modeling_auto.MODEL_MAPPING_NAMES}
        if self.images:  # one class for text alone, and with images
            both = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
            tables |= {"AutoModelForCausalLM": both, "AutoModelForImageTextToText": both}
        else:
            tables["AutoModelForCausalLM"] = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        return {auto: str(table[self.model_type]) for auto, table in tables.items()}

    @property
    def auto_class(self) -> Any:  # noqa: ANN401 - a class of Transformers
        """The class of Transformers that opens its language model: one with `from_pretrained` and `from_config`."""
        import transformers

        return transformers.AutoModelForImageTextToText if self.images else transformers.AutoModelForCausalLM

    def text(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The entries of a config.json that describe the decoder; some wrappers have them at its top."""
        found = config.get("text_config") if self.images else None
        return found if isinstance(found, Mapping) else config

    def sizes_in(self, config: Mapping[str, Any]) -> tuple[int, int | None, int]:
        """L, M and D of a config that has the keys in ``sizes``; None for M: the weights say it."""
        text = self.text(config)
        sizes: list[Any] = [None if key is None else text[key] for key in self.sizes]
        layers, mlp_size, hidden_size = sizes
        if mlp_size is None and self.mlp_ratio is not None and isinstance(hidden_size, int):
            mlp_size = self.mlp_ratio * hidden_size
        return layers, mlp_size, hidden_size

    def factor(self, config: Mapping[str, Any]) -> float:
        """What the output of a down projection is multiplied by before it is added; not for families with a norm."""
        assert self.behind != "norm"
        key, _, place = (self.behind or "").partition(".")
        found = self.text(config).get(key)
        return 1.0 if found is None else float(found[int(place)] if place else found)


_OWN_WIDTHS = ("num_hidden_layers", None, "hidden_size")
_FAST = "PreTrainedTokenizerFast"
_TABLE = (
    Family("llama", vllm="llama"),
    Family("mistral", vllm="mistral"),
    Family("qwen2", vllm="qwen2", tokenizer="Qwen2Tokenizer"),
    Family("qwen3", vllm="qwen3", tokenizer="Qwen2Tokenizer"),
    Family("gemma2", vllm="gemma2", behind="norm", tokenizer="GemmaTokenizer"),
    Family("gemma3_text", vllm="gemma3", behind="norm", tokenizer="GemmaTokenizer"),
    Family("olmo2", vllm="transformers", behind="norm", tokenizer="GPTNeoXTokenizer"),
    Family("granite", vllm="granite", behind="residual_multiplier", tokenizer="GPT2Tokenizer"),
    Family("smollm3", vllm="transformers", tokenizer=_FAST),
    Family("phi3", vllm="phi3"),
    Family("gpt_neox", vllm="transformers", decoder="gpt_neox", down="mlp.dense_4h_to_h", tokenizer="GPTNeoXTokenizer"),
    Family(
        "gpt2",
        vllm="gpt2",
        decoder="transformer",
        layers="h",
        down="mlp.c_proj",
        transposed=True,
        sizes=("n_layer", "n_inner", "n_embd"),
        mlp_ratio=4,
        tokenizer="GPT2Tokenizer",
    ),
    Family("ministral3", since=5, tokenizer=_FAST),
    Family("seed_oss", tokenizer=_FAST),
    Family("olmo3", behind="norm", tokenizer="GPT2Tokenizer"),
    Family("exaone4", behind="norm", tokenizer=_FAST),
    Family("glm4", behind="norm", tokenizer=_FAST),
    Family("cohere2", tokenizer="CohereTokenizer"),
    Family("apertus", since=5, tokenizer=_FAST),  # version 4 cannot build its activation on the meta device
    Family("arcee"),
    Family("nemotron", tokenizer=_FAST),
    Family("hunyuan_v1_dense", tokenizer=_FAST),
    Family("ernie4_5"),
    Family("starcoder2", down="mlp.c_proj", tokenizer="GPT2Tokenizer"),
    Family("stablelm", tokenizer="GPTNeoXTokenizer"),
    Family("gemma", tokenizer="GemmaTokenizer"),
    Family("olmo", tokenizer="GPTNeoXTokenizer"),
    Family("phi", down="mlp.fc2", tokenizer="GPT2Tokenizer"),
    Family("qwen3_5_text", since=5, tokenizer="Qwen3_5Tokenizer"),
    Family("gemma4_text", sizes=_OWN_WIDTHS, behind="norm", since=5, tokenizer=_FAST),
    Family("lfm2", down="feed_forward.w2", sizes=_OWN_WIDTHS, since=5, tokenizer=_FAST),
    Family("lfm3", down="feed_forward.w2", behind="norm", since=5, tokenizer=_FAST),
    Family("falcon_h1", down="feed_forward.down_proj", behind="mlp_multipliers.1", since=5, tokenizer=_FAST),
    Family(
        "granitemoehybrid",
        down="shared_mlp.output_linear",
        sizes=("num_hidden_layers", "shared_intermediate_size", "hidden_size"),
        behind="residual_multiplier",
        since=5,
        tokenizer="GPT2Tokenizer",
    ),
)
FAMILIES = {family.model_type: family for family in _TABLE}

# Models that read images, and the family of their decoders.
_AROUND = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "mistral3": "mistral",
    "qwen2_5_vl": "qwen2",
    "qwen3_5": "qwen3_5_text",
    "qwen3_vl": "qwen3",
}
FAMILIES |= {
    name: replace(FAMILIES[inner], model_type=name, decoder="model.language_model", images=True, since=5, vllm=None)
    for name, inner in _AROUND.items()
}

_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def family_of(config: Mapping[str, Any], subject: str) -> Family:
    """The table entry for a config.json.

    Raises:
        UnsupportedModelError: a mixture of experts, or an architecture that is not in the table.
    """
    model_type = str(config.get("model_type"))
    text = config.get("text_config")
    entries = {**(text if isinstance(text, dict) else {}), **config}
    experts = [key for key in _EXPERT_KEYS if entries.get(key)]
    if experts:
        raise UnsupportedModelError(
            f"{subject}: {model_type} is a mixture of experts ({experts[0]} = {entries[experts[0]]}); a neuron of an "
            f"expert has no constant contribution to fold; expected a dense model of: {', '.join(FAMILIES)}"
        )
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{subject}: model_type {model_type} is not supported; expected one of: {', '.join(FAMILIES)}; a new "
            "family is one entry in adaras_export/core/families.py"
        )
    return FAMILIES[model_type]


def decoder(model: "nn.Module") -> "nn.Module":
    """The module of a causal language model that runs the decoder layers (without the LM head).

    Raises:
        UnsupportedModelError: the architecture is not in the table.
    """
    module: nn.Module = reduce(getattr, _family(model).decoder.split("."), model)
    return module


def text_config(model: "nn.Module") -> Any:  # noqa: ANN401 - a config class of Transformers
    """The config of a model's decoder, which is a part of the whole config where the model also reads images."""
    config: Any = model.config
    return config.get_text_config()


def reads_images(model: "nn.Module") -> bool:
    """Whether a model in memory also reads images."""
    return _family(model).images


def input_device(model: "nn.Module") -> Any:  # noqa: ANN401 - torch is not imported here
    """The torch.device for token ids; where Accelerate moves weights at run time, its execution device."""
    embedding = cast("Any", model).get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)  # only where there is a device map
    placed = None if hook is None else getattr(hook, "execution_device", None)
    return embedding.weight.device if placed is None else placed


def decoder_layer(model: "nn.Module", layer: int) -> "nn.Module":
    """A 0-based decoder layer; its output, or the first of several, is the hidden state."""
    layers: Any = getattr(decoder(model), _family(model).layers)
    module: nn.Module = layers[layer]
    return module


def down_projection(model: "nn.Module", layer: int) -> "nn.Module":
    """The down projection of a 0-based decoder layer; its input is h."""
    module: nn.Module = reduce(getattr, _family(model).down.split("."), decoder_layer(model, layer))
    return module


def mlp(model: "nn.Module", layer: int) -> "nn.Module":
    """The module that holds the down projection of a 0-based decoder layer; it treats every token alone."""
    parent, _, _ = _family(model).down.rpartition(".")
    module: nn.Module = reduce(getattr, parent.split("."), decoder_layer(model, layer))
    return module


def for_all_tokens(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a decoder with which every layer runs every token; Gemma 4's upper ones run the last ones alone."""
    return {**arguments, **({"logits_to_keep": 0} if "logits_to_keep" in arguments else {})}


def down_name(family: str, layer: int) -> str:
    """The module name of a 0-based layer's down projection in a causal language model of a family."""
    known = FAMILIES[family]
    return f"{known.decoder}.{known.layers}.{layer}.{known.down}"


def sizes_of(model: "nn.Module") -> tuple[str, int, int | tuple[int, ...], int]:
    """Family, L, M and D of a model in memory; M of each layer where they may differ."""
    config: Any = model.config
    family = _family(model)
    layers, mlp_size, hidden_size = family.sizes_in(config.to_dict())
    if mlp_size is None:
        downs: Any = (down_projection(model, layer) for layer in range(layers))
        return family.model_type, layers, tuple(down.in_features for down in downs), hidden_size
    return family.model_type, layers, mlp_size, hidden_size


def require_version(family: str, subject: str) -> None:
    """Refuse a family that the installed Transformers does not run, or runs wrongly.

    Raises:
        UnsupportedModelError: it is older than the family's ``since``.
    """
    found, since = version("transformers"), FAMILIES[family].since
    if int(found.partition(".")[0]) < since:
        raise UnsupportedModelError(
            f"{subject}: {family} needs transformers {since} or later; found {found}; upgrade it"
        )


def _family(model: "nn.Module") -> Family:
    config: Any = model.config
    return family_of(config.to_dict(), config.name_or_path or type(model).__name__)
