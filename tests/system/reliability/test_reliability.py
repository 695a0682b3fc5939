"""What holds whatever happens: the base stays, the same input gives the same bytes, and what fails leaves nothing."""

import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
from processes import ended, forked
from reliability import jobs
from reliability.exporting import command

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


def export(name, home, out):
    """The exit status of a job, and what it printed."""
    return command(jobs.JOBS[name].command(home, out))


@contextmanager
def no_file_larger_than(size):
    """Nearly a full disk, without any rights: a file of this process cannot grow further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@contextmanager
def script(name, *arguments, prefix=(), **environment):
    """A script of this folder as a process of its own."""
    call = [*prefix, sys.executable, HERE / name, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(call, env={**os.environ, **environment}, **pipes) as process:
        yield process
        process.kill()


def told(process):
    """What a script prints, line by line; it must end well."""
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, out + errors
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope="module")
def elsewhere(toys, tmp_path_factory):
    """A copy of the toys, a snapshot of it, and an export from it, by the name of its job. Read only."""
    home = shutil.copytree(toys, tmp_path_factory.mktemp("elsewhere") / "home")
    before = jobs.snapshot(home)

    def make(name):
        out = home.parent / "two" / jobs.folder_name(name)
        assert export(name, home, out)[0] == 0
        return home, before, out

    return tiny.Lazy(make)


@pytest.mark.parametrize("name", jobs.QUICK)
def test_the_base_stays_as_it_is_and_verify_writes_nothing(name, elsewhere, tmp_path):
    """Whether an export succeeds or fails; only the number of links of a weight file may rise."""
    home, before, out = elsewhere[name]
    artifact = jobs.snapshot(out)
    assert command(["verify", str(out)])[0] == 0
    with no_file_larger_than(600):
        assert export(name, home, tmp_path / "failed")[0] == 2
    assert jobs.snapshot(home) == before
    assert jobs.snapshot(out) == artifact


@pytest.mark.parametrize("name", jobs.QUICK)
def test_a_file_that_cannot_be_written_is_one_line_and_nothing_is_left(name, toys, made, tmp_path):
    """Each file of an artifact in turn is the first that is too large; of most targets, every third one."""
    sizes = sorted({path.stat().st_size for path in made[name].rglob("*") if path.stat().st_nlink == 1} - {0})
    for size in sizes if name == "hf" else sizes[::3]:
        with no_file_larger_than(size - 1):
            status, text = export(name, toys, tmp_path / "failed")
        assert (status, text.count("\n")) == (2, 1), text
        assert "cannot be written" in text
        assert [*tmp_path.iterdir()] == []


def test_an_export_to_where_another_process_writes_is_refused_until_that_one_is_dead(toys, tmp_path):
    with script("rival.py", tmp_path, "dead", 0) as rival:
        assert rival.stdout.readline() == "staged\n"
        status, text = export("hf", toys, tmp_path / "out-0")
        assert (status, text.count("\n")) == (2, 1)
        assert "out-0: another export is writing it now" in text
        rival.kill()
        rival.wait()
    assert export("hf", toys, tmp_path / "out-0")[0] == 0
    assert [*tmp_path.iterdir()] == [tmp_path / "out-0"]
    assert command(["verify", str(tmp_path / "out-0")])[0] == 0


# Two runs give the same bytes

ODD = {"PYTHONHASHSEED": "77", "TZ": "Asia/Kolkata", "LC_ALL": "C", "PYTHONUTF8": "0"}


@pytest.mark.onnx
def test_another_process_writes_the_same_bytes_and_permissions(toys, made, tmp_path):
    """Other hashes, another umask, time zone, locale, and folder of temporary files, in which nothing is left."""
    names = (*jobs.QUICK, "onnx int8")
    (tmp_path / "odd").mkdir()
    masked = ("sh", "-c", 'umask 077; exec "$0" "$@"')
    odd = {**ODD, "TMPDIR": str(tmp_path / "odd")}
    with script("exporting.py", toys, tmp_path / "theirs", *names, prefix=masked, **odd) as process:
        assert [line["status"] for line in told(process)] == [0] * len(names)
    for name in names:
        assert jobs.contents(tmp_path / "theirs" / jobs.folder_name(name)) == jobs.contents(made[name])
    assert [*(tmp_path / "odd").glob("tmp*")] == []


# Files that name a base which has no Hub id by its path, and the receipt, which has their hashes.
PATHS = {"hf-thin": {"config.json"}} | {
    name: {"adapter_config.json"} for name in ("peft", "peft --adaptive", "peft --start-at")
}


@pytest.mark.parametrize("name", jobs.QUICK)
def test_a_base_at_another_path_changes_nothing_but_that_path(name, toys, made, elsewhere):
    one, (home, _, two) = made[name], elsewhere[name]
    found, expected = jobs.contents(two), jobs.contents(one)
    differing = {path for path in found if found[path] != expected[path]}
    assert found.keys() == expected.keys()
    assert differing == {"receipt.json"} | PATHS.get(name, set())
    for path in differing:
        moved, original = ((out / path).read_text().splitlines() for out in (two, one))
        changed = {pair for pair in zip(original, moved, strict=True) if pair[0] != pair[1]}
        hashes = {pair for pair in changed if str(toys) not in pair[0]}
        assert {old.replace(str(toys), str(home)) for old, _ in changed - hashes} == {
            new for _, new in changed - hashes
        }
        assert len(hashes) == (len(differing) - 1 if path == "receipt.json" else 0)


def in_a_hub_cache(folder, cache):
    """A base as huggingface_hub keeps what it has downloaded: links to files that are named by their content."""
    place, commit = cache / "models--somebody--toy", "c" * 40
    snapshot = place / "snapshots" / commit
    for path in (place / "blobs", place / "refs", snapshot):
        path.mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(path, place / "blobs" / f"{number}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number}")
    return place


@pytest.mark.parametrize("name", jobs.QUICK)
def test_a_base_with_a_hub_id_gives_the_same_wherever_its_cache_is(name, toys, tmp_path, monkeypatch):
    job, found = jobs.JOBS[name], []
    for place in ("one", "two/deeper"):
        cache = in_a_hub_cache(toys / job.name, tmp_path / place)
        before = jobs.snapshot(cache)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache.parent))
        arguments = job.command(toys, tmp_path / place / "out")
        arguments[arguments.index("--base") + 1] = "somebody/toy"
        assert command(arguments)[0] == 0
        found.append(jobs.contents(tmp_path / place / "out"))
        assert jobs.snapshot(cache) == before
    assert found[0] == found[1]


# Disks


@pytest.fixture
def namespace():
    """What a command begins with that may mount a disk of its own."""
    found = ("unshare", "--user", "--map-root-user", "--mount")
    if shutil.which(found[0]) is None or subprocess.run([*found, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no namespace of its own for a small disk: unshare is missing or not allowed here")
    return found


def test_a_disk_that_becomes_full_or_is_read_only_is_one_line_and_nothing_is_left(namespace, home):
    """Weights are copied, since they cannot be linked from another disk. With enough room, all of it succeeds."""
    names = ("hf", "gguf --into")
    with script("small_disk.py", home, *names, prefix=namespace) as process:
        lines = told(process)
    enough = [line for line in lines if line["status"] == 0]
    assert [line["job"] for line in enough] == [*names, "hf", "verify"]
    assert all(line.get("free", 0) > line.get("need", -1) for line in enough)
    for line in lines:
        if line["status"]:
            assert (line["status"], line["text"].count("\n")) == (2, 1), line
            assert ("the disk is full: 0.0 MB of 1.0 MB are free in" in line["text"]) == ("free" in line), line
            assert line["left"] == ([] if "free" in line else ["here"])
    assert "Read-only file system" in lines[-1]["text"]


# Kills


def killing():
    """The exit status of kills.py, in a fork, which has all libraries loaded."""
    warnings.resetwarnings()  # pytest makes errors of them
    sys.argv = ["kills.py", "--kills", "6", "--real", "0", "--jobs", "hf,stock --switchable"]
    try:
        runpy.run_path(str(HERE / "kills.py"), run_name="__main__")
    except SystemExit as end:
        return end.code


def test_killed_runs_leave_nothing_wrong_and_the_next_ones_succeed(tmp_path):
    """A sample; docs/reliability.md has the figures of a long run, in which some are processes from the start."""
    status = ended([forked(killing, tmp_path / "log")], seconds=300)
    text = (tmp_path / "log").read_text()
    assert status == [0], text
    assert "0 faults" in text
