"""What only ONNX Runtime GenAI has: a generator that goes on after an answer."""

import oracle
import tiny
from drive import require_result
from tiny import EOS, PROMPTS

KEY = ("qwen3", "causal", "last_prompt_token")


def test_each_turn_of_a_chat_is_judged_and_steered_anew(driven, rules, stock):
    """With shared buffers; with growing ones GenAI 0.18 raises at the second turn, gated or not."""
    expected = oracle.converse(stock["qwen3"], PROMPTS, tiny.plain_rule(rules[KEY]), 6, ends=(EOS,))
    assert {answer["steered"] for answer in expected} == {True, False}
    key = (*KEY, "genai")
    found = driven("genai", {key: {"modes": ["chat"]}})[key]["chat"]
    require_result(found, expected)
