"""KV caches that lose tokens, change their rows or belong to another branch: exports, adapters, hooks."""

import copy
from contextlib import contextmanager

import oracle
import pytest
import tiny
import torch
import transformers
from tiny import CACHE, EOS, PAD, PROMPTS

from adaras_export.core.checkpoint import Checkpoint
from adaras_export.exporters.base import ExportContext
from adaras_export.modeling.steering import steered

# What Transformers 5.23 has renamed and peft 0.21 does not know yet.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LAST, FIRST = "last_prompt_token", "first_generated_token"
RULES = [("causal", LAST), ("later", FIRST), (None, LAST)]
HOW = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD, "return_dict_in_generate": True}


@contextmanager
def as_export(key, request):
    yield request.getfixturevalue("opened")[key]


@contextmanager
def in_memory(key, request):
    model = request.getfixturevalue("stock")[key[0]]
    with steered(model, request.getfixturevalue("rules")[key]):
        yield model


@contextmanager
def as_adapter(key, request):
    peft = pytest.importorskip("peft")
    from adaras_export.exporters.peft.exporter import EXPORTER

    folder, base = (request.getfixturevalue(name) for name in ("tmp_path", "folders"))
    options = {"adaptive": True}
    exporter = EXPORTER.with_context(ExportContext(str(base[key[0]]), options=options))
    exporter.write(request.getfixturevalue("rules")[key], Checkpoint(base[key[0]]), folder)
    stock = transformers.AutoModelForCausalLM.from_pretrained(base[key[0]], dtype=torch.float32)
    yield peft.PeftModel.from_pretrained(stock, folder).eval()


@pytest.fixture(params=[as_export, in_memory, as_adapter], ids=lambda way: way.__name__)
def way(request):
    """A context manager that gives a steered model by the key of its rule."""
    return lambda key: request.param(key, request)


EVERY = pytest.mark.parametrize("key", [("qwen3", *rule) for rule in RULES], ids=lambda key: "-".join(map(str, key)))


def require(out, prompt, key, stock, rules):
    """Assert that the answer to one prompt, with its logits, is the oracle's."""
    told = oracle.respond(stock[key[0]], prompt, tiny.plain_rule(rules[key]), HOW["max_new_tokens"], ends=(EOS,))
    assert out.sequences[0, len(prompt) :].tolist() == told["ids"]
    assert (torch.cat(out.logits) - told["logits"]).abs().max() < tiny.logit_limit(told["logits"])


@EVERY
def test_a_cropped_cache_serves_the_same_prompt_and_another_one_that_begins_alike(key, way, stock, rules):
    """The gate's sums stayed as they were: one prompt was judged 0.42, then 0.46, then 0.44."""
    answers = {}
    for prompt in (PROMPTS[3], PROMPTS[3], [*PROMPTS[3][:5], 70, 33, 12]):
        kept = answers.get("cache")
        if kept is not None:  # as far as the prompts are the same, but for the last token
            kept.crop(-(kept.get_seq_length() - 5))
        with way(key) as model:
            how = {} if kept is None or key[1] == "later" else {CACHE: kept}
            out = model.generate(torch.tensor([prompt]), **HOW, **how, output_logits=True)
        require(out, prompt, key, stock, rules)
        answers["cache"] = out.past_key_values


def test_rows_of_a_cache_that_are_picked_take_their_decisions_along(way, stock, rules, told):
    key = ("qwen3", "causal", LAST)
    on, off = (next(row for row, one in enumerate(told[key]) if one["steered"] == steered) for steered in (True, False))
    rows = tiny.left_padded([PROMPTS[on], PROMPTS[off]])
    places = (rows["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with way(key) as model, torch.no_grad():
        out = model(**rows, position_ids=places, use_cache=True)
        cache = out.past_key_values
        cache.batch_select_indices(torch.tensor([1, 0]))
        mask = torch.cat([rows["attention_mask"].flip(0), torch.ones(2, 1, dtype=torch.int64)], 1)
        new, place = out.logits[:, -1:].argmax(-1).flip(0), mask.sum(1, keepdim=True) - 1
        found = model(new, attention_mask=mask, position_ids=place, **{CACHE: cache}).logits[:, -1]
    for logits, row in zip(found, (off, on), strict=True):
        expected = told[key][row]["logits"]
        assert (logits - expected[1]).abs().max() < tiny.logit_limit(expected)


@EVERY
def test_guidance_treats_the_unconditional_branch_as_a_prompt_of_its_own(key, way, stock, rules):
    """Its prompt is the last token of the real one. The hooks took it for generated tokens of the real one."""
    for prompt in PROMPTS[2:]:
        with way(key) as model:
            out = model.generate(torch.tensor([prompt]), **HOW, guidance_scale=1.5)
        assert out.sequences[0, len(prompt) :].tolist() == guided(stock[key[0]], prompt, tiny.plain_rule(rules[key]))


def guided(model, prompt, rule, scale=1.5):
    chosen = []
    for step in range(1, HOW["max_new_tokens"] + 1):
        real, empty = (
            oracle.respond(model, row, rule, step, follow=[*chosen, 0])["logits"][-1].log_softmax(-1)
            for row in (prompt, prompt[-1:])
        )
        chosen.append(int((scale * (real - empty) + empty).argmax()))
        if chosen[-1] == EOS:
            break
    return chosen


def test_guidance_without_a_cache_is_refused(way):
    """Each call would be a longer prompt, and which of its tokens were generated cannot be seen."""
    with way(("qwen3", "causal", LAST)) as model, pytest.raises(ValueError, match="guidance_scale"):
        model.generate(torch.tensor([PROMPTS[0]]), **HOW, guidance_scale=1.5, use_cache=False)


@pytest.mark.parametrize("layers", [2, 3])
def test_drafts_of_fewer_layers_are_exact(layers, way, stock, rules):
    key = ("qwen3", "causal", LAST)
    with way(key) as model:
        out = model.generate(torch.tensor([PROMPTS[3]]), **HOW, output_logits=True, assistant_early_exit=layers)
    require(out, PROMPTS[3], key, stock, rules)


def test_drafts_that_end_below_the_gate_are_refused_and_leave_the_model_whole(way, stock, rules):
    """The gate reads layers 0 and 1. That was an error about sizes, and left the model with one layer."""
    key = ("qwen3", "causal", LAST)
    with way(key) as model:
        with pytest.raises(ValueError, match="the gate reads layers that this call leaves out"):
            model.generate(torch.tensor([PROMPTS[3]]), **HOW, assistant_early_exit=1)
        out = model.generate(torch.tensor([PROMPTS[3]]), **HOW, output_logits=True)
    require(out, PROMPTS[3], key, stock, rules)


def test_a_generate_whose_cache_is_not_seen_is_an_error_and_not_an_unsteered_answer(way, monkeypatch):
    """Transformers 5.24 gave the cache another name: each generated token was taken for a new prompt."""
    prepare = transformers.GenerationMixin.prepare_inputs_for_generation

    def hiding(self, input_ids, attention_mask=None, inputs_embeds=None, **kwargs):
        prepared = prepare(self, input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        return {name: value for name, value in prepared.items() if name != CACHE}

    monkeypatch.setattr(transformers.GenerationMixin, "prepare_inputs_for_generation", hiding)
    with way(("qwen3", None, LAST)) as model, pytest.raises(ValueError, match="no KV cache that steering knows"):
        model.generate(torch.tensor([PROMPTS[3]]), **HOW)


def test_copies_of_a_cache_are_followed_apart_from_it(way, stock, rules):
    key = ("qwen3", "causal", LAST)
    with way(key) as model:
        first = model.generate(torch.tensor([PROMPTS[3]]), **HOW)
        kept = copy.deepcopy(first.past_key_values)
        kept.crop(-(kept.get_seq_length() - 4))
        before = first.past_key_values.steering_state.probability
        out = model.generate(torch.tensor([PROMPTS[3]]), **HOW, output_logits=True, **{CACHE: kept})
        assert first.past_key_values.steering_state.probability is before
    require(out, PROMPTS[3], key, stock, rules)
