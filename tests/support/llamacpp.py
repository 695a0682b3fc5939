"""Bases as GGUF models, exports of target `gguf` for them, and what the oracle says of both: for tests of llama.cpp."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tiny
import tiny_gguf
import transformers

from adaras_export.core.base_model import BaseModel
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.rule import SteeringRule
from adaras_export.exporters.base import ExportContext

NAMES = ("llama", "llama-biased", "mistral", "qwen2", "qwen3", "granite", "smollm3", "phi3", "gpt_neox", "gpt2")
NAMES += ("seed_oss", "cohere2", "arcee", "nemotron", "hunyuan_v1_dense", "ernie4_5", "stablelm", "olmo")
NAMES += ("starcoder2", "gemma", "phi")
CARRIERS = ("llama", "mistral", "granite")  # what --into takes
SWITCHABLE = ("llama", "mistral", "granite", "qwen2")  # and with --switchable
_CHANGES = {  # to what llama.cpp knows
    "smollm3": {"no_rope_layer_interval": 4},
    "arcee": {"attention_bias": False},
    "starcoder2": {"sliding_window": None},
    "phi": {"qk_layernorm": False},
    "cohere2": {"layer_types": [*["sliding_attention"] * 3, "full_attention"]},
}

# In limits of `tiny.logit_limit`: measured up to 0.6. GELU it approximates and looks up in a table of 16 bits, steered
# or not: measured 130 and 71. The effect of steering is 10^4 limits and more.
GELU = ("gpt_neox", "gpt2", "starcoder2", "gemma", "phi")
SLACK = {name: 400 if name in GELU else 4 for name in NAMES}


@dataclass(frozen=True)
class Case:
    """One base with all that is made of it, in a folder of its own."""

    name: str
    folder: Path
    changes: Mapping[str, Any]

    @cached_property
    def base(self) -> Path:
        return tiny.save_base(self.name, self.folder / "base", **{**_CHANGES.get(self.name, {}), **self.changes})

    @cached_property
    def model(self) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(self.base).eval()

    @cached_property
    def gguf(self) -> Path:
        return tiny_gguf.write_model(self.model, tiny.build_tokenizer(), self.folder / "model.gguf")

    @cached_property
    def rule(self) -> SteeringRule:
        return tiny.make_rule(BaseModel.of(self.base), strength=tiny.STRENGTHS.get(self.name, 2.0))

    @cached_property
    def low_rule(self) -> SteeringRule:
        """A rule that steers layer 0, too, which only a model can carry."""
        return replace(self.rule, neurons=tiny.make_neurons(layers=(0, 3)))

    @cached_property
    def vector(self) -> Path:
        return self.exported(self.rule, "vector") / "control-vector.gguf"

    @cached_property
    def steered(self) -> Path:
        return self.exported(self.low_rule, "into", into=self.gguf) / "model-steered.gguf"

    @cached_property
    def switchable(self) -> Path:
        """The folder of a model with a LoRA."""
        return self.exported(self.low_rule, "switchable", into=self.gguf, switchable=True)

    def exported(self, rule: SteeringRule, name: str, **options: Any) -> Path:
        from adaras_export.exporters.gguf.exporter import EXPORTER

        out = self.folder / name
        out.mkdir()
        EXPORTER.with_context(ExportContext(str(self.base), options=options)).write(rule, Checkpoint(self.base), out)
        return out

    def told(self, rule: SteeringRule) -> list[dict[str, Any]]:
        """What the oracle says where every token is steered."""
        if rule.fingerprint not in self._told:
            self._told[rule.fingerprint] = tiny.answers_everywhere(self.model, rule)
        return self._told[rule.fingerprint]

    @cached_property
    def _told(self) -> dict[str, list[dict[str, Any]]]:
        return {}


def cases(tmp_path_factory: Any, **changes: Any) -> Any:
    """`Case` by name, with these changes of the base's config."""
    return tiny.Lazy(lambda name: Case(name, tmp_path_factory.mktemp(name), changes))
