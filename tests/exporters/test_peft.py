"""Target `peft`: the stock LoRA adapter, in every way that PEFT and Transformers have of using one."""

import json
import shutil
import warnings

import numpy as np
import oracle
import pytest
import tiny
import torch
import transformers
from receipts import failures
from safetensors.numpy import load_file, save_file
from tiny import EOS, PROMPTS, greedy, require_answers

from adaras_export.core.base_model import BaseModel
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.delivery import verifier
from adaras_export.delivery.verifier import verify
from adaras_export.delivery.writer import export
from adaras_export.errors import ExportError
from adaras_export.exporters.base import ExportContext
from adaras_export.exporters.peft.exporter import EXPORTER

peft = pytest.importorskip("peft")

# What Transformers 5.23 has renamed and peft 0.21 does not know yet, and what PEFT says of every `lora_bias` without
# a base bias: that it cannot be merged. Nothing else may be said.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
]
CAUSAL = ("causal", "last_prompt_token")
QUICK = ("qwen3", "gpt2")
NAMES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in tiny.KINDS]
every_name = pytest.mark.parametrize("name", NAMES)
KEYS = [pytest.param((*param.values, *CAUSAL), marks=param.marks) for param in NAMES]
every_base = pytest.mark.parametrize("key", KEYS, ids=lambda key: key[0])
FEW = [(name, *CAUSAL) for name in ("qwen3", "gemma2", "gpt2")]
few_bases = pytest.mark.parametrize("key", FEW, ids=lambda key: key[0])
LOSS = ["gate", "start"]


@pytest.fixture(scope="module")
def adapters(rules, folders, tmp_path_factory):
    """Folder of an adapter by the keys of ``rules``."""

    def write(key):
        out = tmp_path_factory.mktemp("adapter")
        EXPORTER.with_context(ExportContext(str(folders[key[0]]))).write(rules[key], Checkpoint(folders[key[0]]), out)
        return out

    return tiny.Lazy(write)


@pytest.fixture(scope="module")
def told_base(stock, bases):
    """What the oracle says of the unsteered base, by its name."""
    return tiny.Lazy(lambda name: tiny.answers(stock[name], tiny.make_rule(bases[name], strength=0.0)))


@pytest.fixture(scope="module")
def other(rules, folders, tmp_path_factory):
    """A second rule for the base of a key, with other neurons in other layers, and the folder of its adapter."""

    def make(key):
        out, first = tmp_path_factory.mktemp("other"), rules[key]
        rule = tiny.make_rule(first.base, strength=first.strength, neurons=tiny.make_neurons(seed=5, layers=(1, 3)))
        EXPORTER.write(rule, Checkpoint(folders[key[0]]), out)
        return rule, out

    return tiny.Lazy(make)


def plain_model(folder, **how):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **how}).eval()


def adapted(folder, adapter, **how):
    with torch.random.fork_rng():  # PEFT draws adapters before it reads them
        return peft.PeftModel.from_pretrained(plain_model(folder, **how), adapter).eval()


@pytest.fixture(scope="module")
def opened(adapters, folders):
    """PeftModel by key. Whoever changes its state puts it back."""
    return tiny.Lazy(lambda key: adapted(folders[key[0]], adapters[key]))


def add(model, folder, name="other"):
    with torch.random.fork_rng():
        model.load_adapter(folder, name)


def logits_of(model, **how):
    return torch.stack(greedy(model, **how).logits)


# What an opened adapter does


@every_base
def test_a_peft_model_equals_the_oracle_that_steers_everywhere(key, opened, told_everywhere):
    require_answers(greedy(opened[key]), told_everywhere[key])


@pytest.mark.slow
@few_bases
def test_without_cache_and_row_by_row_too(key, opened, told_everywhere):
    require_answers(greedy(opened[key], use_cache=False), told_everywhere[key])
    require_answers(greedy(opened[key], PROMPTS[2:3]), told_everywhere[key][2:3])


@few_bases
def test_load_adapter_of_transformers_equals_the_oracle(key, adapters, folders, told_everywhere):
    model = plain_model(folders[key[0]])
    with torch.random.fork_rng():
        model.load_adapter(str(adapters[key]))
    require_answers(greedy(model), told_everywhere[key])


@pytest.mark.slow
@few_bases
def test_from_pretrained_of_transformers_follows_the_adapter_to_its_base(key, adapters, told_everywhere):
    with torch.random.fork_rng():
        model = plain_model(adapters[key])
    require_answers(greedy(model), told_everywhere[key])


@few_bases
def test_rows_choose_the_adapter_or_the_base(key, opened, told_everywhere, told_base):
    names = ["default", "__base__", "__base__", "default"]
    answers = {"default": told_everywhere[key], "__base__": told_base[key[0]]}
    expected = [answers[name][row] for row, name in enumerate(names)]
    require_answers(greedy(opened[key], adapter_names=names), expected)


@every_base
def test_switched_off_it_is_the_base_bit_for_bit(key, opened, folders, told_everywhere):
    with opened[key].disable_adapter():
        assert torch.equal(logits_of(opened[key]), logits_of(frozen(folders[key[0]])))
    require_answers(greedy(opened[key]), told_everywhere[key])


def frozen(folder):
    """The base as PEFT has it: frozen and read from the same files. Weights that are not, or that lie elsewhere in
    memory, are multiplied in another order (1e-6).
    """
    return plain_model(folder).requires_grad_(False)


def set_scale(model, scale):
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", scale)


@few_bases
def test_set_scale_dials_the_strength(key, opened, rules, stock):
    rule = rules[key]
    half = tiny.answers_everywhere(stock[key[0]], rule.with_strength(0.5 * rule.strength))
    try:
        set_scale(opened[key], 0.5)
        require_answers(greedy(opened[key]), half)
    finally:
        set_scale(opened[key], 1.0)


@pytest.mark.slow
@few_bases
def test_two_rules_on_one_base_are_switched_chosen_by_row_and_added(  # noqa: PLR0913 - two rules and their answers
    key, adapters, folders, rules, other, stock, told_everywhere
):
    rule, folder = other[key]
    model = adapted(folders[key[0]], adapters[key])
    add(model, folder)
    require_answers(greedy(model), told_everywhere[key])
    model.set_adapter("other")
    theirs = tiny.answers_everywhere(stock[key[0]], rule)
    require_answers(greedy(model), theirs)
    mixed = [*theirs[:2], *told_everywhere[key][2:]]
    require_answers(greedy(model, adapter_names=["other", "other", "default", "default"]), mixed)
    model.base_model.set_adapter(["default", "other"])
    require_answers(greedy(model), answers_of_both(stock[key[0]], rules[key], rule))


def answers_of_both(model, one, two):
    """The oracle, with the neurons of two rules of one strength."""
    plain = {**tiny.plain_rule(one), "gate": None, "start": "everywhere"}
    plain["neurons"] = plain["neurons"] + tiny.plain_rule(two)["neurons"]
    return [oracle.respond(model, prompt, plain, 6, ends=(EOS,)) for prompt in PROMPTS]


@pytest.mark.slow
def test_more_layers_than_peft_lists_one_by_one(bases, tmp_path):
    """PEFT shortens lists of 20 target modules and more; layers that are not steered must stay as they are."""
    folder = tiny.save_base("llama", tmp_path / "deep", num_hidden_layers=26)
    layers = tuple(range(1, 25))
    neurons = tiny.make_neurons(layers=layers, count=200)
    rule = tiny.make_rule(BaseModel.of(folder), neurons=neurons, strength=0.5)
    assert rule.layers() == list(layers)
    (tmp_path / "out").mkdir()
    EXPORTER.write(rule, Checkpoint(folder), tmp_path / "out")
    require_answers(greedy(adapted(folder, tmp_path / "out")), tiny.answers_everywhere(plain_model(folder), rule))


def test_a_base_in_bfloat16_keeps_the_biases_in_float32(adapters, folders):
    model = adapted(folders["qwen3"], adapters[FEW[0]], dtype=torch.bfloat16)
    biases = [value for name, value in model.state_dict().items() if name.endswith("lora_B.default.bias")]
    stored = load_file(adapters[FEW[0]] / "adapter_model.safetensors")
    assert [bias.dtype for bias in biases] == [torch.float32] * 2
    assert all(any(np.array_equal(bias, value) for value in stored.values()) for bias in biases)


def test_it_cannot_be_merged_where_the_base_has_no_bias_and_can_where_it_has(adapters, folders, told_everywhere):
    with pytest.raises(RuntimeError, match="the base layer has no bias"):
        adapted(folders["qwen3"], adapters[FEW[0]]).merge_and_unload()
    key = ("llama-biased", *CAUSAL)
    require_answers(greedy(adapted(folders[key[0]], adapters[key]).merge_and_unload()), told_everywhere[key])


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_loading_warns_of_nothing_but_that_a_bias_cannot_be_merged_into_none(name, adapters, folders):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted(folders[name], adapters[(name, *CAUSAL)])
    said = {str(one.message).partition(" was ")[0] for one in caught if one.category is not FutureWarning}
    assert said == (set() if name == "gpt2" else {"`lora_bias=True`"})


# What is in the folder


def test_settings_are_only_such_as_the_oldest_peft_knows(adapters, folders):
    """PEFT warns of entries that it does not know; this file passes under 0.18.0, too."""
    settings = json.loads((adapters[FEW[0]] / "adapter_config.json").read_text())
    known = {*vars(peft.LoraConfig())}
    assert settings.keys() <= known
    assert settings["base_model_name_or_path"] == str(folders["qwen3"])
    assert settings["target_modules"] == ["model.layers.2.mlp.down_proj", "model.layers.3.mlp.down_proj"]
    assert "peft_version" not in settings


def test_the_base_and_its_commit_are_named(rules, folders, tmp_path):
    EXPORTER.with_context(ExportContext("some/base", "0" * 40)).write(
        rules[FEW[0]], Checkpoint(folders["qwen3"]), tmp_path
    )
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("some/base", "0" * 40)


def test_a_rule_without_effect_is_refused(rules, folders, bases, tmp_path):
    rule = rules[FEW[0]]
    with pytest.raises(ExportError, match="peft: the rule has strength 0; expected an effect"):
        EXPORTER.write(rule.with_strength(0), Checkpoint(folders["qwen3"]), tmp_path)
    with pytest.raises(ExportError, match="peft: the rule has no neurons; expected an effect"):
        EXPORTER.write(
            tiny.make_rule(bases["qwen3"], neurons=tiny.make_neurons().top(0)), Checkpoint(folders["qwen3"]), tmp_path
        )
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adaptive": True, "merge": True}, "peft: adaptive and merge exclude each other"),
        ({"merge": 1}, "peft: merge 1; expected true or false"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ExportError, match=message):
        EXPORTER.with_context(ExportContext("x", options=options))


# Exported, verified, damaged


@pytest.fixture(scope="module")
def delivered(rules, folders, tmp_path_factory):
    """An export by the name of its base."""

    def deliver(name):
        out = tmp_path_factory.mktemp("out") / f"{name}-steered"
        return export(rules[(name, *CAUSAL)], base=folders[name], to="peft", out=out, accept_loss=LOSS)

    return tiny.Lazy(deliver)


@every_name
def test_an_export_verifies_also_where_the_base_has_moved(name, delivered, folders, tmp_path):
    report = delivered[name]
    assert report.drops == ("gate", "start")
    assert name not in QUICK or verify(report.path).ok
    moved = shutil.copytree(folders[name], tmp_path / "moved")
    assert verify(report.path, base=moved).ok


@pytest.fixture
def folder(delivered, tmp_path):
    """A delivered copy that may be damaged."""
    return shutil.copytree(delivered["qwen3"].path, tmp_path / "damaged")


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


LAYER = "base_model.model.model.layers.{}.mlp.down_proj.lora_B.bias"


def drop(tensors):
    del tensors[LAYER.format(3)]


def test_a_bias_that_is_gone_is_named_and_fails_the_comparison(folder):
    change_tensors(folder, drop)
    found = failures(folder)
    assert LAYER.format(3) in found["adapter tensors that differ"]
    assert "by the rule, prefill logits" in found
    assert "adapter tensors that PEFT did not take" in found


def shift(tensors):
    for name in [*tensors]:
        tensors[name.replace("layers.2", "layers.1")] = tensors.pop(name)


def test_a_layer_that_is_shifted_fails_even_if_the_settings_are_shifted_too(folder, rules, folders):
    change_tensors(folder, shift)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["target_modules"] = [name.replace("layers.2", "layers.1") for name in settings["target_modules"]]
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert failures(folder)["adapter_config.json entries that differ"] == "target_modules"
    reference = EXPORTER.reference(folder, rules[FEW[0]], Checkpoint(folders["qwen3"]))
    found = verifier.compare(verifier.rehearse(reference), EXPORTER.load(folder))
    assert "by the rule, prefill logits" in {check.name for check in found if not check.ok}


@pytest.mark.parametrize(
    "change",
    [{"lora_bias": False}, {"lora_alpha": 2}, {"base_model_name_or_path": "somebody/else"}, {"auto_mapping": {}}],
    ids=lambda change: next(iter(change)),
)
def test_settings_that_differ_are_named_and_nothing_runs(change, folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    found = failures(folder)
    assert found["adapter_config.json entries that differ"] == next(iter(change))
    assert "not run, because its code or its settings differ" in found
