"""Target stock: ordinary checkpoints of every family that it claims, without custom code, against the oracle."""

import json
import shutil

import pytest
import tiny
import torch
import transformers
from elsewhere import as_output, exports, jobs_of, run_elsewhere
from pairwise import in_turn, pairwise
from receipts import failures
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import PROMPTS, greedy, require_answers

from adaras_export.core import checkpoint
from adaras_export.core.base_model import BaseModel
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.families import FAMILIES
from adaras_export.delivery.verifier import verify
from adaras_export.delivery.writer import export
from adaras_export.errors import ExportError, UnsupportedModelError
from adaras_export.exporters.stock import families, stream
from adaras_export.exporters.stock.exporter import EXPORTER
from adaras_export.exporters.stock.families import FORMS, Form

CAUSAL = ("causal", "last_prompt_token")
LOSS = ("gate", "start", "dial")
FIVE = pytest.mark.skipif("hy_v3" not in transformers.CONFIG_MAPPING, reason="needs a Transformers with hy_v3")


def marks_of(name, quick=()):
    """Qwen3 is for where its form is there; where some names are quick, the others are slow."""
    return [pytest.mark.slow] * (bool(quick) and name not in quick) + [FIVE] * name.startswith("qwen3")


def only_five(*names, quick=()):
    return [pytest.param(name, marks=marks_of(name, quick)) for name in names]


NAMES = [name for name in tiny.NAMES if tiny.SPECS[name][0] in FORMS and name != "mistral-window"]
HERE = [name for name in NAMES if FORMS[tiny.SPECS[name][0]].model_type in transformers.CONFIG_MAPPING]
QUICK = ("llama-biased", "qwen2", "qwen3")
each_name = pytest.mark.parametrize("name", only_five(*NAMES))
most_slow = pytest.mark.parametrize("name", only_five(*NAMES, quick=QUICK))
HALVES = [
    pytest.param(*case, marks=marks_of(case[0], QUICK))
    for case in in_turn(QUICK, NAMES, (torch.bfloat16, torch.float16))
]


@pytest.fixture(scope="module")
def stocked(rules, folders, tmp_path_factory):
    """The folder of an export to `stock`, by the keys of ``rules``."""
    return exports(EXPORTER, rules, folders, tmp_path_factory)


@pytest.fixture(scope="module")
def clean(stocked, tmp_path_factory):
    """The results of one process in which importing the library fails, and which trusts no code."""
    modes = {(name, *CAUSAL): ["greedy", "uncached", "single", "auto"] for name in HERE}
    return run_elsewhere(jobs_of(modes, stocked, trust=False), tmp_path_factory.mktemp("clean"))


def opened(folder, **how):
    how = {"dtype": torch.float32, **how}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)


def found_by(report):
    return {key: names for key, names in report.items() if names}


def edit_json(path, **changes):
    """Set keys; an ellipsis takes one away."""
    found = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))


def saved(name, folder, dtype=torch.float32, shard="1GB", **changes):
    """A base with other settings or another type."""
    base = tiny.save_base(name, folder, **changes)
    for path in base.glob("model*"):
        path.unlink()
    tiny.build_model(name, **changes).to(dtype).save_pretrained(base, max_shard_size=shard)
    return base


def carried(base, tmp_path, rows_alone=False):
    """Export a rule on a base of any settings, and hold its first tokens against the oracle's. Returns the folder.

    In float64: some settings round float32 by 75 units of the largest logit, on some processors, in the oracle alone.
    """
    model, report = opened(base, dtype=torch.float64)
    assert not found_by(report)
    rule = tiny.make_rule(BaseModel.of(base), strength=tiny.STRENGTHS.get(model.config.model_type, 2.0))
    out = tmp_path / "out"
    out.mkdir()
    EXPORTER.write(rule, Checkpoint(base), out)
    found, report = opened(out, dtype=torch.float64)
    assert not found_by(report)
    expected = tiny.answers_everywhere(model.eval(), rule, steps=3)
    if rows_alone:
        for row, answer in zip(PROMPTS, expected, strict=True):
            require_answers(greedy(found, [row], use_cache=False, max_new_tokens=3), [answer])
    else:
        require_answers(greedy(found, max_new_tokens=3), expected)
    return out


# Against the oracle


@pytest.mark.slow  # all families together, in a process of their own
@each_name
def test_a_checkpoint_in_a_process_without_the_library_equals_the_oracle(name, clean, told_everywhere):
    key = (name, *CAUSAL)
    assert clean[key]["report"] == {}
    for mode in ("greedy", "uncached"):
        require_answers(as_output(clean[key][mode]), told_everywhere[key])
    for row, answer in enumerate(told_everywhere[key]):
        require_answers(as_output(clean[key]["single"][row]), [answer])


@each_name
def test_in_this_process_too_cached_or_not(name, stocked, told_everywhere):
    key = (name, *CAUSAL)
    model, report = opened(stocked[key])
    assert not found_by(report)
    require_answers(greedy(model), told_everywhere[key])
    require_answers(greedy(model, use_cache=False), told_everywhere[key])


@pytest.mark.slow  # as above
@each_name
def test_the_type_of_the_base_is_what_dtype_auto_gives(name, clean):
    assert set(clean[(name, *CAUSAL)]["auto"]) == {"torch.float32"}


ROPES = {
    "theta": None,
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "old-yarn": {"type": "yarn", "factor": 4.0},  # an older word, and no original length
}
WORDS = ("for 4", "for 5")


def read_by_both(name, rope, written):
    """Transformers 4 reads no base that is written for 5, and not this one."""
    return transformers.__version__ >= "5" or (written == "for 4" and (name, rope) != ("granite", "old-yarn"))


ROTATED = pairwise(
    ("llama",), ("llama", "mistral", "qwen2", "qwen3", "granite", "smollm3"), ROPES, WORDS, allowed=read_by_both
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rope", "written"),
    [pytest.param(*case, marks=marks_of(case[0])) for case in ROTATED],
)
def test_rotary_embeddings_pass_through_in_the_words_of_both_generations(name, rope, written, folders, tmp_path):
    base = shutil.copytree(folders[name], tmp_path / "base")
    scaling, positions = ROPES[rope], 8 if rope == "dynamic" else 128
    old = {"rope_theta": 777.0, "rope_scaling": scaling, "rope_parameters": ...}
    new = {"rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": 777.0}, "rope_theta": ...}
    if written == "for 5" and "type" in new["rope_parameters"]:
        new["rope_parameters"]["rope_type"] = new["rope_parameters"].pop("type")
    head = {"head_dim": 8} if name == "mistral" else {}  # Transformers 4 needs it named where there is a scaling
    edit_json(base / "config.json", max_position_embeddings=positions, **head, **(old if written == "for 4" else new))
    out = carried(base, tmp_path, rows_alone=rope == "dynamic")  # its frequencies depend on the longest row
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 777.0
    kind = "yarn" if rope == "old-yarn" else (scaling or {"rope_type": "default"})["rope_type"]
    assert config["rope_parameters"]["rope_type"] == kind
    assert (config["rope_scaling"] is None) == (rope == "theta")


@pytest.mark.parametrize("name", only_five("llama", "mistral", "qwen2", "qwen3", "smollm3"))
def test_a_theta_that_the_base_leaves_to_its_family_is_written_down(name, folders, tmp_path):
    base = shutil.copytree(folders[name], tmp_path / "base")
    edit_json(base / "config.json", rope_theta=..., rope_scaling=..., rope_parameters=...)
    config = json.loads((carried(base, tmp_path) / "config.json").read_text())
    read = transformers.AutoConfig.from_pretrained(base)
    assert config["rope_theta"] == getattr(read, "rope_theta", None) or read.rope_parameters["rope_theta"]


VARIANTS = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True}),
    ("llama", {"head_dim": 16}),
    ("llama-biased", {"attention_bias": False, "tie_word_embeddings": False}),
    ("mistral", {"tie_word_embeddings": True, "head_dim": 16}),
    ("mistral", {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    ("qwen2", {"tie_word_embeddings": False}),
    ("qwen2", {"hidden_act": "gelu", "rms_norm_eps": 1e-3}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True, "rms_norm_eps": 1e-3}),
    ("qwen3", {"hidden_act": "gelu", "num_key_value_heads": 1}),
    ("granite", {"mlp_bias": True, "attention_bias": True, "attention_multiplier": 0.3}),
    ("smollm3", {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": False}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 4}),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=lambda value: "-".join(value) if value else "")
def test_what_the_base_has_besides_is_kept(name, changes, tmp_path):
    if name not in HERE:
        pytest.skip("needs a Transformers with hy_v3")
    carried(saved(name, tmp_path / "base", **changes), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["hidden_act", "rms_norm_eps", "tie_word_embeddings", "head_dim"])
@pytest.mark.parametrize("name", only_five("mistral", "qwen2", "qwen3"))
def test_what_the_base_leaves_to_its_family_is_written_down(name, missing, tmp_path):
    changes = {"tie_word_embeddings": False, **({"head_dim": 128} if name == "qwen3" else {})}
    base = saved(name, tmp_path / "base", **changes)
    edit_json(base / "config.json", **{missing: ...})
    config = json.loads((carried(base, tmp_path) / "config.json").read_text())
    assert missing in config


def test_a_checkpoint_that_was_steered_before_can_be_a_base(stocked, tmp_path):
    """Its steering file is a base's file like any other, and keeps its values under another name."""
    out = carried(stocked[("llama", *CAUSAL)], tmp_path)
    assert {"model-base.safetensors", "model-base-steering.safetensors", "model-steering.safetensors"} < {
        path.name for path in out.iterdir()
    }


# What is in the folder


@pytest.mark.parametrize(("name", "dtype"), HALVES)
def test_half_precision_weights_stay_bit_identical_and_the_biases_are_exact(name, dtype, tmp_path):
    base = saved(name, tmp_path / "base", dtype, shard="20KB")
    out = carried(base, tmp_path)
    located, ours = checkpoint.shards(out), stream.streams(out / "model-steering.safetensors")
    for tensor, path in checkpoint.shards(base).items():
        if tensor not in ours:
            assert stream.same_tensors(path, stream.streams(path))
            assert stream._equal(stream.streams(located[tensor])[tensor], stream.streams(path)[tensor]), tensor
    assert {tensor.dtype for tensor in ours.values()} == {"F32"}
    assert len({*located.values()}) > 3
    for found in (opened(out, dtype="auto")[0], opened(base, dtype="auto")[0]):
        assert {tensor.dtype for tensor in found.parameters()} == {dtype}


def test_entries_that_mlx_and_earlier_transformers_need_are_written_and_read_as_before():
    """Saved by Transformers 5, the rotary share of a gpt_neox is read as 0.25 by 4.57 to 5.4; MLX opens no such GPT."""
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}
    neox = families.expressed({"model_type": "gpt_neox", **rope}, "gpt_neox", "float32", "base")
    assert (neox["rotary_pct"], neox["rotary_emb_base"], neox["rope_parameters"]) == (
        0.5,
        500.0,
        rope["rope_parameters"],
    )
    assert families.expressed({"n_positions": 128}, "gpt2", "float32", "base")["n_ctx"] == 128
    for name, given in (("gpt_neox", {**rope, "rotary_pct": 0.5, "rotary_emb_base": 500.0}), ("gpt2", {"n_ctx": 64})):
        assert families.expressed(given, name, "float32", "base").items() >= given.items()
    read = [
        transformers.CONFIG_MAPPING["gpt_neox"].from_dict(one)
        for one in (neox, {"rotary_pct": 0.5, "rotary_emb_base": 500.0})
    ]
    shares = [getattr(one, "rotary_pct", None) or one.rope_parameters["partial_rotary_factor"] for one in read]
    assert shares == [0.5, 0.5]


def test_a_type_that_the_config_does_not_name_is_that_of_the_weights(tmp_path):
    base = saved("llama", tmp_path / "base", torch.bfloat16)
    edit_json(base / "config.json", dtype=..., torch_dtype=...)
    assert json.loads((carried(base, tmp_path) / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", only_five("llama", "mistral", "qwen2", "qwen3-sharded", "granite", "smollm3"))
def test_weights_are_hard_links_where_the_base_had_no_bias(name, stocked, folders):
    out = stocked[(name, *CAUSAL)]
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for tensor, source in checkpoint.shards(folders[name]).items():
        assert (out / index[tensor]).stat().st_ino == source.stat().st_ino
    assert not (out / "model.safetensors").exists()  # it would hide the index
    assert all(file.startswith("model") for file in index.values())


@pytest.mark.parametrize("name", ["llama-biased", "gpt2", "gpt_neox"])
def test_a_file_with_a_bias_that_changes_is_written_anew_without_it(name, stocked, folders, rules):
    out, base = stocked[(name, *CAUSAL)], folders[name] / "model.safetensors"
    family = FAMILIES[tiny.SPECS[name][0]]
    ours = {f"{family.decoder}.{family.layers}.{layer}.{family.down}.bias" for layer in (2, 3)}
    assert load_file(out / "model-steering.safetensors").keys() == ours
    expected = {tensor: value for tensor, value in stream.streams(base).items() if tensor not in ours}
    assert len(expected) == len(stream.streams(base)) - 2
    assert stream.same_tensors(out / "model-base.safetensors", expected)


def test_a_bias_that_the_base_stores_but_does_not_read_stays_unread(folders, rules, told_everywhere, tmp_path):
    """Such a key is ignored under a config without biases; under ours it would be loaded."""
    base = shutil.copytree(folders["llama"], tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    stray = {"model.layers.3.mlp.down_proj.bias": tensors["model.norm.weight"] + 1}
    save_file(tensors | stray, base / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    EXPORTER.write(rules[("llama", *CAUSAL)], Checkpoint(base), tmp_path / "out")
    require_answers(greedy(opened(tmp_path / "out")[0]), told_everywhere[("llama", *CAUSAL)])
    with safe_open(tmp_path / "out" / "model-base.safetensors", framework="numpy") as file:
        assert not stray.keys() & set(file.keys())


def test_files_of_other_names_get_one_that_converters_look_for(folders, rules, tmp_path):
    base = shutil.copytree(folders["llama"], tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").rename(base / "weights.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "weights.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    out = carried(base, tmp_path)
    assert {path.name for path in out.glob("*.safetensors")} == {
        "model-weights.safetensors",
        "model-steering.safetensors",
    }


def test_copies_are_no_links(folders, rules, tmp_path):
    out = tmp_path / "out"
    export(rules[("llama", *CAUSAL)], base=folders["llama"], to="stock", out=out, accept_loss=LOSS, copy=True)
    assert (out / "model-base.safetensors").stat().st_nlink == 1


def test_no_code_and_no_pointer_to_code_is_carried(folders, rules, tmp_path):
    base = shutil.copytree(folders["llama"], tmp_path / "base")
    edit_json(base / "config.json", auto_map={"AutoConfig": "evil.EvilConfig"})
    for name in ("evil.py", "adapter_config.json"):
        (base / name).write_text("{}")
    (tmp_path / "out").mkdir()
    EXPORTER.write(rules[("llama", *CAUSAL)], Checkpoint(base), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"evil.py", "adapter_config.json"}
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_tokenizer_is_the_bases_where_its_class_was_left_to_the_model_type(folders, rules, tmp_path):
    base = shutil.copytree(folders["qwen2"], tmp_path / "base")
    edit_json(base / "tokenizer_config.json", tokenizer_class=...)
    (tmp_path / "out").mkdir()
    EXPORTER.write(rules[("qwen2", *CAUSAL)], Checkpoint(base), tmp_path / "out")
    theirs, ours = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (base, tmp_path / "out"))
    assert "tokenizer_class" in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert ours(" What is\t1234 + 56?")["input_ids"] == theirs(" What is\t1234 + 56?")["input_ids"]


# What is refused


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral-window", {}),
        ("mistral", {"sliding_window": ...}),  # the family's default is a window
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "layer_types": ...}),
        ("qwen2", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}),
        pytest.param("qwen3", {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, marks=FIVE),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_sliding_window_is_refused(name, changes, folders, rules, tmp_path):
    base = shutil.copytree(folders[name], tmp_path / "base")
    edit_json(base / "config.json", **changes)
    with pytest.raises(ExportError, match=r"has .*which (Llama|HYV3)ForCausalLM does not.*choose target hf or peft"):
        EXPORTER.write(rules[(name.partition("-")[0], *CAUSAL)], Checkpoint(base), tmp_path)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "olmo2", "phi3"])
def test_a_family_without_an_ordinary_form_is_refused(name, rules, folders, tmp_path):
    with pytest.raises(ExportError, match=f"what {name} does and has a bias behind its MLP.*choose target hf or peft"):
        export(rules[(name, *CAUSAL)], base=folders[name], to="stock", out=tmp_path / "out", accept_loss=LOSS)
    assert not (tmp_path / "out").exists()


def test_a_transformers_without_the_form_is_refused(rules, folders, tmp_path, monkeypatch):
    monkeypatch.setitem(families.FORMS, "qwen3", Form("hy_v99", "HYV99ForCausalLM"))
    with pytest.raises(ExportError, match=rf"HYV99ForCausalLM, which transformers {transformers.__version__} does not"):
        EXPORTER.write(rules[("qwen3", *CAUSAL)], Checkpoint(folders["qwen3"]), tmp_path)


LONGROPE = {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": LONGROPE}, "rotary embeddings of type longrope"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "or one for each kind of layer"),
        ({"mlp_bias": True}, r"no tensor model.layers.2.mlp.down_proj.bias; expected the biases that its config names"),
    ],
)
def test_what_is_not_known_is_refused(change, message, rules, folders, tmp_path):
    base = shutil.copytree(folders["llama"], tmp_path / "base")
    edit_json(base / "config.json", **{"rope_parameters": ..., **change})
    with pytest.raises(ExportError, match=message):
        EXPORTER.write(rules[("llama", *CAUSAL)], Checkpoint(base), tmp_path)


def test_a_base_in_an_untried_format_is_refused(rules, folders, tmp_path):
    base = shutil.copytree(folders["llama"], tmp_path / "base")
    edit_json(base / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedModelError, match="is quantised by 'gptq'; expected plain weights, or a format that"):
        EXPORTER.write(rules[("llama", *CAUSAL)], Checkpoint(base), tmp_path)


def test_weights_of_no_floating_type_are_refused(rules, folders, tmp_path):
    base = saved("llama", tmp_path / "base", torch.float64)
    with pytest.raises(ExportError, match=r"down_proj.weight is F64; expected one of: F32, BF16, F16"):
        EXPORTER.write(rules[("llama", *CAUSAL)], Checkpoint(base), tmp_path)


# Delivered and verified


@pytest.fixture(scope="module")
def delivered(rules, folders, tmp_path_factory):
    """Reports of exports, by name of the base. Their folders are read only."""

    def make(name):
        out = tmp_path_factory.mktemp("delivered") / "out"
        return export(rules[(name, *CAUSAL)], base=folders[name], to="stock", out=out, accept_loss=LOSS)

    return tiny.Lazy(make)


@most_slow
def test_a_delivered_checkpoint_passes_and_says_what_it_lost(name, delivered):
    report = delivered[name]
    assert verify(report.path).ok
    assert report.drops == ("dial", "gate", "start")
    figures = {check.name: check.figure for check in report.parity.checks}
    assert figures["keys in the loading report"] == 0
    assert figures["accepted loss: next-token KL from the whole rule, nats, on random tokens"] > 0
    assert "off, prefill logits" not in figures


def change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


DOWN = "model.layers.{}.mlp.down_proj.bias"


def unname(folder):
    index = folder / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    del found["weight_map"][DOWN.format(2)]
    index.write_text(json.dumps(found))


def flip(folder):
    path = folder / "model-base.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.unlink()  # a link to the base
    path.write_bytes(content)


def unbias(folder):
    edit_json(folder / "config.json", mlp_bias=False)


def follow(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')


def point(folder):
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})


TAMPERED = {
    unname: "tensors missing or unknown",
    flip: "weight files that are not as they should be",
    unbias: "config entries that differ",
    follow: "code files that are not the library's",
    point: "code files that are not the library's",
}


@pytest.mark.parametrize("tamper", TAMPERED, ids=lambda function: function.__name__)
def test_what_was_tampered_with_fails_even_with_a_receipt_that_fits(tamper, delivered, tmp_path):
    folder = shutil.copytree(delivered["llama"].path, tmp_path / "copy")
    tamper(folder)
    failed = {*failures(folder)}
    assert TAMPERED[tamper] in failed
    stopped = "not run, because its code or its settings differ" in failed
    assert stopped == (TAMPERED[tamper].startswith(("code", "config")))


def test_a_bias_under_a_config_without_biases_is_found_in_the_loading_report(delivered, tmp_path):
    """from_pretrained drops it without an error: the model opens, unsteered."""
    folder = shutil.copytree(delivered["llama"].path, tmp_path / "copy")
    unbias(folder)
    (report,) = EXPORTER.load(folder).findings()
    assert report.figure == 3 * tiny.LAYERS
    assert not report.ok
