"""The model card of an artifact, as Markdown. Pure: values in, text out; reads and writes nothing."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaras_export.parity import ParityReport
from adaras_export.rule import SteeringRule


@dataclass(frozen=True)
class CardContext:
    """What a card says besides the rule: the target's own words, and what is known of the base."""

    repository: str
    usage: str
    weights: str
    library: str
    relation: str
    tags: Sequence[str]
    drops: Sequence[str]
    license: str | None
    evaluation: Mapping[str, Any] | None


def card(rule: SteeringRule, parity: ParityReport, context: CardContext) -> str:
    """The complete README.md, with the YAML header that the Hub reads."""
    sections = [
        _header(rule, context),
        _what_changed(rule, context),
        f"## Load it\n\n{_usage(rule, context)}",
        _effect(context.evaluation),
        _limits(rule),
        _verification(parity),
    ]
    return "\n".join(sections)


def _header(rule: SteeringRule, context: CardContext) -> str:
    tags = sorted({"activation-steering", "adaras", *context.tags})
    lines = [
        "---",
        *([f"license: {context.license}"] if context.license else []),
        *([f"base_model: {rule.base.id}", f"base_model_relation: {context.relation}"] if rule.base.revision else []),
        f"library_name: {context.library}",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
    ]
    return "\n".join(lines) + "\n"


def _what_changed(rule: SteeringRule, context: CardContext) -> str:
    base, revision = rule.base, f" at revision `{rule.base.revision}`" if rule.base.revision else ""
    first = "the last prompt token" if rule.start == "last_prompt_token" else "the first generated token"
    counts = Counter(rule.neurons.layer.tolist())
    layers = [f"| {layer} | {counts[layer]} |" for layer in sorted(counts)]
    if static := "start" in context.drops:
        first = "the very first token"
    dropped = (
        f"\n**Left out by this format:** {', '.join(context.drops)}.{_STATIC if static else ''}\n"
        if context.drops
        else ""
    )
    return f"""# {context.repository}

`{base.id}`{revision}, steered at test time by AdaRAS ([paper](https://arxiv.org/abs/2601.19847)): while the model
generates, a fixed amount is added to {len(rule.neurons)} of its {base.layers * base.mlp_size} MLP neurons.
{context.weights}
{dropped}
## What was changed

* Neurons: {len(rule.neurons)}, ranked by: {_RANKINGS[rule.neurons.ranking]}.
* Strength: {rule.strength:g}. From {first} on.
* Gate: {_gate(rule, left_out="gate" in context.drops)}
* Rule: `{rule.fingerprint}` (SHA-256 of `rule.safetensors`).

| layer (0-based) | neurons |
|---|---|
{chr(10).join(layers)}
"""


def _usage(rule: SteeringRule, context: CardContext) -> str:
    return context.usage.replace("{repo}", context.repository).replace("{strength}", str(rule.strength))


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


def _effect(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return (
            "## Effect\n\nNot evaluated. Steering often does not help; measure it on your own questions, with the "
            "sign-flipped and random-neuron controls of `adaras-export eval`, before you rely on it.\n"
        )
    rows = [
        f"| {arm['name']} | {arm['accuracy']:.1%} | {arm['low']:.1%} to {arm['high']:.1%} | {arm['fixed']} | "
        f"{arm['broken']} | {arm['p_value']:.2g} |"
        for arm in evaluation["arms"]
    ]
    table = "\n".join(rows)
    return f"""## Effect

{evaluation["questions"]} fresh questions, greedy decoding; {evaluation["verdict"]}

| arm | accuracy | 95 % Wilson interval | fixed | broken | exact McNemar p |
|---|---|---|---|---|---|
{table}
"""


def _limits(rule: SteeringRule) -> str:
    gate = (
        ""
        if rule.gate is None
        else (
            "* The gate was calibrated on the questions named in the rule; on other kinds of prompts its probabilities "
            "may be off.\n"
        )
    )
    return f"""## Limits

* An effect that was measured on one kind of question says nothing about another.
{gate}* The strength belongs to this base model and these neurons. More is often worse.
"""


def _verification(parity: ParityReport) -> str:
    checks = "\n".join(
        f"| {check.name} | {check.figure:.3g} | {'' if check.limit is None else f'{check.limit:.3g}'} |"
        for check in parity.checks
    )
    return f"""## Verified

Against the reference semantics of the rule, in float32, when this was exported. Run `adaras-export verify` on the
folder to repeat it; `receipt.json` has the SHA-256 of every file.

| check | figure | limit |
|---|---|---|
{checks}
"""
