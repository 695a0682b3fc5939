"""The gradient of the margin, against finite differences in float64 and without the prefix cache."""

import copy

import numpy as np
import oracle
import pytest
import tiny
import torch
from pairwise import in_turn

from adaras_export.core.traces import Trace
from adaras_export.discovery.attribution import WeightedCompletion, margin_gradients
from adaras_export.discovery.identify import read_attribution
from adaras_export.modeling.activations import Reading
from adaras_export.modeling.generation import prefill

PROMPTS = [[72, 105, 33], [49], [87, 104, 97, 116, 32, 105, 115]]
COMPLETIONS = [
    WeightedCompletion(0, [65, 66], 0.5),
    WeightedCompletion(0, [70], -1.0),
    WeightedCompletion(0, [1, 2, 3, 4, 5], 0.5),
    WeightedCompletion(1, [8, 9, 10], 1.0),
    WeightedCompletion(1, [3], -1.0),
    WeightedCompletion(2, [200], 1.0),
    WeightedCompletion(2, [100, 120, 7], -1.0),
]
STARTS = ["last_prompt_token", "first_generated_token"]


class DoubleNorm(torch.nn.Module):
    """RMS norm that stays in float64; Transformers' own computes in float32, which difference quotients cannot bear."""

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


@pytest.fixture(scope="module")
def double(stock):
    """float64 models by name."""
    found = {name: copy.deepcopy(stock[name]).double() for name in ("llama-biased", "mistral-window", "qwen3")}
    for model in found.values():
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.__class__ = DoubleNorm
    return found


@torch.no_grad()
def log_p(model, prompt, completion, start, layer, index, offset):  # noqa: PLR0913
    """log p of a completion with ``offset`` added to one neuron at the steered tokens; no cache, no batch."""
    first = len(prompt) - (start == "last_prompt_token")

    def add(module, args):
        h = args[0].clone()
        h[:, first:, index] += offset
        return (h,)

    handle = oracle.down_projections(model)[layer].register_forward_pre_hook(add)
    try:
        log_probabilities = model(torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0].log_softmax(-1)
    finally:
        handle.remove()
    return sum(log_probabilities[len(prompt) - 1 + at, token].item() for at, token in enumerate(completion))


def uncached_gradient(model, prompt, completion, start):
    """(L, M) by one backward pass over the whole unpadded row."""
    first = len(prompt) - (start == "last_prompt_token")
    downs = oracle.down_projections(model)
    offsets = [torch.zeros(width_of(down), dtype=model.dtype, requires_grad=True) for down in downs]
    handles = []
    for down, offset in zip(downs, offsets, strict=True):

        def add(module, args, offset=offset):
            steered = (torch.arange(args[0].shape[1]) >= first).to(args[0])
            return (args[0] + steered[None, :, None] * offset,)

        handles.append(down.register_forward_pre_hook(add))
    with torch.enable_grad():
        log_probabilities = model(torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0].log_softmax(-1)
        total = sum(log_probabilities[len(prompt) - 1 + at, token] for at, token in enumerate(completion))
        found = torch.autograd.grad(total, offsets)
    for handle in handles:
        handle.remove()
    widest = max(map(width_of, downs))
    return torch.stack([torch.nn.functional.pad(one, (0, widest - len(one))) for one in found])


def width_of(down):
    return down.nx if hasattr(down, "nx") else down.in_features


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", ["llama-biased", "mistral-window", "qwen3"])
def test_gradients_equal_central_differences(name, start, double):
    model, step = double[name], 1e-5
    found = margin_gradients(model, prefill(model, PROMPTS, tiny.PAD), COMPLETIONS, start)
    draw = np.random.default_rng(0)
    for row, completion in enumerate(COMPLETIONS):
        prompt = PROMPTS[completion.prompt_row]
        for layer in range(tiny.LAYERS):
            index = int(draw.integers(tiny.MLP_SIZE))
            up, down = (log_p(model, prompt, completion.ids, start, layer, index, sign * step) for sign in (1, -1))
            expected = completion.weight * (up - down) / (2 * step)
            # The result is cast to float32. Measured: at most 6.1e-8.
            assert found[row, layer, index].item() == pytest.approx(expected, abs=3e-7)


CASES = [(name, start) for start in STARTS for name in tiny.NAMES] + in_turn((), tiny.MORE, STARTS)
# Of the largest entry: float32 gradients, summed over other paths: measured at most 6.7e-6.
CLOSE = dict.fromkeys((*tiny.NAMES, *tiny.MORE), 5e-05) | {"qwen3_5_text": 1e-3}


@pytest.mark.parametrize("case", tiny.mostly_slow(CASES, quick=tiny.NAMES), ids=tiny.key_id)
def test_the_cached_prefix_changes_nothing(case, stock):
    (name, start), model = case, stock[case[0]]
    found = margin_gradients(model, prefill(model, PROMPTS, tiny.PAD), COMPLETIONS, start)
    for row, completion in enumerate(COMPLETIONS):
        grads = [parameter.requires_grad for parameter in model.parameters()]
        expected = completion.weight * uncached_gradient(model, PROMPTS[completion.prompt_row], completion.ids, start)
        assert grads == [parameter.requires_grad for parameter in model.parameters()]
        assert float((found[row] - expected).abs().max()) <= CLOSE[name] * float(expected.abs().max())


def test_the_starts_differ_by_the_last_prompt_token(stock):
    model = stock["qwen3"]
    one, other = (margin_gradients(model, prefill(model, PROMPTS, tiny.PAD), COMPLETIONS, start) for start in STARTS)
    single = [row for row, completion in enumerate(COMPLETIONS) if len(completion.ids) == 1]
    assert not other[single].any()  # only the last prompt token can change one generated token
    assert one[single].any()


def test_the_prefilled_prompts_serve_again(stock):
    model = stock["qwen3"]
    prompts = prefill(model, PROMPTS, tiny.PAD)
    first, second = (margin_gradients(model, prompts, COMPLETIONS, "last_prompt_token") for _ in range(2))
    assert torch.equal(first, second)


def test_an_error_leaves_gradients_and_hooks_as_they_were(stock):
    """The guard of this suite compares the model afterwards."""
    model = stock["qwen3"]
    prompts = prefill(model, PROMPTS, tiny.PAD)
    with pytest.raises(IndexError):
        margin_gradients(model, prompts, [WeightedCompletion(0, [999_999], 1.0)], "last_prompt_token")


TRACES = [
    Trace("a1", "a", "1+1=", "2", True),
    Trace("a2", "a", "1+1=", "33", False),
    Trace("a3", "a", "1+1=", "4", False),
    Trace("b1", "b", "what is 12+30?", "42", True),
    Trace("b2", "b", "what is 12+30?", "4", False),
    Trace("c1", "c", "never right", "no", False),
]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("token_budget", [8, 4096])
def test_a_margin_is_the_mean_over_correct_minus_the_mean_over_incorrect(token_budget, start, stock, tokenizer, bases):
    model = stock["llama"]
    reading = Reading(token_budget)
    found = read_attribution(model, tokenizer, TRACES, bases["llama"], start=start, reading=reading)
    margins = []
    for question, weights in (("a", (1.0, -0.5, -0.5)), ("b", (1.0, -1.0))):
        rows = [trace for trace in TRACES if trace.question_id == question]
        ids = [(tokenizer(t.prompt)["input_ids"], tokenizer(t.completion)["input_ids"]) for t in rows]
        margins.append(sum(w * uncached_gradient(model, *row, start) for w, row in zip(weights, ids, strict=True)))
    expected = torch.stack(margins).double()
    limit = 1e-4 * float(expected.abs().max())
    np.testing.assert_allclose(found.mean(), expected.mean(0), atol=limit)
    np.testing.assert_allclose(found.standard_error(), expected.std(0) / 2**0.5, atol=limit)
    assert len(found.questions) == 2


@pytest.mark.parametrize(
    "name", ["qwen3", "gemma2", "granite", "gpt2", "mistral-window", "qwen3_5_text", "falcon_h1", "lfm2", "gemma4_text"]
)
def test_long_completions_have_the_gradients_of_short_ones(name, stock, monkeypatch):
    """Layers run again, logits two tokens at a time: scaled and capped logits, windows and biases included."""
    model, pad = stock[name], 0
    prompts = prefill(model, PROMPTS, pad)
    expected = margin_gradients(model, prompts, COMPLETIONS, "last_prompt_token")
    found = margin_gradients(model, prompts, COMPLETIONS, "last_prompt_token", longest=2)
    assert float(expected.abs().max()) > 1e-4
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    assert "forward" not in vars(model.base_model)  # nothing is left behind
    again = margin_gradients(model, prompts, COMPLETIONS, "last_prompt_token")
    assert torch.equal(again, expected)


def test_the_gradient_at_another_point_is_that_of_the_steered_model(double):
    """Against central differences around it."""
    model, at = double["qwen3"], np.random.default_rng(0).normal(size=(tiny.LAYERS, tiny.MLP_SIZE)) * 0.1
    prompts = prefill(model, PROMPTS, 0)
    found = margin_gradients(model, prompts, COMPLETIONS[:1], "last_prompt_token", at=at)[0]
    plain = margin_gradients(model, prompts, COMPLETIONS[:1], "last_prompt_token")[0]
    assert float((found - plain).abs().max()) > 1e-3 * float(plain.abs().max())
    layer, index = np.unravel_index(int(found.abs().argmax()), found.shape)
    ends = [total_log_p(model, at, (layer, index), step) for step in (1e-5, -1e-5)]
    assert 0.5 * (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(found[layer, index]), rel=1e-4)


@torch.no_grad()
def total_log_p(model, at, place, step):
    """log p of the first completion with ``at`` added everywhere from the last prompt token on, and a step to one."""
    moved = at.copy()
    moved[place] += step
    first, handles = len(PROMPTS[0]) - 1, []
    for layer, down in enumerate(oracle.down_projections(model)):

        def add(_module, args, layer=layer):
            h = args[0].clone()
            h[:, first:] += torch.tensor(moved[layer])
            return (h,)

        handles.append(down.register_forward_pre_hook(add))
    ids = torch.tensor([[*PROMPTS[0], *COMPLETIONS[0].ids]])
    logits = model(ids, use_cache=False).logits[0].log_softmax(-1)
    for handle in handles:
        handle.remove()
    return sum(float(logits[first + n, id_]) for n, id_ in enumerate(COMPLETIONS[0].ids))


def test_bfloat16_weights_sum_up_in_float32(stock):
    """Symptom that this would show: sums over thousands of tokens that stop growing."""
    model = copy.deepcopy(stock["qwen3"]).bfloat16()
    long = [WeightedCompletion(0, [65, 66, 70, 1, 2, 3, 4, 5] * 6, 1.0)]
    prompts = prefill(model, PROMPTS[:1], 0)
    seen = []
    handle = model.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    found = margin_gradients(model, prompts, long, "last_prompt_token")
    handle.remove()
    assert (seen, found.dtype) == ([torch.bfloat16], torch.float32)
    assert not torch.equal(found, found.bfloat16().float())  # more digits than a sum in bfloat16 has
