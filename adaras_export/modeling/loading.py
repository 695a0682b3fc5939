"""Loads a stock model and its tokenizer in a chosen numeric type. Runs no code of a repository."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from adaras_export.core import quantised
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.families import input_device
from adaras_export.errors import ArtifactError, first_line, require
from adaras_export.files.hub import fetch

Dtype = Literal["float32", "bfloat16", "float16"]


def load_model(
    base: str | Path,
    revision: str | None = None,
    dtype: Dtype = "float32",
    device: str | None = None,
    device_map: str | Mapping[str, str | int] | None = None,
    offload_folder: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A stock model in eval mode, and its tokenizer with padding on the left; runs no untrusted code.

    Args:
        base: folder or Hub id.
        revision: branch, tag or commit of a Hub id.
        dtype: numbers that the model computes with; float32 where results are to be reproducible.
        device: default: CUDA where torch sees one, else the CPU.
        device_map: where Accelerate puts the modules; "auto" fills GPUs, then memory, then the disk. Then ``device``
            does not count.
        offload_folder: where a device map may put weights on the disk.

    Raises:
        MissingExtraError: a device map is given, but Accelerate is not installed; or what opens quantised weights.
        ArtifactError: the folder has no model, or its tensors are not exactly those of the architecture.
        UnsupportedModelError: the architecture is not in the table, or the weights are quantised in a format that was
            not tried.

    Example:
        model, tokenizer = load_model("Qwen/Qwen3-1.7B", dtype="bfloat16")
        report = collect(model, tokenizer, read_questions("questions.jsonl"), "traces.jsonl")
        print(report.correct, "of", report.traces, "traces are correct")
    """
    folder = fetch(base, revision)
    checkpoint = Checkpoint(folder)
    checkpoint.require_buildable()
    stored = quantised.required(checkpoint.config, str(base))
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    # Some quantised models can be put somewhere only while they are loaded.
    placing: dict[str, Any] = {} if stored is None else {"device_map": {"": place}}
    if device_map is not None:
        require("accelerate", "distributed", "a device map")
        placing = {"device_map": device_map, "offload_folder": offload_folder}
    try:
        with torch.random.fork_rng(devices=[]):  # missing tensors are drawn at random
            loaded: Any = checkpoint.family.auto_class.from_pretrained(
                folder, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True, **placing
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        # ImportError: a folder without tokenizer.json may need sentencepiece or protobuf.
        reason = first_line(error)
        raise ArtifactError(f"{base}: cannot be loaded ({reason}); expected a complete model folder") from error
    model, loading = loaded
    _require_exact(loading, str(base))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if device_map is None and stored is None:
        model.to(place)
    if stored is not None and stored.library == "compressed_tensors":
        with (
            torch.no_grad()
        ):  # it unpacks the weights in the model's first call, and not where only the decoder is called
            model(torch.tensor([[0]], device=input_device(model)))
    return model.eval(), tokenizer


def _require_exact(loading: Mapping[str, Any], subject: str) -> None:
    """Refuse a load with a missing or an unexpected tensor, which Transformers only logs."""
    wrong = [f"{kind} {key}" for kind in ("missing", "unexpected") for key in sorted(loading[f"{kind}_keys"])]
    if wrong:
        raise ArtifactError(
            f"{subject}: {len(wrong)} tensors do not fit its config.json ({', '.join(wrong[:5])}); "
            "expected exactly the tensors of the architecture"
        )
