"""Target `peft` with `merge`: an ordinary checkpoint of the same family, with the adapter's biases added to the base's.

What PEFT's `merge_and_unload` amounts to, for bases that have biases there; done on the files, one at a time, so that
every other tensor keeps its bits, and with the sums in float32, which PEFT would round to the base's type.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from adaras_export import models, storage
from adaras_export.errors import ArtifactError, ExportError, first_line
from adaras_export.exporters.base import Commission, Exporter, Feature, Written, stock_reference
from adaras_export.exporters.checkpoint import (
    changed_companions,
    copy_companions,
    link_or_copy,
    plain_config,
    same_content,
    vectors,
    write_json,
)
from adaras_export.exporters.peft import CONFIG_FILE, code_check, refuse_nothing
from adaras_export.parity import FLOAT32, Artifact, Check, Mode, Play, Reference, play_model
from adaras_export.rule import SteeringRule

_INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class MergeExporter:
    """The exporter of target `peft` with option `merge`."""

    name: str = "peft"
    drops: frozenset[Feature] = frozenset({"gate", "start", "dial"})
    options: frozenset[str] = frozenset({"adaptive", "merge"})
    library: str = "transformers"
    relation: str = "finetune"
    copy: bool = False

    def commissioned(self, commission: Commission) -> Exporter:
        """As `Exporter` says."""
        return replace(self, copy=commission.copy)

    def recorded(self) -> Mapping[str, Any]:
        """As `Exporter` says."""
        return {"merge": True}

    def write(self, rule: SteeringRule, base: Path, out: Path) -> Written:
        """As `Exporter` says."""
        refuse_nothing(rule)
        config, located, merged = plain_config(base), models.shards(base), _merged(rule, base)
        for path in sorted(set(located.values())):
            if changed := {name: value for name, value in merged.items() if located[name] == path}:
                save_file({**load_file(path), **changed}, out / path.name, metadata={"format": "pt"})
            else:
                link_or_copy(path, out / path.name, copy=self.copy)
        if (base / _INDEX_FILE).exists():
            size = sum((out / path.name).stat().st_size for path in set(located.values()))
            weight_map = {name: path.name for name, path in located.items()}
            write_json(out / _INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})
        write_json(out / "config.json", config)
        copy_companions(base, out)
        return Written(rule)

    def inspect(self, folder: Path, rule: SteeringRule, base: Path) -> Sequence[Check]:
        """As `Exporter` says."""
        expected, found = plain_config(base), storage.read_json(folder / "config.json")
        settings = [key for key in sorted({*expected, *found}) if found.get(key) != expected.get(key)]
        if (folder / CONFIG_FILE).exists():  # from_pretrained would follow it elsewhere
            settings.append(CONFIG_FILE)
        carried = changed_companions(folder, base)
        return [
            code_check(folder),
            Check("config entries that differ", len(settings), 0, " ".join(settings)),
            Check("files of the base that differ", len(carried), 0, " ".join(carried)),
            *_tensor_checks(folder, rule, base),
        ]

    def reference(self, folder: Path, rule: SteeringRule, base: Path) -> Reference:  # noqa: ARG002
        """As `Exporter` says."""
        return stock_reference(rule, base, everywhere=True)

    def load(self, folder: Path) -> Artifact:
        """As `Exporter` says."""
        from transformers import AutoModelForCausalLM

        try:
            opened: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ArtifactError(f"{folder}: cannot be opened ({first_line(error)})") from error
        model, report = opened
        return _Merged(model.eval(), sorted(f"{key} {name}" for key, names in report.items() for name in names))

    def tags(self) -> Sequence[str]:
        """As `Exporter` says."""
        return ()

    def weights(self) -> str:
        """As `Exporter` says."""
        return (
            "Only the biases of the down projections of the steered layers are changed, and stored in float32; all "
            "other weights of the base are here as they were."
        )

    def usage(self) -> str:
        """As `Exporter` says."""
        return _USAGE


EXPORTER = MergeExporter()

_USAGE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForCausalLM.from_pretrained("{repo}")
inputs = tokenizer("What is 12 times 7?", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```

An ordinary checkpoint: whatever serves the base serves this. It cannot be switched off; for that, use the base.
"""


class _Merged:
    """The opened checkpoint."""

    tolerance = FLOAT32
    switchable = False

    def __init__(self, model: Any, loading_report: list[str]) -> None:  # noqa: ANN401 - a class of Transformers
        self.model = model
        self.loading_report = loading_report

    def findings(self) -> Sequence[Check]:
        """A bias that the config does not know is dropped when it is loaded, and only the report says so."""
        return [Check("keys in the loading report", len(self.loading_report), 0, " ".join(self.loading_report))]

    def play(self, rows: Sequence[Sequence[int]], mode: Mode, follow_BS: torch.Tensor | None) -> Play:
        assert mode != "off"
        return play_model(self.model, rows, follow_BS)


def _merged(rule: SteeringRule, base: Path) -> dict[str, torch.Tensor]:
    """The new biases by checkpoint key, (D,) float32: summed in float64, rounded once.

    Raises:
        ExportError: the base has no bias there.
    """
    located, family, merged = models.shards(base), rule.base.family, {}
    for layer, vector in vectors(rule, base).items():
        name = f"{models.layers_key(family, located)}.{layer}.{models.FAMILIES[family].down}.bias"
        if name not in located:
            raise ExportError(
                f"{base}: has no {name} to merge into; expected biases on the down projections: write an ordinary "
                "checkpoint with --to stock, or the adapter without --merge"
            )
        with safe_open(located[name], framework="pt") as file:
            bias = file.get_tensor(name).double().numpy()
        merged[name] = torch.from_numpy((bias + rule.strength * vector.astype(np.float64)).astype(np.float32))
    return merged


def _tensor_checks(folder: Path, rule: SteeringRule, base: Path) -> list[Check]:
    merged, theirs, ours = _merged(rule, base), models.shards(base), models.shards(folder)
    strange = sorted(ours.keys() ^ theirs.keys())
    biases = [name for name, value in merged.items() if name not in ours or not _same(_tensor(ours, name), value)]
    rewritten = {theirs[name] for name in merged}
    kept = {path.name for path in set(theirs.values()) - rewritten if not same_content(folder / path.name, path)}
    others = {name for name, path in theirs.items() if path in rewritten} - merged.keys() - {*strange}
    kept |= {name for name in others if not _same(_tensor(ours, name), _tensor(theirs, name))}
    return [
        Check("merged biases that differ", len(biases), 0, " ".join(biases)),
        Check("tensors missing or unknown", len(strange), 0, " ".join(strange)),
        Check("other weights that differ", len(kept), 0, " ".join(sorted(kept))),
    ]


def _tensor(located: Mapping[str, Path], name: str) -> torch.Tensor:
    with safe_open(located[name], framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)))
