"""Streamed activations, against loops over single tokens."""

import pytest
import tiny
import torch
from oracle import activations_of
from tiny import PAD, PROMPTS, left_padded

from adaras_export.activations import capture, recording, right_pad, token_means
from adaras_export.generation import Sampling, continue_ids, prefill

# A mean of up to 17 float32 numbers near 1, summed in another order.
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def mean_by_hand(model, row):
    """(L, M): the mean over tokens of what enters each down projection, one row at a time."""
    return torch.tensor(activations_of(model, row)).mean(1)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_token_means_equal_loops_over_single_rows(name, stock):
    found = token_means(stock[name], PROMPTS, range(tiny.LAYERS))
    for row, mean in zip(PROMPTS, found, strict=True):
        torch.testing.assert_close(mean, mean_by_hand(stock[name], row), **CLOSE)


def test_only_the_layers_that_were_asked_for_are_read_in_that_order(stock):
    found = token_means(stock["qwen3"], PROMPTS, [3, 1])
    whole = token_means(stock["qwen3"], PROMPTS, range(tiny.LAYERS))
    assert torch.equal(found, whole[:, [3, 1]])


def test_rows_are_padded_on_the_right():
    ids, mask = right_pad([[5], [6, 7]], torch.device("cpu"))
    assert ids.tolist() == [[5, 0], [6, 7]]
    assert mask.tolist() == [[1, 0], [1, 1]]


def test_capture_leaves_no_hook_after_an_error(stock):
    """The guard of this suite looks at the model afterwards."""

    def fail(layer, h):
        raise RuntimeError(f"layer {layer}")

    with pytest.raises(RuntimeError, match="layer 1"), capture(stock["llama"], [1, 2], fail), torch.no_grad():
        stock["llama"](torch.tensor([[1, 2]]))
    with pytest.raises(IndexError), capture(stock["llama"], [1, 99], fail):
        pass


def generated(model, rows, **how):
    """Ids that generate() gives, and what a recorder made of the activations meanwhile."""
    ends = how.pop("ends")
    with recording(model, ends) as recorder, torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        out = model.generate(**left_padded(rows), eos_token_id=list(ends), pad_token_id=PAD, max_new_tokens=7, **how)
    width = max(map(len, rows))
    return [row[width:] for row in out.tolist()], recorder.means()


def read_afterwards(model, prompt, new, ends):
    """The teacher-forced mean over prompt and completion: what was fed back, up to EOS and without it."""
    fed = new[: next((at for at, id_ in enumerate(new) if id_ in ends or id_ == PAD), len(new) - 1)]
    return mean_by_hand(model, [*prompt, *fed]), len(fed)


@pytest.mark.parametrize("how", [{"do_sample": False}, {"do_sample": True, "top_k": 0}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2", "qwen3"])
def test_recording_while_generating_equals_a_teacher_forced_read(name, how, stock):
    model = stock[name]
    free, _ = generated(model, PROMPTS, ends=(tiny.EOS,), **how)
    ends = (free[0][2], free[1][0], tiny.EOS)  # so that some rows end early, one of them at once
    new, means = generated(model, PROMPTS, ends=ends, **how)
    lengths = []
    for prompt, row, mean in zip(PROMPTS, new, means, strict=True):
        expected, length = read_afterwards(model, prompt, row, ends)
        torch.testing.assert_close(mean, expected, **CLOSE)
        lengths.append(length)
    assert min(lengths) == 0
    assert max(lengths) > min(lengths)


def test_a_row_that_ended_does_not_count_its_padding_even_where_padding_is_the_end(stock):
    """The pad token of many models is their end-of-sequence token."""
    model, end = stock["qwen3"], tiny.greedy(stock["qwen3"], PROMPTS[:1]).sequences[0, -3].item()
    with recording(model, [end]) as recorder, torch.no_grad():
        out = model.generate(**left_padded(PROMPTS), eos_token_id=end, pad_token_id=end, max_new_tokens=7)
    width = max(map(len, PROMPTS))
    for prompt, row, mean in zip(PROMPTS, out.tolist(), recorder.means(), strict=True):
        new = row[width:]
        fed = new[: new.index(end)] if end in new else new[:-1]
        torch.testing.assert_close(mean, mean_by_hand(model, [*prompt, *fed]), **CLOSE)


def test_recording_several_attempts_behind_one_prefill_equals_a_teacher_forced_read(stock, tokenizer):
    model, rows = stock["qwen3"], [0, 0, 2, 3]
    ends = [tiny.EOS, tiny.greedy(model, PROMPTS[:1]).sequences[0, -3].item()]
    with recording(model, ends) as recorder:
        prefilled = prefill(model, PROMPTS, PAD).repeated(rows)
        recorder.repeat(rows)
        sampling = Sampling(5, temperature=1.0)
        found = continue_ids(model, tokenizer, prefilled, sampling, ["a", "b", "c", "d"])
    for row, new, mean in zip(rows, found, recorder.means(), strict=True):
        fed = new[: next((at for at, id_ in enumerate(new) if id_ in ends), len(new))]
        torch.testing.assert_close(mean, mean_by_hand(model, PROMPTS[row] + fed), **CLOSE)
