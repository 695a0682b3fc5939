"""Runs exports in the environments of other runtimes, by the drivers in tests/system; judges results."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from elsewhere import answered, as_output
from places import ROOT, TESTS
from tiny import EOS, LAYERS, PAD, PROMPTS, logit_limit, require_answers

DRIVERS = TESTS / "system" / "runtimes" / "drivers"
SERVERS = TESTS / "system" / "servers" / "drivers"
NODE = TESTS / "system" / "runtimes" / "node"
VENV = Path(sys.prefix)
LLAMA_CPP = ROOT / "build" / "llama.cpp" / "server" / "bin"  # programs that `make test-llamacpp` compiles

# What runs a driver, the file that says that its environment is there, what builds that, and variables that it wants.
Environment = namedtuple("Environment", "command built target settings", defaults=["test-runtimes", {}])


def _python(folder, driver):
    return Environment([ROOT / folder / "bin" / "python", DRIVERS / driver], ROOT / folder / ".installed")


def _node(driver):
    return Environment(["node", NODE / driver], NODE / "node_modules" / ".installed")


def _vllm(driver):
    # Memory for its KV cache; no telemetry; compiling its small kernels takes longer here than it saves.
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "TORCHDYNAMO_DISABLE": "1"}
    settings["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    version = os.environ.get("VLLM_VERSION", "")  # of `make test-vllm`
    folder = f".venv-vllm-{version}" if version else ".venv-vllm"
    return _python(folder, SERVERS / driver)._replace(target="test-vllm", settings=settings)


def _llama_server(driver):
    return _python(".venv-runtimes", SERVERS / driver)._replace(
        target="test-llamacpp", built=LLAMA_CPP / "llama-server"
    )


def _transformers_serve():
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
    return Environment(command, VENV / ".serve", "test-serve")


RUNTIMES = {
    "onnxruntime": _python(".venv-runtimes", "run_onnxruntime.py"),
    "onnxruntime-gpu": _python(".venv-ort-gpu", "run_onnxruntime.py"),
    "genai": _python(".venv-runtimes", "run_genai.py"),
    "openvino": _python(".venv-runtimes", "run_openvino.py"),
    "optimum": _python(".venv-4.57", "run_optimum.py"),
    "transformers.js": _node("run_transformers.mjs"),
    "web": _node("run_web.mjs"),
    "page": _python(".venv-runtimes", "run_page.py"),
    "mlx": _python(".venv-mlx", "run_mlx.py"),
    "vllm": _vllm("run_vllm.py"),
    "vllm-server": _vllm("run_vllm_server.py"),
    "vllm-steered": _vllm("run_vllm_steered.py"),
    "vllm-model-state": _vllm("run_vllm_model_state.py"),
    "transformers-serve": _transformers_serve(),
    "llamacpp": _python(".venv-runtimes", "run_llamacpp.py"),
    "llamacpp-server": _python(".venv-runtimes", SERVERS / "run_llamacpp_server.py"),
    "llama-server": _llama_server("run_llama_server.py"),
    "modelscan": Environment([VENV / "bin" / "modelscan"], VENV / ".scan", "test"),
}


def job(folder, key, modes, **more):
    """What a driver is to do with the export in ``folder`` of the rule ``key``."""
    state = None if key[1] is None else LAYERS  # the KV layer behind the model's own
    asked = {"folder": str(folder), "rows": PROMPTS, "pad": PAD, "end": EOS, "steps": 6, "state": state, "modes": modes}
    return {**asked, **more}


def run_driver(runtime, jobs, folder):
    """What the driver of a runtime or server found, by the keys of ``jobs``; ``folder`` is its home."""
    found, _ = answered(RUNTIMES[runtime].command, jobs, folder, _environment(runtime, folder))
    return dict(zip(jobs, found, strict=True))


def _environment(runtime, folder):
    shared = {"PATH": os.environ["PATH"], "HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return shared | RUNTIMES[runtime].settings


class Conversation:
    """A driver that answers each line of jobs with a line of results; ``folder`` is its home and has its log."""

    def __init__(self, runtime, folder):
        self.log = folder / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                RUNTIMES[runtime].command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=folder,
                env=_environment(runtime, folder),
            )

    def ask(self, *jobs):
        print(json.dumps(jobs), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-4000:]
        return json.loads(line)

    def end(self):
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


def require_built(runtime, *, required):
    """Skip the running test, or fail it, where the environment of a runtime or server is absent."""
    environment = RUNTIMES[runtime]
    if environment.built.exists() and shutil.which(environment.command[0]):
        return
    missing = f"{runtime} is not installed; make {environment.target} builds its environment"
    (pytest.fail if required else pytest.skip)(missing)


def require_result(result, expected):
    """Assert that tokens, logits, p(correct) and decisions are the oracle's, of a batch or a list of single rows."""
    if isinstance(result, list):
        for one, answer in zip(result, expected, strict=True):
            require_result(one, [answer])
        return
    require_answers(as_output(result), expected)
    gated = [answer for answer in expected if answer["probability"] is not None]
    for (probability, steered), answer in zip(result["decisions"], gated, strict=True):
        assert probability == pytest.approx(answer["probability"], abs=1e-5)
        assert steered == answer["steered"]


def distance(row, answer):
    """How far a row's table of log-probabilities is from the oracle's, in limits; infinite where tokens differ."""
    if row["ids"] != answer["ids"]:
        return float("inf")
    limit = 2 * logit_limit(answer["logits"])  # both the logit and the normaliser may be off
    return float((torch.tensor(row["logprobs"]) - answer["logits"].log_softmax(-1)).abs().max()) / limit


def require_rows(rows, expected):
    """Assert that tokens and log-probabilities are the oracle's; the largest distance, in limits."""
    worst = max(distance(row, answer) for row, answer in zip(rows, expected, strict=True))
    assert worst <= 1, f"{worst:.3g} times the limit"
    return worst


def as_answers(results):
    """The results of single rows in the form that the oracle gives."""
    answers = []
    for result in results:
        [ids], logits = result["sequences"], torch.tensor(result["logits"])[:, 0]
        [(probability, steered)] = result["decisions"]
        answers.append({"ids": ids, "logits": logits, "probability": probability, "steered": steered})
    return answers


def negated(source, target):
    """An export like ``source`` that steers the other way."""
    import onnx

    shutil.copytree(source, target)
    path = target / "onnx" / "model.onnx"
    graph = onnx.load(path, load_external_data=False)
    [strength] = [tensor for tensor in graph.graph.initializer if tensor.name == "steering_strength"]
    value = onnx.numpy_helper.to_array(strength)
    strength.CopyFrom(onnx.numpy_helper.from_array(-value, strength.name))
    onnx.save(graph, path)
    return target
