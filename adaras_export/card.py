"""The model card of an artifact, as Markdown. Pure: values in, text out; reads and writes nothing.

Its header is made by `card_header`, what it says of the effect by `card_effect`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaras_export.card_effect import computed_arm, effect_text
from adaras_export.card_header import Header, results_file
from adaras_export.card_text import Example, cell, code, filled, plain
from adaras_export.checks import ParityReport
from adaras_export.disclosure import Disclosed
from adaras_export.models import BaseModel
from adaras_export.record import Evaluation
from adaras_export.rule import SteeringRule
from adaras_export.verdicts import Arm


@dataclass(frozen=True)
class CardContext:
    """What a card says besides the rule: the target's own words, and what is known of base, tensors and effect.

    Attributes:
        repository: what the card calls the artifact: a Hub id, or a folder's name.
        usage: how to load it, `Exporter.usage`.
        off: how to switch it off, `Exporter.off`.
        limits: the format's own, `Exporter.limits`.
        weights: what became of the base's weights, `Exporter.weights`.
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
    usage: str
    off: str
    limits: Sequence[str]
    weights: str
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
        asked = None if self.measured is None else Example.of(self.measured.example)
        return asked or Example("What is 12 times 7?", self.chat_template)


def card(rule: SteeringRule, parity: ParityReport, context: CardContext) -> str:
    """The complete README.md, with the YAML header that the Hub reads."""
    sections = [
        _header(rule, context),
        _introduction(rule, context),
        _what_changed(rule, context),
        _tensors(context),
        f"## Load it\n\n{_filled(context.usage, rule, context)}",
        f"## Switch it off\n\n{_filled(context.off, rule, context)}",
        _effect(rule, context),
        _limits(rule, context),
        _verification(parity, rule, context),
    ]
    return "\n".join(sections)


def results(rule: SteeringRule, context: CardContext) -> str | None:
    """The file of results that goes beside the card, where the Hub has a place for them."""
    arm = _claimed(rule, context)
    return None if arm is None else results_file(context.measured, arm)


def _header(rule: SteeringRule, context: CardContext) -> str:
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


def _introduction(rule: SteeringRule, context: CardContext) -> str:
    base = _known_base(rule, context)
    revision = f" at revision {code(base.revision)}" if base.revision else ""
    is_same = (base.id, base.revision) == (context.base.id, context.base.revision)
    told = "" if is_same else _TOLD_BY_THE_RULE
    return f"""# {plain(context.repository)}

{code(base.id)}{revision}, steered at test time by AdaRAS
([arXiv 2601.19847](https://arxiv.org/abs/2601.19847)): while the model generates, a fixed amount is added to
{len(rule.neurons)} of its {base.layers * base.mlp_size} MLP neurons. Made with adaras-export.{told}
"""


_TOLD_BY_THE_RULE = """

The base goes by that name and revision by the rule that was exported; this was made from elsewhere, and the two were
not compared. `adaras-export verify` compares them where it has both."""


def _what_changed(rule: SteeringRule, context: CardContext) -> str:
    first = "the last prompt token" if rule.start == "last_prompt_token" else "the first generated token"
    counts = Counter(rule.neurons.layer.tolist())
    layers = "\n".join(f"| {layer} | {counts[layer]} |" for layer in sorted(counts))
    if static := "start" in context.drops:
        first = "the very first token"
    dropped = (
        f"\n**Left out by this format:** {', '.join(map(plain, context.drops))}.{_STATIC if static else ''}\n"
        if context.drops
        else ""
    )
    return f"""## What was changed

* Neurons: {len(rule.neurons)}, ranked by: {_RANKINGS[rule.neurons.ranking]}.
* Strength: {rule.strength:g}. From {first} on.
* Gate: {_gate(rule, left_out="gate" in context.drops)}
* Rule: `{rule.fingerprint}` (SHA-256 of `rule.safetensors`).
{dropped}
| layer (0-based) | neurons |
|---|---|
{layers}
"""


_RANKINGS = {
    "given": "their author, outside this tool",
    "paper": "difference of mean activation between correct and incorrect traces (the paper's)",
    "attribution": "causal effect on the margin between correct and incorrect traces",
}


_STATIC = (
    " Every token of every sequence is steered, prompts too, which is not the rule that the paper evaluates; how far "
    "it is from that is said under Effect, where it was measured, and among the checks."
)


def _gate(rule: SteeringRule, *, left_out: bool) -> str:
    if rule.gate is None:
        return "none; every sequence is steered."
    if left_out:
        return "left out; every sequence is steered, also those that the rule's gate would leave alone."
    return (
        f"{len(rule.gate.layer)} features of layers {rule.gate.layer.min()} to {rule.gate.layer.max()} are read over "
        f"the prompt; sequences with p(correct) < {rule.gate.threshold:.4f} are steered, the others get the base model."
    )


def _tensors(context: CardContext) -> str:
    """Every tensor that is not the base's; those that differ in the layer only stand in one row."""
    layers: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for one in context.tensors:
        template, layer = _template(one.name)
        layers[template, one.file, one.dtype, one.shape, one.what, one.only_zeros] += layer
    rows = "\n".join(_tensor_row(*key, sorted(found)) for key, found in layers.items())
    return f"""## Every tensor that is not the base's

{context.weights}

Added or changed: {len(context.tensors)}, in the rows below. `receipt.json` has the SHA-256 of each, and `verify` looks
for others. `{{2..4}}` stands for layers 2, 3 and 4.

| tensor | file | type | shape | |
|---|---|---|---|---|
{rows}
"""


def _template(name: str) -> tuple[str, list[int]]:
    """A name with its first number taken out, and that number."""
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if _LAYER.fullmatch(part)), None)
    if place is None:
        return name, []
    return ".".join([*parts[:place], "{}", *parts[place + 1 :]]), [int(parts[place])]


_LAYER = re.compile("0|[1-9][0-9]{0,5}")


def _tensor_row(*row: Any) -> str:
    template, file, dtype, shape, what, zeros, layers = row
    name = template.replace("{}", _ranges(layers)) if layers else template
    said = f"{what}, zeros only" if zeros else what
    sizes = " x ".join(map(str, shape)) or "-"
    return f"| {cell(code(name))} | {cell(code(file))} | {cell(dtype)} | {sizes} | {said} |"


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


def _filled(text: str, rule: SteeringRule, context: CardContext) -> str:
    return filled(text, context.repository, rule.strength, context.example)


def _effect(rule: SteeringRule, context: CardContext) -> str:
    static = "start" in context.drops
    ways = f"{'gated,' if rule.gate is not None else ''}always,everywhere"
    command = f"`adaras-export eval --compare {ways}`" if static else "`adaras-export eval`"
    if context.measured is None:
        return f"## Effect\n\n{_NOT_EVALUATED.format(command)}\n"
    text = effect_text(context.measured, _arm_name(rule, context), command, rounded=context.rounded)
    return f"## Effect\n\n{text}"


_NOT_EVALUATED = (
    "Not evaluated. Steering often does not help; measure it on your own questions, with the sign-flipped and "
    "random-neuron controls of {}, before you rely on it."
)


def _limits(rule: SteeringRule, context: CardContext) -> str:
    gate = [_GATE_LIMIT] if rule.gate is not None and "gate" not in context.drops else []
    lines = "\n".join(f"* {limit}" for limit in (*_LIMITS, *gate, *context.limits))
    return f"## Limits\n\n{lines}\n"


_LIMITS = (
    "An effect that was measured on one kind of question says nothing about another.",
    "At most accuracy was measured. What steering does to safety, style, other languages or long answers is not known.",
    "The strength belongs to this base model and these neurons. More is often worse.",
)
_GATE_LIMIT = (
    "The gate was calibrated on questions whose digests the rule has; on other kinds of prompts its probabilities may "
    "be off."
)


def _verification(parity: ParityReport, rule: SteeringRule, context: CardContext) -> str:
    without = f" without {' and '.join(map(plain, context.drops))}" if context.drops else ""
    checks = "\n".join(
        f"| {cell(check.name)} | {check.figure:.3g} | {'' if check.limit is None else f'{check.limit:.3g}'} |"
        for check in parity.checks
    )
    return f"""## Verify it

`receipt.json` has the SHA-256 of every file, of every tensor above and of the base's tensors, the versions, and the
figures below. The library that checks them is not on PyPI yet: `pip install .` in a clone of adaras-export. Download,
check the files in seconds without the base, then everything, by running it against the base:

{_filled(_VERIFY, rule, context)}
Without a network the last one needs the base in the Hub's cache, or `--base FOLDER`. If there is a file `model.sig`,
the artifact is signed: `adaras-export verify steered --key PUBLIC.pem` says whether it is as its owner signed it.

`verify` compares what stands here with the base, and the checks below with those that it makes itself; it says which
names of the base it could not compare. Evaluations, datasets, and figures within their limits are the author's word.

When this was exported, it was compared with the reference semantics of the rule{without}, in float32:

| check | figure | limit |
|---|---|---|
{checks}
"""


_VERIFY = """\
```bash
hf download {repo} --local-dir steered
adaras-export verify steered --offline-hashes
adaras-export verify steered
```
"""
