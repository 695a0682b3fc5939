"""Driver of ONNX Runtime GenAI, which is told of the graph by genai_config.json alone."""

from functools import partial

import numpy as np
import onnxruntime_genai
from greedy import each, padded, result, serve


def run(job, rows, *, share=False):
    """Greedy tokens; rows are padded on the right, as GenAI's own encode_batch does it."""
    ids, _ = padded(rows, job["pad"], left=False)
    generator = start(job, len(rows), ids.shape[1] + job["steps"], share)
    return answer(job, generator, ids if len(rows) > 1 else ids[0])


def start(job, rows, length, share):
    model = onnxruntime_genai.Model(onnxruntime_genai.Config(job["folder"]))
    parameters = onnxruntime_genai.GeneratorParams(model)
    settings = {"do_sample": False, "batch_size": rows, "max_length": length, "past_present_share_buffer": share}
    parameters.set_search_options(**settings)
    return onnxruntime_genai.Generator(model, parameters)


def answer(job, generator, ids):
    generator.append_tokens(np.asarray(ids, np.int32))
    chosen, logits = [], []
    while len(chosen) < job["steps"] and not generator.is_done():
        logits.append(np.array(generator.get_logits())[:, -1])
        generator.generate_next_token()
        chosen.append(np.array(generator.get_next_tokens()))
    names = [] if job["state"] is None else [f"present.{job['state']}.{slot}" for slot in ("key", "value")]
    return result(chosen, logits, job, {name: generator.get_output(name) for name in names})


def chat(job):
    """The rows as the turns of one chat. GenAI never reads the last token of an answer, unless it is given it again."""
    generator = start(job, 1, sum(map(len, job["rows"])) + job["steps"] * len(job["rows"]), share=True)
    found, unread = [], []
    for row in job["rows"]:
        if found:
            sequence = generator.get_sequence(0).tolist()
            generator.rewind_to(len(sequence) - 1)
            unread = sequence[-1:]
        found.append(answer(job, generator, unread + row))
    return found


if __name__ == "__main__":
    serve(
        {
            "batch": lambda job: run(job, job["rows"]),
            "single": partial(each, run),
            "batch-shared": lambda job: run(job, job["rows"], share=True),
            "single-shared": partial(each, partial(run, share=True)),
            "chat": chat,
        }
    )
