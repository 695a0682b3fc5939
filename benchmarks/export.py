"""What an hf export costs: weights are linked and not rewritten, so seconds whatever the size, and little memory.

python benchmarks/export.py [--model DIR] [--threads 2] [--repeats 5] [--gigabytes 4] [--work DIR]

The write stage (vectors folded, files linked, configuration and code written) beside plain copying of the small files
that every export carries; once for the model and once for a larger made-up checkpoint in bfloat16, of random bytes, in
shards of 500 MB, which is removed afterwards. Then its peak memory beyond imports, and the time of the verification,
which loads base and export and runs both.
"""

import argparse
import json
import math
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from common import CACHE, Memory, comparison, fresh_process, in_turn, machine, options, prepare, table

from adaras_export import BaseModel, NeuronSet, SteeringRule, export, exporters, verify
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.exporters.checkpoint import copy_companions

NEURONS, SHARD_BYTES, FREE_FACTOR = 50, 500_000_000, 3
WRITE, COPY = "write stage", "copying the small files"


def main() -> None:
    parser = options(__doc__, repeats=5)
    parser.add_argument("--gigabytes", type=float, default=4, help="of the made-up checkpoint (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=CACHE, help="folder on the model's file system (default: .cache)")
    arguments = parser.parse_args()
    model = prepare(arguments)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.side:
        measured = Path(arguments.side)
        print(
            json.dumps(memory(measured, arguments.work) if measured.is_absolute() else verification(model, arguments))
        )
        return
    print(machine())
    print(written(f"{model.name}, {size(model):.2f} GB", model, arguments))
    with made_up(arguments) as large:
        if large is not None:
            print(written(f"made-up checkpoint, {size(large):.2f} GB", large, arguments))
    print("Whole export and verification of the model:\n")
    found = fresh_process(__file__, arguments, "verification")
    rows = [[name, f"{one['seconds']:.1f}", f"{one['resident'] / 1000:.2f}"] for name, one in found.items()]
    print(table(["", "wall s", "peak memory beyond imports, GB"], rows))


def written(title: str, base: Path, arguments: argparse.Namespace) -> str:
    """Times of the write stage of one checkpoint, and its memory in a fresh process."""
    rule = any_rule(base)
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        sides = {COPY: lambda: copy_small(base, Path(work)), WRITE: lambda: write(rule, base, Path(work))}
        times = in_turn(sides, arguments.repeats)
    used = fresh_process(__file__, arguments, str(base.resolve()))
    text = comparison(times, COPY, unit="ms", scale=1000, budgets={WRITE: "seconds for any size"})
    figures = f"{used['resident']:.0f} MB resident, {used['allocated'] or math.nan:.0f} MB of it allocated"
    return f"{title}:\n\n{text}\nPeak memory of the write stage beyond imports: {figures} (budget: below 1000 MB).\n"


def write(rule: SteeringRule, base: Path, work: Path) -> None:
    with tempfile.TemporaryDirectory(dir=work) as out:
        exporters.load("hf").write(rule, Checkpoint(base), Path(out))


def copy_small(base: Path, work: Path) -> None:
    with tempfile.TemporaryDirectory(dir=work) as out:
        copy_companions(base, Path(out))


def memory(base: Path, work: Path) -> dict[str, float | None]:
    """Peak of the write stage in this process, which has imported everything by now."""
    rule = any_rule(base)
    with Memory() as used:
        write(rule, base, work)
    return {"resident": used.resident, "allocated": used.allocated}


def verification(base: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds and memory of `export` as a whole, which verifies, and of `verify` alone."""
    rule = any_rule(base)
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        out = Path(work) / "steered"
        stages = {
            "export (write, verify, card, receipt)": lambda: export(rule, base=base, to="hf", out=out),
            "verify": lambda: verify(out),
        }
        return {name: timed(run) for name, run in stages.items()}


def timed(run: Callable[[], object]) -> dict[str, float]:
    started = time.perf_counter()
    with Memory() as used:
        run()
    return {"seconds": time.perf_counter() - started, "resident": used.resident}


def any_rule(base: Path) -> SteeringRule:
    """Random neurons of the upper half of the layers: which ones they are costs the same."""
    model, draw = BaseModel.of(base), np.random.default_rng(0)
    flat = draw.choice(model.layers * model.mlp_size // 2, NEURONS, replace=False) + model.layers // 2 * model.mlp_size
    return SteeringRule(
        NeuronSet(flat // model.mlp_size, flat % model.mlp_size, draw.normal(size=NEURONS)), 0.3, base=model
    )


@contextmanager
def made_up(arguments: argparse.Namespace) -> Iterator[Path | None]:
    """A llama checkpoint of about so many gigabytes; None, with the reason printed, where the disk is too full."""
    free, needed = shutil.disk_usage(arguments.work).free / 1e9, FREE_FACTOR * arguments.gigabytes
    if not arguments.gigabytes or free < needed:
        print(
            f"made-up checkpoint skipped: {free:.0f} GB free, {needed:g} wanted, {arguments.gigabytes:g} GB asked for\n"
        )
        yield None
        return
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        write_checkpoint(Path(folder), arguments.gigabytes)
        yield Path(folder)


def write_checkpoint(folder: Path, gigabytes: float) -> None:
    width, mlp_size, vocabulary = 2048, 8192, 32000
    per_layer = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width, width),
        "self_attn.v_proj": (width, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (mlp_size, width),
        "mlp.up_proj": (mlp_size, width),
        "mlp.down_proj": (width, mlp_size),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    layer_bytes = sum(2 * math.prod(shape) for shape in per_layer.values())
    layers = max(2, round((gigabytes * 1e9 - 2 * vocabulary * width) / layer_bytes))
    tensors = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    for layer in range(layers):
        tensors |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in per_layer.items()}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in tensors.items():
        if sum(2 * math.prod(one) for one in shards[-1].values()) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        write_shard(folder / file, shard)
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": width,
        "intermediate_size": mlp_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of random bfloat16 numbers below 2 in size: the same block over and over."""
    header, end = {}, 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = np.random.default_rng(0).integers(0, 0x3F80, 1 << 23, dtype=np.uint16).tobytes()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for first in range(0, end, len(block)):
            file.write(block[: end - first])


def size(folder: Path) -> float:
    """Weights of a checkpoint, in GB (10^9 bytes)."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9


if __name__ == "__main__":
    main()
