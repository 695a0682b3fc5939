"""The rule: identity, validity, order, and the neurons that the reference published."""

import re
from dataclasses import replace

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from places import SHARED

from adaras_export.core import published_sets
from adaras_export.core.base_model import BaseModel
from adaras_export.core.neurons import NeuronSet
from adaras_export.core.rule import SteeringRule
from adaras_export.errors import ArtifactError, RuleError

DATA = SHARED / "rcn"
BASE = BaseModel("tiny", "qwen3", tiny.LAYERS, tiny.MLP_SIZE, tiny.HIDDEN_SIZE, fingerprint="ab" * 32)
QWEN3 = BaseModel("Qwen3-1.7B", "qwen3", 28, 6144, 2048)


@st.composite
def rules(draw):
    """Valid rules with 0, 1 or many neurons, gated or not."""
    place = st.tuples(st.integers(2, 3), st.integers(0, tiny.MLP_SIZE - 1))
    places = draw(st.lists(place, unique=True, max_size=12))
    numbers = st.floats(-1e6, 1e6, width=32)
    delta = draw(st.lists(numbers, min_size=len(places), max_size=len(places)))
    neurons = NeuronSet(layer=[p[0] for p in places], index=[p[1] for p in places], delta=delta)
    gate = tiny.make_gate(threshold=draw(st.floats(0, 1))) if draw(st.booleans()) else None
    start = draw(st.sampled_from(["last_prompt_token", "first_generated_token"]))
    questions = tuple(draw(st.lists(st.text(max_size=4), max_size=3)))
    return tiny.make_rule(BASE, neurons=neurons, gate=gate, start=start, strength=draw(numbers), questions=questions)


@given(rules())
def test_loading_gives_the_rule_that_was_saved(tmp_path_factory, rule):
    path = tmp_path_factory.getbasetemp() / "rule"
    rule.save(path)
    loaded = SteeringRule.load(path)
    assert loaded == rule
    assert loaded.fingerprint == rule.fingerprint


@given(rules())
def test_neurons_are_in_order_and_each_layer_has_its_own(rule):
    places = list(zip(rule.neurons.layer.tolist(), rule.neurons.index.tolist(), strict=True))
    assert places == sorted(places)
    by_layer = [(layer, index) for layer in rule.layers() for index in rule.neurons_of(layer)[0].tolist()]
    assert by_layer == places


def test_the_order_in_which_neurons_and_features_are_given_does_not_matter():
    rule = tiny.make_rule(BASE, gate=tiny.make_gate())
    swapped = replace(rule.neurons, **{name: getattr(rule.neurons, name)[::-1] for name in ("layer", "index", "delta")})
    columns = {
        name: getattr(rule.gate, name)[..., ::-1] for name in ("layer", "index", "attention_weight", "hidden_weight")
    }
    again = replace(rule, neurons=swapped, gate=replace(rule.gate, **columns))
    assert again.fingerprint == rule.fingerprint


RULE = tiny.make_rule(BASE, gate=tiny.make_gate(), questions=("q",))
GATE_CHANGES = {
    "threshold": 0.25,
    "attention_weight": RULE.gate.attention_weight + 1,
    "attention_bias": 7.0,
    "hidden_weight": RULE.gate.hidden_weight * 2,
    "hidden_bias": RULE.gate.hidden_bias * 2,
    "output_weight": RULE.gate.output_weight * 2,
    "output_bias": 7.0,
    "index": (RULE.gate.index + 1) % tiny.MLP_SIZE,
    "layer": 1 - RULE.gate.layer,
}
CHANGES = {
    "strength": {"strength": 0.25},
    "start": {"start": "first_generated_token"},
    "gate": {"gate": None},
    "questions": {"questions": ("other",)},
    "base": {"base": replace(BASE, id="other"), "neurons": tiny.make_neurons(), "gate": tiny.make_gate()},
    "revision": {"base": replace(BASE, revision="other"), "neurons": tiny.make_neurons(), "gate": tiny.make_gate()},
    "delta": {"neurons": replace(RULE.neurons, delta=-RULE.neurons.delta)},
    "index": {"neurons": replace(RULE.neurons, index=(RULE.neurons.index + 1) % tiny.MLP_SIZE)},
    "layer": {"neurons": replace(RULE.neurons, layer=5 - RULE.neurons.layer)},
    "count": {"neurons": RULE.neurons.top(5)},
    "ranking": {"neurons": replace(RULE.neurons, ranking="paper")},
    "score": {"neurons": replace(RULE.neurons, score=np.ones(6))},
    **{f"gate.{name}": {"gate": replace(RULE.gate, **{name: value})} for name, value in GATE_CHANGES.items()},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_fingerprint_changes_with_every_field(change):
    assert replace(RULE, **change).fingerprint != RULE.fingerprint


def test_one_value_is_one_byte_string_for_ever():
    """The fingerprint is printed in published artifacts: a change of the format must raise its version."""
    neurons = NeuronSet(layer=[2, 3], index=[5, 1], delta=[0.5, -1.5])
    rule = SteeringRule(neurons=neurons, strength=0.3, base=BASE)
    assert rule.fingerprint == "260bc414564c6e49f28be7bf9fd2ce3f5e5713ae35de161f7fdcf09c0d2d501a"


def test_with_strength_changes_the_strength_only():
    assert RULE.with_strength(1.5).with_strength(RULE.strength) == RULE
    assert RULE.with_strength(1.5).strength == 1.5


def test_ungated_keeps_everything_but_the_gate():
    assert RULE.ungated() == replace(RULE, gate=None)
    assert RULE.ungated().gate is None


def test_a_rule_remembers_the_questions_of_all_its_parts():
    neurons, gate = replace(tiny.make_neurons(), questions=("n",)), replace(tiny.make_gate(), questions=("g", "n"))
    assert tiny.make_rule(BASE, neurons=neurons, gate=gate, questions=("r",)).questions == ("g", "n", "r")


@pytest.mark.parametrize("strength", [np.nan, np.inf, "1", None, True, [1.0]])
def test_a_strength_that_is_no_finite_number_is_refused(strength):
    with pytest.raises(RuleError, match=r"rule: strength is .*; expected a finite number"):
        RULE.with_strength(strength)


def test_an_unknown_start_is_refused_with_the_known_ones():
    expected = "start is 'now'; expected one of: last_prompt_token, first_generated_token"
    with pytest.raises(RuleError, match=expected):
        replace(RULE, start="now")


@pytest.mark.parametrize("layers", [(2,), (3,), (0, 2)])
def test_a_gate_that_reads_steered_layers_cannot_decide_at_the_last_prompt_token(layers):
    gate = tiny.make_gate(layers=layers)
    with pytest.raises(RuleError, match=f"gate reads layer {layers[-1]}, steering begins in layer 2.*first_generated"):
        tiny.make_rule(BASE, gate=gate)
    assert not tiny.make_rule(BASE, gate=gate, start="first_generated_token").causal


def test_a_gate_below_the_steered_layers_is_causal():
    assert RULE.causal
    assert RULE.ungated().causal


OTHERS = {
    "family": "llama",
    "layers": 5,
    "mlp_size": 64,
    "hidden_size": 40,
    "fingerprint": "cd" * 32,
}


@pytest.mark.parametrize("field", OTHERS)
def test_parts_of_another_model_are_refused_by_what_differs(field):
    other = replace(BASE, **{field: OTHERS[field]})
    for part in (
        {"neurons": replace(tiny.make_neurons(), base=other)},
        {"gate": replace(tiny.make_gate(), base=other)},
    ):
        with pytest.raises(RuleError, match=rf"{field} .* \(expected {OTHERS[field]}\)"):
            tiny.make_rule(BASE, **part)


def test_every_difference_of_another_model_is_named():
    other = replace(BASE, **OTHERS)
    with pytest.raises(RuleError) as caught:
        tiny.make_rule(BASE, neurons=replace(tiny.make_neurons(), base=other))
    assert all(f"{name} " in str(caught.value) for name in OTHERS)


def test_parts_of_a_model_whose_weights_are_not_recorded_fit():
    unrecorded = replace(BASE, fingerprint=None)
    rule = tiny.make_rule(BASE, neurons=replace(tiny.make_neurons(), base=unrecorded))
    assert rule.neurons.base == BASE


def test_neurons_outside_the_model_are_refused_when_the_rule_is_made():
    with pytest.raises(RuleError, match=r"index \[99\] outside 0..47 of tiny"):
        tiny.make_rule(BASE, neurons=NeuronSet(layer=[1], index=[99], delta=[1.0]))


def test_top_takes_the_first_and_refuses_more_than_there_are():
    neurons = tiny.make_neurons()
    assert neurons.top(2).index.tolist() == neurons.index[:2].tolist()
    assert len(neurons.top(0)) == 0
    with pytest.raises(RuleError, match="neurons: 7 requested; the set has 6"):
        neurons.top(7)


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 100, 400, -200, -8, -1])
def test_a_truncated_file_is_refused_by_name(cut, tmp_path):
    RULE.save(tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:cut])
    with pytest.raises(ArtifactError, match=r"cut: .*; expected a rule file of adaras_export"):
        SteeringRule.load(tmp_path / "cut")


@given(st.integers(0, 1200), st.integers(1, 255))
def test_a_damaged_byte_of_the_header_never_escapes_as_another_error(tmp_path_factory, at, flip):
    content = bytearray(RULE.to_bytes())
    content[at % len(content)] ^= flip
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    try:
        assert SteeringRule.load(path) is not None  # a damaged number is another rule, with another fingerprint
    except (ArtifactError, RuleError):
        pass


@pytest.mark.skipif(not DATA.is_dir(), reason="the reference's neuron sets are not on this machine")
@pytest.mark.parametrize("task", ["aime", "amc", "gsm8k", "humaneval", "math"])
def test_the_published_neuron_sets_load(task):
    neurons = NeuronSet.from_reference_csv(DATA / f"{task}_qwen3-1.7b_top200.csv", base=QWEN3)
    assert len(neurons) == 200
    assert neurons.ranking == "given"
    rows = (DATA / f"{task}_qwen3-1.7b_top200.csv").read_text().splitlines()
    first = dict(zip(rows[0].split(","), rows[1].split(","), strict=True))
    assert neurons.layer[0] * 6144 + neurons.index[0] == int(first["overall_neuron_index"])
    assert neurons.delta[0] == np.float32(first["weight"])
    top = NeuronSet.from_reference_csv(DATA / f"{task}_qwen3-1.7b_top200.csv", top=50)
    assert (top.index == neurons.index[:50]).all()


HEAD = "overall_neuron_index,layer,neuron_index_in_layer,weight\n"


def test_of_a_published_set_the_questions_are_known_whatever_its_file_is_called(tmp_path, monkeypatch):
    """Rules of published neurons knew no questions, so that nothing was seen before."""
    rows = [(layer, 7 * layer, 0.5) for layer in range(12)]
    known = {"first_neurons": published_sets.first_neurons(rows), "questions": ["b.c", "a.d"]}
    monkeypatch.setattr(published_sets, "published", lambda: {"a set": known})
    for kept, expected in ((rows, ("a.d", "b.c")), (rows[:10], ("a.d", "b.c")), (rows[1:], ()), (rows[::-1], ())):
        lines = [f"{100 * layer + index},{layer},{index},{delta}\n" for layer, index, delta in kept]
        (tmp_path / "mine.csv").write_text(HEAD + "".join(lines))
        assert NeuronSet.from_reference_csv(tmp_path / "mine.csv", top=4).questions == expected


def test_what_is_shipped_of_published_sets_are_digests():
    for name, known in published_sets.published().items():
        assert re.fullmatch("[0-9a-f]{16}", known["first_neurons"]), name
        assert len({*known["questions"]}) == 15
        assert all(re.fullmatch(r"[0-9a-f]{16}\.[0-9a-f]{16}", one) for one in known["questions"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"columns \['overall_neuron_index'.* are missing"),
        ("overall_neuron_index,layer,weight\n1,2,3\n", r"columns \['neuron_index_in_layer'\] are missing"),
        (HEAD, "has no rows; expected one neuron a row"),
        (HEAD + "6145,1,1,0.5\n6147,1,x,0.5\n", r"top.csv:3: invalid literal .*; expected numbers"),
        (HEAD + "6145,1,1\n", r"top.csv:2: .*; expected numbers"),
        (HEAD + "6145,1,1,0.5\n20000,2,2,0.5\n", r"top.csv:3: overall_neuron_index 20000 contradicts the rows above"),
        (HEAD + "7,0,8,0.5\n", r"top.csv:2: overall_neuron_index 7 contradicts"),
        (HEAD + "6145,1,1,nan\n", "top.csv:2: holds NaN, infinity"),
        (HEAD + "6145,1,1,0.5\n6145,1,1,0.5\n", r"\[1:1\] given more than once"),
        (HEAD + "-5,-1,1,0.5\n", r"layer \[-1\] outside"),
    ],
)
def test_a_bad_reference_file_is_refused_with_its_line(content, message, tmp_path):
    (tmp_path / "top.csv").write_text(content)
    with pytest.raises(RuleError, match=message):
        NeuronSet.from_reference_csv(tmp_path / "top.csv")


def test_a_reference_file_of_another_encoding_or_none_at_all_is_refused(tmp_path):
    (tmp_path / "top.csv").write_bytes(b"\xff\xfe\x00layer")
    for name in ("top.csv", "missing.csv"):
        with pytest.raises(RuleError, match=rf"{name}: .*; expected a CSV file of the reference"):
            NeuronSet.from_reference_csv(tmp_path / name)


def test_fewer_rows_than_wanted_are_refused(tmp_path):
    (tmp_path / "top.csv").write_text(HEAD + "6145,1,1,0.5\n")
    with pytest.raises(RuleError, match="neurons: 50 requested; the set has 1"):
        NeuronSet.from_reference_csv(tmp_path / "top.csv", top=50)
