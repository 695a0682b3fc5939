"""Files: atomic writes, the same bytes, and clear refusals of what is not ours."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save
from safetensors.torch import save_file as save_torch

from adaras_export.errors import ArtifactError
from adaras_export.files import atomic, safetensors_record

ARRAYS = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros((0,), np.int64), "c": np.float64(2.5)}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text().filter(lambda key: key != "kind"), JSON, max_size=5))
def test_any_record_comes_back(tmp_path_factory, record):
    path = tmp_path_factory.getbasetemp() / "record"
    try:
        safetensors_record.save_file(path, "thing", ARRAYS, record)
    except UnicodeEncodeError:  # half a surrogate pair is not text
        return
    arrays, found = safetensors_record.load_file(path, "thing")
    assert found == record
    assert all(np.array_equal(arrays[name], ARRAYS[name]) for name in ARRAYS)


def test_the_order_of_arrays_and_records_does_not_change_the_bytes():
    one = safetensors_record.to_bytes("thing", ARRAYS, {"x": 1, "y": 2})
    assert one == safetensors_record.to_bytes("thing", dict(reversed(ARRAYS.items())), {"y": 2, "x": 1})


def test_an_array_in_fortran_order_is_written_as_it_reads(tmp_path):
    """safetensors.numpy alone writes the memory, so a transposed array would come back with other values."""
    transposed = np.arange(6, dtype=np.float32).reshape(3, 2).T
    safetensors_record.save_file(tmp_path / "f", "thing", {"x": transposed}, {})
    assert np.array_equal(safetensors_record.load_file(tmp_path / "f", "thing")[0]["x"], transposed)


def test_nan_in_a_record_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        safetensors_record.to_bytes("thing", {}, {"x": float("nan")})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="gone: no such file; expected a rule file of adaras_export"):
        safetensors_record.load_file(tmp_path / "gone", "rule")


@pytest.mark.parametrize("metadata", [None, {"other": "1"}, {"adaras": "{"}, {"adaras": "[1]"}])
def test_a_safetensors_file_that_is_not_ours_is_refused(metadata, tmp_path):
    (tmp_path / "file").write_bytes(save({"x": np.zeros(1)}, metadata=metadata))
    with pytest.raises(ArtifactError, match=r"file: (has no adaras|damaged) metadata"):
        safetensors_record.load_file(tmp_path / "file", "rule")


@pytest.mark.parametrize("taught", [False, True])
def test_a_type_that_numpy_lacks_is_refused(taught, tmp_path):
    if taught:
        pytest.importorskip("ml_dtypes")  # which onnx imports
    save_torch({"x": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "file", metadata={"adaras": '{"kind": "rule"}'})
    with pytest.raises(ArtifactError, match="expected a rule file"):
        safetensors_record.load_file(tmp_path / "file", "rule")


@given(st.binary(max_size=64))
def test_arbitrary_bytes_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        safetensors_record.load_file(path, "rule")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="expected a rule file"):
        safetensors_record.load_file(tmp_path, "rule")


def test_a_write_replaces_the_file_and_leaves_no_other(tmp_path):
    atomic.replace_file(tmp_path / "f", b"one")
    atomic.replace_file(tmp_path / "f", b"two")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == b"two"
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    atomic.replace_file(tmp_path / "f", b"one")

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ArtifactError, match=r"f: cannot be written \(No space left on device\); nothing was changed"):
        atomic.replace_file(tmp_path / "f", b"two")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"one"]


def test_writing_into_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"cannot be written .No such file or directory."):
        atomic.replace_file(tmp_path / "gone" / "f", b"")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff"])
def test_json_that_is_no_object_is_refused(content, tmp_path):
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"f.json: .*expected a JSON object"):
        atomic.read_json(tmp_path / "f.json")


def test_a_json_object_is_read(tmp_path):
    (tmp_path / "f.json").write_text(json.dumps({"ä": [1]}), encoding="utf-8")
    assert atomic.read_json(tmp_path / "f.json") == {"ä": [1]}


def test_hashes_of_a_file_and_of_its_content_agree(tmp_path):
    content = bytes(range(256)) * 5000  # more than one piece of 1 MiB
    (tmp_path / "f").write_bytes(content)
    assert atomic.sha256_file(tmp_path / "f") == atomic.sha256(content)
