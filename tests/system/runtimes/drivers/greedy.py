"""What the drivers share: jobs in, results out, and greedy decoding with numpy over a graph with KV inputs.

A driver is a script that a runtime's own environment runs. It reads a list of jobs as JSON from standard input, each
{"folder", "rows", "pad", "end", "steps", "state", "modes"}, and prints one {mode: result} per job, as JSON on the last
line. A result of generating has "sequences" (the new tokens by row), "logits" (steps, rows, vocabulary) and "decisions"
(p(correct) and whether steered, by row; none without a gate). "state" is the number of the KV layer that holds them.
"""

import json
import sys

import numpy as np

sys.modules["adaras_export"] = None  # importing it fails from here on


def serve(modes):
    """Do every job with ``modes``: functions of a job, by name."""
    results = [{mode: modes[mode](job) for mode in job["modes"]} for job in json.load(sys.stdin)]
    print("\n" + json.dumps(results))  # a line of its own: runtimes print, too


def each(run, job):
    """What ``run(job, rows)`` gives for each row alone."""
    return [run(job, [row]) for row in job["rows"]]


def padded(rows, pad, *, left=True):
    """Ids and mask, (rows, tokens)."""
    width = max(map(len, rows))
    gaps = [[pad] * (width - len(row)) for row in rows]
    ids = [[*gap, *row] if left else [*row, *gap] for gap, row in zip(gaps, rows, strict=True)]
    mask = [[0] * len(gap) + [1] * len(row) if left else [1] * len(row) + [0] * len(gap)
            for gap, row in zip(gaps, rows, strict=True)]  # fmt: skip
    return np.array(ids), np.array(mask)


def generate(call, caches, job, rows):
    """Greedy tokens of left-padded rows.

    ``call(feeds)`` runs the graph once and gives its outputs by name; ``caches`` has (heads, size) of every KV input.
    """
    ids, mask = padded(rows, job["pad"])
    past = {name: np.zeros((len(rows), heads, 0, size), np.float32) for name, (heads, size) in caches.items()}
    ended = np.zeros(len(rows), bool)
    steps = []
    for _ in range(job["steps"]):
        position = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        out = call({"input_ids": ids, "attention_mask": mask, "position_ids": position, **past})
        logits = out["logits"][:, -1]
        chosen = np.where(ended, job["pad"], logits.argmax(-1))
        steps.append((chosen, logits))
        ended |= chosen == job["end"]
        if ended.all():
            break
        past = {name: out[name.replace("past_key_values", "present")] for name in caches}
        ids, mask = chosen[:, None], np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
    return result(*zip(*steps, strict=True), job, out)


def result(chosen, logits, job, outputs):
    """A result, from each step's tokens (rows) and logits (rows, vocabulary) and any call's outputs by name."""
    return {
        "sequences": np.stack(chosen, 1).tolist(),
        "logits": np.stack(logits).tolist(),
        "decisions": [] if job["state"] is None else decisions(job["state"], outputs),
    }


def decisions(layer, outputs):
    """p(correct) and whether a row is steered, from the layer that carries them."""
    steered, probability = (np.asarray(outputs[f"present.{layer}.{slot}"])[:, 0, 0, 0] for slot in ("key", "value"))
    return [[float(p), bool(flag)] for p, flag in zip(probability, steered, strict=True)]
