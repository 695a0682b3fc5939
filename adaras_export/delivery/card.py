"""The model card of an artifact, as Markdown. Pure: values in, text out.

Its sentences are in `card.md` and in the target's own template, its header is made by `card_header`, what it says of
the effect by `card_effect`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adaras_export.core.base_model import BaseModel
from adaras_export.core.markdown import Example, Markdown, render
from adaras_export.core.rule import SteeringRule
from adaras_export.delivery.card_effect import computed_arm, effect_text
from adaras_export.delivery.card_metadata import Header, results_file
from adaras_export.evaluation.arms import Arm
from adaras_export.evaluation.record import Evaluation
from adaras_export.exporters.checks import ParityReport
from adaras_export.exporters.manifest import Disclosed


@dataclass(frozen=True)
class CardContext:
    """What a card shows besides the rule: the target's own template, and what is known of base, tensors and effect.

    Attributes:
        repository: what the card calls the artifact: a Hub id, or a folder's name.
        template: `Exporter.card`.
        options: of the export, `Exporter.recorded`.
        library: what opens it.
        relation: what it is to its base.
        tags: the target's own.
        rounded: whether it computes with rounded weights.
        drops: the features that the format left out.
        base: the model that it was made on.
        base_card: what the base's own card says, for the header.
        datasets: Hub ids of datasets that the rule was made with.
        tensors: every tensor that is not the base's.
        measured: the evaluation; None where there is none.
        chat_template: whether the base has one.
    """

    repository: str
    template: str
    options: Mapping[str, Any]
    library: str
    relation: str
    tags: Sequence[str]
    rounded: bool
    drops: Sequence[str]
    base: BaseModel
    base_card: Mapping[str, Any]
    datasets: Sequence[str]
    tensors: Sequence[Disclosed]
    measured: Evaluation | None
    chat_template: bool

    @property
    def example(self) -> Example:
        """A question of the evaluation as it was asked there, or any one as the base wants it."""
        example = None if self.measured is None else self.measured.example
        return example or Example("What is 12 times 7?", self.chat_template)


def card(rule: SteeringRule, parity: ParityReport, context: CardContext) -> str:
    """The complete README.md, with the YAML header that the Hub reads."""
    base, example, drops = _known_base(rule, context), context.example, context.drops
    values = {
        "header": _header(rule, context),
        "repository": context.repository,
        "base": base,
        "is_exported_base": (base.id, base.revision) == (context.base.id, context.base.revision),
        "rule": rule,
        "strength": float(rule.strength),
        "layers": dict(sorted(Counter(rule.neurons.layer.tolist()).items())),
        "drops": drops,
        "options": context.options,
        "rounded": context.rounded,
        "chat": example.chat,
        "question": example.text,
        "tensors": _rows(context.tensors),
        "tensor_count": len(context.tensors),
        "effect": _effect(rule, context),
        "checks": parity.checks,
    }
    return render(context.template, values)


def results(rule: SteeringRule, context: CardContext) -> str | None:
    """The file of results that goes beside the card, where the Hub has a place for them."""
    arm = _claimed(rule, context)
    return None if arm is None else results_file(context.measured, arm)


def _header(rule: SteeringRule, context: CardContext) -> Markdown:
    arm = _claimed(rule, context)
    measured = None if arm is None or context.measured is None else (context.measured, arm)
    return Header(
        context.repository,
        _known_base(rule, context),
        context.base_card,
        context.library,
        context.relation,
        context.tags,
        context.datasets,
        measured,
    ).text()


def _known_base(rule: SteeringRule, context: CardContext) -> BaseModel:
    """The base as the one knows it that knows its commit: the rule, or who exported it."""
    return rule.base if rule.base.revision is not None else context.base


def _claimed(rule: SteeringRule, context: CardContext) -> Arm | None:
    """The result that machines may read: of the arm that this artifact computes, as it does, on unseen questions."""
    measured = context.measured
    if measured is None or measured.seen or context.rounded:
        return None
    return measured.arm(_arm_name(rule, context))


def _arm_name(rule: SteeringRule, context: CardContext) -> str:
    return computed_arm(static="start" in context.drops, gated=rule.gate is not None)


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


def _effect(rule: SteeringRule, context: CardContext) -> Markdown:
    static = "start" in context.drops
    ways = f"{'gated,' if rule.gate is not None else ''}always,everywhere"
    command = f"`adaras-export eval --compare {ways}`" if static else "`adaras-export eval`"
    if context.measured is None:
        return Markdown(f"{_NOT_EVALUATED.format(command)}\n")
    arm = _arm_name(rule, context)
    return Markdown(effect_text(context.measured, arm, command, rounded=context.rounded))


_NOT_EVALUATED = (
    "Not evaluated. Steering often does not help; measure it on your own questions, with the sign-flipped and "
    "random-neuron controls of {}, before you rely on it."
)
