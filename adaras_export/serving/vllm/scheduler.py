"""vLLM's schedulers, with prefix-cache keys that tell steered pages from unsteered ones, and with the gate's verdicts.

KV pages at and behind the first steered token depend on where the prompt ended and on the dials. Their block hashes get
that as one more part; hashes are chained, so all blocks behind differ too, while the prompt in front of it is shared by
all requests.
"""

from functools import cache
from inspect import signature
from typing import Any

from vllm.logger import init_logger
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from adaras_export.serving.vllm.dials import RESULT, Dials, dials_of, rules_of
from adaras_export.serving.vllm.runner import REPORT

_LOOKAHEAD = "num_hash_lookahead_tokens"
_log = init_logger("vllm.adaras_export")


def make_scheduler(vllm_config: Any, **kwargs: Any) -> Scheduler:
    """What the engine calls as its scheduler class; only then is it settled whether vLLM schedules ahead."""
    native = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    return _steered(native)(vllm_config=vllm_config, **kwargs)


class _SteeredScheduling:
    """Mix-in for a scheduler of vLLM's."""

    def __init__(self, vllm_config: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, **kwargs)  # type: ignore[call-arg]
        self.steering_rules = rules_of(vllm_config.model_config.hf_config.adaras)
        self.steering_reports: dict[str, tuple[float, bool]] = {}

    def add_request(self, request: Any) -> None:
        """As in vLLM; the request's block hashes get our part."""
        own: Any = self
        params = request.sampling_params
        dials = dials_of(self.steering_rules, params.extra_args, request.num_prompt_tokens)
        request.steering_dials = dials
        if request._block_hasher is not None:  # with prefix caching
            algorithm = get_hash_fn_by_name(own.vllm_config.cache_config.prefix_caching_hash_algo)
            request._block_hasher = BlockHasher(own.vllm_config, own.hash_block_size, algorithm, dials)
            request.block_hashes.clear()
            request.update_block_hashes()
        super().add_request(request)  # type: ignore[misc]

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """As in vLLM; keeps the verdicts until their requests end."""
        self.steering_reports |= getattr(model_runner_output, REPORT, {})
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        transfer, *rest = super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
        verdict = self.steering_reports.pop(request.request_id, None)
        dials = request.steering_dials
        if verdict is None and self.steering_rules[dials.rule].gate is not None:
            return transfer, *rest  # ended before its prompt was read
        p, below = verdict or (None, True)
        result = {"p_correct": p, "steered": below and dials.strength != 0, "strength": dials.strength}
        judged = "no gate" if p is None else f"p(correct) {p:.3f}"
        does = f"steered at strength {dials.strength:g}" if result["steered"] else "not steered"
        _log.info("request %s: %s, %s", request.request_id, judged, does)
        return {**(transfer or {}), RESULT: result}, *rest


class BlockHasher:
    """A request's block hasher: vLLM's own, whose hash function gets one more part for blocks that steering changes."""

    def __init__(self, vllm_config: Any, block_size: int, algorithm: Any, dials: Dials) -> None:
        self.block_size, self.algorithm, self.dials = block_size, algorithm, dials
        # From 0.33 on a hash also covers the tokens behind its block that a drafter has read.
        known = signature(get_request_block_hasher).parameters
        more = {_LOOKAHEAD: getattr(vllm_config, _LOOKAHEAD)} if _LOOKAHEAD in known else {}
        self.native = get_request_block_hasher(block_size, self._hash, **more)
        self.end = 0

    def __call__(self, request: Any) -> Any:
        """The hashes of the request's new full blocks."""
        self.end = len(request.block_hashes) * self.block_size
        return self.native(request)

    def _hash(self, content: tuple[Any, ...]) -> bytes:
        """Called once for each block, in order."""
        self.end += self.block_size
        hashed: bytes = self.algorithm((*content, self.dials.key()) if self.end > self.dials.first else content)
        return hashed


@cache
def _steered(native: type[Any]) -> type[Any]:
    return type(f"Steered{native.__name__}", (_SteeredScheduling, native), {"__module__": __name__})
