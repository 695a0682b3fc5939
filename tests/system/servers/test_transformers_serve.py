"""Traces of a real server, `transformers serve` on loopback, held against the same model in this process."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request

import drive
import pytest
import tiny
from places import PLANTED

from adaras_export.core.base_model import BaseModel
from adaras_export.core.trace_files import read_traces
from adaras_export.core.traces import Question
from adaras_export.data.backends.openai import Endpoint, EndpointBackend
from adaras_export.data.checkers import last_number
from adaras_export.data.collect import CollectOptions, collect, collect_from
from adaras_export.data.sampling_plan import Goal
from adaras_export.demo import planted
from adaras_export.discovery.identify import IdentifyOptions, identify
from adaras_export.errors import EndpointError
from adaras_export.modeling.generation import Sampling
from adaras_export.modeling.loading import load_model

pytest.importorskip("openai")
TALK = [Question(f"c{n}", [{"role": "user", "content": f"{n}+{n}"}], "1") for n in range(3)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The planted model; the server samples only where the model's own settings say so."""
    folder = tmp_path_factory.mktemp("served") / "teacher"
    shutil.copytree(PLANTED, folder)
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "do_sample": True}))
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A model of another family, with another tokenizer and a chat template."""
    return tiny.save_base("llama", tmp_path_factory.mktemp("student") / "student")


@pytest.fixture(scope="module")
def url(tmp_path_factory, pytestconfig):
    drive.require_built("transformers-serve", required=pytestconfig.option.require_runtimes)
    home = tmp_path_factory.mktemp("home")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*drive.RUNTIMES["transformers-serve"].command, "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (home / "log").open("w") as log:
        server = subprocess.Popen([*map(str, command), "--dtype", "float32"], env=environment, stdout=log, stderr=log)
    try:
        _wait(server, f"http://127.0.0.1:{port}/health", home / "log")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def _wait(server, address, log):
    until = time.monotonic() + 240
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(address):
                return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError


@pytest.fixture
def ask(url, tmp_path):
    """`collect_from` the server, into a file; then its traces by id."""

    def go(questions, model, sampling, *, attempts=1, name="served.jsonl", **settings):
        backend = EndpointBackend(Endpoint(url, str(model), **settings), sampling)
        collect_from(backend, questions, tmp_path / name, goal=Goal(attempts), options=CollectOptions(last_number, 8))
        return {trace.id: trace for trace in read_traces(tmp_path / name)}

    return go


@pytest.fixture(scope="module")
def sums(teacher):
    """Questions as the text that the teacher's template makes: this server parses chats of a qwen3 as Qwen's own."""
    tokenizer = load_model(teacher, device="cpu")[1]

    def make(count):
        rows = planted.splits({"identify": count}, seed=5)["identify"]
        form = {"tokenize": False, "add_generation_prompt": True}
        return [Question(r["id"], tokenizer.apply_chat_template(r["prompt"], **form), r["answer"]) for r in rows]

    return make


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_greedy_traces_of_a_server_are_those_of_the_model_here(ask, sums, teacher, student, tmp_path, kind):
    questions, folder = (sums(6), teacher) if kind == "text" else (TALK, student)
    served = ask(questions, folder, Sampling(12))
    settings = {"goal": Goal(1), "sampling": Sampling(12), "options": CollectOptions(last_number, 1)}
    collect(*load_model(folder, device="cpu"), questions, tmp_path / "here.jsonl", **settings)
    here = {trace.id: trace for trace in read_traces(tmp_path / "here.jsonl")}
    assert served == here
    assert len({trace.completion for trace in here.values()}) > 1


def test_one_request_at_a_time_gives_the_same_samples_again_and_another_seed_others(ask, sums, teacher):
    questions = sums(4)
    first, again, other = (
        ask(questions, teacher, Sampling(40, 1.0, seed=seed), attempts=4, name=name, concurrency=1)
        for seed, name in ((1, "a"), (1, "b"), (2, "c"))
    )
    assert first == again != other
    assert len({trace.completion for trace in first.values()}) > 2


def test_traces_of_a_served_teacher_are_read_by_another_model(ask, sums, teacher, student, tmp_path):
    traces = [*ask(sums(12), teacher, Sampling(40, 1.0), attempts=6, concurrency=4).values()]
    assert len(traces) == 72
    found = identify(*load_model(student, device="cpu"), traces, BaseModel.of(student), IdentifyOptions(keep=10))
    assert len(found.neurons.layer) == 10
    assert found.neurons.base == BaseModel.of(student)


def test_a_model_that_the_server_cannot_find_is_one_line(ask, tmp_path):
    with pytest.raises(EndpointError, match=r"model .*none, trace .*: answers \d+ \("):
        ask(TALK, tmp_path / "none", Sampling(4), retries=0)
