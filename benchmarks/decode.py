"""What a steered Hugging Face model costs beside its base: prefill and decoding, eager and compiled.

python benchmarks/decode.py [--model DIR] [--threads 2] [--repeats 10] [--compile-seconds 300]

On a CPU in float32, SmolLM2-135M-Instruct by default. Where CUDA is there, on it in bfloat16, by default a model of the
shape of Qwen3-1.7B with random weights, made on the spot: cost does not depend on what the weights are. Nor on which
neurons the rule has: 50 random ones in the upper half of the layers, and where there is a gate, one of 64 random
features in the lower half. All models share the same weights in memory. "base again" is the base measured a second
time: how far its ratio is from 1 is the noise. "gated, left alone": the gate decides not to steer any row; "gated,
steered": every row. The last table has the rows for RESULTS.md.
"""

import json
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    Times,
    comparison,
    fresh_process,
    in_turn,
    machine,
    options,
    prepare,
    quartiles,
    ratios,
    set_up,
    table,
)
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config, StaticCache

from adaras_export import BaseModel, Gate, NeuronSet, SteeringRule, exporters
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.modeling.generation import CACHE

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
FEATURES, NEURONS = 64, 50
PROMPT, BLOCK = 128, 8
STEERED = ("ungated", "gated, left alone", "gated, steered")
QWEN3_1_7B = {
    "num_hidden_layers": 28,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
}


def main() -> None:
    parser = options(__doc__, repeats=10)
    parser.add_argument("--prefill-tokens", type=int, default=512, help="length of a prompt (default: %(default)s)")
    parser.add_argument(
        "--compile-seconds", type=float, default=300, help="patience with one torch.compile (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.side:
        with tempfile.TemporaryDirectory() as folder:
            found = COMPILED[arguments.side](Models(arguments, Path(folder)), arguments)
        print(json.dumps({name: vars(times) for name, times in found.items()}))
        return
    print(machine(gpu_used=CUDA))
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        eager(report, Models(arguments, Path(folder)), arguments)
    compiled(report, arguments)
    report.summarise()


class Report:
    """Prints every measurement, and remembers the ratios for the summary."""

    def __init__(self) -> None:
        self._rows: list[list[str]] = []

    def add(self, what: str, times: Mapping[str, Times], budget: str, tokens: int) -> None:
        """One table; ``tokens`` is how many a measured block has."""
        print(f"{what}:\n")
        budgets = dict.fromkeys(STEERED, budget)
        scale = 1000 / tokens
        print(comparison(times, "base", unit="ms/token", scale=scale, budgets=budgets, show=quartiles))
        clock = "wall" if CUDA else "cpu"  # a GPU's time is no process's; a CPU's is disturbed by other programs
        for name in [name for name in times if name != "base"]:
            found = ratios(getattr(times[name], clock), getattr(times["base"], clock))
            row = [f"hf {what}, {name} / base", budgets.get(name, "noise"), quartiles(found, 3)]
            self._rows.append(row)

    def summarise(self) -> None:
        clock = "wall, GPU" if CUDA else "CPU"
        print("Medians of the ratios within a round, interquartile range in brackets:\n")
        print(table(["what", "budget", f"found ({clock})"], self._rows))


class Models:
    """The base and its exports, without a gate and with one, with the same weights in memory."""

    def __init__(self, arguments: Namespace, scratch: Path) -> None:
        folder = model_folder(arguments, scratch)
        how = {"dtype": DTYPE, "device_map": DEVICE} if CUDA else {"dtype": DTYPE}
        self.base = AutoModelForCausalLM.from_pretrained(folder, **how).eval()
        base = BaseModel.of(folder)
        self.ungated, self.gated = (self._steered(any_rule(base, gated=gated), folder, how) for gated in (False, True))

    def _steered(self, rule: SteeringRule, base: Path, how: dict[str, Any]) -> Any:
        with tempfile.TemporaryDirectory(dir=base.parent) as out:
            exporters.load("hf").write(rule, Checkpoint(base), Path(out))
            model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, **how).eval()
        for name, parameter in self.base.named_parameters():
            model.get_parameter(name).data = parameter.data  # same pages, so that none is luckier
        return model

    def sides(self, run: Callable[[Any], Callable[[], object]]) -> dict[str, Callable[[], object]]:
        """``run(model)`` prepares one side; the gate's decision is set by its threshold."""

        def with_threshold(threshold: float) -> Callable[[], object]:
            self.gated.steering.threshold = threshold
            measured = run(self.gated)

            def side() -> object:
                self.gated.steering.threshold = threshold
                return measured()

            return side

        plain = {"base": self.base, "base again": self.base, "ungated": self.ungated}
        sides = {name: run(model) for name, model in plain.items()}
        sides |= {"gated, left alone": with_threshold(0.0), "gated, steered": with_threshold(2.0)}
        return {name: finished(side) for name, side in sides.items()}


def finished(side: Callable[[], object]) -> Callable[[], object]:
    """A side that ends when the GPU has done its work."""

    def whole() -> None:
        side()
        if CUDA:
            torch.cuda.synchronize()

    return whole


def model_folder(arguments: Namespace, scratch: Path) -> Path:
    if arguments.model is not None or not CUDA:
        return prepare(arguments)
    set_up(arguments)
    return random_qwen3(scratch / "base", QWEN3_1_7B)


def random_qwen3(folder: Path, sizes: Mapping[str, Any]) -> Path:
    """A checkpoint of random weights."""
    with torch.device(DEVICE):
        AutoModelForCausalLM.from_config(Qwen3Config(**sizes), dtype=DTYPE).save_pretrained(folder)
    return folder


def any_rule(base: BaseModel, *, gated: bool, neurons: int = NEURONS) -> SteeringRule:
    draw, half = np.random.default_rng(0), base.layers // 2

    def places(first: int, last: int, count: int) -> tuple[Any, Any]:
        flat = draw.choice((last - first) * base.mlp_size, count, replace=False)
        return first + flat // base.mlp_size, flat % base.mlp_size

    read, steered = places(0, half, FEATURES), places(half, base.layers, neurons)
    shapes = ((FEATURES,), (), (16, FEATURES), (16,), (16,), ())
    gate = Gate(*read, *(draw.normal(size=shape) for shape in shapes), threshold=0.5, base=base)
    chosen = NeuronSet(*steered, draw.normal(size=neurons))
    return SteeringRule(chosen, 0.3, base, gate=gate if gated else None)


def eager(report: Report, models: Models, arguments: Namespace) -> None:
    for rows, repeats in ((1, arguments.repeats), (16, (arguments.repeats + 1) // 2)):
        times = in_turn(decoding(models, rows), repeats)
        report.add(f"decode step, eager, batch {rows}", times, "<= 1.03", BLOCK)
    tokens = arguments.prefill_tokens
    times = in_turn(prefilling(models, tokens, use_cache=True), (arguments.repeats + 1) // 2)
    report.add(f"prefill, {tokens} tokens, eager, batch 1", times, "<= 1.05", tokens)


def compiled(report: Report, arguments: Namespace) -> None:
    """Both compiled, each in a process of its own that is given up after a while."""
    tokens = arguments.prefill_tokens
    for side, what, budget, count in (
        ("decode", "decode step, compiled, batch 1", "<= 1.01", BLOCK),
        ("prefill", f"prefill, {tokens} tokens, compiled, batch 1", "", tokens),
    ):
        found = fresh_process(__file__, arguments, side, limit=arguments.compile_seconds)
        if found is None:
            print(f"{what}: left out, not compiled and measured within {arguments.compile_seconds:g} s\n")
        else:
            report.add(what, {name: Times(**one) for name, one in found.items()}, budget, count)


def decoding(models: Models, rows: int) -> dict[str, Callable[[], object]]:
    """One block of single-token steps behind the same prompt, over and over."""

    def run(model: Any) -> Callable[[], None]:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=some_ids(rows, PROMPT), use_cache=True, logits_to_keep=1, **{CACHE: cache})

        @torch.no_grad()
        def block() -> None:
            ids = some_ids(rows, 1)
            for _ in range(BLOCK):
                ids = model(input_ids=ids, use_cache=True, **{CACHE: cache}).logits[:, -1:].argmax(-1)
            cache.crop(-BLOCK)

        return block

    return models.sides(run)


def prefilling(models: Models, tokens: int, *, use_cache: bool, fullgraph: bool = False) -> dict[str, Any]:
    """A whole prompt, as generate() does it: logits of the last token only."""
    ids = some_ids(1, tokens)

    def run(model: Any) -> Callable[[], None]:
        call = torch.compile(model, fullgraph=True) if fullgraph else model

        @torch.no_grad()
        def prefill() -> None:
            call(input_ids=ids, use_cache=use_cache, logits_to_keep=1)

        return prefill

    return models.sides(run)


def compiled_prefill(models: Models, arguments: Namespace) -> dict[str, Times]:
    """Without a KV cache: what fills it is the same on both sides."""
    sides = prefilling(models, arguments.prefill_tokens, use_cache=False, fullgraph=True)
    for _ in range(2):  # compiles, and again what a first pass may have changed
        in_turn(one_threshold(sides), 0)
    return in_turn(one_threshold(sides), (arguments.repeats + 1) // 2)


def compiled_decode(models: Models, arguments: Namespace) -> dict[str, Times]:
    """Single-token steps of the compiled models on a static cache, each block over the same columns."""

    def run(model: Any) -> Callable[[], None]:
        cache = StaticCache(config=model.config, max_cache_len=PROMPT + BLOCK)
        step = torch.compile(model, fullgraph=True)
        with torch.no_grad():
            model(input_ids=some_ids(1, PROMPT), use_cache=True, logits_to_keep=1, **{CACHE: cache})

        @torch.no_grad()
        def block() -> None:
            ids = some_ids(1, 1)
            for _ in range(BLOCK):
                ids = step(input_ids=ids, use_cache=True, **{CACHE: cache}).logits[:, -1:].argmax(-1)
            for layer in cache.layers:
                layer.cumulative_length.fill_(PROMPT)  # the next block overwrites this one

        return block

    return in_turn(one_threshold(models.sides(run)), 2 * arguments.repeats)


def one_threshold(sides: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Another threshold would be another compilation."""
    return {name: side for name, side in sides.items() if name != "gated, left alone"}


COMPILED = {"decode": compiled_decode, "prefill": compiled_prefill}


def some_ids(rows: int, tokens: int) -> torch.Tensor:
    ids = torch.randint(1000, 20000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return ids.to(DEVICE)


if __name__ == "__main__":
    main()
