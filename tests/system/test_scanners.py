"""No pickle in any artifact: two scanners take every file apart as if it were one, and find nothing.

Both choose by suffixes what they look at, and an export has nothing that they would. So they are shown the same files
under another name.
"""

import io
import json
import pickle
import re
import shutil
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import drive
import pytest
import tiny_gguf
from picklescan.scanner import scan_directory_path

from adaras_export.delivery.writer import export
from adaras_export.exporters import TARGETS, load

pytestmark = [pytest.mark.slow, pytest.mark.onnx]

LOSS = ["gate", "start", "dial"]
# Name: base, target, options. The plain graph of llama is made for other tests, too; its heads are too small for GenAI.
EXPORTS = {
    "hf": ("qwen3-sharded", "hf", {}),
    "hf-thin": ("llama", "hf-thin", {}),
    "peft": ("llama", "peft", {}),
    "peft-adaptive": ("llama", "peft", {"adaptive": True}),
    "peft-start-at": ("llama", "peft", {"start_at": "<assistant>"}),
    "peft-merge": ("gpt2", "peft", {"merge": True}),
    "stock": ("qwen3", "stock", {}),
    "stock-switchable": ("llama", "stock", {"switchable": True}),
    "gguf": ("llama", "gguf", {}),
    "gguf-into": ("llama", "gguf", {"into": "base.gguf"}),
    "gguf-switchable": ("llama", "gguf", {"into": "base.gguf", "switchable": True}),
    "onnx-genai": ("qwen3", "onnx", {"genai": True}),
    "onnx-int4": ("llama", "onnx", {"precision": "int4", "inline": True}),
}
# None of these formats can hold a pickle: text, numbers behind a JSON header, protocol buffers, GGUF's own.
SUFFIXES = {".json", ".jinja", ".md", ".py", ".safetensors", ".onnx", ".onnx_data", ".gguf"}
# How pickles (from protocol 2 on), zip, 7z, gzip, xz and bzip2 begin; a tar says so behind its first entry's name. The
# length that a safetensors file begins with may look like a pickle's first two bytes, but goes on with zeros.
MAGIC = re.compile(rb"\x80[\x02-\x05][^\x00]|PK|7z\xbc\xaf|\x1f\x8b|\xfd7zXZ|BZh|.{257}ustar", re.DOTALL)


class Harmful:
    def __reduce__(self):
        import os

        return os.system, ("true",)


def archive(mode):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as file:
        file.addfile(tarfile.TarInfo("data.pkl"))
    return content.getvalue()


@pytest.fixture(scope="module")
def artifacts(rules, folders, stock, tokenizer, tmp_path_factory):
    """A folder with one of every export."""
    together = tmp_path_factory.mktemp("artifacts")
    carrier = tiny_gguf.write_model(stock["llama"], tokenizer, tmp_path_factory.mktemp("carrier") / "base.gguf")
    for name, (key, target, options) in EXPORTS.items():
        chosen = {option: carrier if option == "into" else value for option, value in options.items()}
        rule = rules[key, "causal", "last_prompt_token"]
        export(rule, base=folders[key], to=target, out=together / name, accept_loss=LOSS, **chosen)
    return together


def files_of(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def as_pickles(folder, out):
    """The files of ``folder`` under other names: what either scanner takes for pickles. Their names, by these."""
    out.mkdir()
    names = {f"{number}.pkl": path for number, path in enumerate(files_of(folder))}
    for name, path in names.items():
        shutil.copyfile(path, out / name)
    return names


@pytest.fixture(scope="module")
def renamed(artifacts, tmp_path_factory):
    out = tmp_path_factory.mktemp("renamed") / "files"
    return out, as_pickles(artifacts, out)


@pytest.fixture
def modelscan(pytestconfig, tmp_path):
    """``modelscan(folder)``: its exit status, and its report."""

    def scan(folder):
        drive.require_built("modelscan", required=pytestconfig.option.require_runtimes)
        report = tmp_path / "report.json"
        command = [*drive.RUNTIMES["modelscan"].command, "-p", folder, "-r", "json", "--show-skipped", "-o", report]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert report.exists(), done.stdout + done.stderr
        return done.returncode, json.loads(report.read_text())

    return scan


@pytest.fixture
def infected(artifacts, tmp_path):
    """An export with a pickle among its files that calls os.system."""
    folder = tmp_path / "infected"
    shutil.copytree(artifacts / "hf", folder)
    (folder / "optimizer.pkl").write_bytes(pickle.dumps(Harmful()))
    return folder


def test_every_target_and_option_is_among_the_exports():
    assert {target for _, target, _ in EXPORTS.values()} == TARGETS.keys()
    for target in TARGETS:
        used = {option for _, name, options in EXPORTS.values() if name == target for option in options}
        # A page is files of ours and of npm; calibration is a file that is read, and not part of the export.
        assert used == load(target).spec.options - {"page", "calibration"}


def test_all_files_are_of_formats_that_cannot_hold_a_pickle(artifacts):
    found = Counter(path.suffix for path in files_of(artifacts))
    assert found.keys() == SUFFIXES
    for path in files_of(artifacts):
        assert not MAGIC.match(path.read_bytes()), path


@pytest.mark.parametrize(
    "content",
    [pickle.dumps(Harmful(), 2), pickle.dumps(Harmful()), archive("w"), archive("w:gz")],
    ids=["old pickle", "pickle", "tar", "gzip"],  # a gzip holds the time: processes would not agree on its name
)
def test_a_pickle_or_an_archive_is_known_by_how_it_begins(content):
    assert MAGIC.match(content)


def test_picklescan_finds_nothing(artifacts, renamed):
    folder, names = renamed
    assert scan_directory_path(str(artifacts)).scanned_files == 0
    result = scan_directory_path(str(folder))
    assert result.scanned_files == len(names) > 50
    assert not result.scan_err
    assert (result.issues_count, result.infected_files, result.globals) == (0, 0, [])


def test_modelscan_finds_nothing_that_it_would_scan(artifacts, modelscan):
    status, report = modelscan(artifacts)
    assert status == 3  # no supported files
    skipped = {entry["source"] for entry in report["summary"]["skipped"]["skipped_files"]}
    assert skipped == {str(path.relative_to(artifacts)) for path in files_of(artifacts)}
    assert (report["issues"], report["errors"]) == ([], [])


def test_modelscan_finds_nothing_when_it_takes_every_file_for_a_pickle(renamed, modelscan):
    folder, names = renamed
    _, report = modelscan(folder)
    scanned = report["summary"]["scanned"].get("scanned_files", [])
    refused = [Path(error["source"]).name for error in report["errors"]]
    assert sorted([*scanned, *refused]) == sorted(names)
    assert not report["summary"]["skipped"]["skipped_files"]
    assert report["issues"] == []


def test_both_find_a_pickle_among_the_files(infected, modelscan):
    result = scan_directory_path(str(infected))
    assert (result.issues_count, result.infected_files) == (1, 1)
    status, report = modelscan(infected)
    assert status == 1
    [issue] = report["issues"]
    assert (issue["source"], issue["operator"]) == ("optimizer.pkl", "system")


def test_both_find_a_pickle_that_is_called_like_a_file_of_ours(infected, modelscan, tmp_path):
    (infected / "optimizer.pkl").rename(infected / "generation_config.json")
    names = as_pickles(infected, tmp_path / "renamed")
    result = scan_directory_path(str(tmp_path / "renamed"))
    assert (result.issues_count, result.infected_files) == (1, 1)
    _, report = modelscan(tmp_path / "renamed")
    assert [names[issue["source"]].name for issue in report["issues"]] == ["generation_config.json"]
