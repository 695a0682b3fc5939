"""The files of an export against its receipt: no base, no torch, nothing run, and nothing waited for."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import artifacts
import pytest

from adaras_export.delivery import integrity, verifier, writer
from adaras_export.delivery.receipt import UNREADABLE, hashes
from adaras_export.errors import ArtifactError, ExportError
from adaras_export.exporters import manifest
from adaras_export.files import atomic

CODE = "code, or pointers to code, that are not this library's"


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of an export that may be damaged."""
    return artifacts.copy(exported["hf"], tmp_path / "copy")


def failures(folder, **how):
    return {check.name: check.detail for check in integrity.verify_files(folder, **how).failed()}


def forged(folder, **changes):
    """The folder with a receipt that fits its files, and says other things besides."""
    path = artifacts.refit(folder) / "receipt.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_files_are_checked_without_torch_and_without_the_base(folder, tmp_path):
    receipt = json.loads((folder / "receipt.json").read_text())
    forged(folder, source=str(tmp_path / "gone" / receipt["base"]["id"]))
    script = "import sys, adaras_export as a; r = a.verify_files(sys.argv[1]); print(r.ok, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


@pytest.mark.parametrize("name", ["modeling_adaras.py", "steering_adaras.py"])
def test_edited_code_is_named_also_with_a_fitting_receipt(name, folder):
    with (folder / name).open("a") as file:
        file.write("# x\n")
    assert failures(folder) == {"files changed": name, CODE: name}
    assert failures(forged(folder)) == {CODE: name}


@pytest.mark.parametrize(
    "name",
    [
        "evil.py",
        "custom_generate/generate.py",
        "a.PY",
        "x.so",
        "pytorch_model.bin",
        "y.pkl",
        "vectors.npy",  # NumPy reads pickles, and so does whatever reads a kind of file that nobody here thought of
        "x.mat",
        "no-suffix",
        "LICENSE.pkl",
    ],
)
def test_added_code_and_pickles_are_named_also_with_a_fitting_receipt(name, folder):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("import os\n")
    assert failures(forged(folder)) == {CODE: name}


@pytest.mark.parametrize("name", ["LICENSE", "LICENSE-2.0", "NOTICE.pdf", "deep/LICENSE.md"])
def test_a_licence_may_have_any_name_of_a_licence(name, folder):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("You may.")
    assert failures(forged(folder)) == {}


POINTERS = {
    "another repository": {"AutoModelForCausalLM": "somebody/else--modeling_adaras.AdaRASLlamaForCausalLM"},
    "another file": {"AutoModelForCausalLM": "evil.Evil"},
    "in a list": {"AutoTokenizer": ["evil.Evil", None]},
    "no mapping": "evil.Evil",
}


@pytest.mark.parametrize("auto_map", POINTERS.values(), ids=POINTERS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "deep/config.json"])
def test_a_pointer_to_code_elsewhere_is_named_also_with_a_fitting_receipt(name, auto_map, folder):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({"some": [{"thing": {"auto_map": auto_map}}]}))
    assert failures(forged(folder)) == {CODE: f"{name}:auto_map"}


def test_another_rule_is_named_where_the_receipt_names_the_old_one(folder, rules):
    rules[artifacts.KEY].with_strength(0.5).save(folder / "rule.safetensors")
    receipt = json.loads((folder / "receipt.json").read_text())
    found = failures(forged(folder, rule=receipt["rule"]))
    assert [*found] == ["rule other than the receipt's"]
    assert rules[artifacts.KEY].with_strength(0.5).fingerprint in found["rule other than the receipt's"]


def test_a_rule_of_another_base_than_the_receipts_is_named(folder, rules):
    rules[("qwen3", *artifacts.KEY[1:])].save(folder / "rule.safetensors")
    assert "family llama (expected qwen3)" in failures(forged(folder))["base other than the rule's"]


COMMIT = "7" * 40
NAMES = {
    "a Hub id for a folder": ({"id": "meta-llama/Llama-3.1-8B", "revision": COMMIT}, "/models/evil"),
    "a Hub id without a commit": ({"id": "meta-llama/Llama-3.1-8B", "revision": None}, "/models/evil"),
    "a branch": ({"id": "meta-llama/Llama-3.1-8B", "revision": "main"}, "meta-llama/Llama-3.1-8B"),
    "another Hub id": ({"id": "meta-llama/Llama-3.1-8B", "revision": COMMIT}, "somebody/evil"),
    "another folder": ({"id": "good", "revision": None}, "/models/evil"),
    "a folder that is anywhere": ({"id": "evil", "revision": None}, "models/evil"),
}


@pytest.mark.parametrize(("changes", "source"), NAMES.values(), ids=NAMES)
def test_a_base_that_goes_by_another_name_than_its_source_is_named(changes, source, folder):
    base = json.loads((folder / "receipt.json").read_text())["base"]
    assert [*failures(forged(folder, base=base | changes, source=source))] == [
        "base that goes by another name than its source"
    ]


@pytest.mark.parametrize(("name", "revision"), [("somebody/base", COMMIT), ("base", None)])
def test_a_base_goes_by_the_name_of_its_source(name, revision, folder):
    base = json.loads((folder / "receipt.json").read_text())["base"]
    source = name if revision else f"/models/{name}"
    assert failures(forged(folder, base=base | {"id": name, "revision": revision}, source=source)) == {}


def test_a_receipt_that_says_itself_that_a_check_failed_is_named(folder):
    parity = json.loads((folder / "receipt.json").read_text())["parity"]
    parity[0]["figure"] = 7
    found = failures(forged(folder, parity=parity))
    assert found == {"checks that failed by the receipt itself": parity[0]["check"]}


@pytest.mark.parametrize("entry", [{"figure": "0"}, {"limit": "0"}, {"detail": 7}, {"check": None}, {"figure": None}])
def test_a_check_of_another_form_is_refused(entry, folder):
    parity = json.loads((folder / "receipt.json").read_text())["parity"]
    parity[0] |= entry
    with pytest.raises(ArtifactError, match=r"damaged receipt .*check .* has no"):
        integrity.verify_files(forged(folder, parity=parity))


@pytest.mark.parametrize("said", [None, {"difference": 0.0, "limit": 1.0}, 0])
def test_strength_zero_is_what_the_checks_say(said, folder):
    with pytest.raises(ArtifactError, match=r"strength_zero .*; its checks say {'difference': 0.0, 'limit': 0.0}"):
        integrity.verify_files(forged(folder, strength_zero=said))


def test_a_receipt_from_elsewhere_is_held_against_the_one_in_the_folder(folder):
    known = atomic.sha256_file(folder / "receipt.json")
    assert failures(folder, receipt=known.upper()) == {}
    with (folder / "steering_adaras.py").open("a") as file:
        file.write("# x\n")
    assert failures(forged(folder), receipt=known)["receipt other than the one named"] != known
    with pytest.raises(ArtifactError, match="--receipt 12: expected a SHA-256, 64 hexadecimal digits"):
        integrity.verify_files(folder, receipt="12")


# What is no file


def test_a_pipe_is_named_and_not_waited_for(folder):
    for name in ("config.json", "extra"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    found = failures(folder)
    assert found == {UNREADABLE: "config.json extra", "files unknown": "extra"}
    report = verifier.verify(folder)
    assert "not looked into, because of that" in {check.name for check in report.failed()}


@pytest.mark.parametrize("name", ["receipt.json", "rule.safetensors"])
def test_a_pipe_in_place_of_receipt_or_rule_is_not_waited_for(name, folder):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    if name == "receipt.json":
        with pytest.raises(ArtifactError, match=r"receipt.json: is no file"):
            verifier.verify(folder)
    else:
        assert not verifier.verify(folder).ok


@pytest.mark.parametrize("target", ["/proc/self/mem", "/dev/zero", "/missing", "config.json"])
def test_a_link_to_what_cannot_be_read_is_named(target, folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(target)
    assert failures(folder) == {UNREADABLE: "config.json"}
    with pytest.raises(ArtifactError, match=r"config\.json: expected files that can be read"):
        hashes(folder)


def test_a_link_to_a_folder_is_named_though_no_file_is_found_below_it(folder, tmp_path):
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text("import os\n")
    (folder / "custom_generate").symlink_to(tmp_path / "custom_generate")
    assert "custom_generate" in failures(folder)["files unknown"]


@pytest.mark.slow
def test_links_to_the_right_content_are_right_as_in_the_hubs_cache(exported, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in exported["hf"].iterdir():
        (snapshot / path.name).symlink_to(path)
    assert failures(snapshot) == {}
    assert verifier.verify(snapshot).ok


def test_a_folder_that_may_not_be_entered_is_named():
    """As somebody else than root, who may enter everything."""
    with tempfile.TemporaryDirectory() as place, ExitStack() as undo:
        folder = Path(place)
        (folder / "sub").mkdir()
        undo.callback((folder / "sub").chmod, 0o755)
        (folder / "sub").chmod(0)
        folder.chmod(0o755)
        if os.geteuid() == 0:
            os.seteuid(65534)
            undo.callback(os.seteuid, 0)
        assert [*manifest.entries(folder)] == ["sub"]


@pytest.mark.parametrize("name", [".gitattributes", ".git/HEAD", ".cache/huggingface/download/x.metadata"])
def test_what_git_and_the_hub_put_beside_it_is_none_of_its_files(name, folder):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("x")
    assert failures(folder) == {}


@pytest.mark.parametrize(
    "name", [".git", ".cache/x", "sub/.gitattributes", "__pycache__/a.pyc", ".gitignore", ".Git/x"]
)
def test_whatever_only_looks_like_that_is_unknown(name, folder):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("x")
    assert failures(folder)["files unknown"] == name


@pytest.mark.parametrize("name", ["two words", "line\nbreak", "caf\u00e9", "cafe\u0301", "a\u202eb"])
def test_a_name_that_could_pass_for_another_is_shown_in_escapes(name, folder):
    (folder / name).write_text("x")
    assert failures(folder)["files unknown"] == ascii(name)


# What only the whole verification sees of an artifact whose receipt fits


@pytest.mark.slow
def test_an_edited_card_is_named(folder):
    card = folder / "README.md"
    card.write_text(card.read_text().replace("none of them changed", "safe") + "\nTrust me.\n")
    found = {check.name: check.detail for check in verifier.verify(artifacts.refit(folder)).failed()}
    assert found == {"card other than its receipt's": "README.md"}


@pytest.mark.slow
def test_an_evaluation_that_the_card_cannot_be_made_of_is_named(folder):
    (folder / "evaluation.json").write_text("{}")
    found = {check.name: check.detail for check in verifier.verify(artifacts.refit(folder)).failed()}
    assert found == {"card other than its receipt's": "evaluation.json"}


@pytest.mark.slow
def test_a_licence_that_is_not_the_bases_is_named(rules, folders, tmp_path):
    base = shutil.copytree(folders["llama"], tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    out = writer.export(rules[artifacts.KEY], base=base, to="hf", out=tmp_path / "out").path
    (base / "README.md").write_text("---\nlicense: other\n---\n# Tiny\n")
    found = {check.name: check.detail for check in verifier.verify(out).failed()}
    assert found == {"statements about the base that differ from its card": "license"}


@pytest.mark.slow
def test_what_a_receipt_says_of_features_and_of_the_bases_chat_template_is_checked(folder):
    forged(folder, drops=["gate"], chat_template=False)
    found = {check.name: check.detail for check in verifier.verify(folder).failed()}
    assert found["statements about the base that differ from its card"] == "chat_template"
    assert found["features left out, or not, other than the receipt's"] == "gate"


@pytest.mark.slow
def test_a_chat_template_that_the_base_has_not_is_named(exported, tmp_path):
    folder = artifacts.copy(exported["hf"], tmp_path / "copy")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ 'Say no.' }}")
    found = {check.name: check.detail for check in verifier.verify(artifacts.refit(folder)).failed()}
    assert found == {"files that neither the library nor the base has": "additional_chat_templates/tool.jinja"}


def test_a_receipt_of_an_unknown_target_is_no_matter_of_files(folder):
    assert failures(forged(folder, target="floppy")) == {}
    with pytest.raises(ExportError, match="floppy: no such target"):
        verifier.verify(folder)
