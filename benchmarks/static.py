"""What static artifacts and PEFT adapters cost beside their base: a decode step, and writing them.

python benchmarks/static.py [--model DIR] [--threads 2] [--repeats 10]

SmolLM2-135M-Instruct in float32 by default, with the rule of decode.py without a gate. All models that can share the
base's weights in memory do; those of `stock --switchable` are wider. "base again" is the base measured a second time:
how far its ratio is from 1 is the noise. Writing is beside copying the small files that a checkpoint carries.
"""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import comparison, in_turn, machine, options, prepare, quartiles
from decode import BLOCK, any_rule, decoding
from peft import PeftModel
from transformers import AutoModelForCausalLM

import adaras_export.exporters.peft.method  # noqa: F401 - registers the method of `peft --adaptive`
from adaras_export import BaseModel, SteeringRule, exporters
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.exporters.base import ExportContext
from adaras_export.exporters.checkpoint import copy_companions

COPY = "copying the small files"
TARGETS = {
    "hf": ("hf", {}),
    "peft": ("peft", {}),
    "peft --adaptive": ("peft", {"adaptive": True}),
    "stock": ("stock", {}),
    "stock --switchable": ("stock", {"switchable": True}),
    "gguf": ("gguf", {}),
}


def main() -> None:
    arguments = options(__doc__, repeats=10).parse_args()
    folder = prepare(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT 0.21 uses a name that Transformers has renamed
    warnings.filterwarnings("ignore", module="peft")
    print(machine())
    rule = any_rule(BaseModel.of(folder), gated=False)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        models = Models(rule, folder, Path(scratch))
        for rows, repeats in ((1, arguments.repeats), (16, (arguments.repeats + 1) // 2)):
            times = in_turn(decoding(models, rows), repeats)
            print(f"decode step, eager, batch {rows}:\n")
            print(comparison(times, "base", unit="ms/token", scale=1000 / BLOCK, budgets={}, show=quartiles))
        print("write stage:\n")
        print(comparison(written(rule, folder, Path(scratch)), COPY, unit="ms", scale=1000, budgets={}))


class Models:
    """The base and what its users open in its place."""

    def __init__(self, rule: SteeringRule, folder: Path, scratch: Path) -> None:
        self.base = opened(folder)
        stock, switchable, peft, adaptive = (
            write(rule, folder, scratch / name.replace(" ", ""), name)
            for name in ("stock", "stock --switchable", "peft", "peft --adaptive")
        )
        wide = opened(switchable)
        self.plain = {
            "base": self.base,
            "base again": self.base,
            "stock": self.sharing(opened(stock)),
            "stock --switchable, off": wide,
            "stock --switchable, on": adapted(opened(switchable), switchable / "steering-lora", wide),
            "peft": adapted(opened(folder), peft, self.base),
            "peft --adaptive": adapted(opened(folder), adaptive, self.base),
        }

    def sharing(self, model: Any) -> Any:
        return share(model, self.base)

    def sides(self, run: Callable[[Any], Callable[[], object]]) -> dict[str, Callable[[], object]]:
        return {name: run(model) for name, model in self.plain.items()}


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def share(model: Any, source: Any) -> Any:
    """Give a model the source's weights, page for page, so that none is luckier."""
    own = dict(model.named_parameters())
    for name, parameter in source.named_parameters():
        own[name].data = parameter.data
    return model


def adapted(model: Any, adapter: Path, source: Any) -> Any:
    return PeftModel.from_pretrained(share(model, source), adapter).eval()


def write(rule: SteeringRule, base: Path, out: Path, name: str) -> Path:
    target, how = TARGETS[name]
    out.mkdir()
    exporters.load(target).with_context(ExportContext(str(base.resolve()), options=how)).write(
        rule, Checkpoint(base), out
    )
    return out


def written(rule: SteeringRule, base: Path, scratch: Path) -> Any:
    def side(name: str) -> Callable[[], object]:
        def run() -> None:
            with tempfile.TemporaryDirectory(dir=scratch) as out:
                write(rule, base, Path(out) / "artifact", name)

        return run

    def copy() -> None:
        with tempfile.TemporaryDirectory(dir=scratch) as out:
            copy_companions(base, Path(out))

    return in_turn({COPY: copy, **{name: side(name) for name in TARGETS}}, 5)


if __name__ == "__main__":
    main()
