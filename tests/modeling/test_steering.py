"""`steered` on stock models, against the oracle."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import oracle
import pytest
import tiny
import torch
from pairwise import in_turn, pairwise
from tiny import CACHE, EOS, PROMPTS, greedy, left_padded, require_answers

from adaras_export.core import families
from adaras_export.errors import RuleError, UnsupportedModelError
from adaras_export.modeling.gate import gate_module
from adaras_export.modeling.generation import Sampling, complete_ids, continue_ids, prefill
from adaras_export.modeling.steering import steered, steered_everywhere

RULES = [
    ("causal", "last_prompt_token"),
    ("causal", "first_generated_token"),
    ("later", "first_generated_token"),
    (None, "last_prompt_token"),
    (None, "first_generated_token"),
]
GATED = ("qwen3", "causal", "last_prompt_token")


DEEP = ("llama", "qwen3", "gpt2")


CASES = pairwise(DEEP, tiny.NAMES, RULES, (True, False))
CASES += [(name, rule, True) for name, rule in in_turn((), tiny.MORE, RULES)]


@pytest.mark.parametrize("case", tiny.mostly_slow(CASES), ids=tiny.key_id)
def test_greedy_generation_of_a_padded_batch_equals_the_oracle(case, rules, stock, told):
    name, rule, use_cache = case
    key = (name, *rule)
    expected = told[key]
    with steered(stock[name], rules[key]):
        require_answers(greedy(stock[name], use_cache=use_cache), expected, tiny.SLACK.get(name, 1))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_steering_changes_what_the_tiny_models_say(name, stock, rules, told):
    """Otherwise every comparison in this suite would hold for a library that does nothing."""
    always, off = (name, None, "last_prompt_token"), rules[name, None, "last_prompt_token"].with_strength(0)
    base = tiny.answers(stock[name], off)
    assert sum(one["ids"] != other["ids"] for one, other in zip(told[always], base, strict=True)) >= 3
    assert {answer["steered"] for answer in told[name, "causal", "last_prompt_token"]} == {True, False}
    assert {answer["steered"] for answer in told[name, "later", "first_generated_token"]} == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.MORE)
def test_steering_changes_what_the_other_families_say(name, stock, rules, told):
    key = (name, None, "last_prompt_token")
    base = tiny.answers(stock[name], rules[key].with_strength(0))
    assert sum(one["ids"] != other["ids"] for one, other in zip(told[key], base, strict=True)) >= 2


@pytest.mark.parametrize(("name", "use_cache"), in_turn(DEEP, tiny.NAMES, (True, False)))
def test_steering_everywhere_equals_the_oracle_and_is_not_the_rule(
    name, use_cache, rules, stock, told, told_everywhere
):
    key = (name, "causal", "last_prompt_token")
    expected = told_everywhere[key]
    assert any(one["ids"] != other["ids"] for one, other in zip(expected, told[key], strict=True))
    with steered_everywhere(stock[name], rules[key]):
        require_answers(greedy(stock[name], use_cache=use_cache), expected)


def test_a_failure_while_steering_everywhere_leaves_no_hook(stock, rules):
    with pytest.raises(ZeroDivisionError), steered_everywhere(stock["qwen3"], rules[GATED]):
        raise ZeroDivisionError
    with pytest.raises(RuleError, match="family"), steered_everywhere(stock["llama"], rules[GATED]):
        pass


@pytest.mark.parametrize("row", range(len(PROMPTS)))
def test_one_row_alone_equals_the_oracle(row, rules, stock, told):
    expected = told[GATED][row : row + 1]
    with steered(stock["qwen3"], rules[GATED]):
        require_answers(greedy(stock["qwen3"], PROMPTS[row : row + 1]), expected)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("gate", "start"), RULES[:3])
def test_sampling_with_a_seed_equals_the_oracle_sampling_with_that_seed(gate, start, use_cache, rules, stock):
    rule = rules["llama", gate, start]
    how = {"do_sample": True, "top_k": 0, "temperature": 1.0, "use_cache": use_cache}
    for prompt in PROMPTS:
        with torch.random.fork_rng(), steered(stock["llama"], rule):
            torch.manual_seed(3)
            out = greedy(stock["llama"], [prompt], **how)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            draw = lambda logits: int(torch.multinomial(logits.softmax(-1), 1))  # noqa: E731
            expected = oracle.respond(stock["llama"], prompt, tiny.plain_rule(rule), 6, pick=draw, ends=(EOS,))
        require_answers(out, [expected])


@pytest.mark.parametrize(("gate", "start"), RULES)
def test_a_beam_has_the_probability_that_the_oracle_gives_its_tokens(gate, start, rules, stock):
    rule, model = rules["mistral", gate, start], stock["mistral"]
    with steered(model, rule):
        how = {"num_beams": 3, "length_penalty": 0.0, "eos_token_id": 0, "max_new_tokens": 5, "output_scores": True}
        out = greedy(model, PROMPTS, **how)
    for row, (prompt, score) in enumerate(zip(PROMPTS, out.sequences_scores.tolist(), strict=True)):
        path = out.sequences[row, -5:].tolist()
        log_p = oracle.respond(model, prompt, tiny.plain_rule(rule), 5, follow=path)["logits"].log_softmax(-1)
        # 5 log-probabilities near -5, each with an error of some units of 1e-6
        assert sum(log_p[at, token].item() for at, token in enumerate(path)) == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize(("gate", "start"), RULES)
def test_a_bare_forward_and_decoding_by_hand_equal_the_oracle(gate, start, rules, stock, told):
    rule, model = rules["qwen2", gate, start], stock["qwen2"]
    for prompt, answer in zip(PROMPTS, told["qwen2", gate, start], strict=True):
        ids, cache, chosen = torch.tensor([prompt]), None, []
        with torch.no_grad(), steered(model, rule):
            while len(chosen) < len(answer["ids"]):
                out = model(input_ids=ids, use_cache=True, **{CACHE: cache})
                cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
                chosen.append(int(ids))
        assert chosen == answer["ids"]


def test_generation_from_embeddings_equals_the_oracle(rules, stock, told):
    model = stock["qwen3"]
    inputs = left_padded(PROMPTS)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with steered(model, rules[GATED]):
        out = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], max_new_tokens=6)
    for row, answer in zip(out.tolist(), told[GATED], strict=True):
        assert row[: len(answer["ids"])] == answer["ids"]


def test_completing_through_a_second_handle_on_the_model_equals_the_oracle(rules, stock, told, tokenizer):
    """`generation` calls a shallow copy of the model, so that its settings stay its own."""
    with steered(stock["qwen3"], rules[GATED]):
        found = complete_ids(stock["qwen3"], tokenizer, PROMPTS, Sampling(6), ["a", "b", "c", "d"])
    assert found == [[id_ for id_ in answer["ids"] if id_ != EOS] for answer in told[GATED]]


PREFILLED = [("mistral-window", start) for start in ("last_prompt_token", "first_generated_token")]
STATEFUL = ("qwen3_5_text", "lfm2", "falcon_h1", "gemma4_text")
PREFILLED += [(name, "last_prompt_token") for name in STATEFUL if name in tiny.MORE]


@pytest.mark.parametrize(("name", "start"), PREFILLED)
def test_continuing_prompts_that_were_prefilled_unsteered_equals_the_oracle(name, start, rules, stock, told, tokenizer):
    """What evaluation relies on: no rule changes anything before the last prompt token. States of any kind repeat."""
    model, key = stock[name], (name, None, start)
    expected = [[id_ for id_ in answer["ids"] if id_ != EOS] for answer in told[key]]
    prefilled = prefill(model, PROMPTS, tiny.PAD)
    for _ in range(2):
        with steered(model, rules[key]):
            own = prefilled.repeated(range(len(PROMPTS)))
            assert continue_ids(model, tokenizer, own, Sampling(6), ["a", "b", "c", "d"]) == expected


@pytest.mark.parametrize("gate", ["causal", None])
def test_strength_zero_is_the_base_model_bit_for_bit(gate, rules, stock):
    model, rule = stock["llama-biased"], rules["llama-biased", gate, "last_prompt_token"]
    base = torch.stack(greedy(model).logits)
    for silent in (rule.with_strength(0), tiny.make_rule(rule.base, neurons=tiny.make_neurons().top(0))):
        with steered(model, silent):
            assert torch.equal(torch.stack(greedy(model).logits), base)


def test_a_rule_and_its_negation_differ_in_the_sign_of_the_first_order_effect(rules, stock):
    rule, model = rules["llama", None, "last_prompt_token"], stock["llama"]
    base = greedy(model, PROMPTS[:1]).logits[0]
    effects = []
    for strength in (1e-2, -1e-2):
        with steered(model, rule.with_strength(strength)):
            effects.append(greedy(model, PROMPTS[:1]).logits[0] - base)
    assert float((effects[0] + effects[1]).abs().max()) < 0.05 * float(effects[0].abs().max())


def test_threads_that_share_a_model_do_not_meet(rules, stock, told):
    model, barrier = stock["qwen3"], threading.Barrier(2)

    def answer(row):
        barrier.wait()
        return [greedy(model, PROMPTS[row : row + 1]) for _ in range(3)]

    expected = told[GATED]
    with steered(model, rules[GATED]), ThreadPoolExecutor(2) as pool:
        for row, outs in zip((2, 3), pool.map(answer, (2, 3)), strict=True):
            for out in outs:
                require_answers(out, expected[row : row + 1])


@pytest.mark.parametrize("gate", ["causal", "later"])
def test_an_error_inside_forward_leaves_nothing_behind(gate, rules, stock, told):
    model, key = stock["llama"], ("llama", gate, "first_generated_token")
    expected = told[key]
    with steered(model, rules[key]):
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[999_999, 1]]))
        require_answers(greedy(model), expected)  # and the context goes on


def test_an_error_inside_generate_leaves_nothing_behind(rules, stock):
    def fail(ids, scores):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"), steered(stock["qwen3"], rules[GATED]):
        greedy(stock["qwen3"], logits_processor=[fail])


def test_an_error_while_hooks_are_registered_leaves_nothing_behind(rules, stock, monkeypatch):
    find = families.down_projection

    def fail_at_the_second(model, layer):
        if layer == 2:
            raise RuntimeError("no such layer")
        return find(model, layer)

    monkeypatch.setattr(families, "down_projection", fail_at_the_second)
    with pytest.raises(RuntimeError, match="no such layer"), steered(stock["qwen3"], rules[GATED]):
        pass


def test_steering_a_steered_model_is_refused(rules, stock):
    with (
        steered(stock["qwen3"], rules[GATED]),
        pytest.raises(RuleError, match="is steered already"),
        steered(stock["qwen3"], rules[GATED]),
    ):
        pass


def test_a_rule_for_another_model_names_every_difference(rules, stock, bases):
    other = tiny.build_model("llama", num_hidden_layers=3, intermediate_size=40)
    expected = r"family llama \(expected qwen3\); layers 3 \(expected 4\); mlp_size 40 \(expected 48\)"
    with pytest.raises(RuleError, match=expected), steered(other, rules[GATED]):
        pass


def test_a_model_of_an_unknown_family_is_refused(rules):
    other = torch.nn.Module()
    other.config = type("Config", (), {"name_or_path": "odd", "to_dict": lambda self: {"model_type": "odd"}})()
    with (
        pytest.raises(UnsupportedModelError, match="odd: model_type odd is not supported"),
        steered(other, rules[GATED]),
    ):
        pass


def test_a_second_prompt_on_a_used_cache_is_judged_and_steered_again(rules, stock):
    """Several tokens behind a filled cache are a further prompt; they do not run into a stale decision."""
    model = stock["qwen3"]
    with torch.no_grad(), steered(model, rules[GATED]):
        first = model(input_ids=torch.tensor([PROMPTS[3]]), use_cache=True)
        before = first.past_key_values.steering_state.probability.clone()
        second = model(input_ids=torch.tensor([PROMPTS[2]]), **{CACHE: first.past_key_values})
    assert second.past_key_values.steering_state.probability != before


def test_a_cache_filled_without_the_gate_is_refused(rules, stock):
    model = stock["qwen3"]
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([PROMPTS[0]]), use_cache=True).past_key_values
        with steered(model, rules[GATED]), pytest.raises(ValueError, match="was filled without the gate"):
            model(input_ids=torch.tensor([[7]]), **{CACHE: cache})


def test_gate_modules_hold_the_weights_of_the_gate(rules):
    gate = rules[GATED].gate
    module = gate_module(gate)
    for name, value in gate.weights().items():
        assert torch.equal(getattr(module, name), torch.tensor(value))


def test_a_shallow_copy_of_a_steered_model_has_its_class_while_the_context_lasts(rules, stock):
    before = type(stock["qwen3"])
    with steered(stock["qwen3"], rules[GATED]):
        assert isinstance(copy.copy(stock["qwen3"]), before)
    assert type(stock["qwen3"]) is before
