"""Streamed activations, against loops over single tokens."""

import copy
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import tiny
import torch
from oracle import activations_of
from pairwise import in_turn
from places import ROOT, TESTS
from tiny import PAD, PROMPTS, left_padded

from adaras_export.errors import TraceError
from adaras_export.modeling.activations import Reading, capture, recording, right_pad, row_means, token_means
from adaras_export.modeling.generation import Sampling, continue_ids, prefill

# A mean of up to 17 float32 numbers near 1, summed in another order.
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
# Linear attention that reads padding too, or pieces, sums in another order. Measured: 1.7e-4.
LOOSE = {"qwen3_5_text": {"atol": 5e-4, "rtol": 1e-3}}


def mean_by_hand(model, row):
    """(L, M): the mean over tokens of what enters each down projection, one row at a time."""
    means = [torch.tensor(of_layer).mean(0) for of_layer in activations_of(model, row)]
    width = max(map(len, means))
    return torch.stack([torch.nn.functional.pad(mean, (0, width - len(mean))) for mean in means])


@pytest.mark.parametrize("name", tiny.mostly_slow((*tiny.NAMES, *tiny.MORE), quick=tiny.NAMES))
def test_token_means_equal_loops_over_single_rows(name, stock):
    found = token_means(stock[name], PROMPTS, range(tiny.LAYERS))
    for row, mean in zip(PROMPTS, found, strict=True):
        torch.testing.assert_close(mean, mean_by_hand(stock[name], row), **LOOSE.get(name, CLOSE))


PIECES = [1, 3, 6]  # a sliding window of 4 lies between
READ = [(name, pieces) for pieces in PIECES for name in tiny.NAMES] + in_turn((), tiny.MORE, PIECES)


@pytest.mark.parametrize("case", tiny.mostly_slow(READ, quick=tiny.NAMES), ids=tiny.key_id)
def test_rows_that_are_read_in_pieces_have_the_same_means(case, stock):
    name, chunk_tokens = case
    found = token_means(stock[name], PROMPTS, range(tiny.LAYERS), chunk_tokens=chunk_tokens)
    for row, mean in zip(PROMPTS, found, strict=True):
        torch.testing.assert_close(mean, mean_by_hand(stock[name], row), **LOOSE.get(name, CLOSE))


@pytest.mark.parametrize(("name", "order"), [("llama", [0, 0, 0, 1, 1, 1]), ("gemma2", [0, 1] * 3)])
def test_in_pieces_no_layer_behind_the_last_wanted_one_is_run(name, order, stock):
    """Pieces of MLPs, or with sliding windows of the model."""
    layers, model = [], stock[name]
    with capture(model, range(tiny.LAYERS), lambda layer, _: layers.append(layer)):
        found = token_means(model, PROMPTS, [1], chunk_tokens=5)
    assert layers == order
    assert not any("forward" in vars(layer.mlp) for layer in model.model.layers)
    for row, mean in zip(PROMPTS, found, strict=True):
        torch.testing.assert_close(mean, mean_by_hand(model, row)[[1]], **CLOSE)


def test_a_row_that_is_read_in_pieces_is_read_alone(stock, monkeypatch):
    widths, rows = [], [*PROMPTS, PROMPTS[3]]
    found = row_means(stock["qwen3"], rows, range(tiny.LAYERS), Reading(chunk_tokens=7))
    handle = stock["qwen3"].model.register_forward_pre_hook(
        lambda _module, _args, given: widths.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    again = row_means(stock["qwen3"], rows, range(tiny.LAYERS), Reading(chunk_tokens=7))
    handle.remove()
    assert widths == [(1, 11), (1, 11), (1, 7), (1, 3), (1, 1)]
    for row, mean, same in zip(rows, found, again, strict=True):
        torch.testing.assert_close(torch.tensor(mean), mean_by_hand(stock["qwen3"], row), **CLOSE)
        assert (mean == same).all()


@pytest.mark.slow
def test_pieces_take_a_fraction_of_the_memory_of_a_whole_row():
    """Peak of one process each; three arrays of 2048 * 8192 float32 are 192 MiB. Measured: 195, and 15."""
    whole, pieces = peak_memory(2048, 128)
    assert whole > 150
    assert pieces < whole / 2


def peak_memory(*sizes):
    """MiB that reading one row of 2048 tokens adds in a process of its own, by ``chunk_tokens``."""
    code = (
        "import os, re, sys, tiny, torch\n"
        "from pathlib import Path\n"
        "from adaras_export.modeling.activations import token_means\n"
        "torch.set_num_threads(1)\n"
        "model = tiny.build_model('llama', intermediate_size=8192, num_hidden_layers=2, max_position_embeddings=8192)\n"
        "token_means(model, [[5] * 64], [0, 1])\n"
        # Not getrusage, which begins with the peak of the process that started this one; and from now on.
        "peak = lambda: int(re.search('VmHWM:\\\\s+([0-9]+)', Path('/proc/self/status').read_text())[1]) // 1024\n"
        "for chunk_tokens in map(int, sys.argv[1:]):\n"
        "    if os.fork():\n"
        "        assert os.wait()[1] == 0\n"
        "        continue\n"
        "    Path('/proc/self/clear_refs').write_text('5')\n"
        "    before = peak()\n"
        "    token_means(model, [[5] * 2048], [0, 1], chunk_tokens=chunk_tokens)\n"
        "    print(peak() - before, flush=True)\n"
        "    os._exit(0)\n"
    )
    paths = os.pathsep.join(map(str, (TESTS / "support", ROOT)))
    # glibc gives blocks of 1 MiB and more back at once, or a peak would be what it happened to keep.
    returning = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
    call = [sys.executable, "-c", code, *map(str, sizes)]
    environment = {**os.environ, "PYTHONPATH": paths, **returning}
    done = subprocess.run(call, capture_output=True, text=True, check=True, env=environment)
    return [int(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_the_first_tokens_of_a_row_can_be_left_out(chunk_tokens, stock):
    skipped = [1, 0, 5, 10]
    found = token_means(stock["qwen3"], PROMPTS, range(tiny.LAYERS), skipped, chunk_tokens)
    for row, skip, mean in zip(PROMPTS, skipped, found, strict=True):
        expected = torch.tensor(activations_of(stock["qwen3"], row))[:, skip:].mean(1)
        torch.testing.assert_close(mean, expected, **CLOSE)


def test_a_sum_over_a_bfloat16_model_does_not_lose_what_bfloat16_would():
    """Of 1024 ones, bfloat16 sums up 256: 256 + 1 is 256 there."""
    ones = torch.ones(1, 1024, tiny.MLP_SIZE, dtype=torch.bfloat16)
    running = torch.zeros((), dtype=torch.bfloat16)
    for one in ones[0, :, 0]:
        running = running + one
    assert running == 256
    model = tiny.build_model("llama", max_position_embeddings=1024).bfloat16()
    with torch.no_grad(), pinned(model, ones):
        for chunk_tokens in (None, 300):
            found = token_means(model, [[5] * 1024], range(tiny.LAYERS), chunk_tokens=chunk_tokens)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, torch.ones_like(found), atol=1e-5, rtol=0)


@contextmanager
def pinned(model, h):
    """Have every down projection be given parts of ``h``, whatever the model computes."""
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _module, args: (h[:, : args[0].shape[1]],), prepend=True)
        for layer in model.model.layers
    ]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_means_of_a_bfloat16_model_are_close_to_those_of_the_float32_one(name, stock):
    rows = [PROMPTS[3] * 5, PROMPTS[2]]
    half = copy.deepcopy(stock[name]).bfloat16()
    whole = token_means(stock[name], rows, range(tiny.LAYERS))
    for chunk_tokens in (None, 7):
        found = token_means(half, rows, range(tiny.LAYERS), chunk_tokens=chunk_tokens)
        assert float((found - whole).norm() / whole.norm()) < 0.03  # bfloat16 has 8 bits; measured: at most 0.0125


@pytest.mark.parametrize("name", ["token_budget", "chunk_tokens"])
def test_a_reading_of_no_tokens_is_refused(name):
    with pytest.raises(TraceError, match=f"reading: {name} is 0; expected 1 or more"):
        Reading(**{name: 0})


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
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2", "qwen3", "gemma4_text", "lfm2"])
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
