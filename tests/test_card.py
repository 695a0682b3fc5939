"""The model card: pure text, everything in it from the values."""

from dataclasses import replace

import pytest
import tiny
from huggingface_hub import ModelCard

from adaras_export.card import CardContext, card
from adaras_export.exporters.hf import EXPORTER
from adaras_export.models import BaseModel
from adaras_export.parity import Check, ParityReport

BASE = BaseModel("somebody/tiny", "qwen3", tiny.LAYERS, tiny.MLP_SIZE, tiny.HIDDEN_SIZE, revision="c0ffee")
RULE = tiny.make_rule(BASE, gate=tiny.make_gate(threshold=0.25), strength=0.3)
CONTEXT = CardContext(
    "tiny-steered",
    EXPORTER.usage(),
    EXPORTER.weights(),
    "transformers",
    EXPORTER.relation,
    EXPORTER.tags(),
    (),
    "apache-2.0",
    None,
)
PARITY = ParityReport((Check("by the rule, prefill logits", 1.5e-6, 3e-5), Check("effect", 2.5, None)))
EVALUATION = {
    "questions": 500,
    "verdict": "no arm differs.",
    "arms": [
        {"name": "gated", "accuracy": 0.578, "low": 0.53, "high": 0.62, "fixed": 29, "broken": 5, "p_value": 4e-5}
    ],
}


def text(rule=RULE, **changes):
    return card(rule, PARITY, replace(CONTEXT, **changes))


def test_the_hub_reads_the_header():
    data = ModelCard(text()).data
    assert (data.license, data.base_model, data.pipeline_tag) == ("apache-2.0", "somebody/tiny", "text-generation")
    assert data.library_name == "transformers"
    assert set(data.tags) == {"activation-steering", "adaras", "custom_code"}


def test_a_base_without_a_licence_gets_none():
    assert ModelCard(text(license=None)).data.license is None


def test_the_same_values_give_the_same_text():
    assert text() == text()


def test_rule_revision_neurons_and_layers_are_told():
    found = text()
    assert RULE.fingerprint in found
    assert "at revision `c0ffee`" in found
    assert "added to 6 of its 192 MLP neurons" in found
    counts = {layer: len(RULE.neurons_of(layer)[0]) for layer in RULE.layers()}
    assert all(f"| {layer} | {count} |" in found for layer, count in counts.items())
    assert "Strength: 0.3. From the last prompt token on." in found


@pytest.mark.parametrize("ranking", ["given", "paper", "attribution"])
def test_every_ranking_has_words(ranking):
    neurons = replace(RULE.neurons, ranking=ranking)
    assert "ranked by: " in text(replace(RULE, neurons=neurons))


def test_the_gate_is_told_with_its_threshold_or_its_absence():
    assert "5 features of layers 0 to 1" in text()
    assert "p(correct) < 0.2500 are steered" in text()
    assert "none; every sequence is steered." in text(RULE.ungated())
    assert "The gate was calibrated" not in text(RULE.ungated())


def test_the_other_start_is_told():
    assert "From the first generated token on." in text(replace(RULE, start="first_generated_token"))


def test_what_the_format_left_out_is_told_and_nothing_where_it_left_out_nothing():
    assert "**Left out by this format:** gate, start." in text(drops=("gate", "start"))
    assert "Left out" not in text()


def test_a_static_artifact_says_that_it_steers_every_token_of_every_sequence():
    found = text(drops=("gate", "start"))
    assert "From the very first token on." in found
    assert "Every token of every sequence is steered, prompts too" in found
    assert "Gate: left out; every sequence is steered" in found
    assert "The gate was calibrated" not in found
    assert "the rule without gate and start, in float32" in found


def test_without_an_evaluation_the_card_says_that_there_is_none():
    assert "Not evaluated. Steering often does not help" in text()


def test_an_evaluation_is_told_with_intervals_and_both_directions():
    found = text(evaluation=EVALUATION)
    assert "500 fresh questions" in found
    assert "no arm differs." in found
    assert "| gated | 57.8% | 53.0% to 62.0% | 29 | 5 | 4e-05 |" in found


def nats(value):
    return {"value": value, "low": value / 2, "high": value * 2}


def gap(name, value=0.0, p_value=1.0):
    """A record of a gap whose interval is two points wide on either side."""
    difference = {"value": value, "low": value - 0.02, "high": value + 0.02}
    kls = {
        "kl_reference": nats(value**2),
        "kl_reference_first": nats(0.5),
        "kl_off": nats(1.5),
        "kl_off_first": nats(2),
    }
    return {"name": name, "difference": difference, "fixed": 3, "broken": 8, "p_value": p_value, **kls}


COMPARED = EVALUATION | {
    "verdict": "gated: no arm differs. everywhere against gated: -1.0 points.",
    "arms": [
        EVALUATION["arms"][0] | {"name": "off", "accuracy": 0.53, "fixed": 0, "broken": 0, "p_value": 1.0},
        *EVALUATION["arms"],
        EVALUATION["arms"][0] | {"name": "everywhere", "accuracy": 0.568, "fixed": 26, "broken": 7, "p_value": 0.0013},
    ],
    "comparison": {
        "reference": "gated",
        "tokens": 64,
        "mean_tokens": 20.25,
        "gaps": [gap("gated"), gap("everywhere", -0.01, 0.23)],
    },
}
STATIC = {"drops": ("gate", "start")}


def effect(**changes):
    return text(**changes).split("## Effect")[1].split("## Limits")[0]


def test_a_comparison_is_told_with_its_intervals_for_every_artifact():
    for drops in ({}, STATIC):
        found = effect(evaluation=COMPARED, **drops)
        assert "Held against `gated`" in found
        assert "up to 64 tokens, 20.2" in found
        assert "| gated | | | | | 0 (0 to 0) | 0.5 (0.25 to 1) | 1.5 (0.75 to 3) | 2 (1 to 4) |" in found
        assert "| everywhere | -1.0 (-3.0 to +1.0) | 3 | 8 | 0.23 | 0.0001 (5e-05 to 0.0002) | 0.5 " in found
        assert "is no proof of equality" in found
    assert "Held against" not in effect(evaluation=EVALUATION)


def test_the_tables_of_a_card_have_as_many_cells_in_every_line():
    for block in effect(evaluation=COMPARED, **STATIC).split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) <= 1


def test_the_card_of_a_static_artifact_is_about_the_arm_that_it_computes():
    found = effect(evaluation=COMPARED, **STATIC)
    assert found.startswith(
        "\n\n**This artifact computes the arm `everywhere`:** 56.8% right (53.0% to 62.0%), against 53.0% without "
        "steering: 26 fixed, 7 broken, exact McNemar p = 0.0013.\n\n500 fresh questions, greedy decoding; gated: no arm"
    )
    assert "This artifact" not in effect(evaluation=COMPARED)


def test_the_card_of_a_static_artifact_says_that_it_was_not_evaluated_and_how_it_can_be():
    found, command = effect(evaluation=EVALUATION, **STATIC), "`adaras-export eval --compare gated,always,everywhere`"
    assert found.startswith("\n\n**This artifact's own behaviour was not evaluated.**")
    assert command in found
    assert command in effect(**STATIC)
    assert "`adaras-export eval --compare always,everywhere`" in card(
        RULE.ungated(), PARITY, replace(CONTEXT, **STATIC)
    )
    assert "--compare" not in effect()


def test_every_check_is_told_with_its_figure():
    assert "| by the rule, prefill logits | 1.5e-06 | 3e-05 |" in text()
    assert "| effect | 2.5 |  |" in text()


def test_the_usage_names_the_repository():
    assert 'from_pretrained("tiny-steered", trust_remote_code=True)' in text()
    assert "{repo}" not in text()


def test_a_rule_without_neurons_has_a_card():
    assert "added to 0 of its 192 MLP neurons" in text(replace(RULE, neurons=RULE.neurons.top(0)))
