"""The model card of an artifact, as Markdown. Pure: values in, text out; reads and writes nothing."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaras_export.checks import ParityReport
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
        _effect(rule, context),
        _limits(rule, context),
        _verification(parity, context),
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


def _effect(rule: SteeringRule, context: CardContext) -> str:
    evaluation, static = context.evaluation, "start" in context.drops
    command = f"`adaras-export eval --compare {'gated,' if rule.gate is not None else ''}always,everywhere`"
    if evaluation is None:
        return f"## Effect\n\n{_NOT_EVALUATED.format(command if static else '`adaras-export eval`')}\n"
    said = f"{evaluation['questions']} fresh questions, greedy decoding; {evaluation['verdict']}"
    if static:
        said = f"{_of_static(evaluation, command)}\n\n{said}"
    rows = "\n".join(
        f"| {arm['name']} | {arm['accuracy']:.1%} | {arm['low']:.1%} to {arm['high']:.1%} | {arm['fixed']} | "
        f"{arm['broken']} | {arm['p_value']:.2g} |"
        for arm in evaluation["arms"]
    )
    return f"""## Effect

{said}

| arm | accuracy | 95 % Wilson interval | fixed | broken | exact McNemar p |
|---|---|---|---|---|---|
{rows}
{_compared(evaluation.get("comparison"))}"""


_NOT_EVALUATED = (
    "Not evaluated. Steering often does not help; measure it on your own questions, with the sign-flipped and "
    "random-neuron controls of {}, before you rely on it."
)


def _of_static(evaluation: Mapping[str, Any], command: str) -> str:
    """What the evaluation says of an artifact that steers every token."""
    arms = {arm["name"]: arm for arm in evaluation["arms"]}
    if "everywhere" not in arms:
        return (
            "**This artifact's own behaviour was not evaluated.** It steers every token of every sequence; what "
            f"follows is about the rule with all that this format leaves out. {command} measures both."
        )
    arm, off = arms["everywhere"], arms["off"]
    return (
        f"**This artifact computes the arm `everywhere`:** {arm['accuracy']:.1%} right ({arm['low']:.1%} to "
        f"{arm['high']:.1%}), against {off['accuracy']:.1%} without steering: {arm['fixed']} fixed, {arm['broken']} "
        f"broken, exact McNemar p = {arm['p_value']:.2g}."
    )


def _compared(comparison: Mapping[str, Any] | None) -> str:
    """The ways to run the rule, held against the one nearest to it."""
    if comparison is None:
        return ""
    reference = comparison["reference"]
    rows = "\n".join(
        f"| {gap['name']} | {_paired(gap) if gap['name'] != reference else '| | |'} | "
        + " | ".join(_with_interval(gap[name]) for name in _DIVERGENCES)
        + " |"
        for gap in comparison["gaps"]
    )
    return f"""
Held against `{reference}`; the controls above are steered as it is. KL from x: KL(x || arm) of next-token
distributions in nats, along the base's own answer (up to {comparison["tokens"]} tokens, {comparison["mean_tokens"]:.1f}
on average). In brackets 95 % intervals over questions; one around 0 is no proof of equality.

| arm | points of accuracy | fixed | broken | exact McNemar p | KL from {reference}, a token | first token | \
KL from off, a token | first token |
|---|---|---|---|---|---|---|---|---|
{rows}
"""


_DIVERGENCES = ("kl_reference", "kl_reference_first", "kl_off", "kl_off_first")


def _paired(gap: Mapping[str, Any]) -> str:
    value, low, high = (100 * gap["difference"][name] for name in ("value", "low", "high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f}) | {gap['fixed']} | {gap['broken']} | {gap['p_value']:.2g}"


def _with_interval(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.2g} ({figure['low']:.2g} to {figure['high']:.2g})"


def _limits(rule: SteeringRule, context: CardContext) -> str:
    gate = (
        ""
        if rule.gate is None or "gate" in context.drops
        else (
            "* The gate was calibrated on the questions named in the rule; on other kinds of prompts its probabilities "
            "may be off.\n"
        )
    )
    return f"""## Limits

* An effect that was measured on one kind of question says nothing about another.
{gate}* The strength belongs to this base model and these neurons. More is often worse.
"""


def _verification(parity: ParityReport, context: CardContext) -> str:
    without = f" without {' and '.join(context.drops)}" if context.drops else ""
    checks = "\n".join(
        f"| {check.name} | {check.figure:.3g} | {'' if check.limit is None else f'{check.limit:.3g}'} |"
        for check in parity.checks
    )
    return f"""## Verified

Against the reference semantics of the rule{without}, in float32, when this was exported. Run `adaras-export verify` on
the folder to repeat it; `receipt.json` has the SHA-256 of every file.

| check | figure | limit |
|---|---|---|
{checks}
"""
