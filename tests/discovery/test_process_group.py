"""One job in several processes: the same bytes whatever their number, one voice, and an end whatever happens."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import tiny
import transformers
from places import ROOT

from adaras_export import cli
from adaras_export.core.neuron_stats import NeuronStats
from adaras_export.core.neurons import NeuronSet
from adaras_export.core.trace_files import write_traces
from adaras_export.core.traces import Trace
from adaras_export.discovery import process_group
from adaras_export.discovery.process_group import Group
from adaras_export.discovery.reading_job import Part

# Eleven questions, the first of them long; with batches of 8 tokens each is a chunk of its own.
QUESTIONS = [("what is 12+30, if not 41 or 43? " * 2, "42"), *((f"{n}+{n}=", str(2 * n)) for n in range(1, 11))]
TRACES = [
    Trace(f"{n}#{attempt}", str(n), prompt, text, text.endswith(answer))
    for n, (prompt, answer) in enumerate(QUESTIONS)
    for attempt, text in enumerate((answer, f"it is {answer}", f"no {answer}?", "hm, 0."))
]
OPTIONS = ["--keep", "20", "--token-budget", "8"]


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    write_traces(path, TRACES)
    return path


def call(*arguments):
    """The exit status of the command line."""
    before, sys.argv = sys.argv, ["adaras-export", *map(str, arguments)]
    verbosity = transformers.logging.get_verbosity()
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = before
        transformers.logging.set_verbosity(verbosity)


def identified(size, traces, folder, model, *more):
    """What `identify` writes and says in so many processes, by rank, and the file."""
    out = folder / f"neurons-{size}"
    told = processes.group(size, lambda _: call("identify", traces, "-m", model, "-o", out, *OPTIONS, *more), folder)
    return told, out


@pytest.mark.parametrize("ranking", ["paper", pytest.param("attribution", marks=pytest.mark.slow)])
def test_one_two_and_four_processes_write_the_same_bytes(ranking, traces, folders, tmp_path):
    contents = set()
    for size in (1, 2, 4):
        told, out = identified(size, traces, tmp_path, folders["qwen3"], "--ranking", ranking)
        assert [status for status, _ in told] == [0] * size, told
        assert f"{out}: 20 neurons of layers 2 to 3 from 11 questions" in told[0][1]
        assert [text for _, text in told[1:]] == [""] * (size - 1)
        contents.add(out.read_bytes())
    assert len(contents) == 1
    assert sorted(path.name for path in tmp_path.glob("*partial*")) == []


def test_more_processes_than_chunks_are_no_harm(traces, folders, tmp_path):
    told, out = identified(3, traces, tmp_path, folders["llama"], "--token-budget", "9999")
    assert [status for status, _ in told] == [0, 0, 0], told
    assert NeuronSet.load(out).ranking == "paper"


@pytest.mark.parametrize("failing", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_error_in_one_process_ends_all_with_one_line(failing, traces, folders, tmp_path, monkeypatch):
    read = NeuronStats.update

    def update(self, question, *means):
        if os.environ.get("RANK") == str(failing):
            means[0][...] = float("nan")
        return read(self, question, *means)

    monkeypatch.setattr(NeuronStats, "update", update)
    told, out = identified(3, traces, tmp_path, folders["llama"])
    assert [status for status, _ in told] == [2, 2, 2], told
    [line] = "".join(text for _, text in told).splitlines()
    assert line.startswith("TraceError: question ")
    assert "NaN or infinite" in line
    assert not out.exists()


def test_input_that_all_refuse_is_refused_in_one_line(folders, tmp_path):
    told, _ = identified(2, tmp_path / "nothing", tmp_path, folders["llama"])
    assert [status for status, _ in told] == [2, 2]
    [line] = "".join(text for _, text in told).splitlines()
    assert line.startswith("UsageError: ")
    assert "nothing" in line


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_leaves_none_behind(killed, traces, folders, tmp_path):
    def work(rank):
        def die(_):
            os.kill(os.getpid(), signal.SIGKILL)

        if rank == killed:
            process_group.Group.check = die
        return call("identify", traces, "-m", folders["llama"], "-o", tmp_path / "out", *OPTIONS)

    told = processes.group(2, work, tmp_path)
    assert told[killed][0] == -signal.SIGKILL
    assert told[1 - killed][0] == 2
    assert "Traceback" not in told[1 - killed][1]


@pytest.mark.slow
def test_a_group_that_was_killed_goes_on_from_the_files_of_its_processes(traces, folders, tmp_path, monkeypatch):
    check, calls = process_group.Group.check, []

    def die_later(self):
        calls.append(self)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        check(self)

    with monkeypatch.context() as patch:
        patch.setattr(process_group.Group, "check", die_later)
        patch.setattr("adaras_export.discovery.reading_job._PATIENCE", 0)
        told, out = identified(2, traces, tmp_path, folders["llama"])
    assert -signal.SIGKILL in [status for status, _ in told]
    assert Part.load(f"{out}.partial-0of2").done or Part.load(f"{out}.partial-1of2").done
    told, again = identified(1, traces, tmp_path, folders["llama"], "-o", out)
    assert f"{out}.partial-0of2: is of an unfinished run of another number of processes" in told[0][1]
    once = out.read_bytes()
    told, again = identified(2, traces, tmp_path, folders["llama"])
    assert [status for status, _ in told] == [0, 0], told
    assert (again, again.read_bytes()) == (out, once)
    assert sorted(path.name for path in tmp_path.glob("*partial*")) == []


def test_options_for_one_process_are_refused_in_several(traces, folders, tmp_path):
    told, _ = identified(2, traces, tmp_path, folders["llama"], "--shard", "0/2")
    [line] = "".join(text for _, text in told).splitlines()
    assert "--shard 0/2 in one of 2 processes: they share the traces" in line


def test_alone_there_is_nobody_to_ask(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group.joined() as group:
        group.check()
        group.wait()
        assert group == Group(0, 1)
        assert process_group.device() is None


@pytest.mark.slow
def test_accelerate_launches_it_as_a_module(traces, folders, tmp_path):
    launcher = [Path(sys.executable).parent / "accelerate", "launch", "--cpu", "--num_processes", "2"]
    settings = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    given = [traces, "-m", folders["qwen3"], "-o", tmp_path / "out", *OPTIONS]
    call_ = [*launcher, *settings, "-m", "adaras_export", "identify", *given]
    found = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, call_)], capture_output=True, text=True, check=False, env=found)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    _, alone = identified(1, traces, tmp_path, folders["qwen3"])
    assert (tmp_path / "out").read_bytes() == alone.read_bytes()


def test_the_tiny_questions_have_both_outcomes():
    for n in range(len(QUESTIONS)):
        assert {trace.correct for trace in TRACES if trace.question_id == str(n)} == {True, False}
    assert tiny.LAYERS == 4
