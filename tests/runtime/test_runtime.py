"""The payload as the package that it is here: its parts, and its models opened without copying the code."""

import copy
import json
import math
import pickle
import threading
import types

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CACHE, greedy, require_answers
from transformers import DynamicCache, GenerationMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3Model, eager_attention_forward

from adaras_export.core.checkpoint import Checkpoint
from adaras_export.exporters.hf.exporter import EXPORTER
from adaras_export.modeling.gate import gate_module
from adaras_export.runtime import modeling_adaras
from adaras_export.runtime import steering_adaras as runtime
from adaras_export.runtime.steering_adaras import Scope, Steering, SteeringGate, SteeringState, Step, here


@pytest.fixture
def module():
    return gate_module(tiny.make_gate())


def random_features(seed, batch=2, tokens=6):
    return torch.tensor(np.random.default_rng(seed).normal(size=(batch, tokens, 5)), dtype=torch.float32)


@given(st.integers(0, 999), st.integers(1, 5))
def test_pooling_in_pieces_equals_pooling_at_once(seed, cut):
    module, features, prompt = gate_module(tiny.make_gate()), random_features(seed), torch.ones(2, 6, dtype=torch.bool)
    whole, parts = SteeringState(), SteeringState()
    whole.see(module, features, prompt, 0)
    parts.see(module, features[:, :cut], prompt[:, :cut], 0)
    parts.see(module, features[:, cut:], prompt[:, cut:], cut)
    assert torch.allclose(whole.probability, parts.probability, atol=1e-6)  # sums of 6 terms in another order


@given(st.integers(0, 999), st.integers(0, 5))
def test_padding_does_not_change_the_verdict(seed, padding):
    module, features = gate_module(tiny.make_gate()), random_features(seed, batch=1)
    state, padded = SteeringState(), SteeringState()
    state.see(module, features[:, padding:], torch.ones(1, 6 - padding, dtype=torch.bool), 0)
    padded.see(module, features, torch.arange(6)[None] >= padding, 0)
    assert torch.allclose(state.probability, padded.probability, atol=1e-6)


def test_zero_attention_weights_pool_by_the_mean():
    module, features = SteeringGate(5, 2), random_features(1)
    module.hidden_weight.copy_(random_features(2)[0, :2])
    values, weights, _ = module(None, (features, torch.ones(2, 6)))
    assert torch.allclose(values.sum(1) / weights.sum(1, keepdim=True), features.mean(1) @ module.hidden_weight.T)


@pytest.mark.parametrize("cast", [False, True])
def test_a_gate_computes_in_float32_whatever_it_is_given(cast, module):
    features = random_features(0)
    exact = module(None, (features.bfloat16().float(), torch.ones(2, 6)))
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        found = module(None, (features.bfloat16(), torch.ones(2, 6)))
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_large_activations_do_not_overflow_the_pooling(module):
    state = state_of(module, random_features(0) * 1e6)
    assert torch.isfinite(state.probability).all()


def state_of(module, features_BTF):
    state = SteeringState()
    state.see(module, features_BTF, torch.ones(features_BTF.shape[:2], dtype=torch.bool), 0)
    return state


def test_a_batch_of_another_size_is_refused(module):
    with pytest.raises(ValueError, match="the KV cache belongs to 2 sequences; the batch has 6"):
        state_of(module, random_features(0)).probability_of(module, 6)


def test_a_verdict_before_the_prompt_is_refused(module):
    with pytest.raises(ValueError, match="the gate has not seen the prompt"):
        SteeringState().probability_of(module, 1)


@pytest.mark.parametrize("columns", [1, 4, 6])
def test_the_gate_forgets_the_columns_that_a_cache_loses(columns, module):
    features = random_features(3)
    state = state_of(module, features)
    state.crop(columns)
    expected = state_of(module, features[:, :columns]).probability
    assert torch.allclose(state.probability_of(module, 2), expected, atol=1e-6)
    state.see(module, features[:, columns : columns + 1], torch.ones(2, 1, dtype=torch.bool), columns)
    expected = state_of(module, torch.cat([features[:, :columns], features[:, columns : columns + 1]], 1)).probability
    assert torch.allclose(state.probability, expected, atol=1e-6)


def test_generated_tokens_between_two_turns_do_not_count(module):
    first, second = random_features(4), random_features(5)
    state = state_of(module, first)
    state.see(module, second, torch.ones(2, 6, dtype=torch.bool), 6 + 3)
    assert torch.allclose(state.probability, state_of(module, torch.cat([first, second], 1)).probability, atol=1e-6)
    state.crop(8)  # two of the three generated ones are left
    assert torch.allclose(state.probability_of(module, 2), state_of(module, first).probability, atol=1e-6)


def test_a_cache_that_lost_judged_columns_unseen_is_refused(module):
    state = state_of(module, random_features(0))
    with pytest.raises(ValueError, match=r"lost 2 columns that the gate has judged; remove them with crop\(\)"):
        state.see(module, random_features(1), torch.ones(2, 6, dtype=torch.bool), 4)


ROWS = {
    "reorder_cache": (torch.tensor([1, 0]), [1, 0]),
    "batch_select_indices": (torch.tensor([1]), [1]),
    "batch_repeat_interleave": (2, [0, 0, 1, 1]),
}


@pytest.mark.parametrize(
    "copied",
    [lambda cache: cache, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))],  # noqa: S301
)
@pytest.mark.parametrize("operation", ROWS)
def test_verdicts_follow_the_rows_of_the_cache(operation, copied, module):
    original, (argument, order) = DynamicCache(), ROWS[operation]
    original.update(torch.ones(2, 1, 6, 4), torch.zeros(2, 1, 6, 4), 0)
    original.steering_state = state_of(module, random_features(0))
    runtime.follow(original)
    cache, before = copied(original), original.steering_state.probability.clone()
    getattr(cache, operation)(argument)
    assert torch.equal(cache.steering_state.probability, before[order])
    cache.crop(-2)
    expected = state_of(module, random_features(0)[order, :4]).probability
    assert torch.allclose(cache.steering_state.probability_of(module, len(order)), expected, atol=1e-6)
    assert cache is original or original.steering_state.seen[1].shape[1] == 6


LAST, FIRST = "last_prompt_token", "first_generated_token"


def dials_of(start):
    return Steering({"strength": 1, "threshold": 0.5, "start": start})


def placed(start, valid, dials):
    step = Step(SteeringState(), None, dials)
    step.place(start, torch.tensor(valid).bool())
    return [None if mask is None else mask.int().tolist() for mask in (step.prompt_BT, step.steered_BT)]


@pytest.mark.parametrize(
    ("mask", "last"),
    [
        ([[1, 1, 1]], [[0, 0, 1]]),
        ([[0, 1, 1]], [[0, 0, 1]]),
        ([[1, 1, 0]], [[0, 1, 0]]),
        ([[1, 0, 0], [0, 1, 1]], [[1, 0, 0], [0, 0, 1]]),
    ],
)
def test_a_prompt_ends_with_its_last_valid_token(mask, last):
    assert placed(None, mask, dials_of(LAST)) == [mask, last]
    assert placed(None, mask, dials_of(FIRST)) == [mask, (torch.tensor(mask) * 0).tolist()]


@pytest.mark.parametrize(
    ("start", "first", "prompt", "steered"),
    [
        (4, LAST, [1, 1, 1, 1], [0, 0, 0, 1]),  # the prompt ends here; its last token is steered
        (4, FIRST, [1, 1, 1, 1], None),
        (2, LAST, [1, 1], [0, 1, 1, 1]),  # the prompt ended inside this call: the gate reads no further
        (2, FIRST, [1, 1], [0, 0, 1, 1]),
        (0, LAST, None, [1, 1, 1, 1]),  # it ended before
        (9, LAST, [1, 1, 1, 1], None),  # it goes on later
        (5, LAST, [1, 1, 1, 1], None),  # the next call begins with its last token
    ],
)
def test_a_step_places_prompt_and_steered_tokens(start, first, prompt, steered):
    expected = [mask if mask is None else [mask] for mask in (prompt, steered)]
    assert placed(start, [[1, 1, 1, 1]], dials_of(first)) == expected


def test_padding_is_neither_prompt_nor_steered():
    step = Step(SteeringState(), None, dials_of(LAST))
    step.place(torch.tensor([[3], [2]]), torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]]).bool())
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
    outer = Scope(one, 3)
    with here(scope=outer):
        assert runtime.scope_of(one) is outer
        with here(scope=Scope(other, 5)):  # an assistant generates inside
            assert runtime.scope_of(one) is None
            thread = threading.Thread(target=lambda: seen.append(runtime.scope_of(other)))
            thread.start()
            thread.join()
        assert runtime.scope_of(one) is outer
    assert runtime.scope_of(one) is None
    assert seen == [None]


def test_the_step_that_ran_before_comes_back_also_after_an_error():
    steps = [Step(SteeringState(), None, dials_of(LAST)) for _ in range(2)]
    with here(step=steps[0]):
        with pytest.raises(RuntimeError), here(step=steps[1]):
            raise RuntimeError
        assert runtime.THREAD.step is steps[0]
    assert runtime.THREAD.step is None


def test_the_dials_can_be_read_set_and_switched_off_for_a_while():
    dials = dials_of(LAST)
    dials.strength, dials.threshold = 3, 1
    assert (dials.strength, dials.threshold, dials.start) == (3.0, 1.0, "last_prompt_token")
    with pytest.raises(RuntimeError), dials.off():  # noqa: PT012 - off, then the error
        assert not dials.active
        raise RuntimeError
    assert dials.active
    with pytest.raises(AttributeError):
        dials.start = "first_generated_token"


def test_a_cache_that_was_filled_without_the_gate_is_refused_only_where_there_is_a_gate(module):
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    arguments = {
        CACHE: cache,
        "input_ids": torch.zeros(1, 1, dtype=torch.int64),
        "inputs_embeds": None,
        "attention_mask": None,
    }
    dials = dials_of(LAST)
    with pytest.raises(ValueError, match="filled without the gate; fill it through this model, with steering on"):
        runtime.begin_step(torch.nn.Module(), module, dials, arguments)
    assert runtime.begin_step(torch.nn.Module(), None, dials, arguments).steered_BT.all()


CAUSAL, LATER = ("causal", "last_prompt_token"), ("later", "first_generated_token")


@pytest.fixture(scope="module")
def packaged(rules, folders, tmp_path_factory):
    """An export by the keys of ``rules``, opened with the classes of the package."""

    class Packaged(dict):
        def __missing__(self, key):
            folder = tmp_path_factory.mktemp("export")
            EXPORTER.write(rules[key], Checkpoint(folders[key[0]]), folder)
            names = json.loads((folder / "config.json").read_text())["auto_map"]
            config, model = (
                getattr(modeling_adaras, names[auto].removeprefix("modeling_adaras."))
                for auto in ("AutoConfig", "AutoModelForCausalLM")
            )
            loaded = model.from_pretrained(folder, config=config.from_pretrained(folder), dtype=torch.float32)
            self[key] = loaded.eval()
            return self[key]

    return Packaged()


@pytest.mark.parametrize("rule", [CAUSAL, LATER])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_package_computes_what_its_copies_compute(name, rule, packaged, told):
    key = (name, *rule)
    for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        require_answers(greedy(packaged[key], **how), told[key])
    found = [steered for _, steered in packaged[key].steering.last_decisions]
    assert found == [answer["steered"] for answer in told[key]]
    # One row: Transformers 4.57 gives padded rows wrong positions when it prefills in chunks, with any model.
    require_answers(greedy(packaged[key], tiny.PROMPTS[3:], prefill_chunk_size=4), told[key][3:])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_a_copied_model_computes_what_the_model_computes(copied, name, packaged, told):
    """Symptom: pickling failed, as Transformers made a class of another name to add GenerationMixin."""
    key = (name, *CAUSAL)
    copy_of = copied(packaged[key])
    require_answers(greedy(copy_of), told[key])
    copy_of.steering.strength = 0
    require_answers(greedy(packaged[key]), told[key])
    assert not torch.equal(greedy(copy_of).logits[0], greedy(packaged[key]).logits[0])


def test_an_mlp_that_was_replaced_is_an_error_and_not_an_unsteered_answer(packaged):
    """As kernel libraries do: they bind another forward function to the module, or put another module there."""
    model = copy.deepcopy(packaged[("qwen3", *CAUSAL)])
    mlp = model.model.layers[3].mlp
    mlp.forward = types.MethodType(Qwen3MLP.forward, mlp)
    with pytest.raises(RuntimeError, match="a steered MLP did not run"):
        greedy(model)
    with model.steering.off():
        greedy(model)


@pytest.mark.parametrize("name", ["Qwen3Model", "AdaRASNothing", "AdaRASGenerationMixin", "AdaRASpipeline", "AdaRAS"])
def test_only_models_and_configs_of_transformers_have_a_steered_class(name):
    with pytest.raises(AttributeError, match="expected AdaRAS and the name of a model or config class"):
        getattr(modeling_adaras, name)


def test_on_the_edge_of_the_threshold_the_told_decision_is_the_one_that_was_made(packaged, monkeypatch):
    """p and threshold were compared in float32 to steer and in float64 to tell: here p is below in the latter only."""
    model = packaged[("qwen3", *CAUSAL)]
    greedy(model, tiny.PROMPTS[3:])
    ((p, _),) = model.steering.last_decisions
    monkeypatch.setattr(model.steering, "threshold", math.nextafter(p, 1))
    found = greedy(model, tiny.PROMPTS[3:])
    assert model.steering.last_decisions == [(p, False)]
    with model.steering.off():
        assert torch.equal(greedy(model, tiny.PROMPTS[3:]).logits[0], found.logits[0])


@pytest.mark.parametrize("rule", [CAUSAL, LATER])
def test_the_package_switches_off_and_refuses_as_its_copies_do(rule, packaged, stock):
    model = packaged[("qwen3", *rule)]
    with model.steering.off(), torch.no_grad():
        assert torch.equal(model(torch.tensor([[1, 2]])).logits, stock["qwen3"](torch.tensor([[1, 2]])).logits)
        cache = model(torch.tensor([[1, 2]]), use_cache=True).past_key_values
    with torch.no_grad(), pytest.raises(ValueError, match="filled without the gate"):
        model(torch.tensor([[7]]), **{CACHE: cache})
    with pytest.raises(NotImplementedError, match="continuous batching"):
        model.init_continuous_batching()


@pytest.mark.parametrize("server", ["vllm", "sglang", "tgi"])
def test_servers_that_pack_requests_without_saying_where_prompts_end_are_refused(server, packaged, monkeypatch):
    """vLLM 0.32 opened such an export and steered by the first piece of each request, without a word."""
    model = packaged[("qwen3", *CAUSAL)]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, server, eager_attention_forward)
    config = copy.deepcopy(model.config)
    config._attn_implementation = server
    refusal = f"{server} does not say where a prompt ends; serve an export to `stock`"
    with torch.random.fork_rng(), pytest.raises(NotImplementedError, match=refusal):
        type(model)(config)


def test_the_package_keeps_a_later_gate_from_judging_prompt_and_answer_behind_a_cache(packaged):
    model = packaged[("qwen3", *LATER)]
    with torch.no_grad():
        cache = model(torch.tensor([[1, 2]]), use_cache=True, steering_start=9).past_key_values
        with pytest.raises(ValueError, match="needs the prompt in calls of its own"):
            model(torch.tensor([[3, 4, 5]]), steering_start=1, **{CACHE: cache})


def test_the_package_gives_no_decisions_without_a_gate(packaged, told):
    key = ("qwen2", None, "last_prompt_token")
    model = packaged[key]
    ids = torch.tensor([tiny.PROMPTS[2]])
    embeds = model.get_input_embeddings()(ids).detach()
    new = model.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=6, pad_token_id=tiny.PAD)
    assert new[0].tolist() == told[key][2]["ids"]
    assert model.steering.last_decisions == []
    with torch.no_grad():
        logits, cache = model(ids, use_cache=True, return_dict=False)[:2]
    assert int(logits[0, -1].argmax()) == told[key][2]["ids"][0]
    assert cache.steering_state.probability is None


# What Transformers does not show


def call(**arguments):
    return {"input_ids": torch.zeros(1, 1, dtype=torch.int64), **arguments}


class OtherCache:
    """A KV cache that is no `Cache`."""


UNSEEN = {
    "an attention mask of more columns": (
        call(attention_mask=torch.ones(1, 5)),
        "1 of 5 columns, and no KV cache that steering knows",
    ),
    "a cache of another kind": (call(kv=OtherCache()), "OtherCache: is no KV cache that steering knows"),
    "two caches": (call(cache=DynamicCache(), other=DynamicCache()), "two KV caches in one call"),
    "half a packed call": (call(cu_seq_lens_q=torch.tensor([0, 1])), "does not show where its prompts end"),
    "the other half": (call(logits_indices=torch.tensor([0])), "does not show where its prompts end"),
}


@pytest.mark.parametrize("case", UNSEEN)
def test_what_steering_cannot_see_is_an_error(case):
    arguments, message = UNSEEN[case]
    with pytest.raises(ValueError, match=message):
        runtime.begin_step(torch.nn.Module(), None, dials_of(LAST), arguments)


def test_a_cache_is_found_under_any_name():
    cache = DynamicCache()
    assert runtime.cache_of({"first": torch.zeros(1), "whatever": cache, "the same": cache}) is cache


def test_a_decoder_whose_arguments_have_other_names_is_refused(packaged, monkeypatch):
    model = packaged[("qwen3", *CAUSAL)]
    monkeypatch.setattr(Qwen3Model, "forward", lambda self, input_ids, mask, position_ids, inputs_embeds: None)
    refusal = r"has no attention_mask in .*, which steering reads"
    with torch.random.fork_rng(), pytest.raises(NotImplementedError, match=refusal):
        type(model)(model.config)


def test_a_generate_whose_arguments_have_other_names_is_refused(packaged, monkeypatch):
    model = packaged[("qwen3", *CAUSAL)]
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, prompts, **how: None)
    refusal = "has no inputs, generation_config in"
    with torch.random.fork_rng(), pytest.raises(NotImplementedError, match=refusal):
        type(model)(model.config)
