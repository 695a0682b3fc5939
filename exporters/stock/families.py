"""For each family, the ordinary architecture with MLP biases that computes the same, and its config.

Reads no weights. The defaults of a config differ from family to family, so Transformers' config classes fill them in.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaras_export.core.checkpoint import config_object
from adaras_export.errors import ExportError


@dataclass(frozen=True)
class Form:
    """The architecture in which a family's checkpoint is written.

    Attributes:
        model_type: model_type of the architecture; the family's own if it supports MLP biases.
        architecture: the class that opens the artifact.
        biased: paths in a decoder layer of the linear maps that get a bias together with the down projection.
        always: whether the family's down projections always have a bias.
        bias: the key of config.json that gives the form its biases, where they are not always there.
        zeros: paths of further linear maps to which that key, or one that the config needs, gives a bias: a zero.
        plain: whether the config is the base's own but for ``bias``; others are written for more programs.
    """

    model_type: str
    architecture: str
    biased: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    always: bool = False
    bias: str = "mlp_bias"
    zeros: tuple[str, ...] = ()
    plain: bool = False


_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
FORMS = {
    "llama": Form("llama", "LlamaForCausalLM"),
    "smollm3": Form("smollm3", "SmolLM3ForCausalLM"),
    "granite": Form("granite", "GraniteForCausalLM"),
    "mistral": Form("llama", "LlamaForCausalLM"),
    "qwen2": Form("llama", "LlamaForCausalLM", zeros=("self_attn.o_proj",)),
    "qwen3": Form("hy_v3", "HYV3ForCausalLM"),
    "gpt_neox": Form("gpt_neox", "GPTNeoXForCausalLM", ("mlp.dense_4h_to_h",), always=True),
    "gpt2": Form("gpt2", "GPT2LMHeadModel", ("mlp.c_proj",), always=True),
    "seed_oss": Form("seed_oss", "SeedOssForCausalLM", plain=True),
    "arcee": Form("arcee", "ArceeForCausalLM", ("mlp.up_proj", "mlp.down_proj"), plain=True),
    "nemotron": Form("nemotron", "NemotronForCausalLM", ("mlp.up_proj", "mlp.down_proj"), plain=True),
    "ernie4_5": Form("ernie4_5", "Ernie4_5ForCausalLM", bias="use_bias", zeros=_ATTENTION, plain=True),
    "starcoder2": Form(
        "starcoder2",
        "Starcoder2ForCausalLM",
        ("mlp.c_fc", "mlp.c_proj"),
        bias="use_bias",
        zeros=_ATTENTION,
        plain=True,
    ),
    "phi": Form("phi", "PhiForCausalLM", ("mlp.fc2",), always=True, plain=True),
    "falcon_h1": Form(
        "falcon_h1",
        "FalconH1ForCausalLM",
        ("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"),
        plain=True,
    ),
}
_REMEDY = "choose target hf or peft"

_ROPES = ("default", "linear", "dynamic", "llama3", "yarn")

# Config entries that are copied to another family's config; all these families have them.
_PASSED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def form_of(family: str, subject: str) -> Form:
    """The form of a family.

    Raises:
        ExportError: no ordinary architecture computes the same with MLP biases, or this Transformers lacks it.
    """
    if family not in FORMS:
        raise ExportError(
            f"{subject}: no ordinary architecture computes what {family} does and has a bias behind its MLP; expected "
            f"one of: {', '.join(FORMS)}; {_REMEDY}"
        )
    form = FORMS[family]
    from transformers import CONFIG_MAPPING, __version__

    if form.model_type not in CONFIG_MAPPING:
        raise ExportError(
            f"{subject}: {family} is written as {form.architecture}, which transformers {__version__} does not have; "
            f"expected one with {form.model_type}, as 5.19 and later are; upgrade it, or {_REMEDY}"
        )
    return form


def has_biases(config: Mapping[str, Any], family: str) -> bool:
    """Whether the MLPs of a base with this config have biases."""
    return FORMS[family].always or bool(getattr(config_object(config, family), FORMS[family].bias, False))


def expressed(config: Mapping[str, Any], family: str, dtype: str, subject: str) -> dict[str, Any]:
    """The config.json of the artifact; ``dtype`` is used if the base's config names none.

    Raises:
        ExportError: the form cannot express the base's config.
    """
    form = form_of(family, subject)
    named = config.get("dtype") or config.get("torch_dtype") or dtype
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    if form.plain:
        biases = {} if form.always else {form.bias: True}
        return {**kept, "architectures": [form.architecture], "dtype": named, **biases}
    if form.always:
        return {**kept, **_older_entries(config, family), "architectures": [form.architecture], "dtype": named}
    rope = _given_rope(config, subject)
    read = config_object(config, family)
    rope = _rope(rope, config.get("rope_theta"), read)
    ours = {"architectures": [form.architecture], "dtype": named, "mlp_bias": True, **rope}
    if form.model_type == family:
        return {**kept, **ours}
    _refuse_windows(read, family, subject)
    passed = {key: getattr(read, key) for key in _PASSED}
    heads = {"head_dim": getattr(read, "head_dim", None) or read.hidden_size // read.num_attention_heads}
    stored = {key: value for key, value in config.items() if key == "quantization_config"}
    bias = {"attention_bias": bool(form.zeros) or bool(getattr(read, "attention_bias", False))}
    return {**passed, **stored, **heads, **bias, **_dense(form, read), **ours, "model_type": form.model_type}


def _older_entries(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Entries that Transformers 5 writes under another name or leaves out.

    MLX needs them. Transformers 4.57 to 5.4 know the rotary share by its old name only, and would take their default.
    """
    if family == "gpt2":
        return {"n_ctx": config.get("n_ctx", config.get("n_positions", 1024))}
    rope = config.get("rope_parameters") or {}
    defaults = {"rotary_pct": rope.get("partial_rotary_factor", 0.25), "rotary_emb_base": rope.get("rope_theta", 10000)}
    return {name: config.get(name, default) for name, default in defaults.items()}


def _dense(form: Form, read: Any) -> dict[str, Any]:  # noqa: ANN401 - as above
    """Entries that make all layers of a mixture-of-experts architecture dense."""
    if form.model_type != "hy_v3":
        return {}
    return {"mlp_layer_types": ["dense"] * read.num_hidden_layers, "num_experts": 0}


def _refuse_windows(read: Any, family: str, subject: str) -> None:  # noqa: ANN401 - as above
    kinds = {*(getattr(read, "layer_types", None) or ())} - {"full_attention"}
    if read.sliding_window is not None or kinds:
        found = f"a sliding window of {read.sliding_window} tokens" if read.sliding_window else ", ".join(sorted(kinds))
        raise ExportError(
            f"{subject}: this {family} has {found}, which {FORMS[family].architecture} does not; expected full "
            f"attention in all layers; {_REMEDY}"
        )


def _given_rope(config: Mapping[str, Any], subject: str) -> dict[str, Any]:
    """The base's rotary settings, in the old or the new format, with the type as rope_type."""
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise ExportError(f"{subject}: rotary settings are {reprlib.repr(found)}; expected an object; {_REMEDY}")
    given = dict(found)
    kind = given.pop("type", None)
    kind = given.get("rope_type", kind) or "default"
    if kind not in _ROPES or any(isinstance(value, dict) for value in given.values()):
        raise ExportError(
            f"{subject}: rotary embeddings of type {kind}, or one for each kind of layer; expected one of: "
            f"{', '.join(_ROPES)}; {_REMEDY}"
        )
    return {**given, "rope_type": kind}


def _rope(given: Mapping[str, Any], theta: float | None, read: Any) -> dict[str, Any]:  # noqa: ANN401 - as above
    """Rotary settings as both generations of Transformers read them.

    4.57 reads rope_theta and rope_scaling only; 5 reads rope_parameters, or the other two. Entries that the base left
    out stay out: 4.57 would compute other factors from filled-in defaults.
    """
    default = getattr(read, "rope_theta", None) or read.rope_parameters["rope_theta"]
    theta = given.get("rope_theta") or theta or default
    scaling = {key: value for key, value in given.items() if key != "rope_theta"}
    return {
        "rope_theta": theta,
        "rope_scaling": None if given["rope_type"] == "default" else scaling,
        "rope_parameters": {**scaling, "rope_theta": theta},
    }
