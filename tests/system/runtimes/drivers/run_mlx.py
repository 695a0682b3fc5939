"""Driver of MLX, on the CPU: a folder as `mlx_lm` opens it, or as `mlx_lm convert` quantises it.

Mode "single" feeds one prompt, then one token at a time with its cache; "library" is `generate_step` of mlx_lm, with
the prompt in pieces of two tokens. Mode "convert" writes the folder "into" with "bits" a weight. In place of a result
there may be the text of an error.
"""

from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from greedy import each, serve
from mlx_lm.convert import convert
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


def single(job, rows):
    model, _ = load_model(Path(job["folder"]))
    cache, ids, chosen, logits = make_prompt_cache(model), rows[0], [], []
    while len(chosen) < job["steps"] and job["end"] not in chosen:
        found = model(mx.array([ids]), cache=cache)[0, -1].astype(mx.float32)
        logits.append([np.array(found).tolist()])
        ids = [int(mx.argmax(found))]
        chosen += ids
    return {"sequences": [chosen], "logits": logits, "decisions": []}


def library(job, rows):
    """Tokens only."""
    model, _ = load_model(Path(job["folder"]))
    found = []
    for token, _ in generate_step(mx.array(rows[0]), model, max_tokens=job["steps"], prefill_step_size=2):
        found.append(int(token))
        if found[-1] == job["end"]:
            break
    return found


def quantised(job):
    convert(job["folder"], job["into"], quantize=True, q_bits=job["bits"], q_group_size=32)
    return job["into"]


def refusable(run, job):
    try:
        return run(job)
    except (ValueError, TypeError) as error:
        return str(error)


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    modes = {"single": partial(each, single), "library": partial(each, library), "convert": quantised}
    serve({name: partial(refusable, run) for name, run in modes.items()})
