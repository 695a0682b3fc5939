"""Logits along a given text, against the oracle, and the divergence of two distributions."""

import math

import oracle
import pytest
import tiny
import torch

from adaras_export.modeling.divergence import forced_logits, next_token_divergence
from adaras_export.modeling.generation import prefill
from adaras_export.modeling.steering import steered

TEXTS = ([5, 99, 7], [], [250], [1, 2, 3, 4, 5, 6])


def test_the_divergence_is_that_of_the_definition():
    one, other = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert next_token_divergence(one.log() + 3, other.log()).item() == pytest.approx(expected)
    assert next_token_divergence(one.log(), one.log()).item() == 0


@pytest.mark.parametrize("start", ["last_prompt_token", "first_generated_token"])
@pytest.mark.parametrize("name", ["qwen3", "mistral-window", "gemma3_text", "gpt2", "gpt_neox"])
def test_logits_along_a_text_are_the_oracles(name, start, stock, rules):
    model, rule = stock[name], rules[(name, None, start)]
    prompts = prefill(model, tiny.PROMPTS, tiny.PAD)
    with steered(model, rule):
        found = forced_logits(model, prompts, TEXTS)
    again = forced_logits(model, prompts, TEXTS)  # the prompts are as they were
    for row, (prompt, text) in enumerate(zip(tiny.PROMPTS, TEXTS, strict=True)):
        for logits, one in ((found, rule), (again, rule.with_strength(0.0))):
            told = oracle.respond(model, prompt, tiny.plain_rule(one), len(text) + 1, follow=[*text, 0])["logits"]
            assert (logits[row, : len(text) + 1] - told).abs().max() <= tiny.logit_limit(told)
    assert not torch.allclose(found[0], again[0], atol=0.01)
