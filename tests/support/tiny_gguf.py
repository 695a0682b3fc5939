"""Writes bases as GGUF models in float32, as llama.cpp wants each architecture; imports nothing of the library."""

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, TokenType

# model_type -> llama.cpp's name, and how it keeps rotary pairs: side by side, as its llama does, or half and half.
ARCHITECTURES = {
    "llama": ("llama", "side by side"),
    "mistral": ("llama", "side by side"),
    "qwen2": ("qwen2", "half and half"),
    "qwen3": ("qwen3", "half and half"),
    "granite": ("granite", "side by side"),
    "smollm3": ("smollm3", "side by side"),
    "phi3": ("phi3", "half and half"),
    "gpt_neox": ("gptneox", "half and half"),
    "gpt2": ("gpt2", None),
    "seed_oss": ("seed_oss", "half and half"),
    "arcee": ("arcee", "side by side"),
    "nemotron": ("nemotron", "half and half"),
    "ernie4_5": ("ernie4_5", None),  # side by side in Transformers, too
    "starcoder2": ("starcoder2", "half and half"),
    "stablelm": ("stablelm", "half and half"),
    "gemma": ("gemma", "half and half"),
    "olmo": ("olmo", "side by side"),
    "phi": ("phi2", "half and half"),
    "hunyuan_v1_dense": ("hunyuan-dense", "half and half"),
    "cohere2": ("cohere2", None),
}


def write_model(model, tokenizer, path):
    """Write a model in memory as a GGUF file."""
    config = model.config
    name, rotary = ARCHITECTURES[config.model_type]
    writer = GGUFWriter(path, name)
    _add_sizes(writer, config)
    _add_scales(writer, config)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    names = gguf.get_tensor_name_map(_arch(name), config.num_hidden_layers)
    embedding, head = (which().weight for which in (model.get_input_embeddings, model.get_output_embeddings))
    for key, tensor in model.state_dict().items():
        if head is embedding and tensor.data_ptr() == head.data_ptr() and key.startswith(("lm_head", "embed_out")):
            continue
        values = _arranged(key, tensor.float().numpy(), config, rotary)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(values))
    finish(writer)
    return path


def write_dequantised(source, path):
    """Write a GGUF model with quantised weights anew in float32, everything else as it is."""
    reader = GGUFReader(source)
    writer = GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    finish(writer)
    return path


def shifted(source, path):
    """A control vector like ``source``, one layer further down."""
    reader = GGUFReader(source)
    writer = GGUFWriter(path, "controlvector")
    for tensor in reader.tensors:
        assert tensor.tensor_type == GGMLQuantizationType.F32
        writer.add_tensor(f"direction.{int(tensor.name.split('.')[1]) - 1}", np.array(tensor.data))
    finish(writer)
    return path


def _arch(name):
    return next(arch for arch, its_name in gguf.MODEL_ARCH_NAMES.items() if its_name == name)


def _add_sizes(writer, config):
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    inner = config.n_inner if config.model_type == "gpt2" else config.intermediate_size
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type != "gpt2":
        rotary = config.to_dict() | config.to_dict().get("rope_parameters", {})  # Transformers 4 has them in no group
        part = rotary.get("rotary_pct", 1.0) if config.model_type == "gpt_neox" else 1.0
        writer.add_rope_dimension_count(int(head_size * rotary.get("partial_rotary_factor", part)))
        writer.add_rope_freq_base(rotary.get("rope_theta", rotary.get("rotary_emb_base")))


def _add_scales(writer, config):
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key in ("layer_norm_eps", "norm_epsilon", "norm_eps", "layer_norm_epsilon"):
        if hasattr(config, key):
            writer.add_layer_norm_eps(getattr(config, key))
    if hasattr(config, "use_parallel_residual"):
        writer.add_parallel_residual(config.use_parallel_residual)
    if config.model_type == "olmo":
        writer.add_layer_norm_eps(1e-5)
        writer.add_clamp_kqv(config.clip_qkv)
    if config.model_type == "cohere2":
        writer.add_logit_scale(config.logit_scale)
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def _add_tokenizer(writer, tokenizer, size):
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(size)))
    writer.add_token_types([TokenType.CONTROL if one in special else TokenType.NORMAL for one in range(size)])
    writer.add_token_merges([" ".join(tokenizer.convert_ids_to_tokens(sorted(special)))])  # none would be refused
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)


def _arranged(key, values, config, rotary):
    """The values of a tensor in the order that llama.cpp expects."""
    heads = config.num_attention_heads
    if config.model_type == "gpt2" and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return values.T
    if config.model_type == "gpt_neox" and ".query_key_value." in key:  # q, k and v of a head become all q, all k, ...
        parts = values.reshape(heads, 3, config.hidden_size // heads, *values.shape[1:])
        return parts.swapaxes(0, 1).reshape(values.shape)
    if config.model_type in ("nemotron", "gemma") and key.endswith("norm.weight"):
        return values + 1
    if rotary == "side by side" and (".q_proj." in key or ".k_proj." in key):
        count = heads if ".q_proj." in key else config.num_key_value_heads
        halves = values.reshape(count, 2, -1, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)
    return values


def finish(writer):
    """Write what a writer has been given."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
