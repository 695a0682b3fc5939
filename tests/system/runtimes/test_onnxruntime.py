"""What only ONNX Runtime itself has: levels of optimisation, saved graphs, and numbers that a call may feed."""

from dataclasses import replace

import pytest
import tiny
from drive import require_result

KEY = ("qwen3", "causal", "last_prompt_token")
STRENGTH = 2.0
DIALS = {
    "base": {"steering_strength": 0.0},
    "twice": {"steering_strength": 2 * STRENGTH},
    "flipped": {"steering_strength": -STRENGTH},
    "every prompt": {"steering_threshold": 1.0},
    "no prompt": {"steering_threshold": 0.0},
    "both": {"steering_strength": 0.5 * STRENGTH, "steering_threshold": 1.0},
    "none fed": {},
}


@pytest.fixture(scope="module", params=["", "inline"], ids=["functions", "inline"])
def found(driven, request):
    how = {"modes": ["levels", "saved", "dials"], "dials": [*DIALS.values()]}
    key = (*KEY, request.param)
    return driven("onnxruntime", {key: how})[key]


@pytest.mark.parametrize("level", ["DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL"])
def test_every_level_of_optimisation_gives_what_the_oracle_gives(level, found, told):
    require_result(found["levels"][f"ORT_{level}"], told[KEY])


@pytest.mark.parametrize("suffix", [".onnx", ".ort"])
def test_a_graph_saved_after_optimisation_gives_what_the_oracle_gives(suffix, found, told):
    require_result(found["saved"][suffix], told[KEY])


@pytest.mark.parametrize("name", DIALS)
def test_what_a_call_feeds_holds_for_that_call(name, found, rules, stock):
    rule, dials = rules[KEY], DIALS[name]
    assert rule.strength == STRENGTH
    gate = replace(rule.gate, threshold=dials.get("steering_threshold", rule.gate.threshold))
    rule = replace(rule, strength=dials.get("steering_strength", STRENGTH), gate=gate)
    result = found["dials"][list(DIALS).index(name)]
    require_result(result, tiny.answers(stock["qwen3"], rule))


@pytest.mark.parametrize("name", ["base", "twice", "flipped", "every prompt", "no prompt"])
def test_another_dial_is_told_from_the_rules_own(name, found, told):
    result = found["dials"][list(DIALS).index(name)]
    with pytest.raises(AssertionError):
        require_result(result, told[KEY])


def test_the_build_for_gpus_runs_where_there_is_none(driven):
    """Alone in its environment: beside onnxruntime, whichever is installed last has written over the other."""
    asked = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    key = (*KEY, "")
    found = driven("onnxruntime-gpu", {key: {"modes": ["providers"], "providers": asked}})[key]["providers"]
    assert set(asked) <= set(found["built"])
    assert found["used"] in (asked, asked[1:])
