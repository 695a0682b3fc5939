"""From a rule to a folder under its final name, and the proof that a folder is what it says."""

import errno
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import cards
import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from adaras_export.core.base_model import BaseModel
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.rule import SteeringRule
from adaras_export.delivery import documents, verifier, writer
from adaras_export.delivery.receipt import hashes, read
from adaras_export.delivery.verifier import verify
from adaras_export.delivery.writer import export, rewrite_card
from adaras_export.errors import ArtifactError, ExportError, ParityError, RuleError, UnsupportedModelError
from adaras_export.exporters.base import Written
from adaras_export.exporters.checkpoint import differing_keys
from adaras_export.exporters.checks import Check, ParityReport
from adaras_export.exporters.hf.exporter import HuggingFaceExporter
from adaras_export.files import atomic

KEY = ("llama", "causal", "last_prompt_token")
SHARDED = ("qwen3-sharded", "causal", "last_prompt_token")


@pytest.fixture(scope="module")
def delivered(rules, folders, tmp_path_factory):
    """The report of one export of the quick target. Its folder is read only."""
    return export(rules[KEY], base=folders["llama"], to="hf", out=tmp_path_factory.mktemp("out") / "tiny-steered")


@pytest.fixture
def folder(delivered, tmp_path):
    """A copy of the export that may be damaged; the base beside it keeps its own files."""
    return shutil.copytree(delivered.path, tmp_path / "copy")


def names_of(parent):
    return sorted(path.name for path in Path(parent).iterdir())


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_steering(folder, change):
    path = folder / "model-steering.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def with_a_new_receipt(folder):
    """Make the hashes of the receipt those of the files, as whoever damaged the folder would."""
    receipt = json.loads((folder / "receipt.json").read_text())
    receipt["files"] = hashes(folder)
    receipt["rule"] = SteeringRule.load(folder / "rule.safetensors").fingerprint
    (folder / "receipt.json").write_text(json.dumps(receipt))
    return folder


def failures(folder, **how):
    return {check.name: check.detail for check in verify(folder, **how).failed()}


def test_an_export_is_complete_and_says_what_it_is(delivered, rules, folders):
    assert delivered.parity.ok
    assert (delivered.target, delivered.drops) == ("hf", ())
    expected = {"README.md", "config.json", "rule.safetensors", "model-base.safetensors", "model-steering.safetensors"}
    assert expected < set(delivered.files)
    assert set(names_of(delivered.path)) == {*delivered.files, "receipt.json"}
    assert delivered.files == {name: atomic.sha256_file(delivered.path / name) for name in delivered.files}
    assert SteeringRule.load(delivered.path / "rule.safetensors") == rules[KEY]
    assert delivered.path.stat().st_mode & 0o777 == 0o755


def test_the_receipt_names_rule_base_files_versions_and_figures(delivered, rules, folders):
    receipt = json.loads((delivered.path / "receipt.json").read_text())
    assert receipt["rule"] == rules[KEY].fingerprint
    assert receipt["base"] == BaseModel.of(folders["llama"]).as_record()
    assert receipt["files"] == delivered.files
    assert receipt["versions"]["torch"] == torch.__version__
    assert [check["check"] for check in receipt["parity"]] == [check.name for check in delivered.parity.checks]
    assert all(check["ok"] for check in receipt["parity"])


def test_the_card_in_the_folder_has_the_rule_and_the_checks(delivered, rules):
    text = (delivered.path / "README.md").read_text()
    assert rules[KEY].fingerprint in text
    assert all(f"| {check.name} |" in text for check in delivered.parity.checks)


def test_a_good_export_verifies_from_another_place_and_with_the_base_elsewhere(delivered, folders, folder, tmp_path):
    base = shutil.copytree(folders["llama"], tmp_path / "moved")
    assert verify(folder, base=base).ok


@pytest.mark.parametrize(
    "key", [SHARDED, ("mistral-window", "later", "first_generated_token"), ("qwen2", None, "first_generated_token")]
)
def test_other_bases_and_rules_are_delivered_and_verify(key, rules, folders, tmp_path):
    report = export(rules[key], base=folders[key[0]], to="hf", out=tmp_path / "out")
    assert report.parity.ok
    assert verify(tmp_path / "out").ok


def negate(tensors):
    tensors["model.layers.2.mlp.steering_vector"] *= -1


def shift(tensors):
    two, three = (f"model.layers.{layer}.mlp.steering_vector" for layer in (2, 3))
    tensors[two], tensors[three] = tensors[three], tensors[two]


def flip(tensors):
    tensors["model.steering_gate.output_bias"] *= -1


def reindex(tensors):
    tensors["model.layers.0.mlp.steering_index"] = (tensors["model.layers.0.mlp.steering_index"] + 1) % tiny.MLP_SIZE


STEERING_DAMAGE = {
    "negated": (negate, "model.layers.2.mlp.steering_vector"),
    "shifted": (shift, "model.layers.3.mlp.steering_vector"),
    "flipped": (flip, "model.steering_gate.output_bias"),
    "reindexed": (reindex, "model.layers.0.mlp.steering_index"),
}


@pytest.mark.parametrize(("change", "tensor"), STEERING_DAMAGE.values(), ids=STEERING_DAMAGE)
@pytest.mark.parametrize("receipt", ["old", "new"])
def test_damaged_steering_is_named_also_with_a_matching_receipt(change, tensor, receipt, folder):
    edit_steering(folder, change)
    found = failures(with_a_new_receipt(folder) if receipt == "new" else folder)
    assert tensor in found["steering tensors that differ"]
    assert found.get("files changed") == (None if receipt == "new" else "model-steering.safetensors")
    assert any(name.endswith("logits") or name == "gate, p(correct)" for name in found), found


@pytest.mark.parametrize("receipt", ["old", "new"])
def test_one_changed_byte_of_a_base_weight_is_named(receipt, folder):
    """The fingerprint of a base samples its tensors; the byte of this test lies where no sample does."""
    path = folder / "model-base.safetensors"
    content = bytearray(path.read_bytes())
    content[-6000] ^= 1
    path.write_bytes(content)
    found = failures(with_a_new_receipt(folder) if receipt == "new" else folder)
    assert found["base weight files that differ"] == "model-base.safetensors"
    assert ("files changed" in found) == (receipt == "old")


def trap(tmp_path):
    """Code that leaves a file behind when it runs."""
    return f"\nopen({str(tmp_path / 'it-ran')!r}, 'w').close()\n"


def test_the_trap_of_these_tests_does_run_where_code_is_trusted(folder, tmp_path):
    """Otherwise they would prove nothing."""
    with (folder / "modeling_adaras.py").open("a") as file:
        file.write(trap(tmp_path))
    HuggingFaceExporter().load(folder)
    assert (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("where", ["evil.py", "sub/evil.py"])
def test_added_code_is_named_and_never_run_even_where_the_config_points_to_it(where, folder, tmp_path):
    (folder / where).parent.mkdir(exist_ok=True)
    (folder / where).write_text((folder / "modeling_adaras.py").read_text() + trap(tmp_path))
    config = json.loads((folder / "config.json").read_text())
    stem = where.removesuffix(".py").replace("/", ".")
    auto_map = {auto: name.replace("modeling_adaras", stem) for auto, name in config["auto_map"].items()}
    edit_json(folder / "config.json", auto_map=auto_map)
    found = failures(with_a_new_receipt(folder))
    assert where in found["code files that are not the library's"]
    assert "auto_map" in found["config entries that differ"]
    assert not (tmp_path / "it-ran").exists()


def test_settings_that_point_to_code_elsewhere_are_named_and_not_followed(folder, monkeypatch):
    """All files of the library are there unchanged; the config names classes of somebody else's repository."""
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "somebody/else--evil.Evil"})
    monkeypatch.setattr(HuggingFaceExporter, "load", lambda *_: pytest.fail("was opened"))
    found = failures(with_a_new_receipt(folder))
    assert found["config entries that differ"] == "auto_map"
    assert "not run, because its code or its settings differ" in found


def test_a_tokenizer_that_points_to_code_is_named_and_not_run(folder, tmp_path):
    (folder / "evil.py").write_text(trap(tmp_path))
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    found = failures(with_a_new_receipt(folder))
    assert found["code files that are not the library's"] == "evil.py tokenizer_config.json:auto_map"
    assert not (tmp_path / "it-ran").exists()


def test_an_adapter_that_points_elsewhere_is_named_and_not_followed(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    assert failures(with_a_new_receipt(folder))["code files that are not the library's"] == "adapter_config.json"


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("rms_norm_eps", 1e-3),
        ("architectures", ["X"]),
        ("attn_implementation", "somebody/else"),
        ("return_dict", None),  # the same to Python's get(), and Transformers fails on it
        ("use_cache", 1),
    ],
)
def test_an_edited_config_entry_is_named(entry, value, folder):
    edit_json(folder / "config.json", **{entry: value})
    assert failures(with_a_new_receipt(folder))["config entries that differ"] == entry
    assert failures(folder)["config entries that differ"] == entry


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (None, ...),
        (True, 1),
        (1, 1.0),
        (0, False),
        ([True], [1]),
        ({"a": None}, {}),
        ({"a": [{"b": 0}]}, {"a": [{"b": 0.0}]}),
    ],
)
def test_values_that_only_python_takes_for_the_same_differ(one, other):
    found, expected = ({} if value is ... else {"entry": value} for value in (one, other))
    assert differing_keys(found, expected) == differing_keys(expected, found) == ["entry"]
    assert differing_keys(found, found) == []


@pytest.mark.parametrize("dial", ["strength", "start", "threshold"])
def test_an_edited_setting_of_the_rule_is_named(dial, folder):
    settings = json.loads((folder / "config.json").read_text())["adaras"]
    settings[dial] = {"strength": -2.0, "start": "first_generated_token", "threshold": 0.9}[dial]
    edit_json(folder / "config.json", adaras=settings)
    assert failures(with_a_new_receipt(folder))["config entries that differ"] == "adaras"


def test_swapped_missing_and_unknown_files_are_named(folder):
    tokenizer, config = folder / "tokenizer.json", folder / "generation_config.json"
    one, two = tokenizer.read_bytes(), config.read_bytes()
    (folder / "chat_template.jinja").unlink()
    (folder / "extra.bin").write_bytes(b"x")
    config.write_bytes(two + b" ")
    found = failures(folder)
    assert found["files changed"] == "generation_config.json"
    assert found["files missing"] == "chat_template.jinja"
    assert found["files unknown"] == "extra.bin"
    assert one == tokenizer.read_bytes()


def test_two_swapped_files_are_named(folder):
    one, two = folder / "tokenizer_config.json", folder / "generation_config.json"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    report = {check.name: check.detail for check in verify(folder).failed()}
    assert report["files changed"] == "generation_config.json tokenizer_config.json"


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "tokenizer.json"])
def test_an_edited_or_damaged_companion_is_named_also_with_a_matching_receipt(name, folder):
    """An edited chat template changes every answer, and no tensor."""
    (folder / name).write_text("{")
    assert failures(with_a_new_receipt(folder)) == {"files of the base that differ": name}


def test_a_tokenizer_with_other_settings_is_named_also_with_a_matching_receipt(folder):
    edit_json(folder / "tokenizer_config.json", eos_token="x")
    assert failures(with_a_new_receipt(folder)) == {"files of the base that differ": "tokenizer_config.json"}


def test_a_base_that_leaves_the_class_of_its_tokenizer_open_gets_one_that_every_version_knows(rules, folders, tmp_path):
    base = shutil.copytree(folders["llama"], tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    out = export(rules[KEY], base=base, to="hf", out=tmp_path / "out").path
    found = json.loads((out / "tokenizer_config.json").read_text())
    assert found == {**settings, "tokenizer_class": found["tokenizer_class"]}
    assert found["tokenizer_class"] != "TokenizersBackend"


def test_a_missing_code_file_is_named(folder):
    (folder / "steering_adaras.py").unlink()
    assert failures(folder)["code files that are not the library's"] == "steering_adaras.py"


def test_the_file_of_another_rule_is_named(folder, rules):
    other = rules[KEY].with_strength(0.5)
    other.save(folder / "rule.safetensors")
    found = failures(folder)
    assert "rule other than the receipt's" in found
    assert found["config entries that differ"] == "adaras"


def test_a_rule_of_another_model_is_refused(folder, rules):
    rules[("qwen3", *KEY[1:])].save(folder / "rule.safetensors")
    with pytest.raises(RuleError, match="is not the model that this was made for"):
        verify(folder)


RECEIPTS = {
    "no json": "{",
    "no object": "[]",
    "empty": "{}",
    "another version": '{"version": 1, "target": "hf"}',
    "no base": {"base": None},
    "bad base": {"base": 7},
    "bad files": {"files": 7},
    "bad hashes": {"files": {"config.json": 7}},
    "bad checks": {"parity": [7]},
    "bad target": {"target": ["hf"]},
    "no tensors": {"tensors": None},
    "bad tensors": {"tensors": [7]},
    "half a tensor": {"tensors": [{"name": "a", "shape": [1]}]},
    "a tensor of another kind": {
        "tensors": [{"name": "a", "file": "f", "dtype": "F32", "shape": [1], "sha256": "0", "what": "removed"}]
    },
    "a tensor of no size": {
        "tensors": [{"name": "a", "file": "f", "dtype": "F32", "shape": [-1], "sha256": "0", "what": "added"}]
    },
    "bad datasets": {"datasets": ["[x](y)"]},
    "bad names of datasets": {"datasets": [7]},
    "more": {"more": 1},
}


@pytest.mark.parametrize("damage", RECEIPTS.values(), ids=RECEIPTS)
def test_a_damaged_receipt_is_refused_in_one_line(damage, folder):
    path = folder / "receipt.json"
    path.write_text(damage if isinstance(damage, str) else json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(ArtifactError, match=r"receipt.json|damaged base record") as caught:
        verify(folder)
    assert "\n" not in str(caught.value)


def test_a_receipt_of_an_unknown_target_is_refused(folder):
    edit_json(folder / "receipt.json", target="floppy")
    with pytest.raises(ExportError, match="floppy: no such target; expected one of: hf"):
        verify(folder)


def test_a_folder_that_is_no_export_is_refused(folders, tmp_path):
    for path in (folders["llama"], tmp_path / "missing"):
        with pytest.raises(ArtifactError, match=r"is no exported folder, it has no receipt.json"):
            verify(path)


@pytest.mark.parametrize("receipt", ["old", "new"])
@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("model-steering.safetensors", "steering tensors that differ"),
        ("model-base.safetensors", "base weight files that differ"),
    ],
)
def test_truncated_weights_are_named(name, check, receipt, folder):
    (folder / name).write_bytes((folder / name).read_bytes()[:-9])
    found = failures(with_a_new_receipt(folder) if receipt == "new" else folder)
    assert check in found
    assert ("files changed" in found) == (receipt == "old")
    assert "cannot be opened" in found["it does not open or run"]


@pytest.mark.parametrize("name", ["model-steering.safetensors", "model-base.safetensors", "rule.safetensors"])
def test_missing_weights_and_a_missing_or_truncated_rule_are_named(name, folder):
    if name == "rule.safetensors":
        (folder / name).write_bytes((folder / name).read_bytes()[:-9])
        assert failures(folder)["files changed"] == name
    (folder / name).unlink()
    found = failures(folder)
    assert found["files missing"] == name
    assert name in (found.get("what it stores cannot be read") or found["rule that cannot be read"])


def test_a_changed_base_is_refused(folder, folders, tmp_path):
    base = shutil.copytree(folders["llama"], tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(RuleError, match="fingerprint"):
        verify(folder, base=base)


# Staging


def test_an_existing_folder_is_refused_and_untouched(rules, folders, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(ExportError, match="out: exists already; choose another folder, or remove it first"):
        export(rules[KEY], base=folders["llama"], to="hf", out=out)
    assert names_of(out) == ["mine"]
    assert names_of(tmp_path) == ["out"]


def full(*_args, **_how):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["os.link", "shutil.copyfile", "Path.write_bytes", "Path.write_text", "Path.rename"])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing_behind(where, rules, folders, tmp_path, monkeypatch):
    home, name = {"os": os, "shutil": shutil, "Path": Path}[where.split(".")[0]], where.split(".")[1]
    bases = BaseModel.of(folders["llama"])
    assert bases.layers == tiny.LAYERS
    monkeypatch.setattr(home, name, full)
    with pytest.raises(
        ExportError, match=r"deep/out: cannot be written \(the disk is full: .*\); nothing was left behind"
    ):
        export(rules[KEY], base=folders["llama"], to="hf", out=tmp_path / "deep" / "out")
    monkeypatch.undo()
    assert names_of(tmp_path / "deep") == []


def test_a_place_that_cannot_be_written_is_refused(rules, folders, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="cannot be written"):
        export(rules[KEY], base=folders["llama"], to="hf", out=tmp_path / "file" / "out")


def test_a_disk_that_is_full_after_some_shards_leaves_nothing_behind(rules, folders, tmp_path, monkeypatch):
    link, linked = os.link, []

    def link_two(source, target):
        linked.append(target)
        link(source, target) if len(linked) < 3 else full()

    monkeypatch.setattr(os, "link", link_two)
    with pytest.raises(ExportError, match=r"the disk is full: .*\); nothing was left behind"):
        export(rules[SHARDED], base=folders["qwen3-sharded"], to="hf", out=tmp_path / "out")
    assert len(linked) == 3
    assert names_of(tmp_path) == []


# The base's files, which an export may share by hard links


def everything(folder):
    """Content, place on the disk, permissions and time of each file."""
    stats = {path: path.stat() for path in sorted(folder.rglob("*"))}
    return {
        path: (path.is_file() and path.read_bytes(), one.st_ino, one.st_mode, one.st_mtime_ns)
        for path, one in stats.items()
    }


@pytest.fixture(params=["llama", "qwen3-sharded"])
def guarded(request, folders, tmp_path):
    """A base that nothing may write to, and its name."""
    base = shutil.copytree(folders[request.param], tmp_path / "base")
    for path in (*base.iterdir(), base):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield request.param, base
    base.chmod(0o755)  # pytest removes it


@pytest.mark.slow
@pytest.mark.parametrize("how", [("hf", False), ("hf", True), ("hf-thin", False)], ids=["linked", "copied", "thin"])
def test_nothing_that_is_done_with_an_export_changes_the_base(how, guarded, rules, tmp_path):
    (name, base), (to, copy), out = guarded, how, tmp_path / "out"
    before = everything(base)
    export(rules[(name, *KEY[1:])], base=base, to=to, out=out, copy=copy)
    assert verify(out).ok
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    model.steering.strength = 0.25
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()  # what is mapped from a file must not be written through
    model.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    if copy or to == "hf-thin":
        for path in out.rglob("*.safetensors"):
            path.chmod(0o644)
            with path.open("r+b") as file:  # as whoever edits an artifact in place
                file.write(b"\0" * 8)
    shutil.rmtree(out)
    assert everything(base) == before


def test_saving_an_opened_export_into_its_own_folder_leaves_the_base_alone(rules, folders, tmp_path):
    """The names of its shards are those of the base, whose bytes they share."""
    base = shutil.copytree(folders["qwen3-sharded"], tmp_path / "base")
    content = {path.name: path.read_bytes() for path in base.iterdir()}
    out = export(rules[SHARDED], base=base, to="hf", out=tmp_path / "out").path
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)
    model.save_pretrained(out, max_shard_size="30KB")
    assert {path.name: path.read_bytes() for path in base.iterdir()} == content


@pytest.mark.slow
@pytest.mark.parametrize("key", [KEY, SHARDED])
def test_copy_gives_the_same_files_without_links(key, rules, folders, tmp_path):
    for name, copy in (("linked", False), ("copied", True)):
        export(rules[key], base=folders[key[0]], to="hf", out=tmp_path / name / "out", copy=copy)
    for path in sorted((tmp_path / "linked" / "out").iterdir()):
        twin = tmp_path / "copied" / "out" / path.name
        assert twin.read_bytes() == path.read_bytes(), path.name
        assert twin.stat().st_nlink == 1
    sources = {path.stat().st_ino for path in folders[key[0]].glob("*.safetensors")}
    assert sources == {p.stat().st_ino for p in (tmp_path / "linked" / "out").iterdir()} & sources


def test_shards_are_linked_one_by_one_and_the_index_is_that_of_the_base_with_the_steering(rules, folders, tmp_path):
    """A tied LM head is in no file, and in no index."""
    base = folders["qwen3-sharded"]
    out = export(rules[SHARDED], base=base, to="hf", out=tmp_path / "out").path
    theirs, ours = (json.loads((path / "model.safetensors.index.json").read_text()) for path in (base, out))
    added = ours["weight_map"].items() - theirs["weight_map"].items()
    assert theirs["weight_map"].items() < ours["weight_map"].items()
    assert {file for _, file in added} == {"model-steering.safetensors"}
    assert not any("lm_head" in name for name in ours["weight_map"])
    for shard in set(theirs["weight_map"].values()):
        assert (out / shard).samefile(base / shard)


def test_any_other_error_leaves_nothing_behind_either(rules, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(HuggingFaceExporter, "load", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(rules[KEY], base=folders["llama"], to="hf", out=tmp_path / "out")
    assert names_of(tmp_path) == []


@dataclass(frozen=True)
class Sloppy(HuggingFaceExporter):
    """Writes another strength than it was asked for, and looks away."""

    def write(self, rule, base, out):
        super().write(rule.with_strength(-rule.strength), base, out)
        return Written(rule)

    def inspect(self, folder, rule, base):
        return super().inspect(folder, rule.with_strength(-rule.strength), base)


def test_what_fails_the_comparison_never_gets_its_name(rules, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(writer.exporters, "load", lambda _: Sloppy())
    with pytest.raises(ParityError, match=r"out: not written: FAIL by the rule, prefill logits"):
        export(rules[KEY], base=folders["llama"], to="hf", out=tmp_path / "out")
    assert names_of(tmp_path) == []


def test_a_base_in_an_untried_format_is_refused(rules, folders, tmp_path):
    base = shutil.copytree(folders["llama"], tmp_path / "base")
    edit_json(base / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedModelError, match="is quantised by 'gptq'"):
        export(rules[KEY], base=base, to="hf", out=tmp_path / "out")
    assert names_of(tmp_path) == ["base"]


def test_a_receipt_with_an_option_that_its_target_lacks_is_refused(folder):
    edit_json(folder / "receipt.json", options={"precision": "int4"})
    with pytest.raises(ExportError, match="hf: has no option precision; expected of: none"):
        verify(folder)


def test_the_base_of_another_rule_is_refused_before_anything_is_written(rules, folders, tmp_path):
    with pytest.raises(RuleError, match=r"family qwen3 \(expected llama\)"):
        export(rules[KEY], base=folders["qwen3"], to="hf", out=tmp_path / "out")
    assert names_of(tmp_path) == []


def test_an_unknown_target_is_refused_with_the_known_ones(rules, folders, tmp_path):
    with pytest.raises(ExportError, match="floppy: no such target; expected one of: hf"):
        export(rules[KEY], base=folders["llama"], to="floppy", out=tmp_path / "out")


@dataclass(frozen=True)
class Gateless(HuggingFaceExporter):
    """A format that cannot express a gate."""

    @property
    def spec(self):
        return replace(super().spec, name="gateless", drops=frozenset({"gate"}))


def test_a_loss_is_refused_unless_it_is_accepted_by_name(rules, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(writer.exporters, "load", lambda _: Gateless())
    for accepted, union in (((), "gate"), (("start",), "gate,start")):
        with pytest.raises(
            ExportError, match=f"gateless: cannot express gate; drop it with --accept-loss {union}, or choose target hf"
        ):
            export(rules[KEY], base=folders["llama"], to="gateless", out=tmp_path / "o", accept_loss=accepted)
    assert names_of(tmp_path) == []


def test_a_feature_that_is_none_cannot_be_accepted(rules, folders, tmp_path):
    with pytest.raises(ExportError, match="--accept-loss: no feature gatee; expected of: gate, start, dial"):
        export(rules[KEY], base=folders["llama"], to="hf", out=tmp_path / "o", accept_loss=("gatee",))


def test_another_strength_is_that_of_the_artifact_and_the_receipt_names_the_given_rule(rules, folders, tmp_path):
    report = export(rules[KEY], base=folders["llama"], to="hf", out=tmp_path / "out", strength=-1.5)
    assert SteeringRule.load(report.path / "rule.safetensors") == rules[KEY].with_strength(-1.5)
    assert json.loads((report.path / "receipt.json").read_text())["given_rule"] == rules[KEY].fingerprint


def test_a_format_without_gates_loses_nothing_of_a_rule_without_one(rules, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(writer.exporters, "load", lambda _: Gateless())
    report = export(rules["llama", None, KEY[2]], base=folders["llama"], to="gateless", out=tmp_path / "out")
    assert report.drops == ()


@dataclass(frozen=True)
class Dialless(HuggingFaceExporter):
    @property
    def spec(self):
        return replace(super().spec, drops=frozenset({"dial"}))


def test_an_accepted_loss_is_printed_on_the_card(rules, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(writer.exporters, "load", lambda _: Dialless())
    report = export(rules[KEY], base=folders["llama"], to="hf", out=tmp_path / "out", accept_loss=("dial", "gate"))
    assert report.drops == ("dial",)
    assert "**Left out by this format:** dial." in (tmp_path / "out" / "README.md").read_text()


def test_the_evaluation_of_another_rule_is_refused(rules, folders, tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps({**cards.GAIN, "rule": "another"}))
    with pytest.raises(ExportError, match="evaluates rule another; expected "):
        export(rules[KEY], base=folders["llama"], to="hf", out=tmp_path / "out", evaluation=tmp_path / "eval.json")


def write_evaluation(path, rule, **changes):
    path.write_text(json.dumps(cards.GAIN | {"rule": rule.fingerprint} | changes))
    return path


def test_a_damaged_evaluation_is_refused_before_the_work(rules, folders, tmp_path):
    write_evaluation(tmp_path / "eval.json", rules[KEY], arms=[])
    with pytest.raises(ArtifactError, match=r"eval.json: has arms \[\], where there should be off and one of"):
        export(rules[KEY], base=folders["llama"], to="hf", out=tmp_path / "out", evaluation=tmp_path / "eval.json")
    assert not (tmp_path / "out").exists()


def test_evaluation_and_licence_reach_the_card(rules, folders, tmp_path):
    base = shutil.copytree(folders["llama"], tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    write_evaluation(tmp_path / "eval.json", rules[KEY])
    out = export(rules[KEY], base=base, to="hf", out=tmp_path / "out", evaluation=tmp_path / "eval.json").path
    assert (out / "evaluation.json").read_bytes() == (tmp_path / "eval.json").read_bytes()
    text = (out / "README.md").read_text()
    assert text.startswith("---\nlicense: apache-2.0\n")
    assert "| `gated` | 57.8% | 54.8% to 60.8% | 29 | 5 | 4e-05 |" in text


def test_a_base_whose_card_names_no_licence_gives_none(rules, folders, tmp_path):
    base = shutil.copytree(folders["llama"], tmp_path / "base")
    (base / "README.md").write_text("# Tiny\n")
    out = export(rules[KEY], base=base, to="hf", out=tmp_path / "out").path
    assert "license:" not in (out / "README.md").read_text()


def test_a_rule_without_weights_on_record_is_delivered_with_those_of_its_base(rules, folders, tmp_path):
    unrecorded = replace(rules[KEY].base, fingerprint=None, id="somebody/llama")
    rule = replace(rules[KEY], base=unrecorded, neurons=tiny.make_neurons(), gate=None)
    report = export(rule, base=folders["llama"], to="hf", out=tmp_path / "out")
    receipt = json.loads((report.path / "receipt.json").read_text())
    assert receipt["base"]["fingerprint"] == BaseModel.of(folders["llama"]).fingerprint
    assert np.isfinite([check.figure for check in report.parity.checks]).all()
    assert verify(report.path).ok


def test_the_receipt_has_the_hash_of_every_tensor_of_the_base(delivered, folders):
    tensors = load_file(folders["llama"] / "model.safetensors")
    expected = {name: atomic.sha256(tensor.tobytes()) for name, tensor in tensors.items()}
    assert read(delivered.path).base_tensors == expected


def test_a_base_that_changed_in_the_middle_of_a_tensor_is_named(delivered, folders, folder, tmp_path):
    """The fingerprint samples tensors; what lies between its samples only the hashes see."""
    base = shutil.copytree(folders["llama"], tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name, changed = max(((name, tensor.copy()) for name, tensor in tensors.items()), key=lambda pair: pair[1].nbytes)
    changed.reshape(-1)[changed.size // 4] += 1
    save_file({**tensors, name: changed}, base / "model.safetensors", metadata={"format": "pt"})
    assert changed.nbytes > 3 * 4096
    assert failures(folder, base=base)["tensors of the base that changed since"] == name


STATIC = ("gate", "start", "dial")


def unsampled_change(base, out):
    """A copy of a base that differs in one number, which its fingerprint does not sample."""
    evil = shutil.copytree(base, out)
    tensors = load_file(evil / "model.safetensors")
    changed = tensors["lm_head.weight"] = tensors["lm_head.weight"].copy()
    changed.reshape(-1)[changed.size // 4] += 1
    save_file(tensors, evil / "model.safetensors", metadata={"format": "pt"})
    return evil


def reword(folder, **changes):
    """Say something else in a receipt and on the card, as they would be written."""
    told = replace(read(folder), **changes)
    exporter, rule = verifier.exporter_of(told), SteeringRule.load(folder / "rule.safetensors")
    return documents.describe(folder, told, exporter, rule)


@pytest.mark.parametrize(
    ("to", "how"),
    [
        ("hf-thin", {}),
        ("peft", {"accept_loss": STATIC}),
        pytest.param("peft", {"adaptive": True}, marks=pytest.mark.slow),
        pytest.param("hf", {}, marks=pytest.mark.slow),
    ],
)
def test_an_artifact_that_names_another_base_than_the_one_given_is_found(to, how, rules, folders, tmp_path):
    """It was only compared with the base given, and its pointer with its own receipt; opened, it took the other."""
    base = folders["llama"]
    evil = unsampled_change(base, tmp_path / "evil" / base.name)
    out = export(rules[KEY], base=evil, to=to, out=tmp_path / "out", **how).path
    reword(out, base_tensors=Checkpoint(base).hashes)
    found = failures(out, base=base)
    assert found["names of the base that lead to another"] == f"{evil}: lm_head.weight"


def test_a_base_of_the_same_weights_with_another_config_is_another_one(folders, folder, tmp_path, delivered):
    base = shutil.copytree(folders["llama"], tmp_path / "base")
    edit_json(base / "config.json", rope_theta=5.0)
    (base / "chat_template.jinja").write_text("{{ 'Say no.' }}")
    found = failures(folder, base=base)["names of the base that lead to another"]
    assert found == f"{folders['llama'].resolve()}: config.json:rope_theta chat_template.jinja"


def test_a_base_that_is_no_longer_where_the_receipt_says_is_told(folders, rules, tmp_path):
    base = shutil.copytree(folders["llama"], tmp_path / "base")
    out = export(rules[KEY], base=base, to="hf-thin", out=tmp_path / "out").path
    report = verify(out, base=base.rename(tmp_path / "moved"))
    assert report.ok
    [told] = [check for check in report.checks if check.name.endswith("so not compared")]
    assert told.detail == str(tmp_path.resolve() / "base")


def test_a_rule_that_names_a_commit_of_the_hub_is_told_where_that_is_not_at_hand(rules, folders, tmp_path):
    named = replace(rules[KEY].base, id="meta-llama/Llama-3.1-8B", revision="7" * 40)
    out = export(replace(rules[KEY], base=named), base=folders["llama"], to="hf", out=tmp_path / "out").path
    report = verify(out)
    assert report.ok
    [told] = [check for check in report.checks if check.name.endswith("so not compared")]
    assert told.detail == f"meta-llama/Llama-3.1-8B at revision {'7' * 40}"
    assert "The rule names that base and revision." in (out / "README.md").read_text()


INVENTED = Check("audited by an independent lab", 0, 0)


def loosened(check):
    return replace(check, limit=1e9) if check.limit else check


def boasting(check):
    return replace(check, figure=1e9) if check.limit is None else check


CLAIMS = {
    "one more": (lambda checks: (*checks, INVENTED), INVENTED.name),
    "none": (lambda checks: (), "by the rule, prefill logits"),
    "one twice": (lambda checks: (*checks, checks[0]), "code files that are not the library's"),
    "wider": (lambda checks: tuple(map(loosened, checks)), "generate(), one prompt, logits"),
    "without limits": (lambda checks: tuple(replace(check, limit=None) for check in checks), "gate, p(correct)"),
    "boasting": (lambda checks: tuple(map(boasting, checks)), "effect of steering on logits"),
}


@pytest.mark.parametrize(("change", "named"), CLAIMS.values(), ids=CLAIMS)
def test_a_receipt_whose_checks_are_not_those_of_verify_is_found(change, named, delivered, rules):
    told = read(delivered.path)
    claimed = replace(told, parity=ParityReport(change(told.parity.checks)))
    exporter = verifier.exporter_of(told)
    [good] = documents.claim_checks(told, exporter, rules[KEY], delivered.parity)
    [found] = documents.claim_checks(claimed, exporter, rules[KEY], delivered.parity)
    assert good.ok
    assert named in found.detail.split("; ")


def test_invented_checks_are_found_also_where_the_card_has_them(folder):
    reword(folder, parity=ParityReport((*read(folder).parity.checks, INVENTED)))
    assert failures(folder) == {"checks of the receipt that verify does not make so": INVENTED.name}


def test_a_licence_of_a_base_without_a_card_is_found(folder):
    reword(folder, base_card={"license": "mit"})
    assert failures(folder) == {"statements about the base that differ from its card": "license"}


def test_a_new_card_has_the_new_name_and_the_folder_still_verifies(delivered, folder):
    before = hashes(folder)
    receipt = rewrite_card(folder, repository="someone/steered")
    after = hashes(folder)
    assert {name for name in after if after[name] != before[name]} == {"README.md"}
    assert 'from_pretrained("someone/steered"' in (folder / "README.md").read_text()
    assert read(folder).repository == receipt.repository == "someone/steered"
    assert verify(folder).ok


def test_a_folder_that_is_not_as_its_receipt_says_gets_no_new_card(folder):
    (folder / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"files changed: config.json; expected the files of its receipt only"):
        rewrite_card(folder, repository="someone/steered")


def test_a_signed_folder_gets_no_new_card(folder):
    (folder / "model.sig").write_text("{}")
    with pytest.raises(ExportError, match=r"is signed, and a new card would break that; remove model.sig, sign again"):
        rewrite_card(folder)


def hashes_of(path):
    return {name: atomic.sha256(tensor.tobytes()) for name, tensor in load_file(path).items()}


def test_the_receipt_lists_every_tensor_that_is_not_the_base_s_with_its_hash(delivered):
    told = read(delivered.path).tensors
    assert {one.name: one.sha256 for one in told} == hashes_of(delivered.path / "model-steering.safetensors")
    assert {(one.what, one.file) for one in told} == {("added", "model-steering.safetensors")}
    names = [f"`{one.name}`" for one in told if "layers.2" not in one.name and "layers.3" not in one.name]
    assert all(name in (delivered.path / "README.md").read_text() for name in names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda tensors: tensors.update(extra=np.ones(3, np.float32)), "extra"),
        (lambda tensors: tensors.pop("model.steering_gate.output_bias"), "model.steering_gate.output_bias"),
        (negate, "model.layers.2.mlp.steering_vector"),
    ],
    ids=["added", "removed", "changed"],
)
def test_a_tensor_other_than_disclosed_is_named_also_with_a_matching_receipt(change, name, folder):
    edit_steering(folder, change)
    assert failures(with_a_new_receipt(folder))["tensors other than disclosed"] == name


@pytest.mark.slow
def test_a_tensor_in_a_file_that_nothing_names_is_disclosed_or_found(folder):
    save_file({"hidden": np.ones(3, np.float32)}, folder / "more.safetensors")
    assert failures(with_a_new_receipt(folder))["tensors other than disclosed"] == "hidden"


def test_a_list_of_tensors_that_leaves_one_out_is_found(folder):
    told = json.loads((folder / "receipt.json").read_text())["tensors"]
    edit_json(folder / "receipt.json", tensors=told[1:])
    found = failures(folder)
    assert found["tensors other than disclosed"] == told[0]["name"]
    assert found.keys() == {"tensors other than disclosed", "card other than its receipt's"}


@pytest.mark.slow
def test_a_file_of_tensors_that_cannot_be_read_is_said(folder):
    (folder / "more.safetensors").write_bytes(b"x")
    assert "more.safetensors" in failures(with_a_new_receipt(folder))["tensors other than disclosed"]


def test_a_new_evaluation_and_datasets_reach_the_card_and_go_again(delivered, folder, rules, tmp_path):
    path = write_evaluation(tmp_path / "eval.json", rules[KEY])
    receipt = rewrite_card(folder, evaluation=path, datasets=["someone/traces"])
    assert {"evaluation.json", ".eval_results/adaras.yaml"} <= receipt.files.keys()
    assert "\n- someone/traces\n" in (folder / "README.md").read_text()
    assert verify(folder).ok
    plain = rewrite_card(folder, evaluation=write_evaluation(path, rules[KEY], task=None), datasets=[])
    assert ".eval_results/adaras.yaml" not in plain.files
    assert read(folder).datasets == []


def test_a_card_is_made_anew_without_the_base_as_it_was(delivered, folder):
    before = hashes(folder)
    rewrite_card(folder, repository=delivered.path.name)
    assert hashes(folder) == before


@pytest.mark.parametrize("name", ["a b", "[x](y)", "a/b/c"])
def test_a_dataset_that_no_hub_could_have_is_refused_and_changes_nothing(name, folder):
    before = hashes(folder)
    with pytest.raises(ExportError, match=r"cannot be Hub ids; expected USER/NAME"):
        rewrite_card(folder, datasets=[name])
    assert hashes(folder) == before


HEADERS = {"no YAML": "---\na: [\n---\n", "no mapping": "---\n- a\n---\n", "no text": "---\nlicense: {a: 1}\n---\n"}


@pytest.mark.slow
@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_base_whose_card_cannot_be_read_is_refused_in_one_line(header, rules, folders, tmp_path):
    base = shutil.copytree(folders["llama"], tmp_path / "base")
    (base / "README.md").write_text(header)
    with pytest.raises(ArtifactError, match=r"README.md: .*; expected (YAML|text)") as caught:
        export(rules[KEY], base=base, to="hf", out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
