"""What all frozen values share: one file each, the same bytes for the same value, and no bad value is born."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

from adaras_export.core.base_model import BaseModel
from adaras_export.core.gate import Gate
from adaras_export.core.neuron_stats import AttributionStats, NeuronStats
from adaras_export.core.neurons import NeuronSet
from adaras_export.core.rule import SteeringRule
from adaras_export.errors import ArtifactError, RuleError
from adaras_export.files.safetensors_record import to_bytes

BASE = BaseModel("tiny", "qwen3", tiny.LAYERS, tiny.MLP_SIZE, tiny.HIDDEN_SIZE, fingerprint="ab" * 32)


def every_kind():
    """One value of each kind, with all optional parts."""
    neurons = replace(
        tiny.make_neurons(), mean_correct=np.ones(6), mean_incorrect=np.zeros(6), score=np.arange(6.0), questions=("q",)
    )
    draw = np.random.default_rng(0)
    stats = NeuronStats.empty(BASE).update("01", *draw.normal(size=(2, 3, tiny.LAYERS, tiny.MLP_SIZE)))
    attribution = AttributionStats.empty(BASE).update("01", draw.normal(size=(tiny.LAYERS, tiny.MLP_SIZE)))
    rule = tiny.make_rule(BASE, neurons=neurons, gate=replace(tiny.make_gate(), questions=("p",)))
    return {"neurons": neurons, "gate": rule.gate, "rule": rule, "stats": stats, "attribution": attribution}


VALUES = every_kind()
kinds = pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)


@kinds
def test_loading_gives_what_was_saved(value, tmp_path):
    value.save(tmp_path / "file")
    loaded = type(value).load(tmp_path / "file")
    assert loaded == value
    assert hash(loaded) == hash(value)


@kinds
def test_saving_twice_gives_the_same_bytes(value, tmp_path):
    value.save(tmp_path / "one")
    type(value).load(tmp_path / "one").save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_another_process_with_another_hash_seed_writes_the_same_bytes(tmp_path):
    """safetensors 0.8 orders several metadata keys by a hash that changes from process to process; we use one."""
    for name, value in VALUES.items():
        value.save(tmp_path / name)
    script = (
        "import sys; from adaras_export.core import gate, neuron_stats, neurons, rule; from pathlib import Path\n"
        "homes = {'neurons': neurons.NeuronSet, 'gate': gate.Gate, 'rule': rule.SteeringRule,\n"
        "         'stats': neuron_stats.NeuronStats, 'attribution': neuron_stats.AttributionStats}\n"
        "for name, kind in homes.items(): kind.load(Path(sys.argv[1], name)).save(Path(sys.argv[1], name + '2'))"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True, env={"PYTHONHASHSEED": "7"}, cwd=_root())
    for name in VALUES:
        assert (tmp_path / name).read_bytes() == (tmp_path / f"{name}2").read_bytes()


@kinds
def test_a_value_of_one_kind_is_not_read_as_another(value, tmp_path):
    value.save(tmp_path / "file")
    other = Gate if isinstance(value, NeuronSet) else NeuronSet
    with pytest.raises(ArtifactError, match=f"is a {value.kind} file; expected a {other.kind} file"):
        other.load(tmp_path / "file")


@kinds
def test_a_later_format_version_is_refused(value, tmp_path):
    record = {**value._record(), "version": 2}
    (tmp_path / "file").write_bytes(to_bytes(value.kind, value._arrays(), record))
    with pytest.raises(ArtifactError, match="format version 2; expected 1; use a newer adaras-export"):
        type(value).load(tmp_path / "file")


@kinds
def test_a_file_without_one_of_its_records_is_refused(value, tmp_path):
    for key in value._record():
        record = {name: entry for name, entry in value._record().items() if name != key}
        (tmp_path / "file").write_bytes(to_bytes(value.kind, value._arrays(), record))
        with pytest.raises(ArtifactError, match="damaged"):
            type(value).load(tmp_path / "file")


@kinds
def test_a_file_with_a_record_of_another_type_is_refused(value, tmp_path):
    for key in value._record():
        for wrong in ("odd", 7.5, [], None, {"odd": 1}):
            record = {**value._record(), key: wrong}
            (tmp_path / "file").write_bytes(to_bytes(value.kind, value._arrays(), record))
            try:
                assert isinstance(type(value).load(tmp_path / "file"), type(value))  # where the type is right
            except (ArtifactError, RuleError):
                pass


@kinds
def test_a_file_without_one_of_its_arrays_or_with_one_too_many_is_refused(value, tmp_path):
    optional = {"neurons.mean_correct", "neurons.mean_incorrect", "neurons.score", *NeuronSet._optional}
    arrays = value._arrays()
    optional |= {name for name in arrays if name.endswith("_rest")}  # no rest is a rest of 0
    wrong = [{name: a for name, a in arrays.items() if name != gone} for gone in arrays if gone not in optional]
    for damaged in [*wrong, {**arrays, "odd": np.zeros(1)}, {**arrays, "odd.odd": np.zeros(1)}]:
        (tmp_path / "file").write_bytes(to_bytes(value.kind, damaged, value._record()))
        with pytest.raises(ArtifactError, match="damaged"):
            type(value).load(tmp_path / "file")


@kinds
def test_values_are_frozen(value):
    for field in fields(value):
        with pytest.raises(FrozenInstanceError):
            setattr(value, field.name, None)
        held = getattr(value, field.name)
        if isinstance(held, np.ndarray):
            with pytest.raises(ValueError, match="read-only"):
                held[...] = 0


def test_a_value_keeps_its_arrays_when_the_caller_changes_his():
    delta = np.ones(2)
    neurons = NeuronSet(layer=[0, 1], index=[0, 0], delta=delta)
    delta[:] = 9
    assert neurons.delta.tolist() == [1, 1]


@given(st.booleans(), st.integers(1, 4), st.integers(1, 4))
def test_arrays_in_fortran_order_are_saved_as_the_values_they_hold(transposed, features, hidden):
    """Symptom: a gate computed something else behind save and load. Cause: safetensors.numpy writes the memory of a
    Fortran-order array as if it were in C order. Fix: values hold C order. A false alarm is impossible: the
    entries are all different."""
    weight = np.arange(hidden * features, dtype=np.float32).reshape(hidden, features)
    given_weight = np.asfortranarray(weight) if transposed else weight
    gate = Gate(
        layer=np.zeros(features, int), index=np.arange(features), attention_weight=np.zeros(features),
        attention_bias=0.0, hidden_weight=given_weight, hidden_bias=np.zeros(hidden), output_weight=np.zeros(hidden),
        output_bias=0.0, threshold=0.5,
    )  # fmt: skip
    assert gate.hidden_weight.flags.c_contiguous
    assert Gate._restore(gate._arrays(), gate._record(), "gate").hidden_weight.tolist() == weight.tolist()


def test_values_of_different_kinds_are_not_equal():
    assert VALUES["neurons"] != VALUES["gate"]
    assert VALUES["neurons"] != "neurons"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta": [np.nan, 1]}, "delta holds NaN or infinity"),
        ({"delta": [np.inf, 1]}, "delta holds NaN or infinity"),
        ({"delta": [1e39, 1]}, "delta exceeds the range of float32"),
        ({"delta": ["a", "b"]}, "delta holds <U1; expected numbers"),
        ({"delta": [1.0]}, "lengths differ: layer 2, index 2, delta 1"),
        ({"delta": [[1.0, 2.0]]}, "delta has shape .1, 2.; expected one dimension"),
        ({"index": [0.0, 1.0]}, "index holds float64; expected integers"),
        ({"index": [True, False]}, "index holds bool; expected integers"),
        ({"layer": [-1, 0]}, r"layer \[-1\] outside 0 or more"),
        ({"index": [0, -7]}, r"index \[-7\] outside 0 or more"),
        ({"layer": [0, 4], "base": BASE}, r"layer \[4\] outside 0..3 of tiny"),
        ({"index": [48, 99], "base": BASE}, r"index \[48, 99\] outside 0..47 of tiny"),
        ({"layer": [1, 1], "index": [5, 5]}, r"neuron \(layer:index\) \[1:5\] given more than once"),
        ({"score": [np.nan, 0.0]}, "score holds NaN or infinity"),
        ({"score": [1.0]}, "lengths differ"),
        ({"ranking": "best"}, "ranking is 'best'; expected one of: given, paper, absolute, cohen_d, t"),
    ],
)
def test_a_bad_neuron_set_is_not_born(changes, message):
    good = {"layer": [0, 1], "index": [3, 3], "delta": [1.0, 2.0]}
    with pytest.raises(RuleError, match=message):
        NeuronSet(**{**good, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": np.nan}, "threshold is nan; expected a finite number"),
        ({"threshold": 1.5}, "threshold 1.5 is not a probability"),
        ({"threshold": -0.1}, "threshold -0.1 is not a probability"),
        ({"threshold": None}, "threshold is None; expected a finite number"),
        ({"threshold": True}, "threshold is True; expected a finite number"),
        ({"attention_weight": np.ones(4)}, r"attention_weight has shape \(4,\); expected \(F=5\)"),
        ({"hidden_weight": np.ones((4, 3))}, r"hidden_weight has shape \(4, 3\); expected \(H=4, F=5\)"),
        ({"hidden_bias": np.ones(3)}, r"hidden_bias has shape \(3,\); expected \(H=4\)"),
        ({"output_bias": [1.0]}, r"output_bias has shape \(1,\); expected \(\)"),
        ({"output_weight": np.full(4, np.inf)}, "output_weight holds NaN or infinity"),
        ({"layer": [0, 0, 0, 0]}, "lengths differ: layer 4, index 5"),
        ({"layer": [0] * 5, "index": [1] * 5}, r"neuron \(layer:index\) \[0:1\] given more than once"),
        ({"base": replace(BASE, layers=1), "layer": [2] * 5}, r"layer \[2, 2, 2, 2, 2\] outside 0..0 of tiny"),
    ],
)
def test_a_bad_gate_is_not_born(changes, message):
    with pytest.raises(RuleError, match=message):
        replace(tiny.make_gate(), **changes)


def test_a_gate_without_features_or_hidden_units_is_not_born():
    empty = {"layer": [], "index": [], "attention_weight": [], "hidden_weight": np.zeros((4, 0))}
    with pytest.raises(RuleError, match="0 features and 4 hidden units; expected at least one of each"):
        replace(tiny.make_gate(), **empty)


def test_all_offenders_are_named_up_to_five():
    with pytest.raises(RuleError, match=r"\[48, 49, 50, 51, 52, ...\] outside"):
        NeuronSet(layer=[0] * 7, index=range(48, 55), delta=[0.0] * 7, base=BASE)


@given(
    st.integers(1, 5),
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(-2, 6), st.integers(-2, 10)), unique=True, max_size=20),
)
def test_a_neuron_is_accepted_exactly_where_the_model_has_one(layers, mlp_size, places):
    base = BaseModel("x", "llama", layers, mlp_size, 8)
    layer, index = [place[0] for place in places], [place[1] for place in places]
    inside = all(0 <= one < layers and 0 <= two < mlp_size for one, two in places)
    try:
        neurons = NeuronSet(layer=layer, index=index, delta=[1.0] * len(places), base=base)
    except RuleError:
        assert not inside
    else:
        assert inside
        assert list(zip(neurons.layer.tolist(), neurons.index.tolist(), strict=True)) == places


def _root():
    return ROOT


def test_the_kinds_are_named_differently():
    kinds_named = [kind.kind for kind in (NeuronSet, Gate, SteeringRule, NeuronStats, AttributionStats)]
    assert len(set(kinds_named)) == 5
