"""Exports of an earlier version: what `verify` says of them, and what `refresh` makes of them."""

import json
import os
import shutil
from pathlib import Path

import payload_history as script
import pytest
from receipts import failures
from safetensors.torch import load_file, save_file

from adaras_export.delivery.integrity import verify_files
from adaras_export.delivery.receipt import hashes
from adaras_export.delivery.verifier import verify
from adaras_export.delivery.writer import export, refresh
from adaras_export.errors import ArtifactError, ExportError, ParityError
from adaras_export.exporters import payload_history
from adaras_export.files import atomic

KEY = ("llama", "causal", "last_prompt_token")
CODE = "steering_adaras.py"


def resealed(folder):
    """With the hashes of its files in its receipt, as whoever wrote it would have put them there."""
    receipt = json.loads((folder / "receipt.json").read_text())
    atomic.replace_file(folder / "receipt.json", json.dumps({**receipt, "files": hashes(folder)}).encode())
    return folder


@pytest.fixture(scope="module")
def today(rules, folders, tmp_path_factory):
    def made(target):
        return export(rules[KEY], base=folders["llama"], to=target, out=tmp_path_factory.mktemp("today") / target).path

    return {target: made(target) for target in ("hf", "hf-thin")}


@pytest.fixture
def earlier(today, tmp_path, monkeypatch):
    """A folder of a target, made with code that leaves a trace where it runs, and that was this library's once."""
    old = f"open({str(tmp_path / 'ran')!r}, 'w')\n".encode()
    history = payload_history._history()
    files = {**history["files"], CODE: {**history["files"][CODE], atomic.sha256(old): 0}}
    monkeypatch.setattr(payload_history, "_history", lambda: {"fixes": ["this", "that"], "files": files})

    def make(target="hf"):
        folder = shutil.copytree(today[target], tmp_path / "it is", copy_function=os.link)
        atomic.replace_file(folder / CODE, old)
        config = json.loads((folder / "config.json").read_text())
        atomic.replace_file(
            folder / "config.json", json.dumps({**config, "adaras": {**config["adaras"], "x": 1}}).encode()
        )
        return resealed(folder)

    yield make
    assert not (tmp_path / "ran").exists()


def test_the_history_knows_the_payload_of_today():
    """Where this fails, the payload was changed: python tests/support/payload_history.py ["what it lacked before"]."""
    history = payload_history._history()
    assert script.recorded(history) == history
    assert script.payload().keys() < history["files"].keys()  # the others are of earlier versions
    assert sum(map(len, history["files"].values())) > 50
    assert all(0 <= number <= len(history["fixes"]) for found in history["files"].values() for number in found.values())


def test_a_change_of_the_payload_is_recorded_with_what_it_mends():
    history = {"fixes": ["one"], "files": {CODE: {"old": 0}}}
    found = script.recorded(history, "two")
    assert found["fixes"] == ["one", "two"]
    assert found["files"][CODE] == {"old": 0, script.payload()[CODE]: 2}


@pytest.mark.parametrize("target", ["hf", "hf-thin"])
def test_verify_says_what_earlier_code_lacks_and_how_to_renew_it(target, earlier):
    folder = earlier(target)
    said = f"{CODE} (earlier code of this library; it lacks: this; that; run: adaras-export refresh '{folder}')"
    assert failures(folder)["code files that are not the library's"] == said
    assert [check.detail for check in verify_files(folder).failed()] == [said]


@pytest.fixture
def by_family(today, rules, folders, tmp_path):
    """A folder of a target as it was when each family had a code file."""

    def make(target):
        folder = shutil.copytree(today[target], tmp_path / target, copy_function=os.link)
        (folder / "modeling_adaras.py").unlink()
        for path in sorted((Path(__file__).parent / "earlier").iterdir()):
            atomic.replace_file(folder / path.stem, path.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        names = {auto: name.replace("_adaras.", "_adaras_llama.") for auto, name in _auto_map(config).items()}
        _auto_map(config).update(names)
        del config["adaras"]["down_projection"]
        atomic.replace_file(folder / "config.json", json.dumps(config).encode())
        return resealed(folder)

    return make


def _auto_map(config):
    return config["adaras"].get("base", config)["auto_map"]


@pytest.mark.parametrize("target", ["hf", "hf-thin"])
def test_an_export_with_a_code_file_of_its_family_verifies_and_is_refreshed(target, by_family, today):
    folder = by_family(target)
    said = f"it lacks no fix; run: adaras-export refresh {folder})"
    for report in (verify(folder), verify_files(folder)):
        assert report.ok, report.verdict()
        details = [check.detail for check in report.checks if check.name.startswith("code")]
        assert details
        assert all("modeling_adaras_llama.py" in detail and said in detail for detail in details)
    refresh(folder)
    assert {path.name: path.read_bytes() for path in folder.glob("*.py")} == {
        path.name: path.read_bytes() for path in today[target].glob("*.py")
    }
    assert (folder / "config.json").read_bytes() == (today[target] / "config.json").read_bytes()
    assert verify(folder).ok


def test_an_export_of_an_earlier_form_is_held_to_that_form(by_family):
    folder = by_family("hf")
    atomic.replace_file(folder / "modeling_adaras_llama.py", b"import os\n")
    assert not verify_files(resealed(folder)).ok
    assert failures(folder)["code files that are not the library's"] == "steering_adaras.py modeling_adaras_llama.py"


def test_code_that_never_was_the_librarys_is_only_named(earlier):
    folder = earlier()
    (folder / "evil.py").write_text("")
    assert failures(folder)["code files that are not the library's"] == f"{CODE} evil.py"


@pytest.mark.parametrize("target", ["hf", "hf-thin"])
def test_a_refreshed_folder_is_what_an_export_of_today_is(target, earlier, today):
    folder = earlier(target)
    before = json.loads((folder / "receipt.json").read_text())
    report = refresh(folder)
    assert report.parity.ok
    assert verify(folder).ok
    after = json.loads((folder / "receipt.json").read_text())
    assert {name for name in after["files"] if after["files"][name] != before["files"][name]} == {CODE, "config.json"}
    for name in after["files"]:
        assert (folder / name).read_bytes() == (today[target] / name).read_bytes()
        if name.endswith(".safetensors"):
            assert (folder / name).samefile(today[target] / name)
    assert refresh(folder).files == report.files


def test_a_refresh_leaves_other_names_of_its_files_alone(earlier, tmp_path):
    folder = earlier()
    other = shutil.copytree(folder, tmp_path / "other", copy_function=os.link)
    before = hashes(other)
    refresh(folder)
    assert hashes(other) == before


def test_a_base_that_has_moved_can_be_named(earlier, folders, tmp_path):
    folder, base = earlier("hf-thin"), shutil.copytree(folders["llama"], tmp_path / "moved")
    receipt = json.loads((folder / "receipt.json").read_text())
    atomic.replace_file(folder / "receipt.json", json.dumps({**receipt, "source": str(tmp_path / "gone")}).encode())
    with pytest.raises(ArtifactError, match="gone"):
        refresh(folder)
    assert refresh(folder, base).parity.ok
    assert json.loads((folder / "config.json").read_text())["adaras"]["base"]["id"] == str(tmp_path / "gone")


def test_what_cannot_be_refreshed_is_refused_and_left_as_it_was(earlier, tmp_path):
    def refused(change, error, message):
        folder = earlier()
        change(folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(error, match=message):
            refresh(folder)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        shutil.rmtree(folder)

    def strange(folder):
        atomic.replace_file(folder / CODE, b"evil")
        resealed(folder)

    def other_rule(folder):
        path = folder / "model-steering.safetensors"
        tensors = {name: -one if "vector" in name else one for name, one in load_file(path).items()}
        path.unlink()
        save_file(tensors, path, {"format": "pt"})
        resealed(folder)

    refused(lambda folder: (folder / "model.sig").write_text(""), ExportError, "is signed, and a new card would break")
    refused(lambda folder: (folder / "evil.py").write_text(""), ArtifactError, "files unknown: evil.py")
    refused(strange, ExportError, r"steering_adaras\.py: was never code of this library; export again")
    refused(other_rule, ParityError, "not refreshed: FAIL steering tensors that differ.*; export again")


def test_targets_without_code_of_this_library_are_refused(rules, folders, tmp_path):
    folder = export(
        rules[KEY], base=folders["llama"], to="stock", out=tmp_path / "it", accept_loss=["gate", "start", "dial"]
    ).path
    with pytest.raises(ExportError, match="target stock carries no code that could be refreshed; export again"):
        refresh(folder)
