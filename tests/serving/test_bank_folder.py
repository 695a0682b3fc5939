"""The folder of a bank: the base's weights by link, and the tensors and settings of all rules. Needs no vLLM."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from adaras_export.core.bank import BankRule
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.folding import vectors
from adaras_export.errors import ArtifactError, MissingExtraError, RuleError
from adaras_export.serving.vllm.bank import opened, write_bank
from adaras_export.serving.vllm.dials import Dials, dials_of, gates_of, rules_of

BASE = "qwen3-sharded"


@pytest.fixture
def bank(bases):
    one, other = tiny.make_gate(0), tiny.make_gate(3, layers=(1,))
    make = {"base": bases[BASE]}
    return [
        BankRule("one", tiny.make_rule(**make, gate=one)),
        BankRule("other", tiny.make_rule(**make, gate=other, strength=-1.0, start="first_generated_token")),
        BankRule("again", tiny.make_rule(**make, gate=replace(one, threshold=0.25))),
        BankRule("all", tiny.make_rule(**make, neurons=tiny.make_neurons(1, layers=(1, 2))), everywhere=True),
    ]


@pytest.fixture
def written(bank, folders, tmp_path):
    write_bank(tmp_path, Checkpoint(folders[BASE]), bank)
    return json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "bank.safetensors")


def test_the_weights_are_links_to_those_of_the_base(written, folders, tmp_path):
    files = {path.resolve() for path in Checkpoint(folders[BASE]).files.values()}
    assert len(files) > 1
    assert {path.resolve() for path in tmp_path.glob("*.safetensors") if path.is_symlink()} == files
    assert sorted(path.name for path in tmp_path.iterdir() if not path.is_symlink()) == [
        "bank.safetensors",
        "config.json",
    ]


def test_the_settings_are_those_of_the_rules_and_equal_gates_are_one(written, bank, folders):
    config, _ = written
    plain = Checkpoint(folders[BASE]).config
    assert {key: config[key] for key in plain if key not in ("model_type", "architectures")}.items() <= plain.items()
    assert (config["model_type"], config["architectures"]) == ("adaras_qwen3", ["AdaRASQwen3ForCausalLM"])
    settings, (one, other, again, all_) = config["adaras"], rules_of(config["adaras"])
    assert [rule.name for rule in (one, other, again, all_)] == ["one", "other", "again", "all"]
    assert [rule.gate for rule in (one, other, again, all_)] == [0, 1, 0, None]
    assert (one.threshold, again.threshold, other.strength) == (0.5, 0.25, -1.0)
    assert (other.start, all_.start) == ("first_generated_token", "everywhere")
    assert settings["layers"] == [1, 2, 3]
    assert gates_of(settings) == [bank[0].rule.gate.sizes(), bank[1].rule.gate.sizes()]


def test_every_rule_has_its_row_of_vectors_and_every_gate_its_features(written, bank, folders):
    _, tensors = written
    for layer in (1, 2, 3):
        rows = tensors[f"model.layers.{layer}.mlp.steering_vector"]
        for row, one in zip(rows, bank, strict=True):
            found = vectors(one.rule, Checkpoint(folders[BASE])).get(layer, np.zeros(tiny.HIDDEN_SIZE, np.float32))
            assert np.array_equal(row, found)
    first, second = bank[0].rule.gate, bank[1].rule.gate
    both = np.concatenate([first.index[first.layer == 1], second.index])
    assert np.array_equal(tensors["model.layers.1.mlp.steering_index"], both)
    for at, gate in enumerate((first, second)):
        for name, value in gate.weights().items():
            assert np.array_equal(tensors[f"model.steering_gates.{at}.{name}"], value)


def test_a_request_is_placed_by_the_rule_that_it_names(written):
    rules = rules_of(written[0]["adaras"])
    assert dials_of(rules, {"steering_rule": "all", "steering_strength": 0.5}, 9) == Dials(3, 0.5, 1.0, 9, 0)
    assert dials_of(rules, {"steering_rule": "other"}, 9) == Dials(1, -1.0, 0.5, 9, 9)
    assert dials_of(rules[:1], {"steering_rule": "one"}, 9).first == 8  # also where there is one rule only
    with pytest.raises(ValueError, match=r"'nobody' is not a rule of this model; expected one of: one, other"):
        dials_of(rules, {"steering_rule": "nobody"}, 9)


def test_a_quantised_base_is_refused(bank, folders, tmp_path):
    (tmp_path / "base").mkdir()
    config = {**Checkpoint(folders[BASE]).config, "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="is quantised; expected plain weights"):
        write_bank(tmp_path, Checkpoint(tmp_path / "base"), bank)


def test_a_rule_of_another_base_is_refused(bank, folders, bases, tmp_path):
    other = BankRule("other", tiny.make_rule(bases["qwen3"]))
    with pytest.raises(RuleError, match="is not the model that this was made for"):
        write_bank(tmp_path, Checkpoint(folders[BASE]), [*bank, other])


def test_without_vllm_the_backend_names_what_to_install_and_leaves_no_folder(bank, folders, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setitem(sys.modules, "vllm", None)
    with (
        pytest.raises(MissingExtraError, match="the backend vllm needs vllm"),
        opened(Checkpoint(folders[BASE]), bank, 9, dtype="float32", sequences=1),
    ):
        pytest.fail("opened")
    assert not [*tmp_path.iterdir()]
