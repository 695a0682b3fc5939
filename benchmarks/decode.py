"""What a steered Hugging Face model costs beside its base: decoding, prefill, and decoding compiled.

python benchmarks/hf_overhead.py [--model DIR] [--threads 2] [--repeats 16] [--compile-seconds 300]

The rule has 50 random neurons in the upper half of the layers and a gate of 64 random features in the lower half: cost
does not depend on which ones they are. Both models share the same weights in memory. "base again" is the base measured
a second time: how far its ratio is from 1 is the noise. "rows left alone": the gate decides not to steer; "rows
steered": it steers every row. The threshold sets which, the gate runs in both.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Times, comparison, fresh_process, in_turn, machine, options, prepare
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from adaras_export import BaseModel, Gate, NeuronSet, SteeringRule, exporters

FEATURES, NEURONS = 64, 50
BUDGETS = {"decode": "<= 1.03", "prefill": "<= 1.05", "compiled": "<= 1.01"}
PROMPT, BLOCK, COMPILED_BLOCK = 128, 8, 32


def main() -> None:
    parser = options(__doc__, repeats=16)
    parser.add_argument("--prefill-tokens", type=int, default=512, help="length of a prompt (default: %(default)s)")
    parser.add_argument(
        "--compile-seconds", type=float, default=300, help="patience with torch.compile (default: %(default)s)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(prepare(arguments), Path(folder) / "steered")
        if arguments.side:
            print(json.dumps({name: vars(times) for name, times in compiled(pair, arguments.repeats).items()}))
            return
        print(machine())
        for rows in (1, 16):
            print(f"Decoding, batch {rows}, {BLOCK} tokens a block behind a prompt of {PROMPT}:\n")
            times = in_turn(decoding(pair, rows), arguments.repeats)
            print(shown(times, BUDGETS["decode"], "ms/token", 1000 / BLOCK))
        print(f"generate(), greedy, batch 1, a prompt of {PROMPT} and 16 new tokens:\n")
        print(shown(in_turn(generating(pair), arguments.repeats // 2), "", "s", 1))
        for rows in (1, 4):
            print(f"Prefill with the gate, batch {rows}, {arguments.prefill_tokens} tokens:\n")
            times = in_turn(prefilling(pair, rows, arguments.prefill_tokens), arguments.repeats // 2)
            print(shown(times, BUDGETS["prefill"], "s", 1))
    report_compiled(arguments)


def report_compiled(arguments: argparse.Namespace) -> None:
    """Decoding with torch.compile, in a process of its own that is given up after a while."""
    limit = arguments.compile_seconds
    print(f"Decoding compiled (fullgraph, static cache), batch 1, {COMPILED_BLOCK} tokens a block:\n")
    found = fresh_process(__file__, arguments, "compiled", limit=limit)
    if found is None:
        print(f"left out: base and steered model were not compiled and measured within {limit:g} s")
        return
    times = {name: Times(**one) for name, one in found.items()}
    print(shown(times, BUDGETS["compiled"], "ms/token", 1000 / COMPILED_BLOCK))


def shown(times: dict[str, Times], budget: str, unit: str, scale: float) -> str:
    return comparison(times, "base", unit=unit, scale=scale, budgets=dict.fromkeys(STEERED, budget))


STEERED = ("rows left alone", "rows steered")


class Pair:
    """The base and its export, with the same weights in memory, and the sides that a comparison has."""

    def __init__(self, base: Path, out: Path) -> None:
        out.mkdir()
        exporters.load("hf").write(any_rule(BaseModel.of(base)), base, out)
        self.base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.steered = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32).eval()
        for name, parameter in self.base.named_parameters():
            self.steered.get_parameter(name).data = parameter.data  # same pages, so that none is luckier

    def sides(self, run: Callable[[Any], Callable[[], object]]) -> dict[str, Callable[[], object]]:
        """``run(model)`` prepares one side; the gate's decision is set by its threshold."""

        def with_threshold(threshold: float) -> Callable[[], object]:
            self.steered.steering.threshold = threshold
            measured = run(self.steered)

            def side() -> object:
                self.steered.steering.threshold = threshold
                return measured()

            return side

        return {
            "base": run(self.base),
            "base again": run(self.base),
            STEERED[0]: with_threshold(0.0),  # no p(correct) is below 0
            STEERED[1]: with_threshold(2.0),
        }


def any_rule(base: BaseModel) -> SteeringRule:
    draw, half = np.random.default_rng(0), base.layers // 2

    def places(first: int, last: int, count: int) -> tuple[Any, Any]:
        flat = draw.choice((last - first) * base.mlp_size, count, replace=False)
        return first + flat // base.mlp_size, flat % base.mlp_size

    read, steered = places(0, half, FEATURES), places(half, base.layers, NEURONS)
    shapes = ((FEATURES,), (), (16, FEATURES), (16,), (16,), ())
    gate = Gate(*read, *(draw.normal(size=shape) for shape in shapes), threshold=0.5, base=base)
    return SteeringRule(NeuronSet(*steered, draw.normal(size=NEURONS)), 0.3, base, gate=gate)


@torch.no_grad()
def decoding(pair: Pair, rows: int) -> dict[str, Callable[[], object]]:
    """One block of single-token steps behind the same prompt, over and over."""

    def run(model: Any) -> Callable[[], None]:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=some_ids(rows, PROMPT), past_key_values=cache, use_cache=True, logits_to_keep=1)

        @torch.no_grad()
        def block() -> None:
            ids = some_ids(rows, 1)
            for _ in range(BLOCK):
                ids = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            cache.crop(-BLOCK)

        return block

    return pair.sides(run)


def generating(pair: Pair) -> dict[str, Callable[[], object]]:
    ids = some_ids(1, PROMPT)
    asked = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    return pair.sides(lambda model: lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **asked))


def prefilling(pair: Pair, rows: int, tokens: int) -> dict[str, Callable[[], object]]:
    """A whole prompt into an empty cache, as generate() does it: logits of the last token only."""
    ids = some_ids(rows, tokens)

    def run(model: Any) -> Callable[[], None]:
        @torch.no_grad()
        def prefill() -> None:
            model(input_ids=ids, use_cache=True, logits_to_keep=1)

        return prefill

    return pair.sides(run)


def compiled(pair: Pair, repeats: int) -> dict[str, Times]:
    """Single-token steps of the compiled models on a static cache, each step over the same column."""

    def run(model: Any) -> Callable[[], None]:
        cache = StaticCache(config=model.config, max_cache_len=PROMPT + COMPILED_BLOCK)
        step = torch.compile(model, fullgraph=True)
        with torch.no_grad():
            model(input_ids=some_ids(1, PROMPT), past_key_values=cache, use_cache=True, logits_to_keep=1)

        @torch.no_grad()
        def block() -> None:
            ids = some_ids(1, 1)
            for _ in range(COMPILED_BLOCK):
                ids = step(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            set_length(cache, PROMPT)

        return block

    sides = pair.sides(run)
    del sides[STEERED[0]]  # another threshold is another compilation
    return in_turn(sides, repeats)


def set_length(cache: StaticCache, length: int) -> None:
    """Let the next token overwrite what came after ``length``."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)


def some_ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(1000, 20000, (rows, tokens), generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    main()
