"""Random tampering with an export of every target is named; also, by `verify`, where the receipt was made to fit."""

import json
import os
import pickle
import re
from dataclasses import replace

import artifacts
import pytest
import tampering
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from adaras_export.delivery import integrity, verifier
from adaras_export.errors import AdarasError
from adaras_export.exporters import manifest
from adaras_export.exporters.hf.exporter import HuggingFaceExporter
from adaras_export.files import atomic

MARKS = {"onnx": [pytest.mark.onnx]}
each_export = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow, *MARKS.get(name, [])]) for name in artifacts.EXPORTS]
)


def said_by(job, folder, **how):
    """What a failed verification says, or the error that it is refused with; nothing where it passes."""
    try:
        return [f"{check.name}: {check.detail}" for check in job(folder, **how).failed()]
    except AdarasError as error:
        return [str(error)]


def tamper_often(exported, folder, examples, require, **how):
    """Let ``require`` see copies of an export that were tampered with in random ways, and what was touched."""

    @settings(max_examples=examples, **how)
    @given(way=st.sampled_from(tampering.WAYS), data=st.data())
    def once(way, data):
        artifacts.copy(exported, folder)
        require(folder, way(folder, data.draw))

    once()


def require_named_by_their_hash(folder, touched):
    said = said_by(integrity.verify_files, folder)
    for name in touched:
        assert any(manifest.shown(name) in line for line in said), (name, said)


def require_named_although_it_fits(folder, touched):
    """By the file's name, or by what the file holds: a tensor, a setting."""
    with torch.random.fork_rng():  # tensors that are missing are drawn at random
        said = said_by(verifier.verify, artifacts.refit(folder))
    held = [
        line
        for line in said
        if re.match(r"(\S+ )*(tensors|biases|entries|directions|metadata|operators)\b.*: \S", line)
    ]
    named = [line for line in said if any(manifest.shown(name) in line for name in touched)]
    lost_index = [line for line in said if "no model.safetensors and no index" in line]
    assert held or named or lost_index, said


def test_whatever_is_tampered_with_is_named_by_its_hash(exported, tmp_path):
    tamper_often(exported["hf"], tmp_path / "copy", 40, require_named_by_their_hash)


@each_export
def test_whatever_is_tampered_with_is_named_by_its_hash_in_every_target(name, exported, tmp_path):
    tamper_often(exported[name], tmp_path / "copy", 6, require_named_by_their_hash)


@each_export
def test_whatever_is_tampered_with_is_named_by_verify_although_the_receipt_fits(name, exported, tmp_path):
    """Most ways are those of any folder, so that one target is tried thoroughly; each looks over its own files."""
    tamper_often(exported[name], tmp_path / "copy", 30 if name == "hf" else 6, require_named_although_it_fits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf", "peft"])
def test_a_receipt_known_from_elsewhere_finds_what_fits(name, exported, tmp_path):
    known = atomic.sha256_file(exported[name] / "receipt.json")

    def require_found(folder, touched):
        assert said_by(integrity.verify_files, artifacts.refit(folder), receipt=known)

    tamper_often(exported[name], tmp_path / "copy", 40, require_found)


@pytest.mark.slow
@settings(max_examples=60)
@given(at=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
def test_another_byte_in_the_receipt_is_refused_or_looked_into_and_never_a_crash(at, change, exported):
    path = exported["hf"] / "receipt.json"
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[int(at * len(content))] ^= change
    known = atomic.sha256(content)
    path.write_bytes(damaged)
    try:
        said_by(verifier.verify, exported["hf"])
        assert said_by(integrity.verify_files, exported["hf"], receipt=known)
    finally:
        path.write_bytes(content)


# Code of others


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def point_to_evil(path, **more):
    """A config that names evil.py as the code of everything."""
    config = json.loads(path.read_text()) if path.exists() else {}
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    config["auto_map"] = {**dict.fromkeys(names, "evil.Evil"), "AutoTokenizer": ["evil.Evil", None]}
    path.write_text(json.dumps(config | more))


def plant(folder, trap):
    """Code and pickles wherever something might run them, and configs that point there."""
    code = f"import os\nos.mkdir({str(trap)!r})\n"
    own = sorted(folder.rglob("*.py"))
    for name in ("evil.py", "custom_generate/generate.py", "sitecustomize.py", "onnx/evil.py", "__init__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    for path in own:
        path.write_text(code + path.read_text())
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "x.pkl"):
        (folder / name).write_bytes(pickle.dumps(Trap(trap)))
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        point_to_evil(folder / name)
    point_to_evil(folder / "adapter_config.json", auto_mapping={"base_model_class": "Evil", "parent_library": "evil"})


@each_export
def test_no_code_and_no_pickle_of_others_runs(name, exported, tmp_path):
    folder, trap = artifacts.copy(exported[name], tmp_path / "copy"), tmp_path / "it-ran"
    plant(folder, trap)
    for job in (integrity.verify_files, verifier.verify):
        for fitting in (False, True):
            assert said_by(job, artifacts.refit(folder) if fitting else folder)
    assert not trap.exists()


@pytest.mark.slow
def test_the_traps_of_the_last_test_would_run(exported, tmp_path):
    folder, traps = artifacts.copy(exported["hf"], tmp_path / "copy"), [tmp_path / "one", tmp_path / "two"]
    plant(folder, traps[0])
    with pytest.raises((OSError, AttributeError, ImportError, ValueError)):
        HuggingFaceExporter().load(folder)
    pickle.loads(pickle.dumps(Trap(traps[1])))  # noqa: S301
    assert all(trap.exists() for trap in traps)


# The properties can fail

FIRST = {"phases": [Phase.generate]}


@pytest.mark.slow
def test_the_property_fails_where_only_the_size_of_a_file_is_looked_at(exported, tmp_path, monkeypatch):
    sizes = {atomic.sha256_file(path): path.stat().st_size for path in exported["hf"].iterdir()}
    by_size = {size: digest for digest, size in sizes.items()}
    monkeypatch.setattr(atomic, "sha256_file", lambda path: by_size.get(path.stat().st_size, "other"))
    with pytest.raises(AssertionError):
        tamper_often(exported["hf"], tmp_path / "copy", 60, require_named_by_their_hash, **FIRST)


@pytest.mark.slow
def test_the_property_fails_where_hidden_files_are_none_of_the_artifact(exported, tmp_path, monkeypatch):
    entries = manifest.entries
    shown = lambda folder: {name: path for name, path in entries(folder).items() if not name.startswith(".")}  # noqa: E731
    monkeypatch.setattr(manifest, "entries", shown)
    with pytest.raises(AssertionError):
        tamper_often(exported["hf"], tmp_path / "copy", 200, require_named_by_their_hash, **FIRST)


@pytest.mark.slow
def test_the_property_of_fitting_receipts_fails_where_only_code_and_settings_are_looked_at(
    exported, tmp_path, monkeypatch
):
    inspect = HuggingFaceExporter.inspect
    monkeypatch.setattr(HuggingFaceExporter, "inspect", lambda *args: replace(inspect(*args), tensors=()))
    with pytest.raises(AssertionError):
        tamper_often(exported["hf"], tmp_path / "copy", 60, require_named_although_it_fits, **FIRST)
