"""What a steered ONNX graph costs beside the plain one: decoding and prefill, fp32 and int4; and the export itself.

python benchmarks/onnx.py [--model DIR] [--threads 2] [--repeats 10] [--precisions fp32,int4]

In ONNX Runtime on a CPU, with IO binding, SmolLM2-135M-Instruct by default. 50 random neurons in the upper half of the
layers, and where there is a gate, one of 64 random features in the lower half: cost does not depend on which. "plain
again" is the plain graph opened a second time: how far its ratio is from 1 is the noise. "gated, left alone": the gate
decides not to steer; "gated, steered": to steer. Then the steered graph against the steered model in PyTorch, and time
and peak memory of the export in a process of its own. The last table has the rows for RESULTS.md.
"""

import sys

sys.path.append(sys.path.pop(0))  # this folder behind the libraries: `import onnx` is to find the package

import json
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from common import (
    Memory,
    Times,
    comparison,
    fresh_process,
    in_turn,
    machine,
    options,
    prepare,
    quartiles,
    ratios,
    table,
)
from decode import any_rule
from transformers import AutoModelForCausalLM, DynamicCache

from adaras_export import BaseModel, SteeringRule, exporters
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.exporters.base import ExportContext
from adaras_export.exporters.onnx.exporter import GRAPH

CONTEXT, BLOCK = 256, 8
BUDGET = "<= 1.02"


def main() -> None:
    parser = options(__doc__, repeats=10)
    parser.add_argument("--prefill-tokens", type=int, default=256, help="length of a prompt (default: %(default)s)")
    parser.add_argument("--precisions", default="fp32,int4", help="of the weights (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(exported(arguments)))
        return
    folder = prepare(arguments)
    print(machine())
    print(f"onnxruntime {onnxruntime.__version__}\n")
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        for precision in arguments.precisions.split(","):
            paths = graphs(folder, Path(scratch) / precision, precision)
            rows += [row for what in (decoding, prefilling) for row in measured(what, paths, precision, arguments)]
            if precision == "fp32":
                rows += beside_torch(paths, folder, arguments)
    rows += export_rows(arguments)
    print("Medians of the ratios within a round, CPU time, interquartile range in brackets:\n")
    print(table(["what", "budget", "found"], rows))


def graphs(base: Path, out: Path, precision: str) -> dict[str, Path]:
    """The plain graph, and that of an ungated and of a gated rule."""
    found = {}
    for name, rule in rules(base).items():
        folder = out / name
        folder.mkdir(parents=True)
        exporters.load("onnx").with_context(ExportContext("base", options={"precision": precision})).write(
            rule, Checkpoint(base), folder
        )
        found[name] = folder / GRAPH
    return found


def rules(base: Path) -> dict[str, SteeringRule]:
    """What "plain" stands for is a rule of no neurons: the same export, without a steered layer."""
    identity = BaseModel.of(base)
    ungated = any_rule(identity, gated=False)
    none = SteeringRule(ungated.neurons.top(0), 0.3, identity)
    return {"plain": none, "ungated": ungated, "gated": any_rule(identity, gated=True)}


class Session:
    """One graph with its KV cache bound: what a step reads it binds, what it writes ONNX Runtime allocates."""

    def __init__(self, path: Path, threads: int, **dials: float) -> None:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        self.dials = {f"steering_{name}": np.asarray(value, np.float32) for name, value in dials.items()}
        self.pasts = [one for one in self.session.get_inputs() if one.name.startswith("past")]
        draw = np.random.default_rng(0)
        filled = {one.name: self._cache(one, draw, CONTEXT) for one in self.pasts}
        empty = {one.name: self._cache(one, draw, 0) for one in self.pasts}
        self.filled, self.empty = self._binding(1, CONTEXT, filled), empty

    def step(self) -> None:
        """One token behind a full context."""
        self.session.run_with_iobinding(self.filled)

    def prompt(self, tokens: int) -> Callable[[], None]:
        binding = self._binding(tokens, 0, self.empty)
        return lambda: self.session.run_with_iobinding(binding)

    def _cache(self, one: Any, draw: np.random.Generator, columns: int) -> Any:
        values = 0.1 * draw.normal(size=(1, one.shape[1], columns, one.shape[3])).astype(np.float32)
        return onnxruntime.OrtValue.ortvalue_from_numpy(values)

    def _binding(self, tokens: int, past: int, caches: Mapping[str, Any]) -> Any:
        binding = self.session.io_binding()
        fed = {
            "input_ids": np.arange(1, tokens + 1)[None],
            "attention_mask": np.ones((1, past + tokens), np.int64),
            "position_ids": np.arange(past, past + tokens)[None],
        }
        for name, value in {**fed, **self.dials}.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
        for name, value in caches.items():
            binding.bind_ortvalue_input(name, value)
        for output in self.session.get_outputs():
            binding.bind_output(output.name)
        return binding


def sides_of(paths: Mapping[str, Path], threads: int) -> dict[str, Session]:
    dials: dict[str, dict[str, float]] = {"gated, left alone": {"threshold": 0}, "gated, steered": {"threshold": 2}}
    places = {"plain": "plain", "plain again": "plain", "ungated": "ungated"} | dict.fromkeys(dials, "gated")
    return {name: Session(paths[place], threads, **dials.get(name, {})) for name, place in places.items()}


def decoding(
    sessions: Mapping[str, Session], _arguments: Namespace
) -> tuple[str, int, dict[str, Callable[[], object]]]:
    def block(session: Session) -> Callable[[], None]:
        def run() -> None:
            for _ in range(BLOCK):
                session.step()

        return run

    return f"decode step, {CONTEXT} columns", BLOCK, {name: block(session) for name, session in sessions.items()}


def prefilling(
    sessions: Mapping[str, Session], arguments: Namespace
) -> tuple[str, int, dict[str, Callable[[], object]]]:
    tokens = arguments.prefill_tokens
    return f"prefill, {tokens} tokens", tokens, {name: one.prompt(tokens) for name, one in sessions.items()}


def measured(what: Any, paths: Mapping[str, Path], precision: str, arguments: Namespace) -> list[list[str]]:
    title, tokens, sides = what(sides_of(paths, arguments.threads), arguments)
    times = in_turn(sides, arguments.repeats)
    budgets = dict.fromkeys(("ungated", "gated, left alone", "gated, steered"), BUDGET if what is decoding else "")
    print(f"{title}, {precision}:\n")
    print(comparison(times, "plain", unit="ms/token", scale=1000 / tokens, budgets=budgets, show=quartiles))
    names = [name for name in times if name != "plain"]
    return [
        [f"onnx {title}, {precision}, {name} / plain", budgets.get(name, "noise"), ratio(times, name, "plain")]
        for name in names
    ]


def ratio(times: Mapping[str, Times], name: str, against: str) -> str:
    return quartiles(ratios(times[name].cpu, times[against].cpu), 3)


def beside_torch(paths: Mapping[str, Path], base: Path, arguments: Namespace) -> list[list[str]]:
    """The same steered decoding step in both runtimes, float32, always steered."""
    rule = rules(base)["ungated"]
    with tempfile.TemporaryDirectory(dir=base.parent) as out:
        exporters.load("hf").write(rule, Checkpoint(base), Path(out))
        model: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32).eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.ones(1, CONTEXT, dtype=torch.int64), past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def in_torch() -> None:
        for _ in range(BLOCK):
            model(input_ids=torch.ones(1, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
        cache.crop(-BLOCK)

    _, _, sides = decoding({"ONNX Runtime": Session(paths["ungated"], arguments.threads)}, arguments)
    times = in_turn({"PyTorch": in_torch, **sides}, arguments.repeats)
    print("Steered decoding, fp32:\n")
    print(comparison(times, "PyTorch", unit="ms/token", scale=1000 / BLOCK, budgets={}, show=quartiles))
    speed = quartiles(ratios(times["PyTorch"].wall, times["ONNX Runtime"].wall), 2)
    return [["steered tokens per second, ONNX Runtime / PyTorch eager, fp32 (wall)", "", speed]]


def exported(arguments: Namespace) -> dict[str, float]:
    """One export without verification: seconds, and MB beyond what the imports take."""
    folder = prepare(arguments)
    rule = rules(folder)["gated"]
    exporter = exporters.load("onnx").with_context(ExportContext("base", options={"precision": arguments.side}))
    with tempfile.TemporaryDirectory(dir=folder.parent) as out, Memory() as memory:
        start = time.perf_counter()
        exporter.write(rule, Checkpoint(folder), Path(out))
        seconds = time.perf_counter() - start
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
    return {"seconds": seconds, "resident": memory.resident, "weights": weights}


def export_rows(arguments: Namespace) -> list[list[str]]:
    rows = []
    for precision in arguments.precisions.split(","):
        found = fresh_process(__file__, arguments, precision)
        text = f"{found['seconds']:.0f} s, {found['resident']:.0f} MB (weights in the base: {found['weights']:.0f} MB)"
        rows.append([f"onnx export, write stage, {precision}: time and peak memory beyond imports", "", text])
    return rows


if __name__ == "__main__":
    main()
