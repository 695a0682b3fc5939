"""What is known of architectures, and what tells one checkpoint from another."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from adaras_export.core import checkpoint, families
from adaras_export.core.base_model import BaseModel
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.errors import ArtifactError, RuleError, UnsupportedModelError


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def with_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "GONE"}))
    return folder


WIDTHS = {"gemma4_text": (48, 48, 96, 96)}  # of layers that share keys and values, twice as wide
EACH = tiny.mostly_slow((*tiny.NAMES, *tiny.MORE), quick=tiny.NAMES)


@pytest.mark.parametrize("name", EACH)
def test_a_base_is_read_from_its_folder(name, folders):
    base = BaseModel.of(folders[name])
    assert (base.family, base.layers) == (tiny.SPECS[name][0], tiny.LAYERS)
    assert (base.mlp_size, base.hidden_size, base.revision) == (WIDTHS.get(name, tiny.MLP_SIZE), tiny.HIDDEN_SIZE, None)
    assert BaseModel.from_record(json.loads(json.dumps(base.as_record())), "x") == base


@pytest.mark.parametrize("name", EACH)
def test_down_projections_are_those_of_the_checkpoint(name, stock, folders):
    model, index = stock[name], torch.tensor([5, 0, 47])
    for layer in range(tiny.LAYERS):
        h_1M = torch.zeros(1, WIDTHS.get(name, (tiny.MLP_SIZE,) * tiny.LAYERS)[layer])
        h_1M[:, index] = torch.tensor([1.0, -2.0, 0.5])
        down = families.down_projection(model, layer)
        expected = down(h_1M) - down(torch.zeros_like(h_1M))
        columns_DK = Checkpoint(folders[name]).down_columns(layer, index)
        torch.testing.assert_close(columns_DK @ torch.tensor([1.0, -2.0, 0.5]), expected[0])
    BaseModel.of(folders[name]).require_same(BaseModel("in memory", *families.sizes_of(model)))


def test_a_model_of_an_unknown_family_is_refused_with_the_known_ones(folders, tmp_path):
    folder = with_config(copied(folders["llama"], tmp_path), model_type="bloom")
    with pytest.raises(UnsupportedModelError, match="model_type bloom is not supported; expected one of: llama, mis"):
        BaseModel.of(folder)
    with pytest.raises(UnsupportedModelError, match="None is not supported"):
        BaseModel.of(with_config(folder, model_type="GONE"))


@pytest.mark.parametrize("key", ["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"])
def test_a_mixture_of_experts_is_refused_by_name(key, folders, tmp_path):
    folder = with_config(copied(folders["qwen3"], tmp_path), **{"model_type": "odd_moe", key: 8})
    with pytest.raises(UnsupportedModelError, match=rf"odd_moe is a mixture of experts \({key} = 8\)"):
        BaseModel.of(folder)


@pytest.mark.parametrize("key", ["num_hidden_layers", "intermediate_size", "hidden_size"])
def test_a_config_without_a_usable_size_is_refused(key, folders, tmp_path):
    folder = with_config(copied(folders["llama"], tmp_path), **{key: "GONE"})
    with pytest.raises(ArtifactError, match=f"config.json: has no {key}; expected the sizes of a model"):
        BaseModel.of(folder)
    for value in ("four", -1, None):
        with pytest.raises(RuleError, match="expected a positive integer"):
            BaseModel.of(with_config(folder, **{key: value}))


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"config.json: .*expected a JSON object"):
        BaseModel.of(tmp_path)


def test_what_is_neither_a_folder_nor_reachable_is_refused(tmp_path):
    with pytest.raises(
        ArtifactError, match=r"deep: no such folder; expected a model folder, or a repository of the Hub: USER/NAME"
    ):
        BaseModel.of(tmp_path / "gone" / "model" / "deep")


def test_a_checkpoint_without_safetensors_is_refused(folders, tmp_path):
    folder = copied(folders["llama"], tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"as pickles only .pytorch_model.bin.; expected safetensors"):
        BaseModel.of(folder)


@pytest.mark.parametrize("cut", [0, 5, 8, 200, -1000, -1])
def test_truncated_weights_are_refused(cut, folders, tmp_path):
    folder = copied(folders["llama"], tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(ArtifactError, match=r"model.safetensors: .*; expected a safetensors file"):
        BaseModel.of(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "has no weight_map"),
        (None, "has no weight_map"),
        ({"x": "gone.safetensors"}, "not in the folder: gone.safetensors"),
        ({"x": "../model/model.safetensors"}, r"not in the folder: \.\./model/model.safetensors"),
        ({"x": "model.safetensors"}, "tensor x is missing; the index names it"),
    ],
)
def test_a_bad_index_is_refused(weight_map, message, folders, tmp_path):
    folder = copied(folders["llama"], tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ArtifactError, match=message):
        BaseModel.of(folder)


def test_the_fingerprint_does_not_depend_on_how_the_tensors_are_spread(folders, tmp_path):
    sharded = folders["qwen3-sharded"]
    assert len(set(checkpoint.shards(sharded).values())) > 2
    tensors = {key: load_file(path)[key] for key, path in checkpoint.shards(sharded).items()}
    (tmp_path / "one").mkdir()
    shutil.copy(sharded / "config.json", tmp_path / "one")
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    assert Checkpoint(tmp_path / "one").fingerprint == Checkpoint(sharded).fingerprint


@pytest.mark.parametrize("change", ["value", "dtype", "name", "shape", "missing"])
def test_the_fingerprint_tells_checkpoints_apart(change, folders, tmp_path):
    folder = copied(folders["llama"], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.1.mlp.down_proj.weight"
    original = tensors.pop(key)
    if change == "value":
        original[0, 0] += 1
    changed = {"dtype": original.half(), "shape": original.reshape(-1)}.get(change, original)
    if change != "missing":
        tensors["other" if change == "name" else key] = changed
    save_file(tensors, folder / "model.safetensors")
    assert Checkpoint(folder).fingerprint != Checkpoint(folders["llama"]).fingerprint


def test_the_fingerprint_sees_the_head_the_middle_and_the_tail_of_a_large_tensor(tmp_path):
    found = set()
    for at in (None, 0, 5000, 9999):
        tensor = torch.zeros(10_000)
        if at is not None:
            tensor[at] = 1
        save_file({"x": tensor}, tmp_path / "model.safetensors")
        found.add(Checkpoint(tmp_path).fingerprint)
    assert len(found) == 4


def test_the_fingerprint_can_be_limited_to_some_tensors(folders):
    only = {"model.layers.1.mlp.down_proj.weight"}
    one, other = (Checkpoint(folders[name]).fingerprint_of(only) for name in ("llama", "mistral"))
    assert one != other
    assert one != Checkpoint(folders["llama"]).fingerprint


@pytest.mark.parametrize("layers", [0, -1, 2.0, "2", None])
def test_a_base_with_an_impossible_size_is_refused(layers):
    with pytest.raises(RuleError, match=r"base x: layers is .*; expected a positive integer"):
        BaseModel("x", "llama", layers, 8, 8)


def test_a_base_of_an_unknown_family_is_refused():
    with pytest.raises(UnsupportedModelError, match="x: model_type bloom is not supported"):
        BaseModel("x", "bloom", 1, 8, 8)


@pytest.mark.parametrize("record", [None, "x", [], {}, {"id": "x"}, {"odd": 1}])
def test_a_damaged_record_is_refused(record):
    with pytest.raises(ArtifactError, match="file: damaged base record"):
        BaseModel.from_record(record, "file")
