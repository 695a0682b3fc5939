"""Target `stock`: an ordinary checkpoint whose down projections have the steering as their bias.

Opens with plain `from_pretrained`, without custom code, and in every server that knows its architecture. Static: every
token of every sequence is steered; no gate, no dial. Weights stay as they are, see `stock_families` for the classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from adaras_export import models
from adaras_export.errors import ExportError
from adaras_export.exporters import hf, stream
from adaras_export.exporters.base import Commission, Exporter, Feature, Written, stock_reference
from adaras_export.exporters.checkpoint import (
    STEERING_FILE,
    link_or_copy,
    linked_name,
    opened,
    plain_config,
    same_content,
    stores,
    vectors,
    write_index,
    write_tensors,
)
from adaras_export.exporters.stock_families import Form, expressed, form_of, has_biases
from adaras_export.parity import FLOAT32, Artifact, Check, Mode, Play, Reference, play_model
from adaras_export.rule import SteeringRule
from adaras_export.storage import Array


@dataclass(frozen=True)
class StockExporter:
    """The exporter of target `stock`."""

    name: str = "stock"
    drops: frozenset[Feature] = frozenset({"gate", "start", "dial"})
    options: frozenset[str] = frozenset()
    library: str = "transformers"
    relation: str = "finetune"
    copy: bool = False

    def commissioned(self, commission: Commission) -> Exporter:
        """As `Exporter` says."""
        return replace(self, copy=commission.copy)

    def recorded(self) -> Mapping[str, Any]:
        """As `Exporter` says."""
        return {}

    def write(self, rule: SteeringRule, base: Path, out: Path) -> Written:
        """As `Exporter` says."""
        plan = Plan.of(rule, base)
        for path, name in plan.names.items():
            if path in plan.rewritten:
                stream.write(out / name, plan.kept(path))
            else:
                link_or_copy(path, out / name, copy=self.copy)
        write_tensors(out, plan.biases)
        write_index(out, plan.weight_map())
        hf.write_repository(out, base, plan.config, {})
        return Written(rule)

    def inspect(self, folder: Path, rule: SteeringRule, base: Path) -> Sequence[Check]:
        """As `Exporter` says."""
        plan = Plan.of(rule, base)
        checks = hf.repository_checks(folder, base, plan.config, {})
        located = models.shards(folder)
        wrong = [name for name, value in plan.biases.items() if not stores(located.get(name), name, value)]
        strange = sorted(located.keys() ^ plan.weight_map().keys())
        weights = sorted(name for path, name in plan.names.items() if not plan.carried(path, folder / name))
        return [
            *checks,
            Check("biases that differ", len(wrong), 0, " ".join(wrong)),
            Check("tensors missing or unknown", len(strange), 0, " ".join(strange)),
            Check("weight files that differ from the base's", len(weights), 0, " ".join(weights)),
        ]

    def reference(self, folder: Path, rule: SteeringRule, base: Path) -> Reference:  # noqa: ARG002
        """As `Exporter` says."""
        return stock_reference(rule, base, everywhere=True)

    def load(self, folder: Path) -> Artifact:
        """As `Exporter` says."""
        return _Checkpoint(*opened(folder))

    def tags(self) -> Sequence[str]:
        """As `Exporter` says."""
        return ()

    def weights(self) -> str:
        """As `Exporter` says."""
        return "No weight of the base is changed; the steering is a bias behind the MLPs, in a file of its own."

    def usage(self) -> str:
        """As `Exporter` says."""
        return _USAGE


EXPORTER = StockExporter()

_USAGE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto")

inputs = tokenizer("What is 12 times 7?", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```

No custom code: an ordinary checkpoint, which servers open as well:

```sh
vllm serve "{repo}"
```

Where `config.json` says `hy_v3` (a Qwen3, written as the architecture that has its norms and an MLP bias), it needs
Transformers 5.19 or later, and vLLM `--model-impl transformers`. A server whose MLP has no bias for this architecture
may drop the steering without a word: compare a greedy answer with that of Transformers before you rely on one.

Steering is always on, from the first token of the prompt, for every prompt, at one strength.
"""


@dataclass(frozen=True, eq=False)
class Plan:
    """What an artifact of one rule holds besides the small files.

    Attributes:
        config: its config.json.
        biases: the tensors that it adds or puts in place of the base's, float32: exact whatever the weights' type is,
            and no more than the type of one small file; loaders cast them to that of the model.
        located: the base's file of each of its tensors.
        rewritten: the base's files that hold one of ``biases``: a second value in a linked file would be loaded by
            some readers.
    """

    config: dict[str, Any]
    biases: dict[str, Array]
    located: Mapping[str, Path]
    rewritten: frozenset[Path]

    @classmethod
    def of(cls, rule: SteeringRule, base: Path) -> "Plan":
        """The plan of a rule on the checkpoint in ``base``.

        Raises:
            ExportError: the checkpoint cannot carry it.
        """
        found, located = plain_config(base), models.shards(base)
        form = form_of(rule.base.family, str(base))
        config = expressed(found, rule.base.family, _dtype(rule, located), str(base))
        biases = _biases(rule, base, form, present=has_biases(found, rule.base.family))
        rewritten = {path for path in located.values() if biases.keys() & models.header(path).keys()}
        return cls(config, biases, located, frozenset(rewritten))

    @property
    def names(self) -> dict[Path, str]:
        """What each weight file of the base is called here."""
        return {path: linked_name(path) for path in sorted({*self.located.values()})}

    def weight_map(self) -> dict[str, str]:
        """The file of each tensor of the artifact."""
        names = self.names
        kept = {name: names[path] for name, path in self.located.items()}
        return kept | dict.fromkeys(self.biases, STEERING_FILE)

    def kept(self, path: Path) -> dict[str, stream.Stream]:
        """The tensors that stay of a base's file."""
        return {name: tensor for name, tensor in stream.streams(path).items() if name not in self.biases}

    def carried(self, path: Path, target: Path) -> bool:
        """Whether ``target`` holds what it should of a base's file."""
        if path not in self.rewritten:
            return same_content(target, path)
        return stream.same_tensors(target, self.kept(path))


def _dtype(rule: SteeringRule, located: Mapping[str, Path]) -> str:
    """The type of the base's weights, as a config names it: its down projections have it."""
    family = rule.base.family
    name = f"{models.layers_key(family, located)}.0.{models.FAMILIES[family].down}.weight"
    found = models.header(located[name])[name]["dtype"]
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    if found not in names:
        raise ExportError(f"{located[name]}: {name} is {found}; expected one of: {', '.join(names)}")
    return names[found]


def _biases(rule: SteeringRule, base: Path, form: Form, *, present: bool) -> dict[str, Array]:
    """All biases that the base lacks, zero but for the steered layers, or the steered ones alone."""
    located, family = models.shards(base), models.FAMILIES[rule.base.family]
    layers, folded = models.layers_key(family.model_type, located), vectors(rule, base)
    biases: dict[str, Array] = {}
    for layer in range(rule.base.layers):
        prefix = f"{layers}.{layer}."
        for path in () if present else form.biased:
            size = rule.base.hidden_size if path == family.down else rule.base.mlp_size
            biases[f"{prefix}{path}.bias"] = np.zeros(size, np.float32)
        if form.output:
            biases[f"{prefix}self_attn.o_proj.bias"] = np.zeros(rule.base.hidden_size, np.float32)
        if layer in folded:
            name = f"{prefix}{family.down}.bias"
            before = _stored(located, name) if present else biases[name]
            biases[name] = (before + rule.strength * folded[layer].astype(np.float64)).astype(np.float32)
    return biases


def _stored(located: Mapping[str, Path], name: str) -> Array:
    if name not in located:
        folder = next(iter(located.values())).parent
        raise ExportError(f"{folder}: no tensor {name}; expected the biases that its config names")
    with safe_open(located[name], framework="pt") as file:
        found: torch.Tensor = file.get_tensor(name)
    return found.double().numpy()


class _Checkpoint:
    """An opened artifact, which is always steered."""

    tolerance = FLOAT32
    switchable = False

    def __init__(self, model: Any, loading_report: list[str]) -> None:  # noqa: ANN401 - a class of Transformers
        self.model = model
        self.loading_report = loading_report

    def findings(self) -> Sequence[Check]:
        return [Check("keys in the loading report", len(self.loading_report), 0, " ".join(self.loading_report))]

    def play(self, rows: Sequence[Sequence[int]], mode: Mode, follow_BS: torch.Tensor | None) -> Play:  # noqa: ARG002
        return play_model(self.model, rows, follow_BS)
