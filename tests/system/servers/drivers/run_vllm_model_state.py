"""Driver of what Model Runner V2 asks a steered model: a batch by hand, since the runner itself wants a GPU.

Reads a list with one job from standard input, {"requests": [{"slot", "prompt", "computed", "scheduled", "dials"}],
"start", "padding"}, and prints [{"prompt", "scale", "columns"}] on the last line, by token of the padded batch.
"""

import json
import sys
from types import SimpleNamespace

import numpy as np
import torch

from adaras_export.serving.vllm import runner
from adaras_export.serving.vllm.dials import Rule, dials_of
from adaras_export.serving.vllm.gate import Steering

SLOTS, TOKENS = 8, 32


def steering_of(start):
    """The buffers of a steered model, without the model."""
    steering = object.__new__(Steering)
    torch.nn.Module.__init__(steering)
    steering.rules = (Rule("", 2.0, 0.5, start, 0),)
    for name in ("prompt", "scale", "threshold"):
        steering.register_buffer(name, torch.full((TOKENS,), 9.0))
    steering.register_buffer("rule", torch.zeros(TOKENS, dtype=torch.int64))
    return steering


def run(job):
    state = object.__new__(runner.model_state_class())
    state.steering, state.device, state.rope_state = steering_of(job["start"]), torch.device("cpu"), None
    state.prompts = np.zeros(SLOTS, dtype=np.int64)
    state.dials = {name: SimpleNamespace(gpu=torch.zeros(SLOTS, dtype=kind)) for name, kind in runner._TYPES.items()}
    requests = job["requests"]
    for one in requests:
        dials = dials_of(state.steering.rules, one["dials"], one["prompt"])
        for name, tensor in state.dials.items():
            tensor.gpu[one["slot"]] = getattr(dials, name)
        state.prompts[one["slot"]] = one["prompt"]
    counts = [one["scheduled"] for one in requests]
    starts = np.cumsum([0, *counts])
    slots = np.array([one["slot"] for one in requests])
    spans = [range(one["computed"], one["computed"] + one["scheduled"]) for one in requests]
    positions = [*(at for span in spans for at in span), *[0] * job["padding"]]
    state.prepare_inputs(
        SimpleNamespace(
            req_ids=[str(one["slot"]) for one in requests],
            num_reqs=len(requests),
            num_tokens=int(starts[-1]),
            query_start_loc=torch.tensor([*starts, starts[-1]]),  # padded, as for CUDA graphs
            query_start_loc_np=starts,
            idx_mapping=torch.from_numpy(slots),
            idx_mapping_np=slots,
            positions=torch.tensor(positions),
            num_computed_tokens_np=np.array([one["computed"] for one in requests]),
        ),
        None,
    )
    found = {name: getattr(state.steering, name)[: len(positions)].tolist() for name in ("prompt", "scale")}
    return found | {"columns": state.steering_columns}


if __name__ == "__main__":
    print("\n" + json.dumps([run(job) for job in json.load(sys.stdin)]))
