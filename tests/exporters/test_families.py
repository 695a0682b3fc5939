"""The targets besides hf on the families whose forms the other files do not go through one by one.

Exact where the table says so, refused by name elsewhere.
"""

from functools import partial

import pytest
import tiny
import torch
import transformers
from pairwise import in_turn
from tiny import greedy, require_answers

from adaras_export.core import families
from adaras_export.core.base_model import BaseModel
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.folding import vectors
from adaras_export.errors import ExportError, UnsupportedModelError
from adaras_export.exporters import easysteer
from adaras_export.exporters.base import ExportContext
from adaras_export.exporters.checkpoint import residual_vectors
from adaras_export.exporters.gguf import exporter as gguf
from adaras_export.exporters.parity import compare, rehearse
from adaras_export.exporters.peft.exporter import EXPORTER as PEFT
from adaras_export.exporters.stock.exporter import EXPORTER as STOCK
from adaras_export.exporters.stock.families import FORMS
from adaras_export.modeling.steering import steered

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
]
CAUSAL, LATER = ("causal", "last_prompt_token"), ("later", "first_generated_token")
EACH = {name: (name, None, "last_prompt_token") for name in tiny.MORE}
each_family = pytest.mark.parametrize("name", tiny.MORE)


def written(exporter, rule, base, out, **options):
    out.mkdir()
    exporter.with_context(ExportContext(str(base), options=options)).write(rule, Checkpoint(base), out)
    return out


def opened(folder, auto=transformers.AutoModelForCausalLM):
    with torch.random.fork_rng():
        model, report = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not [names for names in report.values() if names]
    return model.eval()


def adapted(model, folder):
    with torch.random.fork_rng():  # PEFT draws adapters before it reads them
        return peft.PeftModel.from_pretrained(model, folder).eval()


def require(name, found, expected):
    require_answers(found, expected, tiny.SLACK.get(name, 1))


@each_family
def test_a_lora_adapter_equals_the_oracle(name, rules, folders, told_everywhere, tmp_path):
    out = written(PEFT, rules[EACH[name]], folders[name], tmp_path / "out")
    require(name, greedy(adapted(opened(folders[name]), out)), told_everywhere[EACH[name]])


@pytest.mark.parametrize("key", [(name, *rule) for name, rule in in_turn((), tiny.MORE, [CAUSAL, LATER])])
def test_an_adaptive_adapter_equals_the_oracle(key, rules, folders, told, tmp_path):
    out = written(PEFT, rules[key], folders[key[0]], tmp_path / "out", adaptive=True)
    require(key[0], greedy(adapted(opened(folders[key[0]]), out)), told[key])


STOCKED = [name for name in tiny.MORE if name in FORMS]


@pytest.mark.parametrize("name", STOCKED)
def test_a_stock_checkpoint_equals_the_oracle(name, rules, folders, told_everywhere, tmp_path):
    out = written(STOCK, rules[EACH[name]], folders[name], tmp_path / "out")
    require(name, greedy(opened(out)), told_everywhere[EACH[name]])


BIASED = {name: FORMS[name].bias for name in STOCKED if not FORMS[name].always}


@pytest.mark.parametrize("name", BIASED)
def test_biases_that_the_base_has_are_kept_or_those_that_it_lacks_are_zero(name, tmp_path):
    """The other setting than the toy's."""
    key = BIASED[name]
    base = tiny.save_base(name, tmp_path / "base", **{key: not getattr(tiny.build_model(name).config, key)})
    model = opened(base)
    rule = tiny.make_rule(BaseModel.of(base), strength=tiny.STRENGTHS.get(name, 2.0))
    expected = tiny.answers_everywhere(model, rule)
    out = written(STOCK, rule, base, tmp_path / "out")
    require(name, greedy(opened(out)), expected)
    if getattr(model.config, key):
        merged = written(PEFT, rule, base, tmp_path / "merged", merge=True)
        require(name, greedy(opened(merged)), expected)


@pytest.mark.parametrize("name", ["seed_oss", "ernie4_5"])
def test_a_switchable_checkpoint_equals_the_oracle(name, rules, folders, told_everywhere, stock, tmp_path):
    out = written(STOCK, rules[EACH[name]], folders[name], tmp_path / "out", switchable=True)
    model = opened(out)
    require(name, greedy(model), tiny.answers(stock[name], rules[EACH[name]].with_strength(0)))
    adapter = next(path.parent for path in out.rglob("adapter_config.json"))
    require(name, greedy(adapted(model, adapter)), told_everywhere[EACH[name]])


@pytest.mark.parametrize("name", [name for name in tiny.MORE if name not in FORMS])
def test_a_family_without_a_bias_behind_its_mlp_has_no_stock_form(name, rules, folders, tmp_path):
    with pytest.raises(ExportError, match=f"no ordinary architecture computes what {name} does and has a bias"):
        written(STOCK, rules[EACH[name]], folders[name], tmp_path / "out")


def behind_blocks(model, changes):
    """Handles of hooks that add a vector to what leaves each of these decoder layers."""
    for layer, vector in changes.items():
        add = partial(added, torch.from_numpy(vector))
        yield families.decoder_layer(model, layer).register_forward_hook(add)


def added(vector, _module, _args, output):
    return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector


@each_family
def test_a_vector_behind_the_block_is_the_rule_where_the_table_says_so(name, rules, folders, told_everywhere):
    """What llama.cpp and EasySteer do. The inexact ones are off, so the table's norms are no empty caution."""
    rule, model = rules[EACH[name]], opened(folders[name])
    checkpoint = Checkpoint(folders[name])
    inexact = families.FAMILIES[name].behind == "norm"
    changes = {layer: rule.strength * vector for layer, vector in folded(rule, checkpoint, inexact).items()}
    assert len([*behind_blocks(model, changes)]) == 2
    found = greedy(model)
    if not inexact:
        require(name, found, told_everywhere[EACH[name]])
        return
    with pytest.raises(AssertionError):
        require(name, found, told_everywhere[EACH[name]])


def folded(rule, checkpoint, inexact):
    if not inexact:
        return residual_vectors(rule, checkpoint)
    with pytest.raises(ExportError, match="normalises what leaves its MLP"):
        easysteer.require_residual_sum(rule, "easysteer")
    return vectors(rule, checkpoint)


@each_family
def test_gguf_takes_what_is_known_of_llama_cpp_and_refuses_the_rest_by_name(name, rules, folders, tmp_path):
    if name in gguf._ARCHITECTURES:
        written(gguf.EXPORTER, rules[EACH[name]], folders[name], tmp_path / "out")
        return
    with pytest.raises(ExportError, match=rf"gguf: {name} (normalises|has not been tried in llama.cpp)"):
        written(gguf.EXPORTER, rules[EACH[name]], folders[name], tmp_path / "out")


STATEFUL = ("qwen3_5_text", "lfm2", "lfm3", "falcon_h1", "granitemoehybrid", "gemma4_text")


@pytest.mark.parametrize("name", [name for name in STATEFUL if name in tiny.MORE])
def test_onnx_refuses_a_cache_that_its_graphs_do_not_carry_by_name(name, stock):
    graph = pytest.importorskip("adaras_export.exporters.onnx.graph")
    with pytest.raises(ExportError, match=f"layers of {name} have states of a convolution .*choose target hf or peft"):
        graph.cache_shape(stock[name])


@pytest.mark.onnx
def test_a_graph_of_a_parallel_residual_equals_the_reference(rules, folders, tmp_path):
    """The families that have plain caches export as the others do; here is one that takes seven seconds."""
    onnx = pytest.importorskip("adaras_export.exporters.onnx.exporter")
    key = ("cohere2-shallow", *CAUSAL)
    out = written(onnx.EXPORTER, rules[key], folders[key[0]], tmp_path / "out")
    script = rehearse(onnx.EXPORTER.reference(out, rules[key], Checkpoint(folders[key[0]])))
    checks = compare(script, onnx.EXPORTER.load(out))
    assert all(check.ok for check in checks)
    effect = next(check for check in checks if check.name == "effect of steering on logits")
    assert effect.figure > 1e-3


@pytest.mark.parametrize("name", [name for name in tiny.MORE if families.FAMILIES[name].since == 5])
def test_an_older_transformers_is_refused_by_name(name, rules, stock, folders, tmp_path, monkeypatch):
    message = f"{name} needs transformers 5 or later; found 4.57.6; upgrade it"
    monkeypatch.setattr(families, "version", lambda _: "4.57.6")
    with pytest.raises(UnsupportedModelError, match=message):
        written(PEFT, rules[EACH[name]], folders[name], tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match=message), steered(stock[name], rules[EACH[name]]):
        pass


def test_a_hybrid_with_experts_is_refused():
    config = {"model_type": "granitemoehybrid", "num_local_experts": 4}
    with pytest.raises(
        UnsupportedModelError, match=r"granitemoehybrid is a mixture of experts \(num_local_experts = 4"
    ):
        families.family_of(config, "x")
