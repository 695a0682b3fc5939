"""Loading, encoding and completing with a tiny model."""

import copy
import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adaras_export.core.families import decoder
from adaras_export.core.traces import Trace
from adaras_export.errors import ArtifactError, TraceError, UnsupportedModelError
from adaras_export.modeling.generation import (
    Sampling,
    _GumbelNoise,
    batches,
    complete,
    complete_ids,
    continue_ids,
    decode,
    encode_prompt,
    encode_trace,
    left_pad,
    pad_id,
    prefill,
)
from adaras_export.modeling.loading import load_model

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'clown' %}{{ raise_exception('no clowns') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTS = ["1+1=", "what is 12+30, and why?", "z"]


def tiny_tokenizer():
    """Every byte is a token, so that any text survives the round trip; then <pad> and <eos>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random weights, with embeddings wide enough that the next token is not the same always."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def rows(tokenizer):
    return [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]


def greedy_by_hand(model, row, count, ends=()):
    """The definition of greedy decoding: a whole forward pass for every token, no cache, no batch."""
    ids = list(row)
    for _ in range(count):
        with torch.no_grad():
            best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if best in ends:
            break
        ids.append(best)
    return ids[len(row) :]


def test_a_loaded_model_gives_the_logits_of_the_saved_one(model, folder, rows):
    loaded, tokenizer = load_model(folder, device="cpu")
    assert not loaded.training
    assert tokenizer.padding_side == "left"
    ids = torch.tensor([rows[1]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_model_is_loaded_in_the_asked_type(folder):
    loaded, _ = load_model(folder, dtype="bfloat16", device="cpu")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def edited(folder, target, name, **changes):
    """A copy of the model with some keys of one JSON file changed; None removes a key."""
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    content = json.loads((target / name).read_text()) | changes
    content = {key: value for key, value in content.items() if value is not None}
    (target / name).write_text(json.dumps(content))
    return target


def test_padding_falls_back_to_eos_only_where_there_is_no_pad_token(folder, tmp_path):
    bare = edited(folder, tmp_path, "tokenizer_config.json", pad_token=None)
    (bare / "special_tokens_map.json").unlink(missing_ok=True)
    assert load_model(folder, device="cpu")[1].pad_token == "<pad>"
    assert load_model(bare, device="cpu")[1].pad_token == "<eos>"


@pytest.mark.parametrize(("layers", "wrong"), [(3, "missing"), (1, "unexpected")])
def test_a_checkpoint_that_does_not_fit_its_config_is_refused(folder, tmp_path, layers, wrong):
    """Transformers only logs it: a missing tensor stays random, an unexpected one is dropped."""
    with pytest.raises(ArtifactError, match=f"9 tensors do not fit its config.json .{wrong} model"):
        load_model(edited(folder, tmp_path, "config.json", num_hidden_layers=layers))


def test_a_checkpoint_of_other_shapes_is_refused(folder, tmp_path):
    with pytest.raises(ArtifactError, match=r"has shape .32, 48.; expected .32, 64., as config.json says"):
        load_model(edited(folder, tmp_path, "config.json", intermediate_size=64))


def test_a_folder_without_a_tokenizer_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match=r"cannot be loaded \(.*\); expected a complete model folder"):
        load_model(tmp_path)


def test_truncated_weights_are_refused(folder, tmp_path):
    weights = edited(folder, tmp_path, "config.json") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="expected a safetensors file"):
        load_model(tmp_path)


def test_an_unknown_architecture_is_refused_before_its_code_could_run(folder, tmp_path):
    changes = {"model_type": "mystery", "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    with pytest.raises(UnsupportedModelError, match="model_type mystery is not supported"):
        load_model(edited(folder, tmp_path, "config.json", **changes))


def test_a_chat_prompt_goes_through_the_template_with_its_generation_prompt(tokenizer):
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "hi"}])
    assert tokenizer.decode(ids) == "<user>hi<eos><assistant>"
    assert tokenizer.eos_token_id in ids


def test_a_chat_prompt_without_a_template_is_refused_with_the_remedy(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(TraceError, match=r"has no chat template.*give the prompt as text"):
        encode_prompt(bare, [{"role": "user", "content": "hi"}])


def test_what_the_template_refuses_is_told(tokenizer):
    with pytest.raises(TraceError, match=r"refuses the messages \(no clowns\); found roles clown"):
        encode_prompt(tokenizer, [{"role": "clown", "content": "hi"}])


def test_a_trace_is_encoded_as_prompt_and_completion_without_eos(tokenizer):
    prompt, completion = encode_trace(tokenizer, Trace("t", "q", "1+1=", " 2\n", True))
    assert tokenizer.decode(prompt + completion) == "1+1= 2\n"
    assert len(completion) == 3


def test_text_that_gives_no_token_is_refused():
    blind = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(TraceError, match=r"prompt 'z': gives no token"):
        encode_prompt(blind, "z")
    with pytest.raises(TraceError, match=r"trace t: completion gives no token; drop it"):
        encode_trace(blind, Trace("t", "q", "a", "z", True))


@pytest.mark.parametrize("text", ["a , b .", " lead", "  two\n\n", "it 's", "café ☕"])
def test_decoding_gives_the_text_back_exactly(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert decode(tokenizer, [*ids, tokenizer.eos_token_id]) == text


def test_rows_are_padded_on_the_left_and_masked(tokenizer):
    ids, mask = left_pad([[5], [6, 7, 8]], 9, "cpu")
    assert ids.tolist() == [[9, 9, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_a_tokenizer_without_pad_and_eos_is_refused(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = bare.eos_token = None
    with pytest.raises(TraceError, match="has no pad and no EOS token; set pad_token"):
        pad_id(bare)


def test_batches_hold_similar_lengths_within_the_budget():
    lengths = [3, 50, 4, 3, 20, 4, 100, 1]
    groups = batches(lengths, token_budget=30, max_rows=3)
    assert groups == [[6], [1], [4], [2, 5, 0], [3, 7]]
    assert batches([], token_budget=40, max_rows=3) == []


def test_every_row_is_in_one_batch_and_no_batch_of_several_exceeds_the_budget():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 300, (500,), generator=generator).tolist()
    groups = batches(lengths, token_budget=1000, max_rows=8)
    assert sorted(index for group in groups for index in group) == list(range(500))
    assert all(len(group) * max(lengths[index] for index in group) <= 1000 and len(group) <= 8 for group in groups)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0 .expected 1 or more"),
        ({"temperature": -1.0}, "temperature -1.0 .expected 0 or more"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_p": 0.0}, "top_p 0.0 .expected above 0, at most 1"),
        ({"top_p": 2, "temperature": -1}, "temperature -1 .*; top_p 2"),
    ],
)
def test_sampling_out_of_range_is_refused(changes, message):
    with pytest.raises(TraceError, match=message):
        Sampling(**{"max_new_tokens": 5, **changes})


def test_a_greedy_batch_equals_single_rows_decoded_by_hand(model, tokenizer, rows):
    ids = complete_ids(model, tokenizer, rows, Sampling(12), PROMPTS)
    assert ids == [greedy_by_hand(model, row, 12, [tokenizer.eos_token_id]) for row in rows]
    assert len({tuple(row) for row in ids}) == len(rows)


def test_the_generation_defaults_of_the_model_do_not_leak_in(model, tokenizer, rows):
    """A model's own sampling, penalties and forbidden words would change what is measured."""
    plain = complete_ids(model, tokenizer, rows, Sampling(12), PROMPTS)
    other = copy.copy(model)
    other.generation_config = copy.deepcopy(model.generation_config)
    other.generation_config.update(
        do_sample=True, temperature=5.0, top_k=3, top_p=0.5, repetition_penalty=3.0,
        suppress_tokens=[row[0] for row in plain if row], min_new_tokens=3, max_new_tokens=2,
    )  # fmt: skip
    assert complete_ids(other, tokenizer, rows, Sampling(12), PROMPTS) == plain
    assert other.generation_config.repetition_penalty == 3.0


@pytest.mark.parametrize("of_tokenizer", [True, False])
def test_a_model_that_names_no_eos_ends_at_the_tokenizers_if_there_is_one(model, tokenizer, rows, of_tokenizer):
    plain = greedy_by_hand(model, rows[0], 12)
    other, ended = copy.copy(model), copy.deepcopy(tokenizer)
    other.generation_config = copy.deepcopy(model.generation_config)
    other.generation_config.eos_token_id = None
    ended.eos_token = tokenizer.convert_ids_to_tokens(plain[5]) if of_tokenizer else None
    found = complete_ids(other, ended, rows[:1], Sampling(12), PROMPTS[:1])
    assert found == [plain[: plain.index(plain[5])] if of_tokenizer else plain]


def test_a_completion_ends_before_the_first_eos(model, tokenizer, rows):
    plain = greedy_by_hand(model, rows[0], 12)
    other = copy.copy(model)
    other.generation_config = copy.deepcopy(model.generation_config)
    other.generation_config.eos_token_id = [tokenizer.eos_token_id, plain[5]]
    found = complete_ids(other, tokenizer, rows[:1], Sampling(12), PROMPTS[:1])
    assert found == [plain[: plain.index(plain[5])]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_kept_token_has_been_an_input_of_the_model(model, tokenizer, rows, temperature):
    """The last one too, or activations recorded while generating would lack it."""
    seen = []
    hook = decoder(model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    sampling = Sampling(7, temperature=temperature)
    ids = complete_ids(model, tokenizer, rows, sampling, PROMPTS)
    hook.remove()
    width = max(len(row) for row in rows)
    fed = torch.cat(seen, dim=1)[:, width:].tolist()
    assert [row[: len(kept)] for row, kept in zip(fed, ids, strict=True)] == ids
    assert max(len(kept) for kept in ids) == 7


def test_a_sample_depends_on_its_key_and_seed_and_not_on_its_batch(model, tokenizer, rows):
    sampling = Sampling(15, temperature=0.9, top_p=0.95, seed=4)
    together = complete_ids(model, tokenizer, rows, sampling, PROMPTS)
    alone = [complete_ids(model, tokenizer, [row], sampling, [key])[0] for row, key in zip(rows, PROMPTS, strict=True)]
    assert together == alone


def test_another_key_or_seed_gives_another_sample(model, tokenizer, rows):
    """256 tokens, 15 steps: equal by chance with odds below 1 in 10^9 unless a key is ignored."""
    keys = ["a", "b", "a"]
    same_row = [rows[1]] * 3
    first = complete(model, tokenizer, same_row, Sampling(15, temperature=2.0), keys)
    other = complete(model, tokenizer, same_row, Sampling(15, temperature=2.0, seed=1), keys)
    assert first[0] == first[2]
    assert len({first[0], first[1], other[0], other[1]}) == 4


def test_noise_and_argmax_sample_the_softmax_exactly():
    """20,000 draws: a frequency is off by more than 0.02 with odds below 1 in 10^7 (5.6 sigma)."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = 20_000
    noise = _GumbelNoise(0, [str(n) for n in range(draws)], torch.device("cpu"))
    chosen = noise(torch.empty(0), probabilities.log().expand(draws, 4)).argmax(-1)
    assert torch.allclose(chosen.bincount(minlength=4) / draws, probabilities, atol=0.02)


def test_a_token_that_top_p_removed_is_never_chosen():
    noise = _GumbelNoise(0, [str(n) for n in range(2000)], torch.device("cpu"))
    scores = torch.tensor([0.0, float("-inf"), 0.0]).expand(2000, 3)
    noisy = noise(torch.empty(0), scores)
    assert not noisy.isnan().any()
    assert set(noisy.argmax(-1).tolist()) == {0, 2}


def test_completions_that_exceed_the_context_are_refused(model, tokenizer, rows):
    message = "prompt of 23 tokens: 18 new ones exceed the context of 40.*at most 17"
    with pytest.raises(TraceError, match=message):
        complete(model, tokenizer, rows, Sampling(18), PROMPTS)
    assert complete(model, tokenizer, rows, Sampling(17), PROMPTS)


def from_prefilled(model, tokenizer, prefilled, sampling):
    """Texts that go on from a copy of the cache."""
    rows = range(len(prefilled.ids))
    found = continue_ids(model, tokenizer, prefilled.repeated(rows), sampling, [""] * len(rows))
    return [decode(tokenizer, ids) for ids in found]


def test_completing_from_a_prefilled_cache_equals_completing_at_once(model, tokenizer, rows):
    prefilled = prefill(model, rows, pad_id(tokenizer))
    expected = complete(model, tokenizer, rows, Sampling(12), PROMPTS)
    for _ in range(2):
        assert from_prefilled(model, tokenizer, prefilled, Sampling(12)) == expected
        assert prefilled.cache.get_seq_length() == max(len(row) for row in rows) - 1


def test_a_prompt_of_one_token_needs_no_prefill(model, tokenizer, rows):
    prefilled = prefill(model, rows[2:], pad_id(tokenizer))
    expected = complete(model, tokenizer, rows[2:], Sampling(5), PROMPTS[2:])
    assert from_prefilled(model, tokenizer, prefilled, Sampling(5)) == expected


def test_sampling_leaves_the_callers_model_and_the_global_random_state_alone(model, tokenizer, rows):
    before = model.generation_config.to_dict()
    state = torch.random.get_rng_state()
    complete(model, tokenizer, rows, Sampling(3, temperature=1.0), PROMPTS)
    assert model.generation_config.to_dict() == before
    assert torch.equal(torch.random.get_rng_state(), state)
