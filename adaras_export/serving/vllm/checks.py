"""What is refused, by name, when a steered model is opened. Whatever is not known to keep the steering exact is."""

from collections.abc import Iterator, Mapping
from typing import Any

from adaras_export.core.checkpoint import Checkpoint
from adaras_export.files.hub import fetch
from adaras_export.serving.vllm.dials import gates_of

KNOWN = ("0.31", "0.32")
"""Minor versions of vLLM that the tests run: others may have moved what the plugin hangs on."""


def version_problem() -> str | None:
    """What is wrong with the installed vLLM, if something is."""
    import vllm

    minor = ".".join(vllm.__version__.split(".")[:2])
    if minor in KNOWN:
        return None
    return f"vLLM {vllm.__version__} is not known to steer exactly; expected one of: {', '.join(KNOWN)}"


def require_supported(vllm_config: Any) -> None:
    """Require that nothing in vLLM's configuration makes steering inexact.

    Raises:
        ValueError: something does; the message has all that does.
    """
    if problems := [*_problems(vllm_config)]:
        raise ValueError(f"a steered model cannot be served like this: {'; '.join(problems)}")


def _problems(vllm_config: Any) -> Iterator[str]:
    if problem := version_problem():
        yield problem
    from vllm import envs

    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    settings = getattr(model.hf_config, "adaras", None)
    if not isinstance(settings, Mapping):
        yield "its config.json has no entry adaras; expected an export to hf or hf-thin"
        return
    yield from _rule_problems(settings)
    refused = {
        f"the model impl {model.model_impl} would leave the plugin's classes out": model.model_impl != "auto",
        f"the runner {model.runner_type} generates nothing": model.runner_type != "generate",
        "prompt embeddings have no tokens to count": model.enable_prompt_embeds,
        "pipeline parallelism: the gate's verdict does not cross stages": parallel.pipeline_parallel_size > 1,
        "micro-batching splits tokens, but not the gate's buffers": parallel.use_ubatching,
        "context parallelism is not tested": _more_than_one(parallel, "decode_context", "prefill_context"),
        f"a KV cache of type {cache.cache_dtype} rounds the gate's pages": cache.cache_dtype
        not in ("auto", str(model.dtype).removeprefix("torch.")),
        "the front end in Rust (VLLM_USE_RUST_FRONTEND) does not check dials": envs.VLLM_USE_RUST_FRONTEND,
        "KV transfer names pages by their tokens, not by what steered them": vllm_config.kv_transfer_config is not None,
    }
    yield from (reason for reason, applies in refused.items() if applies)


def _rule_problems(settings: Mapping[str, Any]) -> Iterator[str]:
    read = [layer for gate in gates_of(settings) for layer in gate["layers"]]
    if not settings["layers"]:
        yield "its rule steers no layer"
    elif read and max(read) >= min(settings["layers"]):
        yield (
            f"its gate reads layer {max(read)}, at or behind the first steered layer {min(settings['layers'])}, which "
            "takes a second pass over the prompt; serve an export of a rule whose gate reads lower layers"
        )


def _more_than_one(parallel: Any, *kinds: str) -> bool:
    return any(getattr(parallel, f"{kind}_parallel_size") > 1 for kind in kinds)


def base_folder(record: Mapping[str, Any]) -> str:
    """The folder of the base model of an `hf-thin` export, whose config has this record of it.

    Raises:
        ValueError: the model there has other tensors.
        ArtifactError: it is not there.
    """
    folder = fetch(record["id"], record["revision"])
    if (found := Checkpoint(folder).fingerprint) != record["fingerprint"]:
        raise ValueError(
            f"{record['id']}: its tensors' fingerprint is {found[:12]}; expected {record['fingerprint'][:12]}, the "
            "base that the export was made from"
        )
    return str(folder)
