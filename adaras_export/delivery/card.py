"""The model card of an artifact, as Markdown. Pure: values in, text out.

Its sentences are in `card.md` and in the target's own template, its header is made by `card_metadata`, what it says of
the effect by `card_effect`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from adaras_export.core.base_model import BaseModel
from adaras_export.core.families import FAMILIES
from adaras_export.core.markdown import Example, Markdown, render
from adaras_export.core.rule import SteeringRule
from adaras_export.delivery.card_effect import computed_arm, effect_text
from adaras_export.delivery.card_metadata import header, results_file
from adaras_export.delivery.receipt import Receipt
from adaras_export.evaluation.arms import Arm
from adaras_export.evaluation.record import Evaluation
from adaras_export.exporters.base import TargetSpec
from adaras_export.exporters.manifest import Disclosed
from adaras_export.exporters.parity import STORED


@dataclass(frozen=True)
class Card:
    """The README.md of an artifact, and the file of results beside it.

    Attributes:
        rule: the rule that the artifact carries.
        receipt: what it was made of, and how it was found to behave.
        target: what it was exported to, with the options of the export.
        measured: the evaluation; None where there is none.
    """

    rule: SteeringRule
    receipt: Receipt
    target: TargetSpec
    measured: Evaluation | None

    def text(self) -> str:
        """The complete README.md, with the YAML header that the Hub reads."""
        receipt, base, example = self.receipt, self._base(), self._example()
        measured = None if self.measured is None or (arm := self._claimed()) is None else (self.measured, arm)
        values = {
            "header": header(receipt, self.target, base, measured),
            "receipt": receipt,
            "family": FAMILIES[receipt.base.family],
            "repository": receipt.repository,
            "drops": receipt.drops,
            "options": receipt.options,
            "rounded": self.target.rounded,
            "base": base,
            "is_exported_base": (base.id, base.revision) == (receipt.base.id, receipt.base.revision),
            "stored": self._stored(),
            "rule": self.rule,
            "strength": float(self.rule.strength),
            "layers": dict(sorted(Counter(self.rule.neurons.layer.tolist()).items())),
            "chat": example.chat,
            "question": example.text,
            "tensors": _rows(receipt.tensors),
            "evaluate": self._command(),
            "effect": self._effect(),
        }
        return render(self.target.card, values)

    def results(self) -> str | None:
        """The file of results that goes beside the card, where the Hub has a place for them."""
        arm = self._claimed()
        return None if arm is None else results_file(self.measured, arm)

    def _base(self) -> BaseModel:
        """The base as the one knows it that knows its commit: the rule, or who exported it."""
        return self.rule.base if self.rule.base.revision is not None else self.receipt.base

    def _stored(self) -> tuple[str, float] | None:
        """The format of a quantised base, and the share of the largest logit that it allows; None for a plain base."""
        found = [check for check in self.receipt.parity.checks if check.name.startswith(STORED)]
        return (found[0].name.removeprefix(STORED).partition(":")[0], found[0].figure) if found else None

    def _example(self) -> Example:
        """A question as the evaluation or else the base has it, with the end that the artifact needs."""
        example = None if self.measured is None else self.measured.example
        example = example or Example("What is 12 times 7?", self.receipt.chat_template)
        end = self.receipt.options.get("start_at", "")
        return example if example.chat or example.text.endswith(end) else replace(example, text=example.text + end)

    def _arm_name(self) -> str:
        drops = self.receipt.drops
        return computed_arm(static="start" in drops, gated=self.rule.gate is not None and "gate" not in drops)

    def _claimed(self) -> Arm | None:
        """The result that machines may read: of the arm that this artifact computes, as it does, on unseen questions.

        None where there is none.
        """
        if self.measured is None or self.measured.seen or self.target.rounded:
            return None
        return self.measured.arm(self._arm_name())

    def _command(self) -> Markdown:
        """What evaluates the arm that the artifact computes."""
        if not {"gate", "start"}.intersection(self.receipt.drops):
            return Markdown("`adaras-export eval`")
        gated = "gated," if self.rule.gate is not None else ""
        everywhere = ",everywhere" if "start" in self.receipt.drops else ""
        return Markdown(f"`adaras-export eval --compare {gated}always{everywhere}`")

    def _effect(self) -> Markdown | None:
        if self.measured is None:
            return None
        return effect_text(self.measured, self._arm_name(), self._command(), rounded=self.target.rounded)


def _rows(tensors: Sequence[Disclosed]) -> list[Disclosed]:
    """Tensors that differ in the layer only as one, whose name has the range of their layers."""
    layers: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    first: dict[tuple[Any, ...], Disclosed] = {}
    for tensor in tensors:
        pattern, layer = _template(tensor.name)
        key = (pattern, tensor.file, tensor.dtype, tensor.shape, tensor.what, tensor.only_zeros)
        layers[key] += layer
        first.setdefault(key, tensor)
    return [
        replace(tensor, name=key[0].replace("{}", _ranges(sorted(layers[key])))) if layers[key] else tensor
        for key, tensor in first.items()
    ]


def _template(name: str) -> tuple[str, list[int]]:
    """A name with its first number taken out, and that number."""
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if _LAYER.fullmatch(part)), None)
    if place is None:
        return name, []
    return ".".join([*parts[:place], "{}", *parts[place + 1 :]]), [int(parts[place])]


_LAYER = re.compile("0|[1-9][0-9]{0,5}")


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in braces, runs of three and more from the first to the last of them."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return texts[0] if numbers[0] == numbers[-1] else "{" + ",".join(texts) + "}"
