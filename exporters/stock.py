"""Target `stock`: an ordinary checkpoint whose down projections have the steering as their bias.

Opens with plain `from_pretrained`, without custom code, and in every server that knows its architecture. Static: every
token of every sequence is steered; no gate, no dial. Weights stay as they are, see `stock_families` for the classes.
With `switchable` the checkpoint computes what the base does, and an ordinary LoRA beside it turns the steering on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adaras_export.errors import require
from adaras_export.exporters import hf, steering_lora
from adaras_export.exporters.base import Commission, Exporter, Feature, Written, require_effect, stock_reference
from adaras_export.exporters.checkpoint import opened, unknown_files
from adaras_export.exporters.constant_neuron import NEURONS
from adaras_export.exporters.stock_plan import Plan
from adaras_export.parity import FLOAT32, Artifact, Check, Mode, Play, Reference, play_model
from adaras_export.rule import SteeringRule


@dataclass(frozen=True)
class StockExporter:
    """The exporter of target `stock`."""

    name: str = "stock"
    options: frozenset[str] = frozenset({"switchable"})
    library: str = "transformers"
    relation: str = "finetune"
    copy: bool = False
    switchable: bool = False

    @property
    def drops(self) -> frozenset[Feature]:
        """As `Exporter` says: PEFT has a dial for adapters, and with it the switchable form."""
        return frozenset({"gate", "start"}) if self.switchable else frozenset({"gate", "start", "dial"})

    def commissioned(self, commission: Commission) -> Exporter:
        """As `Exporter` says."""
        switchable = bool(commission.options.get("switchable", False))
        if switchable:
            require("peft", "peft", "target stock with --switchable")
        return replace(self, copy=commission.copy, switchable=switchable)

    def recorded(self) -> Mapping[str, Any]:
        """As `Exporter` says."""
        return {"switchable": True} if self.switchable else {}

    def write(self, rule: SteeringRule, base: Path, out: Path) -> Written:
        """As `Exporter` says."""
        require_effect(rule, self.name)
        plan = Plan.of(rule, base, switchable=self.switchable)
        plan.write(out, copy=self.copy)
        hf.write_repository(out, base, plan.config, {})
        if self.switchable:
            steering_lora.write(rule, base, out)
        return Written(rule)

    def inspect(self, folder: Path, rule: SteeringRule, base: Path) -> Sequence[Check]:
        """As `Exporter` says."""
        plan = Plan.of(rule, base, switchable=self.switchable)
        checks = [*hf.repository_checks(folder, base, plan.config, {}), *plan.checks(folder)]
        if self.switchable:
            wrong = steering_lora.changed_settings(rule, folder)
            detail = " ".join([checks[1].detail, *wrong]).strip()
            checks[1] = replace(checks[1], figure=checks[1].figure + len(wrong), detail=detail)
            checks += steering_lora.checks(rule, base, folder)
        adapter = steering_lora.FILES if self.switchable else ()
        own = {*hf.REPOSITORY_FILES, *hf.SHARED_FILES, *plan.names.values(), *adapter}
        return [*checks, unknown_files(folder, base, own)]

    def reference(self, folder: Path, rule: SteeringRule, base: Path) -> Reference:  # noqa: ARG002
        """As `Exporter` says."""
        return stock_reference(rule, base, everywhere=True)

    def load(self, folder: Path) -> Artifact:
        """As `Exporter` says."""
        return steering_lora.SwitchableCheckpoint(folder) if self.switchable else _Checkpoint(*opened(folder))

    def tags(self) -> Sequence[str]:
        """As `Exporter` says."""
        return ("peft", "lora") if self.switchable else ()

    def weights(self) -> str:
        """As `Exporter` says."""
        return _SWITCHABLE_WEIGHTS if self.switchable else _WEIGHTS

    def usage(self) -> str:
        """As `Exporter` says."""
        return _SWITCHABLE_USAGE if self.switchable else _USAGE


EXPORTER = StockExporter()

_WEIGHTS = "No weight of the base is changed; the steering is a bias behind the MLPs, in a file of its own."
_SWITCHABLE_WEIGHTS = (
    "The checkpoint computes what the base does: no weight is changed, but each MLP has new neurons with zero weights, "
    f"one of them with a constant activation. The LoRA in `{steering_lora.FOLDER}` turns the steering on."
)

_SERVERS = """
Where `config.json` says `hy_v3` (a Qwen3, written as the architecture that has its norms and an MLP bias), it needs
Transformers 5.19 or later, and vLLM `--model-impl transformers`. A server whose MLP has no bias for this architecture
drops the biases without a word, and with them the steering: SGLang does (by its source, 0.5.23) unless it is started
with `--model-impl transformers`, and TGI. Compare a greedy answer with that of Transformers before you rely on one.
"""

_USAGE = f"""\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{{repo}}")
model = AutoModelForCausalLM.from_pretrained("{{repo}}", dtype="auto")

inputs = tokenizer("What is 12 times 7?", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```

No custom code: an ordinary checkpoint, which servers open as well:

```sh
vllm serve "{{repo}}"
```
{_SERVERS}
Steering is always on, from the first token of the prompt, for every prompt, at one strength.
"""

_SWITCHABLE_USAGE = f"""\
In a server, steering is on for the requests that name the adapter as their model, `steered` here, and off for others:

```sh
hf download "{{repo}}" --local-dir model
vllm serve model --served-model-name base --enable-lora --max-lora-rank 8 --max-loras 2 \\
    --lora-modules steered=model/{steering_lora.FOLDER}
```

Keep a slot of `--max-loras` empty: vLLM's kernels for the CPU (0.32) give requests without a LoRA what is in the last.
{_SERVERS}
In Python, from the downloaded folder, with Transformers and PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("model")
model = AutoModelForCausalLM.from_pretrained("model", dtype="auto")  # the base, as it was
model = PeftModel.from_pretrained(model, "model/{steering_lora.FOLDER}")  # steered

inputs = tokenizer("What is 12 times 7?", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
with model.disable_adapter():  # or switch it off
    model.generate(**inputs, max_new_tokens=32)
```

Where it is on, every token is steered, from the first of the prompt. Adapters that were trained for the base's MLPs do
not fit these, which are {NEURONS} neurons wider.
"""


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
