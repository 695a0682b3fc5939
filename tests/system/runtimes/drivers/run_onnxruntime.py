"""Driver of ONNX Runtime, on whatever provider a job names: one InferenceSession and numpy."""

from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
from greedy import each, generate, serve

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


def open_graph(job, path=None, **options):
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3  # each overridable initialiser is a warning
    for name, value in options.items():
        setattr(settings, name, value)
    asked = job.get("providers", ["CPUExecutionProvider"])
    providers = [tuple(one) if isinstance(one, list) else one for one in asked]
    return onnxruntime.InferenceSession(path or graph_of(job), settings, providers=providers)


def graph_of(job):
    return Path(job["folder"], "onnx", "model.onnx")


def run(job, rows, session=None, dials=None):
    session = session or open_graph(job)
    names = [output.name for output in session.get_outputs()]
    inputs = {one.name: one.shape for one in session.get_inputs()}
    caches = {name: (shape[1], shape[3]) for name, shape in inputs.items() if name.startswith("past_key_values")}
    given = {name: np.array(value, np.float32) for name, value in (dials or {}).items()}

    def call(feeds):
        feeds = {name: value for name, value in feeds.items() if name in inputs}
        return dict(zip(names, session.run(None, {**feeds, **given}), strict=True))

    return generate(call, caches, job, rows)


def at_levels(job):
    """The batch at every level of graph optimisation."""
    levels = {name: getattr(onnxruntime.GraphOptimizationLevel, name) for name in LEVELS}
    return {name: run(job, job["rows"], open_graph(job, graph_optimization_level=at)) for name, at in levels.items()}


def saved(job):
    """The batch on what ONNX Runtime wrote after optimising, in both of its formats."""
    found = {}
    for suffix in (".onnx", ".ort"):
        path = graph_of(job).with_name(f"saved{suffix}")  # beside the weights, which a saved .onnx still refers to
        level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        open_graph(job, optimized_model_filepath=str(path), graph_optimization_level=level)
        found[suffix] = run(job, job["rows"], open_graph(job, path))
    return found


def dialled(job):
    """The batch with each of the job's dials fed."""
    session = open_graph(job)
    return [run(job, job["rows"], session, dials) for dials in job["dials"]]


def providers(job):
    """What this build of ONNX Runtime brings, and what of it runs here."""
    return {"built": onnxruntime.get_available_providers(), "used": open_graph(job).get_providers()}


if __name__ == "__main__":
    serve(
        {
            "batch": lambda job: run(job, job["rows"]),
            "single": partial(each, run),
            "levels": at_levels,
            "saved": saved,
            "dials": dialled,
            "providers": providers,
        }
    )
