"""Driver of ONNX Runtime GenAI, which is told of the graph by genai_config.json alone."""

from functools import partial

import numpy as np
import onnxruntime_genai
from greedy import each, padded, result, serve


def open_model(job):
    config = onnxruntime_genai.Config(job["folder"])
    return onnxruntime_genai.Model(config)


def run(job, rows, *, share=False, left=False):
    """Greedy tokens; rows are padded on the right, as GenAI's own encode_batch does it."""
    model = open_model(job)
    parameters = onnxruntime_genai.GeneratorParams(model)
    ids, _ = padded(rows, job["pad"], left=left)
    parameters.set_search_options(
        do_sample=False, batch_size=len(rows), max_length=ids.shape[1] + job["steps"], past_present_share_buffer=share
    )
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(ids.astype(np.int32) if len(rows) > 1 else ids[0].astype(np.int32))
    chosen, logits = [], []
    while not generator.is_done():
        logits.append(np.array(generator.get_logits())[:, -1])
        generator.generate_next_token()
        chosen.append(np.array(generator.get_next_tokens()))
    names = [] if job["state"] is None else [f"present.{job['state']}.{slot}" for slot in ("key", "value")]
    return result(chosen, logits, job, {name: generator.get_output(name) for name in names})


if __name__ == "__main__":
    serve(
        {
            "batch": lambda job: run(job, job["rows"]),
            "single": partial(each, run),
            "batch-left": lambda job: run(job, job["rows"], left=True),
            "batch-shared": lambda job: run(job, job["rows"], share=True),
            "single-shared": partial(each, partial(run, share=True)),
        }
    )
