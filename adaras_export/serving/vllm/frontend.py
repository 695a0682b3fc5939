"""In the process that takes requests: refuses dials that are wrong, and counts what the gates said.

A request that is refused here is an error of the client's: 400 over HTTP.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from adaras_export.serving.vllm.dials import RESULT, dials_of, rules_of


@cache
def watch() -> None:
    """Wrap what takes requests and what gives answers, once, for steered models."""
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor

    InputProcessor.process_inputs = _checked(InputProcessor.process_inputs)
    OutputProcessor.process_outputs = _counted(OutputProcessor.process_outputs)
    for mixin in (BeamSearchOfflineMixin, BeamSearchOnlineMixin):
        mixin.beam_search = _refused(mixin.beam_search)


def _settings_of(model_config: Any) -> Any:
    """The entry "adaras" of a model's config; None if the model is not steered."""
    steered = str(getattr(model_config.hf_config, "model_type", "")).startswith("adaras_")
    return model_config.hf_config.adaras if steered else None


def _checked(native: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(native)
    def process_inputs(processor: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.exceptions import VLLMValidationError

        request = native(processor, *args, **kwargs)
        settings = _settings_of(processor.model_config)
        if settings is None or request.sampling_params is None:
            return request
        if request.resumable:
            raise VLLMValidationError("streaming input has no end of the prompt, where steering starts")
        try:
            dials_of(rules_of(settings), request.sampling_params.extra_args, len(request.prompt_token_ids))
        except ValueError as error:
            raise VLLMValidationError(str(error)) from error
        return request

    return process_inputs


def _refused(native: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(native)
    def beam_search(front: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.exceptions import VLLMValidationError

        if _settings_of(front.model_config) is not None:
            raise VLLMValidationError(
                "beam search gives the engine prompt and answer as one new prompt at each step, which would move where "
                "steering starts; sample, or search without steering"
            )
        return native(front, *args, **kwargs)

    return beam_search


def _counted(native: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(native)
    def process_outputs(processor: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        for output in engine_core_outputs:
            if verdict := (output.kv_transfer_params or {}).get(RESULT):
                _count(verdict)
        return native(processor, engine_core_outputs, *args, **kwargs)

    return process_outputs


def _count(verdict: dict[str, Any]) -> None:
    requests, steered, probability = _metrics()
    requests.inc()
    steered.inc(bool(verdict["steered"]))
    if verdict["p_correct"] is not None:
        probability.observe(verdict["p_correct"])


@cache
def _metrics() -> tuple[Any, Any, Any]:
    """Requests, steered requests, and the histogram of p(correct), as `/metrics` has them."""
    from prometheus_client import Counter, Histogram

    return (
        Counter("steering:requests", "Requests that a steered model has answered."),
        Counter("steering:requests_steered", "Requests among them whose tokens were steered."),
        Histogram("steering:p_correct", "p(correct) by the gate.", buckets=[at / 10 for at in range(1, 11)]),
    )
