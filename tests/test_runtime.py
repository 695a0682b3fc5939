"""The parts of the payload: the gate, the step of a forward pass, the state on the cache."""

import threading

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from adaras_export.runtime import steering_adaras as runtime
from adaras_export.runtime.steering_adaras import Steering, SteeringGate, SteeringState, Step
from adaras_export.steering import gate_module


@pytest.fixture
def module():
    return gate_module(tiny.make_gate())


def random_features(seed, batch=2, tokens=6):
    return torch.tensor(np.random.default_rng(seed).normal(size=(batch, tokens, 5)), dtype=torch.float32)


@given(st.integers(0, 999), st.integers(1, 5))
def test_pooling_in_pieces_equals_pooling_at_once(seed, cut):
    module, features, prompt = gate_module(tiny.make_gate()), random_features(seed), torch.ones(2, 6, dtype=torch.bool)
    whole, parts = SteeringState(), SteeringState()
    whole.see(module, features, prompt)
    parts.see(module, features[:, :cut], prompt[:, :cut])
    parts.see(module, features[:, cut:], prompt[:, cut:])
    assert torch.allclose(whole.probability, parts.probability, atol=1e-6)  # sums of 6 terms in another order


@given(st.integers(0, 999), st.integers(0, 5))
def test_padding_does_not_change_the_verdict(seed, padding):
    module, features = gate_module(tiny.make_gate()), random_features(seed, batch=1)
    state, padded = SteeringState(), SteeringState()
    state.see(module, features[:, padding:], torch.ones(1, 6 - padding, dtype=torch.bool))
    padded.see(module, features, torch.arange(6)[None] >= padding)
    assert torch.allclose(state.probability, padded.probability, atol=1e-6)


def test_zero_attention_weights_pool_by_the_mean():
    module, features = SteeringGate(5, 2), random_features(1)
    weighted, weight = module.pool(features, torch.ones(2, 6))
    assert torch.allclose(weighted / weight, features.mean(1), atol=1e-6)


def test_a_gate_computes_in_float32_whatever_it_is_given(module):
    features = random_features(0)
    exact = module.pool(features.bfloat16().float(), torch.ones(2, 6))
    for one, other in zip(module.pool(features.bfloat16(), torch.ones(2, 6)), exact, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_large_activations_do_not_overflow_the_pooling(module):
    state = SteeringState()
    state.see(module, random_features(0) * 1e6, torch.ones(2, 6, dtype=torch.bool))
    assert torch.isfinite(state.probability).all()


def test_all_beams_of_a_sequence_share_its_verdict(module):
    state = SteeringState()
    state.see(module, random_features(0), torch.ones(2, 6, dtype=torch.bool))
    one, two = state.probability.tolist()
    assert state.probability_of(6).tolist() == [one, one, one, two, two, two]
    with pytest.raises(ValueError, match="the KV cache belongs to 2 sequences; the batch has 3"):
        state.probability_of(3)


def test_a_verdict_before_the_prompt_is_refused():
    with pytest.raises(ValueError, match="the gate has not seen the prompt"):
        SteeringState().probability_of(1)


@pytest.mark.parametrize(
    ("mask", "ends"),
    [([[1, 1, 1]], [[3]]), ([[0, 1, 1]], [[3]]), ([[1, 1, 0]], [[2]]), ([[1, 0, 0], [0, 1, 1]], [[1], [3]])],
)
def test_a_prompt_ends_behind_its_last_valid_token(mask, ends):
    assert runtime.prompt_ends(torch.tensor(mask).bool()).tolist() == ends


@pytest.mark.parametrize(
    ("start", "offset", "prompt", "steered"),
    [
        (4, 1, [1, 1, 1, 1], [0, 0, 0, 1]),  # the prompt ends here; its last token is steered
        (4, 0, [1, 1, 1, 1], [0, 0, 0, 0]),
        (2, 1, [1, 1, 0, 0], [0, 1, 1, 1]),  # the prompt ended inside this call
        (2, 0, [1, 1, 0, 0], [0, 0, 1, 1]),
        (0, 1, None, [1, 1, 1, 1]),  # it ended before
        (9, 1, [1, 1, 1, 1], [0, 0, 0, 0]),  # it goes on later
        (5, 1, [1, 1, 1, 1], [0, 0, 0, 0]),  # the next call begins with its last token
    ],
)
def test_a_step_places_prompt_and_steered_tokens(start, offset, prompt, steered):
    step = Step(SteeringState(), None, 1.0, 0.0)
    step.place(start, offset, torch.ones(1, 4, dtype=torch.bool))
    assert (step.prompt_BT is None) == (prompt is None)
    assert prompt is None or step.prompt_BT.int().tolist() == [prompt]
    assert step.steered_BT.int().tolist() == [steered]
    assert step.anything_steered == any(steered)


def test_padding_is_neither_prompt_nor_steered():
    step = Step(SteeringState(), None, 1.0, 0.0)
    step.place(torch.tensor([[3], [2]]), 1, torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]]).bool())
    assert step.prompt_BT.int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]
    assert step.steered_BT.int().tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]


def test_a_mask_that_is_not_two_dimensional_is_refused_where_tokens_must_be_told_apart():
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    assert runtime.valid_tokens(None, tokens).tolist() == [[True] * 3]
    for mask in (torch.ones(1, 1, 3, 3), "flash"):
        with pytest.raises(ValueError, match="steering needs a 2D attention mask"):
            runtime.valid_tokens(mask, tokens)


def test_the_width_of_a_prompt_comes_from_the_mask_then_the_embeddings_then_the_ids():
    ids, embeds, mask = torch.zeros(1, 3), torch.zeros(1, 4, 8), torch.zeros(1, 5)
    assert runtime.prompt_width(ids, {"attention_mask": mask, "inputs_embeds": embeds}) == 5
    assert runtime.prompt_width(ids, {"inputs_embeds": embeds, "attention_mask": None}) == 4
    assert runtime.prompt_width(ids, {}) == runtime.prompt_width(None, {"input_ids": ids}) == 3
    assert runtime.prompt_width(None, {}) == 1  # generate() begins with BOS


def test_scopes_nest_and_belong_to_one_model_and_thread():
    one, other, seen = torch.nn.Module(), torch.nn.Module(), []
    with runtime.generating(one, 3) as outer:
        assert runtime.current_scope(one) is outer
        with runtime.generating(other, 5):  # an assistant generates inside
            assert runtime.current_scope(one) is None
            thread = threading.Thread(target=lambda: seen.append(runtime.current_scope(other)))
            thread.start()
            thread.join()
        assert runtime.current_scope(one) is outer
    assert runtime.current_scope(one) is None
    assert seen == [None]


def test_the_step_that_ran_before_comes_back_also_after_an_error():
    steps = [Step(SteeringState(), None, 1.0, 0.0) for _ in range(2)]
    with runtime.running(steps[0]):
        with pytest.raises(RuntimeError), runtime.running(steps[1]):
            raise RuntimeError
        assert runtime.running_step() is steps[0]


def test_the_dials_can_be_read_set_and_switched_off_for_a_while():
    dials = Steering({"strength": 1, "threshold": 0.5, "start": "last_prompt_token"})
    dials.strength, dials.threshold = 3, 1
    assert (dials.strength, dials.threshold, dials.start) == (3.0, 1.0, "last_prompt_token")
    with pytest.raises(RuntimeError), dials.off():
        assert not dials.enabled
        raise RuntimeError
    assert dials.enabled
    with pytest.raises(AttributeError):
        dials.start = "first_generated_token"


def test_a_cache_that_was_filled_without_the_gate_is_refused_only_where_there_is_a_gate(module):
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    arguments = {
        "past_key_values": cache,
        "input_ids": torch.zeros(1, 1, dtype=torch.int64),
        "inputs_embeds": None,
        "attention_mask": None,
    }
    dials = Steering({"strength": 1, "threshold": 0.5, "start": "last_prompt_token"})
    with pytest.raises(ValueError, match="filled without the gate; fill it through this model, with steering on"):
        runtime.begin_step(torch.nn.Module(), module, dials, arguments)
    assert runtime.begin_step(torch.nn.Module(), None, dials, arguments).anything_steered
