"""`collect --backend vllm` on the command line, inside vLLM's own environment, against the model in this process."""

import os
import subprocess
from dataclasses import replace

import drive
import pytest
import tiny
from places import ROOT

from adaras_export.core.checkpoint import version_of
from adaras_export.core.trace_files import read_traces, write_questions
from adaras_export.core.traces import Question
from adaras_export.data.checkers import last_number
from adaras_export.data.collect import CollectOptions, collect
from adaras_export.data.sampling_plan import Goal
from adaras_export.modeling.generation import Sampling
from adaras_export.modeling.loading import load_model

QUESTIONS = [
    Question("text", "Hi! 1 + 1 =", "2"),
    Question("longer text", "What may this be? 20 + 3 =", "2"),
    Question("messages", [{"role": "user", "content": "5 + 6"}], "11"),
]
# vLLM's attention on the CPU wants heads of 32 or more.
WIDE = {"hidden_size": 128, "max_position_embeddings": 256, "initializer_range": 0.15}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_base("llama", tmp_path_factory.mktemp("wide") / "llama", **WIDE)


@pytest.fixture
def run(folder, tmp_path, pytestconfig):
    """The command, into t.jsonl; what it said on standard output."""
    drive.require_built("vllm", required=pytestconfig.option.require_runtimes)
    vllm = drive.RUNTIMES["vllm"]
    shared = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_AOT_COMPILE": "0"}
    environment = {**shared, **vllm.settings, **own, "PYTHONPATH": str(ROOT)}
    write_questions(tmp_path / "q.jsonl", QUESTIONS)

    def go(*options):
        command = [vllm.command[0], "-m", "adaras_export", "collect", tmp_path / "q.jsonl", "-m", folder]
        command += ["-o", tmp_path / "t.jsonl", "--backend", "vllm", "--max-new-tokens", "8", *options]
        done = subprocess.run([*map(str, command)], env=environment, cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        return done.stdout.decode()

    return go


def test_greedy_traces_of_vllm_are_those_of_transformers(run, folder, tmp_path):
    run("--attempts", "1", "--temperature", "0")
    options = CollectOptions(last_number, 1, folder.name, version_of(folder))
    settings = {"goal": Goal(1), "sampling": Sampling(8), "options": options}
    collect(*load_model(folder, device="cpu"), QUESTIONS, tmp_path / "here.jsonl", **settings)
    backends = [_without_backend(tmp_path / name) for name in ("t.jsonl", "here.jsonl")]
    assert [backend for _, backend in backends] == [{"vllm"}, {"transformers"}]
    assert backends[0][0] == backends[1][0]


def test_a_file_that_was_cut_is_completed_with_the_same_samples(run, tmp_path):
    run("--attempts", "3")
    whole = (tmp_path / "t.jsonl").read_bytes()
    (tmp_path / "t.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:4])[:-20])
    assert "(3 traces were there" in run("--attempts", "3")
    assert (tmp_path / "t.jsonl").read_bytes() == whole
    assert len({trace.completion for trace in read_traces(tmp_path / "t.jsonl")}) == 9


def _without_backend(path):
    """Traces but for the backend that they name, and that of each."""
    traces = list(read_traces(path))
    plain = [replace(one, settings={**one.settings, "backend": ""}) for one in traces]
    return set(map(str, plain)), {one.settings["backend"] for one in traces}
