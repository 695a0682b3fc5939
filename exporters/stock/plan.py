"""The plan of a stock artifact: which files of the base stay, which are rewritten, and which tensors are added.

Writing and checking use the same plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adaras_export.core import checkpoint, quantised
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.folding import vectors
from adaras_export.core.rule import SteeringRule
from adaras_export.errors import ExportError
from adaras_export.exporters.checkpoint import (
    STEERING_FILE,
    buildable_config,
    index_check,
    linked_name,
    plain_config,
    same_content,
    stored,
    stores,
    strange_names,
    write_index,
    write_tensors,
)
from adaras_export.exporters.checks import Check
from adaras_export.exporters.stock import stream
from adaras_export.exporters.stock.constant_neuron import NEURONS, constants, weights, wider
from adaras_export.exporters.stock.families import Form, expressed, form_of, has_biases
from adaras_export.files.atomic import link_or_copy
from adaras_export.files.safetensors_record import Array


@dataclass(frozen=True, eq=False)
class StockPlan:
    """The weights of an artifact for one rule.

    Attributes:
        config: the config.json.
        biases: the tensors that are added or replaced, always float32; loaders cast them to the type of the model.
        widened: the axis along which a weight of the base gets `NEURONS` zero rows or columns, by its name.
        located: the base's file of each of its tensors.
        rewritten: files of the base that contain one of ``biases`` or ``widened``; the other files are linked or
            copied. If one name were in two files, readers could disagree on its value.
    """

    config: dict[str, Any]
    biases: dict[str, Array]
    widened: dict[str, int]
    located: Mapping[str, Path]
    rewritten: frozenset[Path]

    @classmethod
    def of(cls, rule: SteeringRule, base: Checkpoint, *, switchable: bool = False) -> "StockPlan":
        """The plan of a rule and a checkpoint: biases steer, or a constant neuron lets a LoRA steer.

        Raises:
            ExportError: the target cannot express the checkpoint.
        """
        # The constant neuron would be one more column of weights that are packed, or share their scales.
        original = plain_config(base) if switchable else buildable_config(base)
        family = rule.base.family
        form, present = form_of(family, str(base)), has_biases(original, family)
        config = expressed(original, family, _dtype(base), str(base))
        biases = _missing(rule, base, form, present=present)
        if switchable:
            config |= wider(config, form, str(base))
            added, widened = constants(base, rule.base.layers, biases), weights(base, rule.base.layers)
        else:
            added, widened = _steered(rule, base, biases), {}
        biases |= added
        changed = biases.keys() | widened.keys()
        rewritten = {path for path in {*base.files.values()} if changed & checkpoint.header(path).keys()}
        stored = quantised.format_of(base.config, str(base))
        if rewritten and stored is not None and stored.weight == "_weight_qdata":
            raise ExportError(
                f"{base}: is stored in {stored.name}, with settings in the headers of the files that would be written "
                "anew; expected a base without biases; choose target hf"
            )
        return cls(config, biases, widened, base.files, frozenset(rewritten))

    @property
    def names(self) -> dict[Path, str]:
        """The name of each weight file of the base in the artifact."""
        return {path: linked_name(path) for path in sorted({*self.located.values()})}

    def weight_map(self) -> dict[str, str]:
        """The file of each tensor of the artifact."""
        names = self.names
        kept = {name: names[path] for name, path in self.located.items()}
        return kept | dict.fromkeys(self.biases, STEERING_FILE)

    def kept(self, path: Path) -> dict[str, stream.Stream]:
        """The tensors that a file keeps from the base, widened where planned."""
        kept = {name: tensor for name, tensor in stream.streams(path).items() if name not in self.biases}
        wide = {name: stream.padded(kept[name], axis, NEURONS) for name, axis in self.widened.items() if name in kept}
        return kept | wide

    def write(self, out: Path, *, copy: bool) -> None:
        """Write the weight files, the biases and the index."""
        for path, name in self.names.items():
            if path in self.rewritten:
                stream.write(out / name, self.kept(path))
            else:
                link_or_copy(path, out / name, copy=copy)
        write_tensors(out, self.biases)
        write_index(out, self.weight_map())

    def checks(self, folder: Path) -> list[Check]:
        """Compare the files that `write` writes."""
        located = checkpoint.shards(folder)
        wrong = [name for name, value in self.biases.items() if not stores(located.get(name), name, value)]
        strange = sorted(located.keys() ^ self.weight_map().keys())
        strange += strange_names(folder / STEERING_FILE, self.biases)
        differing = sorted(name for path, name in self.names.items() if not self._carried(path, folder / name))
        return [
            Check.empty("biases that differ", wrong),
            Check.empty("tensors missing or unknown", strange),
            Check.empty("weight files that are not as they should be", differing),
            index_check(folder, self.weight_map()),
        ]

    def _carried(self, path: Path, target: Path) -> bool:
        if path not in self.rewritten:
            return same_content(target, path)
        return stream.same_tensors(target, self.kept(path))


def _dtype(base: Checkpoint) -> str:
    """The type of the base's down projections, by its name in a config; if they are quantised, that of the config."""
    if base.is_quantised:
        if (named := base.config.get("dtype", base.config.get("torch_dtype"))) is None:
            raise ExportError(
                f"{base}: is quantised, and its config.json has no dtype; expected the type to compute in"
            )
        return str(named)
    name = f"{base.layers_key}.0.{base.family.down}.weight"
    found = base.entries[name]["dtype"]
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    if found not in names:
        raise ExportError(f"{base.files[name]}: {name} is {found}; expected one of: {', '.join(names)}")
    return names[found]


def _missing(rule: SteeringRule, base: Checkpoint, form: Form, *, present: bool) -> dict[str, Array]:
    """Zeros for the biases that the form has and the base lacks."""
    biases = {}
    for layer in range(rule.base.layers):
        for path in () if present else (*form.biased, *form.zeros):
            name = f"{base.layers_key}.{layer}.{path}"
            if f"{name}.weight" not in base.entries:
                raise base.no_tensor(f"{name}.weight")
            biases[f"{name}.bias"] = np.zeros(base.entries[f"{name}.weight"]["shape"][0], np.float32)
    return biases


def _steered(rule: SteeringRule, base: Checkpoint, zeros: Mapping[str, Array]) -> dict[str, Array]:
    """The biases of the steered down projections: those of the base, or zeros, plus strength * vector."""
    biases = {}
    for layer, vector_D in vectors(rule, base).items():
        name = f"{base.layers_key}.{layer}.{base.family.down}.bias"
        before = zeros[name] if name in zeros else stored(base.files, name)
        biases[name] = (before + rule.strength * vector_D.astype(np.float64)).astype(np.float32)
    return biases
