"""ONNX Runtime GenAI: the graph of its builder, and the configuration that tells it how to run a steered graph."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from adaras_export.core import families
from adaras_export.errors import ArtifactError, ExportError, require
from adaras_export.exporters.onnx.graph import DATA_FILE

# The families whose graphs by the builder of version 0.18, beside Transformers 5, equal the base. It fails on
# gemma3_text and smollm3, takes olmo2 for olmo, which has another order of norms, and its gemma2 is off by 2e-3.
BUILDER_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "granite", "phi3")
# GenAI has no such types; all decoders of text run in one loop, whatever they are called.
_TYPES = {"olmo2": "olmo", "gpt_neox": "llama", "gpt2": "llama"}


def build_graph(base: Path, graph: Path, family: str) -> None:
    """Write the base as GenAI's builder does: GroupQueryAttention, right padding, KV buffers that may be shared.

    In a process of its own, so that its copy of the weights is gone afterwards. Runs no code of the base.

    Raises:
        ExportError: the builder does not know the family, fails, or GenAI has no kernel for the head size.
        MissingExtraError: GenAI is not installed.
    """
    require("onnxruntime_genai", "genai", "--genai")
    if family not in BUILDER_FAMILIES:
        known = ", ".join(BUILDER_FAMILIES)
        raise ExportError(
            f"{base}: GenAI's builder is no help with {family}; expected one of: {known}; leave out --genai"
        )
    head_size = _head_size(base)
    with tempfile.TemporaryDirectory(dir=graph.parent) as scratch:
        out = Path(scratch) / "built"
        # A cache of a sliding window would not carry the layer of the gate's state, which has no window.
        own = ["hf_remote=false", "windowed_kv_cache=false"]
        how = ["-i", str(base), "-o", str(out), "-p", "fp32", "-e", "cpu", "-c", scratch, "--extra_options", *own]
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", *how]
        done = subprocess.run(builder, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip().rpartition("\n")[2]
            raise ExportError(f"{base}: GenAI's builder failed ({reason}); leave out --genai for torch's export")
        model = ir.load(out / "model.onnx")
        _make_concrete(model, head_size)
        model.producer_version = None  # the builder's, with the commit of whatever repository it was started in
        ir.save(model, graph, external_data=DATA_FILE)


def _head_size(base: Path) -> int:
    """The size of an attention head; one that GenAI has no kernel for is refused before its builder runs."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(base)
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size % 16:
        raise ExportError(f"{base}: heads of {size}; GroupQueryAttention expects a multiple of 16; leave out --genai")
    return size


def _make_concrete(model: ir.Model, head_size: int) -> None:
    """Write the head size into the shapes of the KV cache: Transformers.js makes symbolic sizes zero."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name is not None and value.name.endswith((".key", ".value")) and value.shape is not None:
            value.shape = ir.Shape([*value.shape[:3], head_size])


def genai_config(
    model: ir.Model, config: Mapping[str, Any], generation: Mapping[str, Any], family: str, filename: str
) -> dict[str, Any]:
    """The genai_config.json of a graph.

    Args:
        model: the graph, with the layer of the gate's state where it has one.
        config: config.json of the base.
        generation: generation_config.json of the base.
        family: its model_type.
        filename: path of the graph below the folder.

    Raises:
        ArtifactError: the graph has no KV cache.
    """
    names = {value.name for value in model.graph.inputs}
    shapes = (value.shape for value in model.graph.inputs if value.name == "past_key_values.0.key")
    shape = next((shape for shape in shapes if shape is not None and len(shape) == 4), None)
    if shape is None:
        raise ArtifactError(f"{filename}: has no input past_key_values.0.key of four axes; expected a KV cache")
    [_, heads, _, size] = shape
    tokens = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in names}
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    first_end = next(iter(ends), None) if isinstance(ends, list) else ends
    length = config.get("max_position_embeddings", config.get("n_positions"))
    special = {"bos_token_id": first_end, "pad_token_id": first_end}  # where the base names none
    special |= {name: config[name] for name in special if config.get(name) is not None}
    chosen = {name: generation[name] for name in ("do_sample", "temperature", "top_k", "top_p") if name in generation}
    return {
        "model": {
            **special,
            "eos_token_id": ends,
            "context_length": length,
            "vocab_size": config.get("vocab_size"),
            "type": _TYPES.get(family, family),
            "decoder": {
                "filename": filename,
                # Else it warns of every initialiser that may be overridden.
                "session_options": {"log_id": "onnxruntime-genai", "log_severity_level": 3, "provider_options": []},
                "head_size": size,
                "hidden_size": config[families.FAMILIES[family].sizes[2]],
                "num_attention_heads": config.get("num_attention_heads", config.get("n_head")),
                "num_hidden_layers": sum(str(name).endswith(".key") for name in names),
                "num_key_value_heads": heads,
                "inputs": {
                    **tokens,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            **chosen,
            "max_length": length,
            "past_present_share_buffer": any(node.op_type == "GroupQueryAttention" for node in model.graph),
        },
    }
