"""Random tampering with an export of every target is named; also, by `verify`, where the receipt was made to fit."""

import json

import artifacts
import pytest
import tampering
from hypothesis import given, settings
from hypothesis import strategies as st

from adaras_export import delivery, integrity, receipts
from adaras_export.errors import AdarasError

each_export = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow, *([pytest.mark.onnx] if name == "onnx" else [])])
        for name in artifacts.EXPORTS
    ],
)
any_way = st.sampled_from(tampering.WAYS)


def said_by(job, folder):
    """What a failed verification says, or the error that it is refused with; nothing where it passes."""
    try:
        return [f"{check.name}: {check.detail}" for check in job(folder).failed()]
    except AdarasError as error:
        return [str(error)]


def tamper_often(exported, folder, examples, require):
    """Let ``require`` see copies of an export that were tampered with in random ways, and what was touched."""

    @settings(max_examples=examples)
    @given(way=any_way, data=st.data())
    def once(way, data):
        artifacts.copy(exported, folder)
        require(folder, way(folder, data.draw))

    once()


def require_named_by_their_hash(folder, touched):
    said = said_by(integrity.verify_files, folder)
    for name in touched:
        assert any(receipts.shown(name) in line for line in said), (name, said)


def test_whatever_is_tampered_with_is_named_by_its_hash(exported, tmp_path):
    tamper_often(exported["hf"], tmp_path / "copy", 20, require_named_by_their_hash)


@each_export
def test_whatever_is_tampered_with_is_named_by_its_hash_in_every_target(name, exported, tmp_path):
    tamper_often(exported[name], tmp_path / "copy", 60, require_named_by_their_hash)
