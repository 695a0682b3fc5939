"""Target `peft` with `adaptive`: a PEFT adapter with gate and start, and the method that opens it."""

import copy
import enum
import importlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import oracle
import pytest
import tiny
import torch
import transformers
from packaging import version
from pairwise import in_turn
from receipts import failures
from safetensors.numpy import load_file
from tiny import CACHE, EOS, PAD, PROMPTS, greedy, require_answers
from transformers.integrations.peft import MIN_PEFT_VERSION

from adaras_export.core.checkpoint import Checkpoint
from adaras_export.delivery.verifier import verify
from adaras_export.delivery.writer import export
from adaras_export.errors import ExportError, MissingExtraError
from adaras_export.exporters.base import ExportContext
from adaras_export.exporters.peft.exporter import EXPORTER
from adaras_export.modeling.steering import steered

peft = pytest.importorskip("peft")
from adaras_export.exporters.peft import method  # noqa: E402 - needs it

# What Transformers 5.23 has renamed and peft 0.21 does not know yet.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LAST, FIRST = "last_prompt_token", "first_generated_token"
CAUSAL, LATER = ("causal", LAST), ("later", FIRST)
RULES = [CAUSAL, ("causal", FIRST), LATER, (None, LAST), (None, FIRST)]


def keys(selected, quick):
    found = [(name, *rule) for name, rule in selected]
    marked = [pytest.param(key, marks=[] if key[0] in quick else pytest.mark.slow) for key in found]
    return pytest.mark.parametrize("key", marked, ids=tiny.key_id)


every_base = keys(in_turn(("qwen3",), tiny.KINDS, [CAUSAL, LATER]), quick=("qwen3", "gpt2"))
other_rule = keys(in_turn(("qwen3",), tiny.KINDS, [LATER, CAUSAL]), quick=("qwen3", "gpt2"))
few_bases = keys([("qwen3", CAUSAL), ("gpt2", LATER), ("gemma2", CAUSAL)], quick=("qwen3", "gpt2"))
every_rule = keys([("qwen3", rule) for rule in RULES] + [("gpt2", CAUSAL), ("gpt2", LATER)], quick=("qwen3",))
KEY = ("qwen3", *CAUSAL)
ADAPTIVE = {"adaptive": True}


def write(rule, base, out):
    EXPORTER.with_context(ExportContext(str(base), options=ADAPTIVE)).write(rule, Checkpoint(base), out)
    return out


@pytest.fixture(scope="module")
def adapters(rules, folders, tmp_path_factory):
    """Folder of an adapter by the keys of ``rules``."""
    return tiny.Lazy(lambda key: write(rules[key], folders[key[0]], tmp_path_factory.mktemp("adapter")))


def plain_model(folder, **how):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **how}).eval()


@pytest.fixture
def opened(adapters, folders):
    """A PeftModel by key; a new one each time."""

    def load(key, **how):
        return peft.PeftModel.from_pretrained(plain_model(folders[key[0]], **how), adapters[key]).eval()

    return load


@pytest.fixture
def two(opened, adapters):
    """A gated rule as "default", an ungated one as "other"."""
    model = opened(KEY)
    model.load_adapter(adapters["qwen3", None, LAST], "other")
    return model


def base_logits(folders, key):
    """Of the base as PEFT has it: frozen and read from the same files. Weights that are not, or that lie elsewhere in
    memory, are multiplied in another order (1e-6).
    """
    return torch.stack(greedy(plain_model(folders[key[0]]).requires_grad_(False)).logits)


# The whole rule


@every_base
def test_a_peft_model_equals_the_oracle(key, opened, told):
    model = opened(key)
    require_answers(greedy(model), told[key])
    require_answers(greedy(model, use_cache=False), told[key])


@every_rule
def test_every_kind_of_rule_also_row_by_row_and_in_chunks(key, opened, told):
    model = opened(key)
    require_answers(greedy(model), told[key])
    for row, prompt in enumerate(PROMPTS):
        require_answers(greedy(model, [prompt]), told[key][row : row + 1])
        if (
            key[1] != "later" and len(prompt) > 1
        ):  # such a gate needs its prompt in one call; 4.57 cannot chunk one token
            require_answers(greedy(model, [prompt], prefill_chunk_size=2), told[key][row : row + 1])


@few_bases
def test_load_adapter_of_transformers_equals_the_oracle(key, adapters, folders, told):
    model = plain_model(folders[key[0]])
    model.load_adapter(str(adapters[key]))
    require_answers(greedy(model), told[key])


def test_from_pretrained_of_transformers_follows_the_adapter_to_its_base(adapters, told):
    require_answers(greedy(plain_model(adapters[KEY])), told[KEY])


@pytest.mark.slow
@every_rule
def test_sampling_with_a_seed_equals_the_oracle_sampling_with_that_seed(key, opened, rules, stock):
    model, how = opened(key), {"do_sample": True, "top_k": 0, "temperature": 1.0}
    draw = lambda logits: int(torch.multinomial(logits.softmax(-1), 1))  # noqa: E731
    for prompt in PROMPTS:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            out = greedy(model, [prompt], **how)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            plain = tiny.plain_rule(rules[key])
            expected = oracle.respond(stock[key[0]], prompt, plain, 6, pick=draw, ends=(EOS,))
        require_answers(out, [expected])


@pytest.mark.slow
@every_rule
def test_beams_are_those_of_the_reference(key, opened, rules, stock):
    how = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    found = greedy(opened(key), **how)
    with steered(stock[key[0]], rules[key]):
        expected = greedy(stock[key[0]], **how)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=0, atol=1e-4)


def test_a_bare_prompt_in_pieces_and_then_single_tokens(opened, told):
    """As a server calls: no generate(), a cache in between."""
    model, answer = opened(KEY), told[KEY][2]
    with torch.no_grad():
        out = model(torch.tensor([PROMPTS[2]]), use_cache=True)
        found = [out.logits[0, -1]]
        for token in answer["ids"][:-1]:
            out = model(torch.tensor([[token]]), use_cache=True, **{CACHE: out.past_key_values})
            found.append(out.logits[0, -1])
    assert float((torch.stack(found) - answer["logits"]).abs().max()) <= tiny.logit_limit(answer["logits"])


# Off, and the dials


@few_bases
def test_switched_off_it_is_the_base_bit_for_bit(key, opened, folders, told):
    model = opened(key)
    with model.disable_adapter():
        assert torch.equal(torch.stack(greedy(model).logits), base_logits(folders, key))
    require_answers(greedy(model), told[key])


def test_the_dials_do_what_they_say(opened, rules, stock, folders, told):
    model, rule = opened(KEY), rules[KEY]
    dials = model.steering
    assert (dials.strength, dials.threshold, dials.start) == (rule.strength, rule.gate.threshold, rule.start)
    greedy(model)
    assert [bool(one["steered"]) for one in told[KEY]] == [one for _, one in dials.last_decisions]
    dials.strength *= -0.5
    require_answers(greedy(model), tiny.answers(stock["qwen3"], rule.with_strength(-0.5 * rule.strength)))
    dials.threshold = 1.0
    always = rule.with_strength(-0.5 * rule.strength).ungated()
    require_answers(greedy(model), tiny.answers(stock["qwen3"], always))
    with dials.off():
        assert torch.equal(torch.stack(greedy(model).logits), base_logits(folders, KEY))


def test_it_is_saved_as_it_is_dialled(opened, rules, stock, folders, adapters, tmp_path):
    model = opened(KEY)
    model.save_pretrained(tmp_path / "same")
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (adapters[KEY], tmp_path / "same"))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    model.steering.strength = 0.75
    model.save_pretrained(tmp_path / "dialled")
    again = peft.PeftModel.from_pretrained(plain_model(folders["qwen3"]), tmp_path / "dialled").eval()
    require_answers(greedy(again), tiny.answers(stock["qwen3"], rules[KEY].with_strength(0.75)))


def test_a_deep_copy_does_the_same_with_dials_of_its_own(opened, told):
    model = opened(KEY)
    twin = copy.deepcopy(model)
    require_answers(greedy(twin, use_cache=False), told[KEY])
    twin.steering.strength = 0.0
    require_answers(greedy(model, use_cache=False), told[KEY])


def test_threads_share_a_model(opened, told):
    model = opened(KEY)
    with ThreadPoolExecutor(3) as pool:
        for out in pool.map(lambda _: greedy(model), range(6)):
            require_answers(out, told[KEY])


# Several adapters, rows, unloading


def test_two_rules_are_switched_deleted_and_loaded_again(two, told, adapters):
    require_answers(greedy(two), told[KEY])
    two.set_adapter("other")
    require_answers(greedy(two), told["qwen3", None, LAST])
    assert two.steering.last_decisions == []
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        two.delete_adapter("other")
    require_answers(greedy(two), told[KEY])
    two.load_adapter(adapters["qwen3", None, FIRST], "other")
    two.set_adapter("other")
    require_answers(greedy(two), told["qwen3", None, FIRST])


@pytest.mark.skipif(
    version.parse(peft.__version__) < version.parse(MIN_PEFT_VERSION), reason="this Transformers wants a newer PEFT"
)
def test_two_rules_of_transformers_are_switched(adapters, folders, told):
    model = plain_model(folders["qwen3"])
    model.load_adapter(str(adapters[KEY]), "one")
    with pytest.warns(UserWarning, match="Already found a `peft_config` attribute"):
        model.load_adapter(str(adapters["qwen3", None, LAST]), "two")
    for name, key in (("one", KEY), ("two", ("qwen3", None, LAST)), ("one", KEY)):
        model.set_adapter(name)
        require_answers(greedy(model), told[key])
    model.disable_adapters()
    assert torch.equal(*(torch.stack(greedy(model, use_cache=cache).logits).argmax(-1) for cache in (True, False)))


def test_rows_choose_the_rule_or_the_base(two, told, stock, bases):
    base = tiny.answers(stock["qwen3"], tiny.make_rule(bases["qwen3"], strength=0.0))
    answers = {"default": told[KEY], "other": told["qwen3", None, LAST], "__base__": base}
    for name in ("default", "other"):
        names = [name, "__base__", name, name]
        expected = [answers[one][row] for row, one in enumerate(names)]
        require_answers(greedy(two, adapter_names=names), expected)
        require_answers(greedy(two, adapter_names=names, use_cache=False), expected)
    require_answers(greedy(two, adapter_names=["__base__"] * 4), base)
    require_answers(greedy(two), told[KEY])


def test_rows_with_beams(two):
    how = {"num_beams": 3}
    expected = greedy(two, **how).sequences
    found = greedy(two, adapter_names=["default", "default", "__base__", "default"], **how).sequences
    with two.disable_adapter():
        base = greedy(two, **how).sequences
    assert torch.equal(found[[0, 1, 3]], expected[[0, 1, 3]])
    assert torch.equal(found[2], base[2])


def test_what_cannot_be_is_refused_in_one_line(two):
    with pytest.raises(ValueError, match=r"ADARAS: default, other cannot steer together; choose one: set_adapter"):
        two.base_model.set_adapter(["default", "other"])
    with pytest.raises(
        ValueError, match="ADARAS: default, other cannot steer one batch; take one of them and __base__"
    ):
        greedy(two, adapter_names=["default", "other", "default", "other"])
    with pytest.raises(ValueError, match="adapter_names: no adapter typo; expected of: __base__, default, other"):
        greedy(two, adapter_names=["typo"] * 4)
    with pytest.raises(ValueError, match="adapter_names: has 3 names for 4 rows"):
        greedy(two, adapter_names=["default"] * 3)
    for merge in (two.merge_and_unload, two.merge_adapter):
        with pytest.raises(ValueError, match="ADARAS: cannot be merged, since weights have neither gate nor start"):
            merge()


def test_a_static_cache(opened, told):
    """Transformers hides the padding from the decoder then; generate() shows it."""
    require_answers(greedy(opened(KEY), cache_implementation="static"), told[KEY])


def test_a_cache_belongs_to_one_adapter(two):
    with torch.no_grad():
        cache = two(torch.tensor([PROMPTS[0]]), use_cache=True).past_key_values
        two.set_adapter("other")
        with pytest.raises(ValueError, match="was filled under adapter default; other needs one of its own"):
            two(torch.tensor([[7]]), **{CACHE: cache})


def test_an_error_inside_forward_does_not_reach_the_next_call(opened, told):
    model = opened(KEY)
    with pytest.raises(IndexError):
        greedy(model, [[999_999, 1]])
    require_answers(greedy(model), told[KEY])


def test_unloading_gives_the_base_back(opened, stock, folders):
    back = opened(KEY).unload()
    assert type(back) is type(stock["qwen3"])
    assert [name for name, _ in back.named_modules()] == [name for name, _ in stock["qwen3"].named_modules()]
    assert not back.model._forward_pre_hooks
    assert not back.model._forward_hooks
    assert torch.equal(torch.stack(greedy(back).logits), base_logits(folders, KEY))


def test_a_base_in_bfloat16_keeps_gate_and_vectors_in_float32(opened, adapters, folders):
    stored = load_file(adapters[KEY] / "adapter_model.safetensors")
    theirs = plain_model(folders["qwen3"], dtype=torch.bfloat16)
    theirs.load_adapter(str(adapters[KEY]))
    for model, prefix in ((opened(KEY, dtype=torch.bfloat16), ""), (theirs, "base_model.model.")):
        found = {prefix + name.replace(".default", ""): value for name, value in model.state_dict().items()}
        for name, value in stored.items():
            assert found[name].dtype == torch.float32
            assert np.array_equal(found[name].numpy(), value)
        assert not any(parameter.requires_grad for parameter in model.parameters() if parameter.dtype == torch.float32)
        greedy(model)


def test_loading_without_a_copy_in_memory(adapters, folders, told):
    model = peft.PeftModel.from_pretrained(plain_model(folders["qwen3"]), adapters[KEY], low_cpu_mem_usage=True).eval()
    require_answers(greedy(model), told[KEY])


def test_another_base_is_refused(adapters, tmp_path):
    small = tiny.save_base("qwen3", tmp_path / "small", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"ADARAS: the model has no model.layers.3.mlp.down_proj; expected the base"):
        peft.PeftModel.from_pretrained(plain_model(small), adapters[KEY])


# Registration


@pytest.mark.slow
def test_without_the_library_peft_and_transformers_refuse_it_by_name(adapters, folders):
    script = f"""
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folders["qwen3"])!r})
for load in (lambda: PeftModel.from_pretrained(model, adapter), lambda: model.load_adapter(adapter)):
    adapter = {str(adapters[KEY])!r}
    try:
        load()
    except KeyError as error:
        print(repr(error))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["KeyError('ADARAS')"] * 2


def test_a_second_method_of_that_name_is_refused():
    with pytest.raises(ExportError, match=r"peft \S+: has a method ADARAS already; expected none of that name"):
        method._register()


class Closed(str, enum.Enum):
    """Stands for the list of methods of a PEFT to come."""

    LORA = "LORA"


def test_a_peft_that_closes_the_door_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(method.peft, "PeftType", Closed)
    with pytest.raises(
        ExportError, match=r"peft \S+: does not let methods be added \(.*already.*\); expected a version"
    ):
        method._register()  # PEFT itself knows another list
    monkeypatch.setattr(method.peft, "PeftType", type("Plain", (str,), {"__members__": {}}))
    with pytest.raises(ExportError, match=r"does not let methods be added \(.*_member_map_.*\)"):
        method._register()


def test_the_method_is_known_to_peft_like_its_own():
    kind = peft.PeftType("ADARAS")
    assert kind is peft.PeftType.ADARAS is peft.PeftType["ADARAS"]
    assert kind in list(peft.PeftType)
    assert kind == "ADARAS"
    assert copy.deepcopy(kind) is kind
    assert peft.PeftConfig.from_peft_type(peft_type="ADARAS").__class__ is method.AdarasConfig


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, method.__name__)
    with pytest.raises(MissingExtraError, match="the method ADARAS needs peft"):
        importlib.import_module(method.__name__)


# Exported, verified, damaged


@pytest.fixture(scope="module")
def delivered(rules, folders, tmp_path_factory):
    """An export by the keys of ``rules``."""

    def deliver(key):
        out = tmp_path_factory.mktemp("out") / f"{key[0]}-adaptive"
        return export(rules[key], base=folders[key[0]], to="peft", out=out, adaptive=True)

    return tiny.Lazy(deliver)


@other_rule
def test_an_export_loses_nothing_and_verifies_also_where_the_base_has_moved(key, delivered, folders, tmp_path):
    report = delivered[key]
    assert report.drops == ()
    assert {"gate, p(correct)", "half of the rows steered, decode logits"} < {one.name for one in report.parity.checks}
    assert verify(report.path, base=shutil.copytree(folders[key[0]], tmp_path / "moved")).ok
    assert json.loads((report.path / "receipt.json").read_text())["options"] == ADAPTIVE


@pytest.fixture
def folder(delivered, tmp_path):
    """A delivered copy that may be damaged."""
    return shutil.copytree(delivered[KEY].path, tmp_path / "damaged")


@pytest.mark.parametrize("setting", ["threshold", "start", "features", "steered", "strength"])
def test_settings_that_differ_are_named_and_nothing_runs(setting, folder):
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    other = {"threshold": 0.1, "start": FIRST, "features": {}, "steered": [], "strength": 0.5}
    path.write_text(json.dumps({**settings, setting: other[setting]}))
    found = failures(folder)
    assert found["adapter_config.json entries that differ"] == setting
    assert "not run, because its code or its settings differ" in found


def test_left_padding_is_of_no_account(opened, told):
    require_answers(greedy(opened(KEY), [PROMPTS[0], PROMPTS[3]], pad_token_id=PAD), [told[KEY][0], told[KEY][3]])
