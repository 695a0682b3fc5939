"""What identification costs: reading traces with statistics, a plain forward pass over them, and the reference's way.

python benchmarks/identify.py [--model DIR] [--threads 2] [--repeats 6] [--traces FILE]

All sides tokenise the same traces. "decoder" is the forward pass without LM head, "with LM head" what `model(...)`
computes; both run the batches of "identify". "every activation to disk" is the reference's way, written anew from what
it does: the whole model reads one trace after the other, all that enters the down projections goes into a file a trace,
and a second pass over the files averages it by label. The means must be those of "identify". Its files are arrays as
they are in memory, and are read back from the system's cache where that holds them: on a full disk or in little memory
it takes longer. Then sampling with and without recording; then peak memory and bytes written, each side in a process of
its own. Traces are those of the reference where its data is at hand, short ones first, else made-up ones.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import (
    CACHE,
    Memory,
    bytes_written,
    comparison,
    fresh_process,
    in_turn,
    machine,
    options,
    prepare,
    ratios,
    spread,
    table,
)
from transformers import PreTrainedTokenizerBase

from adaras_export import BaseModel, NeuronStats
from adaras_export.core.families import decoder
from adaras_export.core.trace_files import read_traces
from adaras_export.core.traces import Trace, balanced, by_question
from adaras_export.data.collect import Recording, collect
from adaras_export.data.sampling_plan import Goal
from adaras_export.demo import smollm2
from adaras_export.discovery.identify import read_stats
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.activations import Reading, capture, right_pad
from adaras_export.modeling.generation import Sampling, batches, encode_trace
from adaras_export.modeling.loading import load_model

BUDGET = "<= 1.10"
MAX_ROWS = 64  # as in the library
TO_DISK = "every activation to disk"
TRACES = Path(__file__).resolve().parents[2] / "shared/data/traces/gsm8k_qwen3-32b.jsonl"
ROUNDING = 1e-4  # of float32 sums over a trace, relative to the largest mean of the layer


def main() -> None:
    arguments = parser().parse_args()
    bench = Bench(arguments)
    if arguments.side:
        print(json.dumps(bench.memory(arguments.side)))
        return
    print(machine())
    reading(bench, arguments.repeats)
    print("Sampling 4 questions, 4 attempts of up to 32 tokens:\n")
    sides = {"collect": bench.sample, "collect, recording": lambda: bench.sample(recording=True)}
    print(comparison(in_turn(sides, arguments.repeats), "collect", budgets={"collect, recording": BUDGET}))
    print("Memory and disk while reading, beyond the loaded model:\n")
    rows = [memory_row(name, fresh_process(__file__, arguments, name)) for name in bench.sides]
    print(table(["", "peak memory, MB", "bytes written", "files at once, bytes", "result, bytes"], rows))


def parser() -> argparse.ArgumentParser:
    found = options(__doc__, repeats=6)
    found.add_argument("--traces", type=Path, help="labelled traces; default: the reference's, where they are at hand")
    found.add_argument("--tokens", type=int, default=8000, help="read of those, about (default: %(default)s)")
    found.add_argument(
        "--per-class", type=int, default=4, help="correct, and incorrect, ones of each question (default: %(default)s)"
    )
    found.add_argument("--questions", type=int, default=6, help="made-up ones, 4 traces each (default: %(default)s)")
    found.add_argument("--words", type=int, default=150, help="words of a made-up completion (default: %(default)s)")
    found.add_argument("--work", type=Path, default=CACHE, help="folder for the activations (default: .cache)")
    return found


def reading(bench: "Bench", repeats: int) -> None:
    """Times of all sides that read traces, in turn; those that average must have found the same means."""
    print(f"Reading {bench.about}:\n")
    found: dict[str, object] = {}
    times = in_turn({name: keeping(found, name, run) for name, run in bench.sides.items()}, repeats)
    print(comparison(times, "decoder", budgets={"identify": BUDGET}))
    one, other = times[TO_DISK], times["identify"]
    walls, cpus = spread(ratios(one.wall, other.wall), 3), spread(ratios(one.cpu, other.cpu), 3)
    print(f"{TO_DISK} / identify: wall {walls}, CPU {cpus}.")
    stats, averaged = found["identify"], found[TO_DISK]
    assert isinstance(stats, NeuronStats)
    assert isinstance(averaged, Averaged)
    print(f"Largest difference of their means: {difference(stats, averaged):.1e} of the layer's largest.\n")


def keeping(found: dict[str, object], name: str, run: Callable[[], object]) -> Callable[[], None]:
    def side() -> None:
        found[name] = run()

    return side


@dataclass(frozen=True)
class Averaged:
    """Class means (L, M), and how many bytes lay on disk for them."""

    correct: Array
    incorrect: Array
    file_bytes: int


def difference(stats: NeuronStats, averaged: Averaged) -> float:
    """How far the means are apart, relative to the largest of each layer."""
    pairs = zip(stats.means(), (averaged.correct, averaged.incorrect), strict=True)
    found = max(float((abs(one - other).max(1) / abs(other).max(1)).max()) for one, other in pairs)
    if not found <= ROUNDING:
        raise SystemExit(f"means: identify and {TO_DISK} differ by {found:.1e}; expected at most {ROUNDING:g}")
    return found


class Bench:
    """The model, the traces, and the sides to compare."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        folder = prepare(arguments)
        self.base = BaseModel.of(folder)
        self.model, self.tokenizer = load_model(folder, device="cpu")
        self.traces, self.about = traces_for(arguments, self.tokenizer, self.base)
        self.work = arguments.work
        self.sides: dict[str, Callable[[], object]] = {
            "decoder": lambda: self.forward(decoder(self.model)),
            "with LM head": lambda: self.forward(self.model),
            "identify": self.identify,
            TO_DISK: self.to_disk,
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

    def to_disk(self) -> Averaged:
        """The reference's two passes: a file of activations for each trace, then their means by label."""
        self.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            files = [(trace, Path(folder) / str(number)) for number, trace in enumerate(self.traces)]
            for trace, path in files:
                self.write_activations(trace, path)
            size = sum(path.stat().st_size for _, path in files)
            correct, incorrect = (
                self.mean_of_files([path for trace, path in files if trace.correct is label]) for label in (True, False)
            )
        return Averaged(correct, incorrect, size)

    @torch.no_grad()
    def write_activations(self, trace: Trace, path: Path) -> None:
        prompt, completion = encode_trace(self.tokenizer, trace)
        held: dict[int, torch.Tensor] = {}
        with capture(self.model, range(self.base.layers), lambda layer, h_BTM: held.update({layer: h_BTM[0]})):
            self.model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False)
        with path.open("wb") as file:
            for layer in range(self.base.layers):
                np.save(file, held[layer].numpy(), allow_pickle=False)

    def mean_of_files(self, paths: Sequence[Path]) -> Array:
        """(L, M) mean over files of the mean over tokens."""
        total = torch.zeros(self.base.layers, self.base.mlp_size)
        for path in paths:
            with path.open("rb") as file:
                for layer in range(self.base.layers):
                    total[layer] += torch.from_numpy(np.load(file, allow_pickle=False)).mean(0)
        return (total / len(paths)).numpy()

    def sample(self, *, recording: bool = False) -> None:
        with tempfile.TemporaryDirectory() as folder:
            collect(
                self.model,
                self.tokenizer,
                smollm2.splits({"collect": 4}, seed=2)["collect"],
                Path(folder) / "traces.jsonl",
                goal=Goal(4),
                sampling=Sampling(32, temperature=1.0),
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
        files = size = 0
        if isinstance(result, Averaged):
            files, size = result.file_bytes, result.correct.nbytes + result.incorrect.nbytes
        if isinstance(result, NeuronStats):
            with tempfile.TemporaryDirectory() as folder:
                result.save(Path(folder) / "statistics.safetensors")
                size = (Path(folder) / "statistics.safetensors").stat().st_size
        peak = memory.resident if memory.allocated is None else memory.allocated
        difference = None if written is None or after is None else after - written
        return {"peak": peak, "written": difference, "files": files, "result": size}


def memory_row(name: str, one: dict[str, float | int | None]) -> list[str]:
    return [name, f"{one['peak']:.0f}", *(str(one[key]) for key in ("written", "files", "result"))]


def traces_for(
    arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, base: BaseModel
) -> tuple[list[Trace], str]:
    """The traces to read, and words about them."""
    if arguments.traces is None and not TRACES.is_file():
        found = made_up(arguments.questions, arguments.words)
        about = f"{len(found)} made-up traces of {sum(lengths(tokenizer, found).values())} tokens in all"
        return found, f"{about} (real ones skipped: ../shared/data/traces is not there, and no --traces given)"
    path = arguments.traces or TRACES
    every = read_traces(path)
    tokens = lengths(tokenizer, every)
    found = shortest(balanced(every, 0, arguments.per_class), tokens, arguments)
    read, all_of_them = sum(tokens[trace.id] for trace in found), sum(tokens.values())
    whole = all_of_them * base.layers * base.mlp_size * 4 / 1e9
    return found, (
        f"{len(found)} traces of {path.name}, {read} tokens in all (all {len(every)} traces have {all_of_them}: "
        f"{whole:.2g} GB of activations in float32)"
    )


def lengths(tokenizer: PreTrainedTokenizerBase, traces: Sequence[Trace]) -> dict[str, int]:
    """Tokens of each trace."""
    return {trace.id: sum(map(len, encode_trace(tokenizer, trace))) for trace in traces}


def shortest(traces: Sequence[Trace], tokens: dict[str, int], arguments: argparse.Namespace) -> list[Trace]:
    """Questions with a full number of traces, the shortest first, while they stay within the tokens; at least one.

    Where every question has as many traces, the mean over traces is the mean over questions.
    """
    full = [group for group in by_question(traces).values() if len(group) == 2 * arguments.per_class]
    kept: list[Trace] = []
    for group in sorted(full, key=lambda group: sum(tokens[trace.id] for trace in group)):
        if kept and sum(tokens[trace.id] for trace in [*kept, *group]) > arguments.tokens:
            break
        kept += group
    if not kept:
        count = arguments.per_class
        raise SystemExit(f"traces: no question has {count} correct and {count} incorrect ones; lower --per-class")
    return kept


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
