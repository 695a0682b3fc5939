"""The benchmarks of identifying and steering run on a tiny model, and end where what they compare is not the same.

Questions of the evidence are dealt so that none that makes a rule tests it.
"""

import gc
import importlib
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from places import ROOT
from transformers.utils import logging

from adaras_export.core.traces import digest

FOLDER = ROOT / "benchmarks"
NAMES = ("common", "decode", "evidence", "identify", "steer")
TEXTS = [(f"{n}+{n}=", f"{attempt}: {2 * n}", attempt < 4) for n in (1, 2, 3) for attempt in range(8)]


@pytest.fixture(scope="module")
def scripts():
    """The modules by name; the folder comes last, as its onnx.py must not stand in front of the package."""
    verbosity, path = logging.get_verbosity(), [*sys.path]
    sys.path.append(str(FOLDER))
    found = {name: importlib.import_module(name) for name in NAMES}
    gc.freeze()  # before each measurement they collect garbage, and would look through all that the tests have loaded
    yield found
    gc.unfreeze()
    sys.path[:] = path
    for name in NAMES:
        del sys.modules[name]
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def flags(folders):
    return ["--model", str(folders["qwen3"]), "--threads", "1", "--repeats", "1"]


@pytest.fixture(scope="module")
def bench(scripts, flags, tmp_path_factory):
    """Over one of three questions, as two more would be too many tokens."""
    work = tmp_path_factory.mktemp("identify")
    names = ("prompt", "completion", "correct")
    rows = [dict(zip(names, row, strict=True)) | {"id": str(n), "question_id": row[0]} for n, row in enumerate(TEXTS)]
    (work / "traces.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    own = ["--traces", str(work / "traces.jsonl"), "--tokens", "70", "--work", str(work / "new")]
    return scripts["identify"].Bench(scripts["identify"].parser().parse_args([*flags, *own]))


def test_identify_is_timed_beside_the_reference_and_both_find_the_same_means(scripts, bench, capsys):
    scripts["identify"].reading(bench, 1)
    out = capsys.readouterr().out
    assert "Reading 8 traces of traces.jsonl, 64 tokens in all (all 24 traces have 192: " in out
    assert all(f"| {name} | " in out for name in ("decoder", "identify", "with LM head", "every activation to disk"))
    assert "every activation to disk / identify: wall " in out


def test_the_reference_has_all_activations_on_disk_and_identify_none(bench):
    there, here = bench.memory("every activation to disk"), bench.memory("identify")
    numbers = 4 * 64 * tiny.LAYERS * tiny.MLP_SIZE
    assert numbers < there["files"] <= numbers + 8 * tiny.LAYERS * 128  # a header for each array
    assert there["written"] >= there["files"]
    assert here["files"] == 0
    assert [*bench.work.iterdir()] == []


def test_means_that_differ_end_the_benchmark(scripts, bench):
    stats, averaged = bench.identify(), bench.to_disk()
    with pytest.raises(SystemExit, match="means: identify and every activation to disk differ by"):
        scripts["identify"].difference(stats, replace(averaged, correct=averaged.incorrect))


def test_without_the_data_of_the_reference_traces_are_made_up_and_that_is_said(scripts, flags, bench, monkeypatch):
    identify = scripts["identify"]
    monkeypatch.setattr(identify, "TRACES", Path("nowhere"))
    arguments = identify.parser().parse_args([*flags, "--questions", "2", "--words", "4"])
    traces, about = identify.traces_for(arguments, bench.tokenizer, bench.base)
    assert len(traces) == 8
    assert about.startswith("8 made-up traces of ")
    assert "real ones skipped: ../shared/data/traces is not there" in about


def test_steering_is_timed_beside_the_stock_model_and_hooks(scripts, flags, capsys, monkeypatch):
    own = ["--neurons", "3", "--batches", "2", "--new-tokens", "2"]
    monkeypatch.setattr(sys, "argv", ["steer.py", *flags, *own])
    scripts["steer"].main()
    out = capsys.readouterr().out
    assert "3 neurons, batch 2: logits are at most " in out
    ways = [f"| {way}, 3 neurons | " for way in scripts["steer"].WAYS]
    assert all(name in out for name in ["| stock | ", "| stock again | ", *ways])


def test_hooks_that_do_not_steer_as_the_rule_says_end_the_benchmark(scripts, flags, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["steer.py", *flags, "--neurons", "3", "--batches", "1"])
    monkeypatch.setitem(scripts["steer"].WAYS, "hook per neuron", lambda _model, _rule: nullcontext())
    with pytest.raises(SystemExit, match=r"3 neurons, batch 1: logits are apart by .*'hook per neuron': 0"):
        scripts["steer"].main()


@pytest.mark.parametrize("task", ["mulw", "chain_sum", "gsm8k"])
def test_no_question_of_the_evidence_is_in_two_parts_and_seeds_differ(scripts, task):
    evidence = scripts["evidence"]
    if task == "gsm8k" and not evidence.BENCHMARKS.is_dir():
        pytest.skip("the reference's data is not here")
    first, second = (evidence.questions_of(task, seed) for seed in (1, 2))
    prompts = [digest(question.prompt) for part in first.values() for question in part]
    assert {name: len(part) for name, part in first.items()} == evidence.SIZES
    assert len(set(prompts)) == len(prompts) == 1200
    others = {digest(question.prompt) for part in second.values() for question in part}
    assert len(others & {*prompts}) < 600  # of neighbouring seeds of reasoning-gym nearly all would be


def test_of_equally_good_settings_of_the_evidence_the_weaker_is_tested(scripts):
    grid = scripts["evidence"].GRIDS["attribution"]
    told = {one.name: np.zeros(3) for one in grid}
    told |= {f"attribution, {best}": np.ones(3) for best in ("100 at 0.6", "100 at 0.3", "400 at 0.15")}
    assert scripts["evidence"].best_of(grid, told).name == "attribution, 100 at 0.3"
