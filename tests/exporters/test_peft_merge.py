"""Target `peft` with `merge`: an ordinary checkpoint whose base has biases to add to."""

import json

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file
from tiny import greedy, require_answers

from adaras_export.core import base_model, checkpoint
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.delivery.verifier import verify
from adaras_export.delivery.writer import export
from adaras_export.errors import ExportError
from adaras_export.exporters.base import ExportContext
from adaras_export.exporters.peft.exporter import EXPORTER

peft = pytest.importorskip("peft")

CAUSAL = ("causal", "last_prompt_token")
BIASED = ("llama-biased", "gpt_neox", "gpt2")
WITHOUT = [name for name in tiny.NAMES if name not in BIASED]
every_base = pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in BIASED[:2]), "gpt2"]
)
LOSS = ["gate", "start", "dial"]
MERGE = ExportContext("unused", options={"merge": True})
BIAS = "model.layers.3.mlp.down_proj.bias"


def merge(rule, base, out):
    return export(rule, base=base, to="peft", out=out, accept_loss=LOSS, merge=True)


def opened(folder, **how):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, **{"dtype": torch.float32, "output_loading_info": True, **how}
    )


def stored(folder):
    """Every tensor of a checkpoint, by name."""
    files = {path: load_file(path) for path in {*checkpoint.shards(folder).values()}}
    return {name: files[path][name] for name, path in checkpoint.shards(folder).items()}


@pytest.fixture(scope="module")
def delivered(rules, folders, tmp_path_factory):
    def deliver(name):
        return merge(rules[(name, *CAUSAL)], folders[name], tmp_path_factory.mktemp("out") / f"{name}-merged").path

    return tiny.Lazy(deliver)


@every_base
def test_a_merged_checkpoint_equals_the_oracle_and_opens_without_a_word(name, delivered, folders, told_everywhere):
    model, report = opened(delivered[name])
    require_answers(greedy(model.eval()), told_everywhere[(name, *CAUSAL)])
    assert not any(report.values())
    assert type(model) is type(opened(folders[name])[0])
    assert verify(delivered[name]).ok


@every_base
def test_every_other_tensor_and_file_is_the_bases(name, delivered, folders, rules):
    ours, theirs = (stored(folder) for folder in (delivered[name], folders[name]))
    changed = {key for key in theirs if not torch.equal(ours[key], theirs[key])}
    assert ours.keys() == theirs.keys()
    assert len(changed) == len(rules[(name, *CAUSAL)].layers())
    assert all(key.endswith(".bias") for key in changed)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (delivered[name], folders[name]))
    assert {key: ours[key] for key in theirs} == theirs
    assert (delivered[name] / "tokenizer.json").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@every_base
def test_it_is_what_peft_merges(name, delivered, folders, rules, tmp_path):
    """Up to one rounding: PEFT rounds the product and the sum."""
    EXPORTER.with_context(ExportContext(str(folders[name]))).write(
        rules[(name, *CAUSAL)], Checkpoint(folders[name]), tmp_path
    )
    with torch.random.fork_rng():
        merged = peft.PeftModel.from_pretrained(opened(folders[name])[0], tmp_path).merge_and_unload().state_dict()
    ours = opened(delivered[name])[0].state_dict()
    assert ours.keys() == merged.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, merged[key], rtol=0, atol=1e-6 if key.endswith("bias") else 0)


@pytest.mark.parametrize("name", WITHOUT)
def test_a_base_without_biases_is_refused_by_name(name, rules, folders, tmp_path):
    with pytest.raises(ExportError, match=r"has no model.layers.2.mlp.down_proj.bias to merge into; .* --to stock"):
        EXPORTER.with_context(MERGE).write(rules[(name, *CAUSAL)], Checkpoint(folders[name]), tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """A base in bfloat16, in several files."""
    folder = tiny.save_base("llama-biased", tmp_path_factory.mktemp("bf16") / "base")
    model = opened(folder, dtype=torch.bfloat16)[0]
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    return folder


def test_a_bfloat16_base_in_several_files_keeps_its_bits_and_gets_exact_biases(halves, tmp_path):
    base = base_model.BaseModel.of(halves)
    rule = tiny.make_rule(base, gate=tiny.make_gate())
    out = merge(rule, halves, tmp_path / "out").path
    model = opened(out)[0].eval()
    require_answers(greedy(model), tiny.answers_everywhere(opened(halves)[0].eval(), rule))
    theirs = checkpoint.shards(halves)
    exact = {name for name, tensor in stored(out).items() if tensor.dtype == torch.float32}
    assert exact == {BIAS, BIAS.replace("3", "2")}
    untouched = set(theirs.values()) - {theirs[BIAS], theirs[BIAS.replace("3", "2")]}
    assert untouched
    assert all(path.stat().st_ino == (out / path.name).stat().st_ino for path in untouched)
    assert opened(out, dtype="auto")[0].dtype == torch.bfloat16
    assert verify(out).ok
