"""What steering costs while a model generates: the stock model, `steered`, and Python hooks as one would write them.

python benchmarks/steer.py [--model DIR] [--threads 2] [--repeats 5] [--neurons 10 50 200] [--batches 1 8]

All sides generate as many tokens behind the same random prompts of different lengths, on the model and the device of
decode.py, with the same rule without a gate. "hook per neuron" has a forward hook for each steered neuron, which adds
to one number of the last token. "hook per layer" does as the reference does: one hook for a layer, which goes through
rows and neurons in Python (the reference also looks the neurons up in a table of pandas for each row, which is left out
here). Before anything is measured, all must give the same logits in float32, up to rounding. "stock again" is the
stock model measured a second time: how far its ratio is from 1 is the noise.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Times, in_turn, machine, options, ratios, spread, table
from decode import CUDA, DEVICE, DTYPE, any_rule, finished, model_folder
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from adaras_export import BaseModel, SteeringRule, steered
from adaras_export.core import families
from adaras_export.modeling.generation import CACHE

STOCK = "stock"
CHECKED_STEPS = 4
LENGTHS = (24, 64)  # of a prompt, in tokens
ROUNDING = 1e-4  # of the largest logit, in float32; steering must change more than that, or nothing is compared

Way = Callable[[nn.Module, SteeringRule], AbstractContextManager[Any]]


def main() -> None:
    arguments = parser().parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(arguments, Path(scratch))
        base = BaseModel.of(folder)
        where = {"device_map": DEVICE} if CUDA else {}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where).eval()
    print(machine(gpu_used=CUDA))
    rules = {count: any_rule(base, gated=False, neurons=count) for count in arguments.neurons}
    for rows in arguments.batches:
        prompts = some_prompts(rows, model.config.vocab_size)
        for count, rule in rules.items():
            require_same(model.float(), rule, prompts, f"{count} neurons, batch {rows}")
        sides = sides_of(model.to(DTYPE), rules, prompts, arguments.new_tokens)
        print(f"\nbatch {rows}, {arguments.new_tokens} new tokens:\n")
        print(report(in_turn(sides, arguments.repeats), rows * arguments.new_tokens))


def parser() -> argparse.ArgumentParser:
    found = options(__doc__, repeats=5)
    found.add_argument(
        "--neurons", type=int, nargs="+", default=[10, 50, 200], help="steered neurons (default: 10 50 200)"
    )
    found.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="prompts at once (default: 1 8)")
    found.add_argument("--new-tokens", type=int, default=24, help="that each prompt gets (default: %(default)s)")
    return found


@contextmanager
def hook_per_neuron(model: nn.Module, rule: SteeringRule) -> Iterator[None]:
    """A forward hook of its own for each neuron."""
    with ExitStack() as undo:
        for layer in rule.layers():
            down = families.down_projection(model, layer)
            for index, change in changes(rule, layer):
                undo.callback(down.register_forward_pre_hook(partial(add_one, index, change)).remove)
        yield


def add_one(index: int, change: float, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """The last token of a prompt, and then every generated one, which is alone in its call."""
    args[0][:, -1, index] += change


@contextmanager
def hook_per_layer(model: nn.Module, rule: SteeringRule) -> Iterator[None]:
    """One forward hook for all neurons of a layer, which treats one number after the other."""
    with ExitStack() as undo:
        for layer in rule.layers():
            down = families.down_projection(model, layer)
            undo.callback(down.register_forward_pre_hook(partial(add_each, changes(rule, layer))).remove)
        yield


def add_each(pairs: Sequence[tuple[int, float]], _module: nn.Module, args: tuple[Tensor, ...]) -> None:
    for row_TM in args[0]:
        for index, change in pairs:
            row_TM[-1, index] += change


def changes(rule: SteeringRule, layer: int) -> list[tuple[int, float]]:
    index, delta = rule.neurons_of(layer)
    return [(int(one), rule.strength * float(value)) for one, value in zip(index, delta, strict=True)]


WAYS: dict[str, Way] = {"steered": steered, "hook per neuron": hook_per_neuron, "hook per layer": hook_per_layer}


def some_prompts(rows: int, vocabulary: int) -> dict[str, Tensor]:
    """Random tokens, padded on the left."""
    draw, (shortest, longest) = torch.Generator().manual_seed(rows), LENGTHS
    ids = torch.randint(0, vocabulary, (rows, longest), generator=draw)
    padding = torch.randint(0, longest - shortest + 1, (rows, 1), generator=draw)
    padding[0] = 0  # so that the batch has the width of its longest row
    mask = (torch.arange(longest) >= padding).long()
    return {"input_ids": (ids * mask).to(DEVICE), "attention_mask": mask.to(DEVICE)}


def require_same(model: Any, rule: SteeringRule, prompts: dict[str, Tensor], what: str) -> None:
    """End here unless all ways to steer give the same logits, which are not those of the stock model."""
    stock = logits(model, prompts)
    found = {}
    for name, way in WAYS.items():
        with way(model, rule):
            found[name] = logits(model, prompts)
    limit = ROUNDING * float(stock.abs().max())
    apart = {name: float((other - found["steered"]).abs().max()) for name, other in found.items()}
    effect = float((found["steered"] - stock).abs().max())
    print(f"{what}: logits are at most {max(apart.values()):.1e} apart, {effect:.1e} from those of the stock model")
    if not max(apart.values()) <= limit < effect:
        raise SystemExit(f"{what}: logits are apart by {apart}; expected at most {limit:.1e}, and an effect above that")


@torch.no_grad()
def logits(model: Any, prompts: dict[str, Tensor]) -> Tensor:
    """Of the last token of each prompt and of some given ones behind it, (steps, B, V)."""
    ids, mask, cache, found = prompts["input_ids"], prompts["attention_mask"], DynamicCache(config=model.config), []
    for step in range(CHECKED_STEPS):
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        how = {CACHE: cache, "use_cache": True, "logits_to_keep": 1}
        found.append(model(input_ids=ids, attention_mask=mask, position_ids=places, **how).logits[:, -1])
        ids = prompts["input_ids"][:, -1 - step :][:, :1]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return torch.stack(found)


def sides_of(
    model: Any, rules: dict[int, SteeringRule], prompts: dict[str, Tensor], new_tokens: int
) -> dict[str, Callable[[], object]]:
    """What is measured, steering set up and removed within it."""

    def side(context: Callable[[], AbstractContextManager[Any]]) -> Callable[[], object]:
        def generate() -> None:
            with context():
                model.generate(
                    **prompts, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
                )

        return finished(generate)

    sides = {STOCK: side(nullcontext), f"{STOCK} again": side(nullcontext)}
    for count, rule in rules.items():
        sides |= {f"{name}, {count} neurons": side(partial(way, model, rule)) for name, way in WAYS.items()}
    return sides


def report(times: dict[str, Times], tokens: int) -> str:
    """Tokens a second of every side, and their ratio to those of the stock model."""
    base, rows = times[STOCK], []
    for name, found in times.items():
        same = [spread(ratios(one, other), 3) for one, other in ((base.wall, found.wall), (base.cpu, found.cpu))]
        rows.append([name, spread([tokens / wall for wall in found.wall], 1), *(["1"] * 2 if name == STOCK else same)])
    return table(["", "tokens / s", "tokens / s, of stock's", "tokens / CPU s, of stock's"], rows)


if __name__ == "__main__":
    main()
