"""A folder that appears complete or not at all, also where two want the same one and one of them dies."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from places import TESTS

from adaras_export.errors import ArtifactError, ExportError
from adaras_export.files.staging import revised, staged

RIVAL = TESTS / "system" / "reliability" / "rival.py"


def rival(parent, word, rounds):
    """A process that stages folders in ``parent``."""
    return subprocess.Popen([sys.executable, RIVAL, parent, word, str(rounds)], stdout=subprocess.PIPE, text=True)


@pytest.fixture
def busy(tmp_path):
    """A process that has staged tmp_path/out-0 and is at work in it."""
    with rival(tmp_path, "dead", 0) as process:
        assert process.stdout.readline() == "staged\n"
        yield process
        process.kill()


def write(out, base, name="file"):
    with staged(out, base) as stage:
        (stage / name).write_text("new")


def names_of(folder):
    return sorted(path.name for path in folder.iterdir())


def test_of_many_at_once_one_wins_and_the_others_say_so(tmp_path):
    """Six processes, twenty folders: each has the content of one, and nobody's stage is left."""
    rivals = [rival(tmp_path, word, 20) for word in "abcdef"]
    told = [process.communicate(timeout=60)[0].splitlines() for process in rivals]
    for number, lines in enumerate(zip(*told, strict=True), start=1):
        assert Counter(line == "won" for line in lines) == {True: 1, False: 5}, lines
        assert {line.partition(": ")[2].partition(";")[0] for line in lines} - {""} <= {
            "another export is writing it now",
            "exists already",
        }
        winner = "abcdef"[lines.index("won")]
        assert {path.read_text() for path in (tmp_path / f"out-{number}").iterdir()} == {winner}
    assert names_of(tmp_path) == sorted(f"out-{number}" for number in range(1, 21))


def test_a_folder_that_another_process_is_writing_is_refused_and_left_to_it(busy, tmp_path):
    before = names_of(tmp_path)
    with pytest.raises(ExportError, match=r"out-0: another export is writing it now; wait until it ends, or choose"):
        write(tmp_path / "out-0", tmp_path / "base")
    assert names_of(tmp_path) == before == [".out-0.adaras-export"]
    assert busy.poll() is None


def test_what_a_killed_process_left_is_cleared_by_the_next_one(busy, tmp_path):
    busy.send_signal(signal.SIGKILL)
    busy.wait()
    assert len([*tmp_path.rglob("stage-*/*")]) == 40
    write(tmp_path / "out-0", tmp_path / "base")
    assert names_of(tmp_path) == ["out-0"]
    assert names_of(tmp_path / "out-0") == ["file"]


@pytest.mark.parametrize("name", ["two words", "Größe 模型 🙂", "'quotes\"", ".hidden", "-o", "x" * 230], ids=str)
def test_any_name_that_can_be_printed_is_taken(name, tmp_path):
    write(tmp_path / name, tmp_path / "base")
    assert names_of(tmp_path) == [name]
    assert (tmp_path / name / "file").read_text() == "new"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two\nlines", r"two\\nlines': has an unprintable character in its name"),
        ("\udcff", "has an unprintable character in its name"),
        ("x" * 256, "cannot be .*File name too long"),
        ("file", "exists already"),
        ("file/out", "cannot be written .*Not a directory|cannot be written .*File exists"),
        ("folder", "exists already"),
        ("nowhere", "exists already"),
        ("base", "exists already|is in the folder of the base model"),
        ("base/deep/out", "is in the folder of the base model"),
        ("link/out", "is in the folder of the base model"),
    ],
)
def test_another_place_is_refused_in_one_line_and_left_as_it_is(name, message, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "base").mkdir()
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExportError, match=message) as caught:
        write(tmp_path / name, tmp_path / "base")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_appears_under_the_name_meanwhile_stays(tmp_path):
    out = tmp_path / "out"
    stage = staged(out, tmp_path / "base")
    (stage.__enter__() / "file").write_text("new")
    (out / "mine").mkdir(parents=True)
    with pytest.raises(ExportError, match=r"out: cannot be written \(.*; nothing was left behind"):
        stage.__exit__(None, None, None)
    assert names_of(tmp_path) == ["out"]
    assert names_of(out) == ["mine"]


def test_a_workshop_that_is_a_link_is_refused_and_nothing_is_removed_behind_it(tmp_path):
    (tmp_path / "mine" / "stage-mine").mkdir(parents=True)
    (tmp_path / ".out.adaras-export").symlink_to(tmp_path / "mine")
    with pytest.raises(ExportError, match="is a symbolic link"):
        write(tmp_path / "out", tmp_path / "base")
    assert names_of(tmp_path / "mine") == ["stage-mine"]


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_permissions_are_the_same_under_every_umask_and_those_of_linked_files_stay(mask, tmp_path):
    linked = tmp_path / "weights"
    linked.write_text("weights")
    linked.chmod(0o640)
    old = os.umask(mask)
    try:
        with staged(tmp_path / "out", tmp_path / "base") as stage:
            (stage / "deep").mkdir()
            (stage / "deep" / "file").write_text("new")
            os.link(linked, stage / "linked")
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]}
    assert modes == {"out": 0o755, "deep": 0o755, "file": 0o644, "linked": 0o640}


def test_an_error_of_the_work_itself_is_passed_on_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "out", tmp_path / "base") as stage:
        (stage / "file").write_text(str(1 / 0))
    assert names_of(tmp_path) == []


def test_a_short_write_without_a_reason_asks_whether_the_disk_is_full(tmp_path):
    """So does NumPy, which is below the writers of ONNX and GGUF."""
    with (
        pytest.raises(
            ExportError, match=r"element 1024 to file; is the disk full\? .* MB are free in /.*, 0.0 MB of the"
        ),
        staged(tmp_path / "out", tmp_path / "base"),
    ):
        raise OSError("problem writing element 1024 to file")
    assert names_of(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, ValueError, ArtifactError])
def test_a_full_disk_is_told_from_the_words_or_the_cause_of_any_error(error, tmp_path):
    """Safetensors says it in a text, others raise their own error from it."""
    cause = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for raised, origin in ((error("I/O error: No space left on device (os error 28)"), None), (error("x"), cause)):
        raised.__cause__ = origin
        stage = staged(tmp_path / "out", tmp_path / "base")
        stage.__enter__()
        with pytest.raises(ExportError, match=r"the disk is full: .* are free in /.*\); nothing was left behind"):
            stage.__exit__(type(raised), raised, None)
    assert names_of(tmp_path) == []


def test_files_are_on_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    """The order of the calls to the system: all files, all folders, and then the name."""
    calls, sync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda one: calls.append(Path(f"/proc/self/fd/{one}").readlink()) or sync(one))
    monkeypatch.setattr(Path, "rename", lambda one, to: calls.append(Path("rename")) or rename(one, to))
    with staged(tmp_path / "out", tmp_path / "base") as stage:
        (stage / "file").write_text("new")
    assert [call.name for call in calls] == ["file", stage.name, "rename", tmp_path.name]


# Some files of a finished folder


@pytest.fixture
def finished(tmp_path):
    """A folder of three files."""
    for name in ("card", "deep/receipt", "weights"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("old")
    return tmp_path / "out"


def texts(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def replace_two(stage, *removed):
    for name in ("card", "deep/receipt"):
        (stage / name).unlink()
        (stage / name).write_text("new")
    for name in removed:
        (stage / name).unlink()


def test_some_files_are_replaced_and_the_others_stay_where_they_are(finished, tmp_path):
    before = (finished / "weights").stat()
    with revised(finished) as stage:
        replace_two(stage)
        assert set(texts(finished).values()) == {"old"}
    assert texts(finished) == {"card": "new", "deep/receipt": "new", "weights": "old"}
    after = (finished / "weights").stat()
    assert (before.st_ino, before.st_nlink, before.st_mtime_ns) == (after.st_ino, after.st_nlink, after.st_mtime_ns)
    assert names_of(tmp_path) == ["out"]


def test_a_file_that_is_removed_from_the_copy_is_removed(finished, tmp_path):
    with revised(finished) as stage:
        replace_two(stage, "weights")
        (finished / "note").write_text("mine")  # it came later
    assert texts(finished) == {"card": "new", "deep/receipt": "new", "note": "mine"}
    assert names_of(tmp_path) == ["out"]


def test_what_fails_before_the_end_replaces_nothing(finished, tmp_path):
    revision = revised(finished)
    replace_two(revision.__enter__())
    assert not revision.__exit__(KeyError, KeyError("any"), None)
    assert set(texts(finished).values()) == {"old"}
    assert names_of(tmp_path) == ["out"]


@pytest.fixture
def half(finished, monkeypatch):
    """The folder, of which one file of two was replaced when the process died."""
    calls = [Path.replace]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda one, to: calls.pop()(one, to))
        with pytest.raises(IndexError), revised(finished) as stage:
            replace_two(stage)
    return finished


def test_what_a_dead_process_has_half_replaced_is_finished_by_the_next_one(half, tmp_path):
    assert sorted(texts(half).values()) == ["new", "old", "old"]
    with revised(half) as stage:
        assert texts(stage) == {"card": "new", "deep/receipt": "new", "weights": "old"}
    assert texts(half) == {"card": "new", "deep/receipt": "new", "weights": "old"}
    assert names_of(tmp_path) == ["out"]


def test_what_a_dead_process_was_to_remove_is_removed_by_the_next_one(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda one, to: (_ for _ in ()).throw(IndexError))
        with pytest.raises(IndexError), revised(finished) as stage:
            replace_two(stage, "weights")
    assert set(texts(finished)) == {"card", "deep/receipt", "weights"}
    with revised(finished):
        pass
    assert texts(finished) == {"card": "new", "deep/receipt": "new"}
    assert names_of(tmp_path) == ["out"]


def test_what_a_dead_process_has_half_replaced_does_not_come_back_in_a_new_folder(half, tmp_path):
    shutil.rmtree(half)
    write(half, tmp_path / "base")
    assert texts(half) == {"file": "new"}
    assert names_of(tmp_path) == ["out"]
