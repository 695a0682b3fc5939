"""What Transformers' common generation and modelling tests ask of every model class, asked of steered ones.

Those tests are in no wheel, and the sdist has test_modeling_common.py but not the tests/generation that it imports. So
the properties are stated again; docs/evaluating.md lists them. Each is held against the oracle, against another way to
the same result, or against the base: where a property is one of form (types, shapes, signatures), the base says which.
"""

import copy
import inspect
import warnings
from concurrent.futures import ThreadPoolExecutor

import oracle
import pytest
import tiny
import torch
import transformers
from pairwise import pairwise
from tiny import CACHE, EOS, LAYERS, PAD, PROMPTS, VOCABULARY, greedy, left_padded, require_answers

pytestmark = pytest.mark.slow  # hundreds of short ones

DEEP = "qwen3"
FAMILIES = (DEEP, "gemma3_text", "gpt2", "gpt_neox")
LAST = "last_prompt_token"
KEYS = [(DEEP, None, LAST), *((family, "causal", LAST) for family in FAMILIES)]


def case_id(value):
    return tiny.key_id(value) if isinstance(value, tuple) else str(value)


def every():
    return pytest.mark.parametrize("key", KEYS, ids=case_id)


def each(name, values):
    """Every value with the deep family, gated and not; with another all values and both, but not all pairs of them."""
    values = [*values]
    selected = pairwise((DEEP,), FAMILIES, (None, "causal"), range(len(values)))
    cases = [((family, gate, LAST), values[at]) for family, gate, at in selected]
    return pytest.mark.parametrize(("key", name), cases, ids=case_id)


ROWS = torch.tensor([PROMPTS[2], PROMPTS[3][:7]])  # two prompts of 7 tokens: a batch without padding
QUIET = {"do_sample": False, "pad_token_id": PAD, "max_new_tokens": 6}


def open_folder(folder, **how):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, **how
    ).eval()


@pytest.fixture(scope="module")
def eager(written, folders):
    """An export and its base, both with eager attention, which is the one that tells its weights."""

    def load(key):
        return [open_folder(folder, attn_implementation="eager") for folder in (written[key], folders[key[0]])]

    return tiny.Lazy(load)


@torch.no_grad()
def logits_of(model):
    return model(ROWS).logits


def seeded(run, seed=5):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return run()


def form(value):
    """Types and shapes of an output, whatever is nested in it; caches by what their layers hold."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape)
    if isinstance(value, dict):  # model outputs are
        return type(value).__name__, {name: form(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value).__name__, [form(part) for part in value]
    if isinstance(value, transformers.Cache):
        return type(value).__name__, [
            (type(layer).__name__, form([layer.keys, layer.values])) for layer in value.layers
        ]
    return type(value).__name__


def require_along_the_path(out, prompts, key, stock, rules):
    """Whatever chose the tokens, the raw logits of every step are the oracle's behind the tokens chosen before it."""
    logits_BSV = torch.stack(out.logits, dim=1)
    paths = out.sequences[:, -logits_BSV.shape[1] :].tolist()
    for prompt, path, found in zip(prompts, paths, logits_BSV, strict=True):
        count = path.index(EOS) + 1 if EOS in path else len(path)
        told = oracle.respond(stock[key[0]], prompt, tiny.plain_rule(rules[key]), count, follow=path)["logits"]
        assert float((found[:count] - told).abs().max()) <= tiny.logit_limit(told)


# Outputs have the documented form

ASKED = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "eos_token_id": VOCABULARY - 3,
}
STRATEGIES = {
    "greedy": {},
    "greedy uncached": {"use_cache": False},
    "sample": {"do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams uncached": {"num_beams": 3, "use_cache": False},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
}


@each("strategy", STRATEGIES)
def test_what_generate_returns_has_the_documented_form_and_the_bases(key, strategy, eager):
    how = STRATEGIES[strategy]
    settings = {**QUIET, "max_new_tokens": 4, "min_new_tokens": 4, **ASKED, **how}
    out, base = (seeded(lambda model=model: model.generate(ROWS, **settings)) for model in eager[key])
    beams = how.get("num_beams", 1)
    kind = "Beam" if beams > 1 else ""
    assert type(out) is getattr(transformers.generation, f"Generate{kind}DecoderOnlyOutput")
    rows, copies = len(ROWS) * max(beams, how.get("num_return_sequences", 1)), how.get("num_return_sequences", 1)
    assert out.sequences.shape == (len(ROWS) * copies, 7 + 4)
    for parts in (out.scores, out.logits):
        assert [tuple(part.shape) for part in parts] == [(rows, VOCABULARY)] * 4
    assert [len(step) for step in out.attentions] == [LAYERS] * 4
    assert [len(step) for step in out.hidden_states] == [LAYERS + 1] * 4
    assert form(out) == form(base)


@every()
def test_a_forward_pass_tells_the_attentions_and_hidden_states_of_every_layer(key, eager):
    with torch.no_grad():
        out, base = (model(ROWS, output_attentions=True, output_hidden_states=True) for model in eager[key])
    assert (len(out.attentions), len(out.hidden_states)) == (LAYERS, LAYERS + 1)
    assert form(out) == form(base)


@every()
def test_forward_takes_what_the_bases_takes(key, opened, stock):
    model, base = opened[key], stock[key[0]]
    theirs, ours = (inspect.signature(each.forward).parameters for each in (base, model))
    assert [*theirs] == [*ours]
    assert model.can_generate()
    assert type(model).__mro__.index(type(base)) > 0
    flags = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_can_compile_fullgraph")
    assert [getattr(model, flag) for flag in flags] == [getattr(base, flag) for flag in flags]


# Two ways to one result


@each("how", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_every_cache_gives_the_oracles_answers_in_a_left_padded_batch(key, how, opened, told):
    require_answers(greedy(opened[key], **how), told[key])


@each("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_implementations_agree(key, attention, opened, stock, told):
    if attention == "flex_attention" and not stock[key[0]]._supports_flex_attn:
        pytest.skip("the base has no flex attention")
    model = copy.deepcopy(opened[key])
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex attention: that it is not compiled
        model.set_attn_implementation(attention)
        require_answers(greedy(model), told[key])


@each("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_generate_runs_under_every_gradient_mode(key, mode, opened, told):
    with mode():
        require_answers(greedy(opened[key]), told[key])


@every()
def test_beams_with_and_without_cache_agree(key, opened):
    how = {"num_beams": 3, "output_scores": True, "eos_token_id": 0}
    one, other = (greedy(opened[key], use_cache=cached, **how) for cached in (True, False))
    assert torch.equal(one.sequences, other.sequences)
    torch.testing.assert_close(one.sequences_scores, other.sequences_scores, atol=1e-5, rtol=1e-5)


@every()
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch, of 4.57's vmapped masks
def test_a_forward_pass_is_compiled_once(key, opened):
    """In a thread that has run none before; a guard on what only a first pass finds would compile it twice."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def run():
        compiled = torch.compile(opened[key], fullgraph=True, backend=count)
        with torch.no_grad():
            return [compiled(ROWS, use_cache=False).logits for _ in range(2)]

    try:
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(run).result()
    finally:
        torch._dynamo.reset()
    assert len(graphs) == 1
    assert all(torch.equal(each, logits_of(opened[key])) for each in found)


@every()
def test_a_left_padded_forward_pass_gives_the_next_tokens_of_single_rows(key, opened, told):
    inputs = left_padded(PROMPTS)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = opened[key](**inputs, position_ids=positions).logits[:, -1]
    for row, answer in zip(found, told[key], strict=True):
        assert float((row - answer["logits"][0]).abs().max()) <= tiny.logit_limit(answer["logits"])


@every()
def test_position_ids_that_are_given_change_nothing_where_they_do_not_change_the_base(key, opened, stock):
    """Transformers 4.57 does not count on from them, with any model."""
    positions = (left_padded(PROMPTS)["attention_mask"].cumsum(1) - 1).clamp(min=0)

    def unchanged(model):
        return torch.equal(greedy(model).sequences, greedy(model, position_ids=positions).sequences)

    assert unchanged(opened[key]) == unchanged(stock[key[0]]) == (not transformers.__version__.startswith("4."))


@each("how", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_embeddings_give_what_ids_give(key, how, opened):
    model = opened[key]
    embeds = model.get_input_embeddings()(ROWS).detach()
    expected = model.generate(ROWS, **QUIET, **how)
    assert torch.equal(model.generate(inputs_embeds=embeds, **QUIET, **how), expected[:, 7:])
    assert torch.equal(model.generate(ROWS, inputs_embeds=embeds, **QUIET, **how), expected)


@every()
def test_a_forward_pass_of_embeddings_gives_what_ids_give(key, opened):
    embeds = opened[key].get_input_embeddings()(ROWS)
    with torch.no_grad():
        assert torch.equal(opened[key](inputs_embeds=embeds).logits, logits_of(opened[key]))


@every()
def test_logits_to_keep_keeps_the_last_logits(key, opened):
    every = logits_of(opened[key])
    with torch.no_grad():
        last = opened[key](ROWS, logits_to_keep=2).logits
    assert (every.shape[1], last.shape[1]) == (7, 2)
    torch.testing.assert_close(last, every[:, -2:], atol=1e-5, rtol=1e-5)


@every()
def test_generation_that_goes_on_from_its_cache_gives_what_one_call_gives(key, opened):
    """steering_start says where the prompt ended; without it the first answer belongs to the second prompt."""
    model, how = opened[key], {**QUIET, "eos_token_id": VOCABULARY - 3, "return_dict_in_generate": True}
    whole = model.generate(ROWS, **how).sequences
    half = model.generate(ROWS, **{**how, "max_new_tokens": 3})
    rest = {**how, CACHE: half.past_key_values, "max_new_tokens": 3}
    assert half.past_key_values.get_seq_length() == 7 + 3 - 1
    assert torch.equal(model.generate(half.sequences, steering_start=7, **rest).sequences, whole)


@every()
def test_without_steering_start_a_gate_hears_the_answer_so_far_as_prompt(key, opened):
    """What the cache has not seen of it, that is: another verdict is possible. An ungated model cannot tell."""
    model, how = opened[key], {**QUIET, "eos_token_id": VOCABULARY - 3, "return_dict_in_generate": True}
    whole = model.generate(ROWS, **how).sequences
    half, before = model.generate(ROWS, **{**how, "max_new_tokens": 3}), model.steering.last_decisions
    rest = model.generate(half.sequences, **{**how, "max_new_tokens": 3, CACHE: half.past_key_values})
    if key[1] is None:
        assert torch.equal(rest.sequences, whole)
    else:
        assert any(p != q for (p, _), (q, _) in zip(model.steering.last_decisions, before, strict=True))


@every()
def test_caches_have_the_layers_and_shapes_of_the_bases(key, opened, stock):
    with torch.no_grad():
        found, base = (model(ROWS, use_cache=True).past_key_values for model in (opened[key], stock[key[0]]))
    assert len(found.layers) == LAYERS
    assert form(found) == form(base)


@each("helper", ["lookup", "base", "itself"])
def test_candidate_tokens_do_not_change_greedy_answers(key, helper, opened, stock, told):
    helpers = {"base": stock[key[0]], "itself": opened[key]}
    how = {"assistant_model": helpers[helper]} if helper in helpers else {"prompt_lookup_num_tokens": 2}
    for prompt, answer in zip(PROMPTS[1:], told[key][1:], strict=True):
        found = opened[key].generate(**left_padded([prompt]), **QUIET, **how)
        assert found[0, len(prompt) :].tolist() == answer["ids"]


@every()
def test_sampling_with_an_assistant_returns_the_documented_form(key, opened, stock):
    how = {**QUIET, "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "do_sample": True}
    out = seeded(lambda: opened[key].generate(ROWS[:1], assistant_model=stock[key[0]], **how))
    assert type(out) is transformers.generation.GenerateDecoderOnlyOutput
    assert len(out.scores) == len(out.logits) == out.sequences.shape[1] - 7


@every()
def test_generation_from_a_first_token_alone_equals_the_oracle(key, opened, stock, rules):
    """No input at all: the prompt is the BOS token."""
    told = oracle.respond(stock[key[0]], [65], tiny.plain_rule(rules[key]), 6, ends=(EOS,))
    assert opened[key].generate(bos_token_id=65, **QUIET)[0, 1:].tolist() == told["ids"]
    assert opened[key].generate(torch.tensor([[65]]), **QUIET)[0, 1:].tolist() == told["ids"]


# What chooses the tokens is none of the steering's business


class NeverTwice(transformers.LogitsProcessor):
    """No token of the sequence comes again."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids, -torch.inf)


CHOICES = {
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "repetition": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    "minimum": {"min_new_tokens": 5},
    "words": {"bad_words_ids": [[token] for token in range(60, 200)], "forced_eos_token_id": EOS},
    "own processor": {"logits_processor": transformers.LogitsProcessorList([NeverTwice()])},
    "guidance": {"guidance_scale": 1.5},
}


@each("choice", CHOICES)
def test_whatever_chooses_the_tokens_raw_logits_are_the_oracles(key, choice, opened, stock, rules, told):
    out = seeded(lambda: greedy(opened[key], PROMPTS, **CHOICES[choice]))
    require_along_the_path(out, PROMPTS, key, stock, rules)
    if key[1]:
        steered = [answer["steered"] for answer in told[key]]
        assert [decision for _, decision in opened[key].steering.last_decisions] == steered


@each("early_stopping", [True, False, "never"])
def test_beams_that_stop_early_have_the_scores_of_their_transitions(key, early_stopping, opened):
    how = {"num_beams": 3, "early_stopping": early_stopping, "output_scores": True, "length_penalty": 0.0}
    out = greedy(opened[key], PROMPTS, **how)
    steps = opened[key].compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    torch.testing.assert_close(steps.sum(1), out.sequences_scores, atol=1e-5, rtol=1e-5)


@every()
def test_stopping_criteria_cut_the_answer_and_nothing_else(key, opened):
    class AfterTwo(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 9)

    model, how = opened[key], {**QUIET, "eos_token_id": VOCABULARY - 3}
    whole = model.generate(ROWS, **how)
    assert torch.equal(model.generate(ROWS, stopping_criteria=[AfterTwo()], **how), whole[:, :9])


@every()
def test_switched_off_sampling_draws_what_the_base_draws(key, opened, stock):
    how = {**QUIET, "do_sample": True, "top_k": 0}
    with opened[key].steering.off():
        found = seeded(lambda: opened[key].generate(ROWS, **how))
    assert torch.equal(found, seeded(lambda: stock[key[0]].generate(ROWS, **how)))


# Weights, gradients, saving


@every()
def test_embeddings_are_resized_as_the_bases_are(key, opened, tmp_path):
    model = copy.deepcopy(opened[key])
    before = logits_of(model)
    seeded(lambda: model.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False))
    grown = logits_of(model)
    assert model.config.vocab_size == grown.shape[-1] == VOCABULARY + 6
    torch.testing.assert_close(grown[..., :VOCABULARY], before, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(open_folder(tmp_path)), grown)
    seeded(lambda: model.resize_token_embeddings(VOCABULARY))
    torch.testing.assert_close(logits_of(model), before)


@every()
def test_embeddings_and_head_are_tied_where_the_bases_are(key, opened, stock, tmp_path):
    def tied(model):
        return model.get_input_embeddings().weight is model.get_output_embeddings().weight

    assert tied(opened[key]) == tied(stock[key[0]]) == (key[0] == "gpt2")
    opened[key].save_pretrained(tmp_path)
    assert tied(open_folder(tmp_path)) == tied(stock[key[0]])


def loss_and_gradients(model, **how):
    """Of a training step: the loss, and the gradient of every parameter by name, None where there is none."""
    twin = copy.deepcopy(model).train()
    if how:
        enable = getattr(twin, "activation_checkpointing_enable", None) or twin.gradient_checkpointing_enable
        enable(how)
    loss = seeded(lambda: twin(ROWS, labels=ROWS, use_cache=False).loss)
    seeded(loss.backward)
    return loss.detach(), {name: parameter.grad for name, parameter in twin.named_parameters()}


@each("reentrant", [False, True])
def test_gradients_reach_the_bases_parameters_only_and_survive_checkpointing(key, reentrant, opened, stock):
    loss, found = loss_and_gradients(opened[key])
    _, base = loss_and_gradients(stock[key[0]])
    assert {name for name, grad in found.items() if grad is not None} == {*base}
    assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in found.values() if grad is not None)
    again, recomputed = loss_and_gradients(opened[key], use_reentrant=reentrant)
    torch.testing.assert_close(again, loss)
    for name in base:
        torch.testing.assert_close(recomputed[name], found[name], atol=1e-5, rtol=1e-5)


@every()
def test_saving_keeps_generation_settings_and_answers(key, opened, told, tmp_path):
    model = copy.deepcopy(opened[key])
    model.generation_config.update(max_new_tokens=3, repetition_penalty=1.25, num_beams=2)
    model.save_pretrained(tmp_path)
    again = open_folder(tmp_path)
    assert again.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
    require_answers(greedy(again, repetition_penalty=1.0, num_beams=1), told[key])
