"""Target hf: what is in the folder, and what it does in a process that cannot import the library."""

import copy
import errno
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from elsewhere import as_output, jobs_of, require_equal_to_the_oracle, run_elsewhere
from safetensors import safe_open
from tiny import CACHE, PROMPTS, greedy, require_answers

from adaras_export.core import checkpoint, families
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.errors import ArtifactError, UnsupportedModelError
from adaras_export.exporters.hf.exporter import EXPORTER, payload, steered_config, steering_tensors

CAUSAL, LATER = ("causal", "last_prompt_token"), ("later", "first_generated_token")
EVERYWHERE = ["greedy", "uncached", "single", "sampled"]
ONCE = ["off", "decoder", "tokenizer", "untrusted", "again", "half"]
MATRIX = ["greedy", "off", "again", "pickled"]
JOBS = {
    **{(name, *CAUSAL): MATRIX for name in tiny.MORE},
    **{(name, *LATER): ["greedy"] for name in tiny.NAMES},
    **{(name, *CAUSAL): EVERYWHERE for name in tiny.NAMES},
    ("qwen3", *LATER): EVERYWHERE,
    ("gpt2", *LATER): EVERYWHERE,
    ("qwen3", None, "last_prompt_token"): EVERYWHERE,
    ("qwen3", "causal", "first_generated_token"): EVERYWHERE,
    ("llama", *CAUSAL): EVERYWHERE + ONCE,
    ("qwen3-sharded", *CAUSAL): [*EVERYWHERE, "off", "again"],
}
KEYS = pytest.mark.parametrize("key", JOBS, ids=lambda key: "-".join(map(str, key)))


@pytest.fixture(scope="module")
def clean(written, tmp_path_factory):
    """The results of one process in which importing the library fails."""
    return run_elsewhere(jobs_of(JOBS, written), tmp_path_factory.mktemp("clean"))


@KEYS
def test_an_export_without_the_library_equals_the_oracle(key, clean, told, stock, rules, record_mode):
    record_mode("a process without the library", key[0])
    assert clean[key]["report"] == {}
    require_equal_to_the_oracle(clean[key], JOBS[key], key, told, stock, rules)


@KEYS
def test_the_decisions_that_users_see_are_the_oracles(key, clean, told):
    for mode in {"greedy", "uncached"}.intersection(JOBS[key]):
        found = clean[key][mode]["decisions"]
        if key[1] is None:
            assert found == []
            continue
        for (probability, steered), answer in zip(found, told[key], strict=True):
            assert probability == pytest.approx(answer["probability"], abs=1e-5)
            assert steered == answer["steered"]


@pytest.mark.parametrize("key", [key for key in JOBS if "off" in JOBS[key]], ids=tiny.key_id)
def test_off_is_the_base_model_bit_for_bit_by_each_way_to_have_it(key, clean, stock):
    base = greedy(stock[key[0]])
    expected_SBV = torch.stack(base.logits)
    within, zero, disabled = (torch.tensor(result["logits"]) for result in clean[key]["off"])
    assert torch.equal(within, expected_SBV)
    assert torch.equal(disabled, expected_SBV)
    if key[0] == "gemma4_text":  # at strength 0, its upper layers run the whole prompt, and not its last token alone
        assert (zero - expected_SBV).abs().max() <= tiny.logit_limit(expected_SBV)
    else:
        assert torch.equal(zero, expected_SBV)


def test_the_decoder_alone_is_steered_too(clean, told):
    key = ("llama", *CAUSAL)
    for found, answer in zip(clean[key]["decoder"], told[key], strict=True):
        distance = float((torch.tensor(found) - answer["logits"][0]).abs().max())
        assert distance <= tiny.logit_limit(answer["logits"])


def test_tokenizer_chat_template_and_generation_settings_are_carried(clean):
    template, new_tokens, model_type = clean[("llama", *CAUSAL)]["tokenizer"]
    assert template == "<user>hi<eos><assistant>"
    assert new_tokens == 6
    assert model_type == "adaras_llama"


def test_without_trust_remote_code_there_is_an_error_and_never_an_unsteered_model(clean):
    for found in clean[("llama", *CAUSAL)]["untrusted"]:
        assert found.startswith("ValueError"), found
        assert "trust_remote_code" in found or "adaras_llama" in found


@pytest.mark.parametrize("key", [key for key in JOBS if "pickled" in JOBS[key]], ids=tiny.key_id)
def test_a_pickled_model_does_the_same(key, clean):
    assert clean[key]["pickled"] == clean[key]["greedy"]


@pytest.mark.parametrize("key", [key for key in JOBS if "again" in JOBS[key]], ids=tiny.key_id)
def test_save_pretrained_writes_a_repository_that_does_the_same(key, clean, written, told):
    require_answers(as_output(clean[key]["again"]), told[key], tiny.SLACK.get(key[0], 1))
    again = Path(f"{written[key]}-again")
    assert {path.name: path.read_bytes() for path in again.glob("*.py")} == payload()
    config = json.loads((again / "config.json").read_text())
    assert config["adaras"] == json.loads((written[key] / "config.json").read_text())["adaras"]
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


def test_in_half_precision_gate_and_vectors_stay_float32(clean):
    own, others = clean[("llama", *CAUSAL)]["half"]
    assert {dtype for name, dtype in own.items() if not name.endswith("steering_index")} == {"torch.float32"}
    assert {dtype for name, dtype in own.items() if name.endswith("steering_index")} == {"torch.int64"}
    assert len(own) == 2 + 2 + 6  # vectors, indices, the gate
    assert others == ["torch.bfloat16"]


# What is in the folder


@pytest.mark.parametrize("name", tiny.NAMES)
def test_weights_are_hard_links_to_the_base(name, written, folders):
    folder = written[(name, *CAUSAL)]
    located = checkpoint.shards(folders[name])
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for tensor, source in located.items():
        assert (folder / index[tensor]).stat().st_ino == source.stat().st_ino
    assert not (folder / "model.safetensors").exists()  # it would hide the index
    assert len({*index.values()}) == len({*located.values()}) + 1


@pytest.mark.parametrize("reason", [errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK])
def test_where_linking_is_impossible_weights_are_copied(reason, rules, folders, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "link", refuse)
    EXPORTER.write(rules[("llama", *CAUSAL)], Checkpoint(folders["llama"]), tmp_path)
    source, target = folders["llama"] / "model.safetensors", tmp_path / "model-base.safetensors"
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_ino != source.stat().st_ino


def test_a_base_of_symbolic_links_is_linked_to_its_blobs(rules, folders, tmp_path):
    """A Hub snapshot holds links into its blobs; a hard link to a link would break when the cache moves."""
    (tmp_path / "base").mkdir()
    for path in folders["llama"].iterdir():
        (tmp_path / "base" / path.name).symlink_to(path)
    (tmp_path / "out").mkdir()
    EXPORTER.write(rules[("llama", *CAUSAL)], Checkpoint(tmp_path / "base"), tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folders["llama"] / "tokenizer.json").read_bytes()


def test_what_belongs_to_the_checkpoint_is_carried_and_nothing_that_could_run(rules, folders, tmp_path):
    base = shutil.copytree(folders["llama"], tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("x")
    for name in ("LICENSE", "merges.txt", "modeling_evil.py", "optimizer.bin", "README.md", "receipt.json"):
        (base / name).write_text("x")
    (tmp_path / "out").mkdir()
    EXPORTER.write(rules[("llama", *CAUSAL)], Checkpoint(base), tmp_path / "out")
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    expected = {"LICENSE", "merges.txt", "additional_chat_templates/rag.jinja", "tokenizer.json", "chat_template.jinja"}
    assert expected | {"generation_config.json"} <= names
    assert not names & {"modeling_evil.py", "optimizer.bin", "README.md", "receipt.json"}


def test_a_base_that_points_to_an_adapter_does_not_make_the_export_load_it(rules, folders, tmp_path):
    """With peft installed, from_pretrained follows adapter_config.json to another repository, code and all."""
    base = shutil.copytree(folders["llama"], tmp_path / "base")
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    (tmp_path / "out").mkdir()
    EXPORTER.write(rules[("llama", *CAUSAL)], Checkpoint(base), tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("name", ["llama-biased", "qwen3-sharded"])
def test_vectors_are_the_folded_deltas_without_the_strength(name, rules, stock, folders):
    rule = rules[(name, *CAUSAL)]
    tensors = steering_tensors(rule, Checkpoint(folders[name]))
    for layer in rule.layers():
        weight = families.down_projection(stock[name], layer).weight.detach()
        expected = [0.0] * tiny.HIDDEN_SIZE
        for index, delta in zip(*rule.neurons_of(layer), strict=True):
            for row in range(tiny.HIDDEN_SIZE):
                expected[row] += float(weight[row, index]) * float(delta)
        found = tensors[f"model.layers.{layer}.mlp.steering_vector"]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.array(expected, np.float32))


def test_the_config_names_rule_classes_and_everything_of_the_base(rules, folders):
    rule = rules[("qwen3", *CAUSAL)]
    base = json.loads((folders["qwen3"] / "config.json").read_text())
    config = steered_config(base, rule)
    changed = {"model_type", "architectures", "auto_map", "adaras"}
    assert {key for key in config if config[key] != base.get(key)} == changed
    assert config["adaras"]["rule"] == rule.fingerprint
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_adaras.AdaRASQwen3ForCausalLM"


def test_a_base_in_an_untried_format_is_refused(rules, folders, tmp_path):
    base = shutil.copytree(folders["llama"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (base / "config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    with pytest.raises(UnsupportedModelError, match="is quantised by 'gptq'; expected plain weights, or a format that"):
        EXPORTER.write(rules[("llama", *CAUSAL)], Checkpoint(base), tmp_path / "out")


def test_a_checkpoint_without_the_down_projection_is_refused(rules, folders, tmp_path):
    base = shutil.copytree(folders["qwen3-sharded"], tmp_path / "base")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.2.mlp.down_proj.weight"]
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=r"no tensor model.layers.2.mlp.down_proj.weight; expected the plain weig"):
        steering_tensors(rules[("qwen3-sharded", *CAUSAL)], Checkpoint(base))


def test_the_steering_file_holds_what_the_rule_says_and_no_more(written, rules):
    key = ("mistral", *LATER)
    with safe_open(written[key] / "model-steering.safetensors", framework="numpy") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
    vectors = {f"model.layers.{layer}.mlp.steering_vector" for layer in rules[key].layers()}
    indices = {f"model.layers.{layer}.mlp.steering_index" for layer in set(rules[key].gate.layer.tolist())}
    assert names == vectors | indices | {f"model.steering_gate.{name}" for name in rules[key].gate.weights()}


# What an opened export does, in this process. The modules are those of the folder, not the library's.

RULES = [
    ("qwen3", *CAUSAL),
    ("qwen3", *LATER),
    ("qwen3", None, "last_prompt_token"),
    ("qwen3", "causal", "first_generated_token"),
    ("mistral-window", *CAUSAL),
]
MOST = pytest.mark.parametrize("key", RULES, ids=lambda key: "-".join(map(str, key)))


def test_a_cache_that_was_filled_while_steering_was_off_is_refused(opened):
    model = opened[("qwen3", *CAUSAL)]
    with torch.no_grad(), model.steering.off():
        cache = model(torch.tensor([PROMPTS[0]]), use_cache=True).past_key_values
    with torch.no_grad(), pytest.raises(ValueError, match="filled without the gate; fill it through this model"):
        model(torch.tensor([[7]]), **{CACHE: cache})


def test_a_cache_with_a_decision_does_not_serve_another_batch(opened):
    model = opened[("qwen3", *CAUSAL)]
    with torch.no_grad():
        cache = model(torch.tensor([PROMPTS[0], PROMPTS[0]]), use_cache=True).past_key_values
        for layer in cache.layers:  # past the cache, which would have changed the decisions with the rows
            layer.batch_select_indices(torch.tensor([0, 1, 1]))
        with pytest.raises(ValueError, match="belongs to 2 sequences; the batch has 3"):
            model(torch.tensor([[7], [7], [7]]), **{CACHE: cache})


def test_a_gate_that_reads_steered_layers_refuses_prompt_and_answer_behind_a_cache(opened):
    model = opened[("qwen3", *LATER)]
    with torch.no_grad():
        cache = model(torch.tensor([PROMPTS[0]]), use_cache=True, steering_start=9).past_key_values
        with pytest.raises(ValueError, match="needs the prompt in calls of its own"):
            model(torch.tensor([PROMPTS[2]]), steering_start=3, **{CACHE: cache})


def test_the_dials_do_what_they_say(opened, rules, stock):
    key = ("llama", *CAUSAL)
    model, rule = opened[key], rules[key]
    steering = model.steering
    assert (steering.strength, steering.threshold, steering.start) == (rule.strength, rule.gate.threshold, rule.start)
    try:
        steering.strength = -1.5
        require_answers(greedy(model), tiny.answers(stock["llama"], rule.with_strength(-1.5)))
        steering.threshold = 1.0
        always = tiny.answers(stock["llama"], rule.with_strength(-1.5).ungated())
        require_answers(greedy(model), always)
        assert [steered for _, steered in steering.last_decisions] == [True] * 4
        steering.threshold = 0.0
        assert torch.equal(torch.stack(greedy(model).logits), torch.stack(greedy(stock["llama"]).logits))
        assert [steered for _, steered in steering.last_decisions] == [False] * 4
    finally:
        steering.strength, steering.threshold = rule.strength, rule.gate.threshold


def test_a_dialled_model_is_saved_as_it_is_dialled(opened, rules, tmp_path):
    key = ("llama", *CAUSAL)
    model = opened[key]
    try:
        model.steering.strength = 0.75
        model.save_pretrained(tmp_path)
    finally:
        model.steering.strength = rules[key].strength
    assert json.loads((tmp_path / "config.json").read_text())["adaras"]["strength"] == 0.75


def test_off_lasts_as_long_as_its_context_and_ends_after_an_error(opened, told, stock):
    key = ("llama", *CAUSAL)
    with pytest.raises(IndexError), opened[key].steering.off():  # noqa: PT012 - off, then the error
        assert torch.equal(torch.stack(greedy(opened[key]).logits), torch.stack(greedy(stock["llama"]).logits))
        opened[key](torch.tensor([[999_999]]))
    require_answers(greedy(opened[key]), told[key])


def test_off_is_this_threads_and_enabled_is_everyones(opened, told, stock):
    """A server's other requests stay steered while one of them compares with the base model."""
    key, inside, done = ("llama", *CAUSAL), threading.Event(), threading.Event()
    base = torch.stack(greedy(stock["llama"]).logits)

    def unsteered():
        with opened[key].steering.off():
            inside.set()
            assert done.wait(60)
            return torch.stack(greedy(opened[key]).logits)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(unsteered)
        assert inside.wait(60)
        require_answers(greedy(opened[key]), told[key])
        done.set()
        assert torch.equal(other.result(), base)
    try:
        opened[key].steering.enabled = False
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(torch.stack(pool.submit(greedy, opened[key]).result().logits), base)
    finally:
        opened[key].steering.enabled = True


def test_an_error_inside_forward_does_not_reach_the_next_call(opened, told):
    key = ("qwen3", *CAUSAL)
    with pytest.raises(IndexError):
        greedy(opened[key], [[999_999, 1]])
    require_answers(greedy(opened[key]), told[key])


@MOST
def test_a_deep_copy_does_the_same_with_dials_of_its_own(key, opened, told):
    twin = copy.deepcopy(opened[key])
    require_answers(greedy(twin), told[key])
    twin.steering.strength = 0.0
    require_answers(greedy(opened[key]), told[key])


def test_outputs_as_a_tuple_carry_the_state_too(opened, told):
    key = ("qwen3", *CAUSAL)
    for prompt, answer in zip(PROMPTS, told[key], strict=True):
        with torch.no_grad():
            logits, cache = opened[key](torch.tensor([prompt]), use_cache=True, return_dict=False)[:2]
            ids = logits[:, -1:].argmax(-1)
            second = opened[key](ids, use_cache=True, return_dict=False, **{CACHE: cache})[0]
        assert [int(ids), int(second[0, -1].argmax())] == answer["ids"][:2]


def test_two_exports_in_one_process_keep_their_own_rules(opened, told):
    for key in RULES[:3]:
        require_answers(greedy(opened[key]), told[key])


def test_a_rule_without_neurons_is_the_base_bit_for_bit(folders, bases, stock, tmp_path):
    rule = tiny.make_rule(bases["llama"], neurons=tiny.make_neurons().top(0), gate=tiny.make_gate())
    EXPORTER.write(rule, Checkpoint(folders["llama"]), tmp_path)
    model = EXPORTER.load(tmp_path).model
    assert torch.equal(torch.stack(greedy(model).logits), torch.stack(greedy(stock["llama"]).logits))
    assert len(model.steering.last_decisions) == 4


def test_a_mask_of_four_dimensions_is_refused(opened):
    with pytest.raises(ValueError, match="steering needs a 2D attention mask"), torch.no_grad():
        opened[("qwen3", *CAUSAL)](torch.tensor([PROMPTS[0]]), attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))


def test_another_strength_of_the_same_rule_differs_in_config_and_receipt_only(rules, folders):
    rule = rules[("llama", *CAUSAL)]
    one, two = (steering_tensors(each, Checkpoint(folders["llama"])) for each in (rule, replace(rule, strength=9.0)))
    assert all(np.array_equal(one[name], two[name]) for name in one)
