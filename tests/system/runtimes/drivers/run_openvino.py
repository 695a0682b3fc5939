"""Driver of OpenVINO: the compiled graph and numpy, in float32."""

from functools import partial
from pathlib import Path

import openvino
from greedy import each, generate, serve


def run(job, rows):
    path = Path(job["folder"], "onnx", "model.onnx")
    compiled = openvino.Core().compile_model(path, "CPU", job["settings"])
    inputs = {port.get_any_name(): port.get_partial_shape() for port in compiled.inputs}
    caches = {
        name: (shape[1].get_length(), shape[3].get_length())
        for name, shape in inputs.items()
        if name.startswith("past_key_values")
    }
    request = compiled.create_infer_request()

    def call(feeds):
        found = request.infer({name: value for name, value in feeds.items() if name in inputs})
        return {port.get_any_name(): value.copy() for port, value in found.items()}

    return generate(call, caches, job, rows)


if __name__ == "__main__":
    serve({"batch": lambda job: run(job, job["rows"]), "single": partial(each, run)})
