"""What vLLM's model runners tell a steered model before each pass, and what its gates said afterwards.

Model Runner V2, the default on CUDA, asks a model for its `ModelState`. Model Runner V1, the one on CPUs, has no such
hook: its `_model_forward` is wrapped, for steered models only. Both know every request's prompt length, also where a
preempted request is computed again, and the positions of its tokens. Dummy passes and graph captures do not come here;
the buffers are zero then, and nothing is steered.
"""

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaras_export.serving.vllm.dials import Dials, dials_of
from adaras_export.serving.vllm.gate import Steering

REPORT = "steering_report"
"""The attribute of a runner's output: p(correct) and the verdict by request id, of requests whose prompt has ended."""

_TYPES = {
    "rule": torch.int64,
    "strength": torch.float32,
    "threshold": torch.float32,
    "prompt_length": torch.int64,
    "first": torch.int64,
}


def steering_of(model: Any) -> Steering | None:
    """The steering of a model; None if it is not steered."""
    found = getattr(model, "steering", None)
    return found if isinstance(found, Steering) else None


def dials_of_request(steering: Steering, sampling_params: Any, prompt_tokens: int) -> Dials:
    """The dials of a request, as the worker knows it.

    Raises:
        ValueError: the front end has let wrong dials pass.
    """
    return dials_of(steering.rules, sampling_params.extra_args, prompt_tokens)


@cache
def model_state_class() -> type[Any]:
    """The `ModelState` of steered models, for Model Runner V2."""
    from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    GPUModelRunner.sample_tokens = _reporting(GPUModelRunner.sample_tokens, lambda runner: runner.model_state)

    class SteeredModelState(DefaultModelState):
        """Has the dials of each request in a buffer that the device reads."""

        def __init__(self, vllm_config: Any, model: Any, *rest: Any) -> None:
            super().__init__(vllm_config, model, *rest)
            self.steering: Steering = model.steering
            self.dials = {name: UvaBackedTensor(self.max_num_reqs, dtype=kind) for name, kind in _TYPES.items()}
            self.prompts = np.zeros(self.max_num_reqs, dtype=np.int64)  # their lengths
            self.steering_columns: dict[str, int] = {}

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            # Not the length of prefill_token_ids: after a preemption they hold generated tokens, too.
            dials = dials_of_request(self.steering, new_req_data.sampling_params, new_req_data.prompt_len)
            for name, tensor in self.dials.items():
                tensor.np[req_index] = getattr(dials, name)
            self.prompts[req_index] = new_req_data.prompt_len

        def apply_staged_writes(self) -> None:
            super().apply_staged_writes()
            for tensor in self.dials.values():
                tensor.copy_to_uva()

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
            count, starts = input_batch.num_tokens, input_batch.query_start_loc
            token_T = torch.arange(count, device=self.device, dtype=starts.dtype)
            request_T = torch.searchsorted(starts[1 : input_batch.num_reqs + 1], token_T, right=True)
            slot_T = input_batch.idx_mapping[request_T].long()
            dials = {name: tensor.gpu[slot_T] for name, tensor in self.dials.items()}
            self.steering.place(input_batch.positions[:count], dials)
            lengths = self.prompts[input_batch.idx_mapping_np]
            self.steering_columns = _last_columns(
                input_batch.req_ids, lengths, input_batch.num_computed_tokens_np, input_batch.query_start_loc_np
            )
            return super().prepare_inputs(input_batch, req_states)

    return SteeredModelState


@cache
def watch() -> None:
    """Wrap Model Runner V1 once, for the steered models that it runs."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    GPUModelRunner._model_forward = _placing(GPUModelRunner._model_forward)
    GPUModelRunner.sample_tokens = _reporting(GPUModelRunner.sample_tokens, lambda runner: runner)


def _placing(native: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(native)
    def _model_forward(runner: Any, input_ids: Any = None, positions: Any = None, *args: Any, **kwargs: Any) -> Any:
        steering = steering_of(runner.get_model())
        if steering is None:
            return native(runner, input_ids, positions, *args, **kwargs)
        _place(runner, steering, positions if positions.dim() == 1 else positions[0])
        return native(runner, input_ids, positions, *args, **kwargs)

    return _model_forward


def _place(runner: Any, steering: Steering, position_T: Tensor) -> None:
    batch = runner.input_batch
    count = batch.num_reqs
    names, starts = batch.req_ids[:count], runner.query_start_loc.np[: count + 1]
    lengths, computed = batch.num_prompt_tokens[:count], batch.num_computed_tokens_cpu[:count]
    runner.steering, runner.steering_columns = steering, _last_columns(names, lengths, computed, starts)
    # One generated token of each: as in the pass before, if that was so for the same requests.
    only_decodes = starts[-1] == count and bool((computed >= lengths).all())
    placed = [*names] if only_decodes else None
    if placed is not None and placed == getattr(runner, "steering_placed", None):
        return
    runner.steering_placed = placed
    table = np.array([_dials_in(runner.requests[name], steering, at) for name, at in zip(names, lengths, strict=True)])
    table = np.repeat(table.T, np.diff(starts), axis=1)
    moved = torch.from_numpy(table).to(position_T.device, non_blocking=True)
    steering.place(position_T[: table.shape[1]], dict(zip(_TYPES, moved, strict=True)))


def _dials_in(state: Any, steering: Steering, prompt_tokens: int) -> list[float]:
    """The dials of a request in the order of `_TYPES`, made once and kept on what the runner has of it."""
    kept: list[float] | None = getattr(state, "steering_dials", None)
    if kept is None:
        dials = dials_of_request(steering, state.sampling_params, int(prompt_tokens))
        kept = state.steering_dials = [float(getattr(dials, name)) for name in _TYPES]
    return kept


def _last_columns(names: Sequence[str], lengths: Any, computed: Any, starts: Any) -> dict[str, int]:
    """The column of the last prompt token by request id, of the requests that have theirs in this pass."""
    columns = starts[:-1] + lengths - 1 - computed
    rows = zip(names, columns.tolist(), starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    return {name: column for name, column, first, end in rows if first <= column < end}


class _Seen:
    """p(correct) and the verdict of the requests whose last prompt token was in a pass, on their way to the host."""

    def __init__(self, names: Sequence[str], values: Tensor, ready: Any) -> None:
        self.names, self.values, self.ready = names, values, ready

    @classmethod
    def of(cls, steering: Steering, columns: dict[str, int]) -> "_Seen | None":
        if not steering.gates:
            return None
        device = steering.probability.device
        column = torch.tensor(list(columns.values()), dtype=torch.int64).to(device, non_blocking=True)
        threshold = steering.threshold[column]
        values = torch.stack([steering.probability[column], threshold, steering.gate_of[steering.rule[column]].float()])
        if device.type == "cpu":
            return cls([*columns], values, None)
        copied, ready = values.to("cpu", non_blocking=True), torch.cuda.Event()
        ready.record()
        return cls([*columns], copied, ready)

    def report(self) -> dict[str, tuple[float, bool]]:
        """(p(correct), steered) by request id, of requests whose rule has a gate."""
        if self.ready is not None:
            self.ready.synchronize()
        rows = zip(self.names, *self.values.tolist(), strict=True)
        return {name: (p, p < threshold) for name, p, threshold, gate in rows if gate >= 0}


def _reporting(native: Callable[..., Any], state_of: Callable[[Any], Any]) -> Callable[..., Any]:
    """``native``, whose output gets a report; ``state_of`` gives what has the steering and its columns of this pass."""

    @wraps(native)
    def sample_tokens(runner: Any, *args: Any, **kwargs: Any) -> Any:
        state = state_of(runner)
        columns = getattr(state, "steering_columns", None)
        seen = _Seen.of(state.steering, columns) if columns else None
        output = native(runner, *args, **kwargs)
        if seen is None or output is None:
            return output
        if hasattr(output, "get_output"):  # scheduled ahead: the output is there later
            output.get_output = _attached(output.get_output, seen)
        else:
            setattr(output, REPORT, seen.report())
        return output

    return sample_tokens


def _attached(native: Callable[[], Any], seen: _Seen) -> Callable[[], Any]:
    def get_output() -> Any:
        output = native()
        setattr(output, REPORT, seen.report())
        return output

    return get_output
