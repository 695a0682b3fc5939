"""What identification costs: reading traces with statistics against a plain forward pass over the same traces.

python benchmarks/identify.py [--model DIR] [--threads 2] [--repeats 6]

Both sides tokenise the same traces and run the same batches. "decoder" is the forward pass without LM head, "with LM
head" what `model(...)` computes. Then sampling with and without recording; then peak memory and bytes written, each
side in a process of its own.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import Memory, bytes_written, comparison, fresh_process, in_turn, machine, options, prepare, table

from adaras_export import BaseModel, NeuronStats
from adaras_export.activations import right_pad
from adaras_export.checkers import last_number
from adaras_export.collect import Recording, collect
from adaras_export.demo import smollm2
from adaras_export.generation import Sampling, batches, encode_trace, load_model
from adaras_export.models import decoder
from adaras_export.neurons import Reading, read_stats
from adaras_export.traces import Trace

BUDGET = "<= 1.10"
MAX_ROWS = 64  # as in the library


def main() -> None:
    parser = options(__doc__, repeats=6)
    parser.add_argument("--questions", type=int, default=6, help="questions, four traces each (default: %(default)s)")
    parser.add_argument("--words", type=int, default=150, help="words of a completion (default: %(default)s)")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    if arguments.side:
        print(json.dumps(bench.memory(arguments.side)))
        return
    print(machine())
    tokens = sum(len(prompt) + len(rest) for prompt, rest in (encode_trace(bench.tokenizer, t) for t in bench.traces))
    print(f"Reading {len(bench.traces)} traces of {tokens} tokens in all:\n")
    sides = {name: bench.sides[name] for name in ("decoder", "identify", "with LM head")}
    print(comparison(in_turn(sides, arguments.repeats), "decoder", budgets={"identify": BUDGET}))
    print("Sampling 4 questions, 4 attempts of up to 32 tokens:\n")
    sides = {"collect": bench.sample, "collect, recording": lambda: bench.sample(recording=True)}
    print(comparison(in_turn(sides, arguments.repeats), "collect", budgets={"collect, recording": BUDGET}))
    print("Memory and disk while reading, beyond the loaded model:\n")
    rows = [(name, fresh_process(__file__, arguments, name)) for name in ("decoder", "with LM head", "identify")]
    head = ["", "peak memory, MB", "bytes written", "result, bytes"]
    print(table(head, [[name, f"{one['peak']:.0f}", str(one["written"]), str(one["result"])] for name, one in rows]))


class Bench:
    """The model, the traces, and the sides to compare."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        folder = prepare(arguments)
        self.base = BaseModel.of(folder)
        self.model, self.tokenizer = load_model(folder, device="cpu")
        self.traces = made_up(arguments.questions, arguments.words)
        self.sides: dict[str, Callable[[], object]] = {
            "decoder": lambda: self.forward(decoder(self.model)),
            "with LM head": lambda: self.forward(self.model),
            "identify": self.identify,
        }

    def identify(self) -> NeuronStats:
        return read_stats(self.model, self.tokenizer, self.traces, self.base)

    @torch.no_grad()
    def forward(self, module: torch.nn.Module) -> None:
        """The batches of `read_stats`, with nothing read from them."""
        for first in range(0, len(self.traces), MAX_ROWS):
            encoded = [encode_trace(self.tokenizer, trace) for trace in self.traces[first : first + MAX_ROWS]]
            rows = [[*prompt, *completion] for prompt, completion in encoded]
            for indices in batches([len(row) for row in rows], Reading().token_budget, MAX_ROWS):
                ids, mask = right_pad([rows[index] for index in indices], torch.device("cpu"))
                module(input_ids=ids, attention_mask=mask, use_cache=False)

    def sample(self, *, recording: bool = False) -> None:
        with tempfile.TemporaryDirectory() as folder:
            collect(
                self.model,
                self.tokenizer,
                smollm2.splits({"collect": 4}, seed=2)["collect"],
                Path(folder) / "traces.jsonl",
                attempts=4,
                sampling=Sampling(32, temperature=1.0),
                check=last_number,
                batch_size=32,
                record=Recording(Path(folder) / "statistics.safetensors", self.base) if recording else None,
            )

    def memory(self, side: str) -> dict[str, float | int | None]:
        """Peak of the allocated memory beyond the loaded model, and bytes written, of one side."""
        with torch.no_grad():
            self.model(input_ids=torch.ones(1, 8, dtype=torch.int64))  # the weights are resident from here on
        with Memory() as memory:
            written = bytes_written()
            result = self.sides[side]()
        after = bytes_written()
        size = 0
        if isinstance(result, NeuronStats):
            with tempfile.TemporaryDirectory() as folder:
                result.save(Path(folder) / "statistics.safetensors")
                size = (Path(folder) / "statistics.safetensors").stat().st_size
        peak = memory.resident if memory.allocated is None else memory.allocated
        return {"peak": peak, "written": None if None in (written, after) else after - written, "result": size}


def made_up(questions: int, words: int) -> list[Trace]:
    """Traces of some length, two of each question labelled correct: what they say does not matter here."""
    draw, traces = random.Random(0), []
    for question in smollm2.splits({"read": questions}, seed=1)["read"]:
        vocabulary = question.prompt.split()
        for attempt in range(4):
            text = " ".join(draw.choices(vocabulary, k=draw.randint(words // 2, words)))
            traces.append(Trace(f"{question.id}#{attempt}", question.id, question.prompt, text, attempt < 2))
    return traces


if __name__ == "__main__":
    main()
