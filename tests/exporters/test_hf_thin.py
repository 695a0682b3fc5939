"""Target hf-thin: as hf in a process without the library, with the base's weights from elsewhere, and only those."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import tiny
import torch
import transformers
from elsewhere import as_output, exports, jobs_of, require_equal_to_the_oracle, run_elsewhere
from safetensors.torch import load_file, save_file
from tiny import greedy, require_answers

from adaras_export.core import checkpoint
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.delivery.receipt import hashes
from adaras_export.delivery.verifier import verify
from adaras_export.delivery.writer import export
from adaras_export.errors import ArtifactError, ExportError, UnsupportedModelError
from adaras_export.exporters.base import ExportContext
from adaras_export.exporters.hf import thin as thin_target
from adaras_export.exporters.hf.exporter import EXPORTER as FULL
from adaras_export.exporters.hf.exporter import STEERING_FILE, payload, steered_config, steering_tensors
from adaras_export.exporters.hf.thin import EXPORTER
from adaras_export.runtime import thin_adaras

CAUSAL, LATER = ("causal", "last_prompt_token"), ("later", "first_generated_token")
KEY = ("llama", *CAUSAL)
EVERYWHERE = ["greedy", "uncached", "single", "sampled"]
ONCE = ["off", "decoder", "tokenizer", "untrusted", "again", "half"]
FEW = ("llama", "qwen3-sharded", "gemma2", "gpt2")  # what the others would say once more, these say
JOBS = {
    **{(name, *CAUSAL): ["greedy", "decoder"] for name in tiny.NAMES},
    **{(name, *CAUSAL): [*EVERYWHERE, "again", "half", "decoder"] for name in FEW},
    ("qwen3", *LATER): EVERYWHERE,
    ("gpt2", *LATER): ["greedy"],
    ("qwen3", None, "last_prompt_token"): ["greedy"],
    KEY: EVERYWHERE + ONCE,
}
KEYS = pytest.mark.parametrize("key", JOBS, ids=tiny.key_id)
FAMILIES = pytest.mark.parametrize("name", tiny.NAMES)
few_families = pytest.mark.parametrize("name", FEW)
slow = pytest.mark.slow  # they share one process that opens eighteen repositories
COMMIT, THIN_COMMIT = "5" * 40, "7" * 40


@pytest.fixture(scope="module")
def written(rules, folders, tmp_path_factory):
    """The folder of an export, by the keys of ``rules``."""
    return exports(EXPORTER, rules, folders, tmp_path_factory)


@pytest.fixture(scope="module")
def clean(written, tmp_path_factory):
    """The results of one process in which importing the library fails."""
    return run_elsewhere(jobs_of(JOBS, written), tmp_path_factory.mktemp("clean"))


@pytest.fixture
def thin(written, tmp_path):
    """A copy of an export that may be damaged."""
    return shutil.copytree(written[KEY], tmp_path / "thin")


@pytest.fixture
def base(folders, tmp_path):
    """A copy of its base that may be damaged."""
    return shutil.copytree(folders["llama"], tmp_path / "elsewhere")


def opened(folder, auto=transformers.AutoModelForCausalLM, **how):
    return auto.from_pretrained(folder, trust_remote_code=True, **{"dtype": torch.float32, **how})


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def put_into_the_hub_cache(folder, cache, repo, commit):
    """As if the Hub's ``repo`` had been downloaded: blobs, a snapshot of links to them, and a branch."""
    home = Path(cache) / f"models--{repo.replace('/', '--')}"
    for path in (path for path in folder.rglob("*") if path.is_file()):
        blob, name = home / "blobs" / f"{commit[:8]}-{path.name}", home / "snapshots" / commit / path.name
        for parent in (blob.parent, name.parent, home / "refs"):
            parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        name.symlink_to(blob)
    (home / "refs" / "main").write_text(commit)


# As hf


@slow
@KEYS
def test_an_export_without_the_library_equals_the_oracle(key, clean, told, stock, rules):
    require_equal_to_the_oracle(clean[key], JOBS[key], key, told, stock, rules)


@slow
@KEYS
def test_the_loading_report_is_empty_and_nothing_is_said_of_missing_tensors(key, clean):
    assert clean[key]["report"] == {}
    for word in ("steering", "newly initialized", "missing", "generative capabilities"):
        assert word not in clean["stderr"].lower()


@slow
@KEYS
def test_the_decisions_that_users_see_are_the_oracles(key, clean, told):
    expected = [(a["probability"], a["steered"]) for a in told[key]] if key[1] else []
    found = clean[key]["greedy"]["decisions"]
    assert [steered for _, steered in found] == [steered for _, steered in expected]
    assert [p for p, _ in found] == pytest.approx([p for p, _ in expected], abs=1e-5)


@slow
@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_decoder_alone_is_steered_too(name, clean, told):
    for found, answer in zip(clean[(name, *CAUSAL)]["decoder"], told[(name, *CAUSAL)], strict=True):
        expected = answer["logits"][0]
        limit = tiny.logit_limit(answer["logits"])
        scaled = torch.tensor(found)
        if name == "gemma2":  # the model caps what its LM head gives
            scaled = torch.tanh(scaled / 30.0) * 30.0
        if name == "granite":
            scaled = scaled / 0.5
        assert float((scaled - expected).abs().max()) <= limit


@slow
def test_off_is_the_base_model_bit_for_bit_by_each_way_to_have_it(clean, stock):
    expected = greedy(stock["llama"])
    for result in clean[KEY]["off"]:
        assert result["sequences"] == expected.sequences.tolist()
        assert torch.equal(torch.tensor(result["logits"]), torch.stack(expected.logits))


@slow
def test_tokenizer_chat_template_and_generation_settings_are_carried(clean):
    assert clean[KEY]["tokenizer"] == ["<user>hi<eos><assistant>", 6, "adaras_llama"]


@slow
def test_without_trust_remote_code_there_is_an_error_and_never_an_unsteered_model(clean):
    for found in clean[KEY]["untrusted"]:
        assert found.startswith("ValueError"), found
        assert "trust_remote_code" in found or "adaras_llama" in found


@slow
@few_families
def test_in_half_precision_gate_and_vectors_stay_float32(name, clean):
    own, others = clean[(name, *CAUSAL)]["half"]
    assert {dtype for key, dtype in own.items() if not key.endswith("steering_index")} == {"torch.float32"}
    assert {dtype for key, dtype in own.items() if key.endswith("steering_index")} == {"torch.int64"}
    assert len(own) == 2 + 2 + 6  # vectors, indices, the gate
    assert others == ["torch.bfloat16"]


@slow
@few_families
def test_save_pretrained_writes_a_full_repository_of_target_hf(name, clean, written, told, rules, folders):
    key = (name, *CAUSAL)
    require_answers(as_output(clean[key]["again"]), told[key])
    again = Path(f"{written[key]}-again")
    assert {path.name: path.read_bytes() for path in again.glob("*.py")} == payload()
    text = (again / "config.json").read_text()
    expected = steered_config(json.loads((folders[name] / "config.json").read_text()), rules[key])
    assert json.loads(text)["adaras"] == expected["adaras"]
    assert json.loads(text)["auto_map"] == expected["auto_map"]
    assert str(folders[name]) not in text
    stored = checkpoint.shards(again)
    assert {*checkpoint.shards(folders[name]), *steering_tensors(rules[key], Checkpoint(folders[name]))} == {*stored}


# What is in the folder


@FAMILIES
def test_a_thin_repository_has_kilobytes_and_one_small_file_of_tensors(name, written):
    files = [path for path in written[(name, *CAUSAL)].rglob("*") if path.is_file()]
    assert [path.name for path in files if path.suffix == ".safetensors"] == [STEERING_FILE]
    assert not [path for path in files if path.name.endswith(".index.json")]
    assert sum(path.stat().st_size for path in files if not path.name.startswith("tokenizer")) < 60_000


def test_the_config_is_that_of_hf_but_for_the_loading_classes_and_the_base(rules, folders, written):
    expected = steered_config(json.loads((folders["llama"] / "config.json").read_text()), rules[KEY])
    found = json.loads((written[KEY] / "config.json").read_text())
    record = found["adaras"].pop("base")
    assert record == {
        "id": str(folders["llama"].resolve()),
        "revision": None,
        "fingerprint": Checkpoint(folders["llama"]).fingerprint,
        "auto_map": expected["auto_map"],
    }
    assert {key for key in found if found[key] != expected[key]} == {"auto_map"}
    assert {name.partition(".")[0] for name in found["auto_map"].values()} == {"thin_adaras"}


@pytest.mark.parametrize("file", ["adapter_config.json", "quantised"])
def test_a_base_that_is_not_plain_is_refused(file, rules, base, tmp_path):
    if file == "quantised":
        edit_json(base / "config.json", quantization_config={"quant_method": "gptq"})
    else:
        (base / file).write_text("{}")
    with pytest.raises(
        (ExportError, UnsupportedModelError), match=r"is quantised by 'gptq'|has an adapter_config.json"
    ):
        EXPORTER.write(rules[KEY], Checkpoint(base), tmp_path)


# The base


def flip_one_value(path):
    edit_tensors(path, lambda tensors: tensors["lm_head.weight"][0, 0].neg_())


def reshape_one(path):
    edit_tensors(path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T.contiguous()}))


def cast(path):
    edit_tensors(path, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))


def drop_one(path):
    edit_tensors(path, lambda tensors: tensors.pop("model.norm.weight"))


def add_one(path):
    edit_tensors(path, lambda tensors: tensors.update({"extra": torch.zeros(1)}))


@pytest.mark.parametrize("change", [flip_one_value, reshape_one, cast, drop_one, add_one])
def test_a_base_with_other_tensors_is_refused_in_one_line(change, thin, base):
    assert opened(thin, base=base) is not None
    change(base / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"elsewhere: is not the base model that this repository was made for"
    ) as caught:
        opened(thin, base=base)
    assert "\n" not in str(caught.value)
    with pytest.raises(ArtifactError, match="is not the base model that this"):
        EXPORTER.with_context(ExportContext("x", base_elsewhere=base)).load(thin)


def test_a_base_that_is_gone_is_refused_in_one_line_and_may_be_named(rules, base, told, tmp_path):
    (tmp_path / "out").mkdir()
    EXPORTER.write(rules[KEY], Checkpoint(base), tmp_path / "out")
    base = base.rename(tmp_path / "moved")
    with pytest.raises(OSError, match=r"elsewhere: the base model's weights are not there .*base=\.\.\.\)") as caught:
        opened(tmp_path / "out")
    assert "\n" not in str(caught.value)
    require_answers(greedy(opened(tmp_path / "out", base=base)), told[KEY])
    require_answers(greedy(opened(tmp_path / "out", base=str(base))), told[KEY])


def test_a_base_without_safetensors_and_one_with_a_missing_shard_are_refused(thin, base, written, folders, tmp_path):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"elsewhere: the base model's weights are not there \(no model.safetensors"):
        opened(thin, base=base)
    sharded = shutil.copytree(folders["qwen3-sharded"], tmp_path / "sharded")
    sorted(sharded.glob("*.safetensors"))[1].unlink()
    with pytest.raises(OSError, match=r"model-00002-of"):
        opened(written[("qwen3-sharded", *CAUSAL)], base=sharded)


def test_what_would_load_other_weights_than_those_that_were_checked_is_refused(thin):
    for how in ({"variant": "fp16"}, {"key_mapping": {"a": "b"}}, {"state_dict": {}}):
        with pytest.raises(ValueError, match=f"{next(iter(how))}: not possible here"):
            opened(thin, **how)


ODD = {
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "flags": torch.arange(5000) % 3 == 0,
    "halves": torch.arange(3000).to(torch.bfloat16).reshape(30, 100),
    "small": torch.arange(4095, dtype=torch.int32).to(torch.int8),
    "exact": torch.arange(4096, dtype=torch.int32).to(torch.int8),
    "over": torch.arange(4097, dtype=torch.int32).to(torch.int8),
    "long": torch.arange(20_001, dtype=torch.float64),
    "eight": torch.arange(99).to(torch.float8_e4m3fn),
}


def test_the_fingerprint_of_the_payload_is_the_librarys(tmp_path):
    """Types and sizes at which the head, middle and tail of a tensor meet, and the places where they lie."""
    path = tmp_path / "model.safetensors"
    save_file(ODD, path)
    expected = Checkpoint(tmp_path).fingerprint
    thin_adaras._require_fingerprint("x", {"": str(path)}, expected)
    for place in (0, 4095 // 8, 10_000, 20_000):
        save_file({**ODD, "long": ODD["long"].index_fill(0, torch.tensor([place]), -1.0)}, path)
        with pytest.raises(ValueError, match="is not the base model"):
            thin_adaras._require_fingerprint("x", {"": str(path)}, expected)


def test_neither_settings_nor_code_of_the_bases_repository_are_used(thin, base, tmp_path):
    edit_json(base / "generation_config.json", max_new_tokens=1)
    (base / "custom_generate").mkdir()
    (base / "custom_generate" / "generate.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w').close()\n")
    model = opened(thin, base=base)
    assert model.generation_config.max_new_tokens == 6
    assert "generate" not in vars(model)
    assert not (tmp_path / "it-ran").exists()


# From the Hub


@pytest.mark.slow
def test_a_repository_of_the_hub_pulls_its_base_by_id_and_revision(rules, folders, told, tmp_path):
    """Both lie in a cache, as after a download; the base's main branch is another model by now."""
    thin = tmp_path / "thin"
    thin.mkdir()
    EXPORTER.with_context(ExportContext("tiny/base", COMMIT)).write(rules[KEY], Checkpoint(folders["llama"]), thin)
    cache = tmp_path / "home" / "hub"
    put_into_the_hub_cache(folders["llama"], cache, "tiny/base", COMMIT)
    put_into_the_hub_cache(folders["qwen3"], cache, "tiny/base", "6" * 40)
    put_into_the_hub_cache(thin, cache, "tiny/thin", THIN_COMMIT)
    assert str(cache) not in (thin / "config.json").read_text()
    jobs = {"hub": {**jobs_of({KEY: ["greedy", "decoder", "half"]}, {KEY: "tiny/thin"})[KEY]}}
    found = run_elsewhere(jobs, tmp_path / "home")["hub"]
    require_answers(as_output(found["greedy"]), told[KEY])
    assert found["report"] == {}


@pytest.fixture(scope="module")
def hub_base(folders):
    """The id of a base in the cache of this process."""
    put_into_the_hub_cache(folders["llama"], huggingface_hub.constants.HF_HUB_CACHE, "tiny/llama", COMMIT)
    return "tiny/llama"


def test_export_records_id_and_revision_and_verify_finds_them(hub_base, rules, told, tmp_path):
    report = export(rules[KEY], base=hub_base, to="hf-thin", out=tmp_path / "out")
    assert report.parity.ok
    record = json.loads((tmp_path / "out" / "config.json").read_text())["adaras"]["base"]
    assert (record["id"], record["revision"]) == (hub_base, COMMIT)
    assert verify(tmp_path / "out").ok
    require_answers(
        greedy(opened(tmp_path / "out", revision="of-the-thin-repository", local_files_only=True)), told[KEY]
    )


@pytest.fixture(scope="module")
def evil_hub_base(folders, tmp_path_factory):
    """The id of another base in the cache of this process; the fingerprint does not sample what differs."""
    evil = shutil.copytree(folders["llama"], tmp_path_factory.mktemp("evil") / "base")
    edit_tensors(evil / "model.safetensors", lambda tensors: tensors["lm_head.weight"][64, 0].neg_())
    assert Checkpoint(evil).fingerprint == Checkpoint(folders["llama"]).fingerprint
    put_into_the_hub_cache(evil, huggingface_hub.constants.HF_HUB_CACHE, "tiny/evil", COMMIT)
    return "tiny/evil"


def test_a_repository_that_names_another_base_of_the_hub_than_the_one_given_is_found(
    hub_base, evil_hub_base, rules, folders, tmp_path
):
    out = export(rules[KEY], base=hub_base, to="hf-thin", out=tmp_path / "out").path
    assert verify(out, base=folders["llama"]).ok
    settings, receipt = (json.loads((out / file).read_text()) for file in ("config.json", "receipt.json"))
    absent = "names of the base that lead to nothing on this machine, so not compared"
    for name, base, check in (
        (evil_hub_base, folders["llama"], "names of the base that lead to another"),
        ("tiny/far", hub_base, absent),
    ):
        settings["adaras"]["base"]["id"] = name
        edit_json(out / "config.json", adaras=settings["adaras"])
        named = {"source": name, "base": receipt["base"] | {"id": name}}
        edit_json(out / "receipt.json", **named, files=hashes(out))
        found = {one.name: one.detail for one in verify(out, base=base).failed()}
        assert found.pop(check).startswith(f"{name} at revision {COMMIT}")
        assert found.keys() == {"card other than its receipt's"}


def test_a_base_that_the_hub_does_not_give_is_refused_in_one_line(rules, folders, tmp_path):
    EXPORTER.with_context(ExportContext("tiny/nowhere", COMMIT)).write(
        rules[KEY], Checkpoint(folders["llama"]), tmp_path
    )
    with pytest.raises(OSError, match="tiny/nowhere: the base model's weights are not there") as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


# What users pass on


def test_devices_are_passed_on(thin, told):
    for device_map in ("cpu", "auto"):
        require_answers(greedy(opened(thin, device_map=device_map)), told[KEY])


PLACES = [
    "model.embed_tokens",
    "model.steering_gate",
    "model.norm",
    "model.rotary_emb",
    "lm_head",
    *(f"model.layers.{n}" for n in range(4)),
]


def test_a_dispatched_model_is_steered_and_offloaded_steering_is_refused(written, told, tmp_path):
    """Where a model is spread over devices, hooks stand before each MLP's forward; steering must stay behind them."""
    key = ("llama", "causal", "last_prompt_token")
    how = {"device_map": dict.fromkeys(PLACES, "cpu") | {"lm_head": "disk"}, "offload_folder": tmp_path}
    model = opened(written[key], **how)
    assert any(hasattr(layer.mlp, "_hf_hook") for layer in model.model.layers)
    require_answers(greedy(model), told[key])
    how["device_map"]["model.layers.2"] = "disk"
    with pytest.raises(ValueError, match=r"2.mlp.steering_vector: offloaded; save_pretrained\(\) the model first"):
        opened(written[key], **how)


def test_arguments_of_the_hub_and_of_the_model_are_passed_on(thin, tmp_path):
    model = opened(
        thin,
        token="hf_x",
        cache_dir=tmp_path / "cache",
        local_files_only=True,
        attn_implementation="eager",
        dtype="auto",
    )
    assert model.config._attn_implementation == "eager"
    assert model.dtype == torch.float32  # as the config says
    assert opened(thin, dtype=torch.float16).model.layers[2].mlp.steering_vector.dtype == torch.float32


def test_a_config_of_the_callers_own_is_used(thin, stock):
    config = transformers.AutoConfig.from_pretrained(thin, trust_remote_code=True)
    config.adaras["strength"] = 0.0
    model = opened(thin, config=config)
    assert torch.equal(torch.stack(greedy(model).logits), torch.stack(greedy(stock["llama"]).logits))
    assert "base" in config.adaras  # not written to


@pytest.mark.parametrize("order", [(EXPORTER, FULL), (FULL, EXPORTER)], ids=["thin-full", "full-thin"])
def test_full_and_thin_repositories_in_folders_of_the_same_name_do_not_meet(order, rules, folders, told, tmp_path):
    """Transformers 5 knows the classes of a local folder by its name and the content of its code."""
    for exporter, name in zip(order, "ab", strict=True):
        (tmp_path / name / tmp_path.name).mkdir(parents=True)
        exporter.write(rules[KEY], Checkpoint(folders["llama"]), tmp_path / name / tmp_path.name)
    for name in "aba":
        require_answers(greedy(opened(tmp_path / name / tmp_path.name)), told[KEY])


def test_a_saved_model_opens_in_a_folder_of_the_same_name(thin, told, tmp_path):
    opened(thin).save_pretrained(tmp_path / "full" / "thin")
    for folder in (tmp_path / "full" / "thin", thin):
        require_answers(greedy(opened(folder)), told[KEY])
    assert type(opened(thin).config).__name__ == "AdaRASLlamaConfig"


def test_two_thin_repositories_in_one_process_keep_their_own_rules(written, told):
    for key in (KEY, ("qwen3", *CAUSAL), ("qwen3", *LATER), ("qwen3", None, "last_prompt_token"), KEY):
        require_answers(greedy(opened(written[key])), told[key])


# Damage


def damage_drop(tensors):
    del tensors["layers.2.mlp.steering_vector"]


def damage_add(tensors):
    tensors["layers.1.mlp.steering_vector"] = tensors["layers.2.mlp.steering_vector"].clone()


def damage_shape(tensors):
    tensors["steering_gate.hidden_bias"] = tensors["steering_gate.hidden_bias"][:-1].clone()


@pytest.mark.parametrize("change", [damage_drop, damage_add, damage_shape])
def test_a_steering_file_that_does_not_fit_the_config_is_refused(change, thin):
    edit_tensors(thin / STEERING_FILE, change)
    expected = r"model-steering.safetensors: missing, unknown or of another shape: (layers|steering_gate).\S+; expected"
    with pytest.raises(ValueError, match=expected):
        opened(thin)


@pytest.fixture(scope="module")
def delivered(rules, folders, tmp_path_factory):
    return export(rules[KEY], base=folders["llama"], to="hf-thin", out=tmp_path_factory.mktemp("out") / "thin-steered")


@pytest.fixture
def folder(delivered, tmp_path):
    """A delivered copy that may be damaged; of a name of its own, by which Transformers keeps the code."""
    return shutil.copytree(delivered.path, tmp_path / tmp_path.name)


def failures(folder):
    """What verify says, also when the receipt was made to match."""
    receipt = json.loads((folder / "receipt.json").read_text())
    edit_json(folder / "receipt.json", files={**receipt["files"], **hashes(folder)})
    return {check.name: check.detail for check in verify(folder).failed()}


def test_an_export_is_complete_and_verifies_also_from_elsewhere(delivered, folder, base):
    assert delivered.parity.ok
    assert {"README.md", "config.json", "rule.safetensors", "thin_adaras.py", STEERING_FILE} < set(delivered.files)
    assert json.loads((folder / "receipt.json").read_text())["target"] == "hf-thin"
    assert "argument, `base=`." in (folder / "README.md").read_text()
    assert verify(folder).ok
    report = verify(folder, base=base)
    assert report.ok, report.failed()


def test_a_config_that_names_another_base_is_named_and_not_followed(folder):
    settings = json.loads((folder / "config.json").read_text())["adaras"]
    for change in ({"id": "somebody/else"}, {"fingerprint": "0" * 64}, {"revision": "main"}, {"auto_map": {}}):
        edit_json(folder / "config.json", adaras=settings | {"base": settings["base"] | change})
        found = failures(folder)
        assert found["config entries that differ"] == "adaras"
        assert "not run, because its code or its settings differ" in found


def test_the_loader_is_only_in_thin_repositories():
    assert set(thin_target.payload()) - set(payload()) == {"thin_adaras.py"}
