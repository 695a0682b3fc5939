"""A request file for EasySteer: what it says, read as EasySteer's documentation and source say it is read.

EasySteer itself is a fork of vLLM and is not run. Its words: docs/user-guide/steering.md of EasySteer and
vllm/model_hooks/steering/payloads.py of EasySteer-vllm-v1 (docs/decisions/046).
"""

import base64
import hashlib
import json
import shutil

import numpy as np
import oracle
import pytest
import tiny
import torch

from adaras_export.core import families
from adaras_export.errors import ExportError, RuleError
from adaras_export.exporters import easysteer

NORMED = ("gemma2", "gemma3_text", "olmo2")
STARTS = ("last_prompt_token", "first_generated_token")
STEPS = 3


@pytest.fixture
def written(rules, folders, tmp_path):
    """The request file of an ungated rule of a base, read."""

    def go(name, start=STARTS[0]):
        easysteer.write(rules[(name, None, start)], folders[name], tmp_path / "request.json")
        return json.loads((tmp_path / "request.json").read_text())

    return go


def directions(data):
    """The vectors of a payload by layer, and the hash of its content."""
    assert data.keys() == {"version", "kind", "tensors", "extra", "sha256"}
    assert (data["version"], data["kind"], data["extra"]) == (1, "direction", {})
    hashed, vectors = f"{data['kind']}:1".encode(), {}
    for name in sorted(data["tensors"]):
        tensor = data["tensors"][name]
        content = base64.b64decode(tensor["data"], validate=True)
        hashed += name.encode() + str(tuple(tensor["shape"])).encode() + content
        vectors[int(name.removeprefix("layer."))] = np.frombuffer(content, np.float32).reshape(tensor["shape"])
    return vectors, hashlib.sha256(hashed).hexdigest()


def selected(apply, prompt, length):
    """The positions of a row of this length that an ApplySpec selects: the union of what each phase names."""
    assert apply.keys() <= {"prompt_positions", "generation"}
    assert apply.get("generation") in (None, "all")
    chosen = [prompt + position for position in apply.get("prompt_positions", ()) if position < 0]
    return chosen + (list(range(prompt, length)) if "generation" in apply else [])


def steered_logits(model, spec, row, prompt):
    """The last logits of a row, with scale * direction added to what leaves decoder layers at selected tokens."""
    [vector] = spec["vectors"]
    where, handles = selected(vector["apply"], prompt, len(row)), []
    for layer, direction in directions(vector["data"])[0].items():

        def hook(_module, _args, output, direction=direction):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[0, where] += vector["scale"] * torch.tensor(direction)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handles.append(families.decoder_layer(model, layer).register_forward_hook(hook))
    try:
        with torch.no_grad():
            return model(torch.tensor([row]), use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()


# One of each shape: plain, with a factor on its MLP, and with transposed weights; test_gguf has the vectors of all.
@pytest.mark.parametrize(
    ("name", "start"), [("llama", STARTS[0]), ("llama", STARTS[1]), ("granite", STARTS[0]), ("gpt2", STARTS[0])]
)
def test_a_server_that_reads_the_file_computes_what_the_oracle_says(name, start, written, rules, stock):
    spec = written(name, start)
    for prompt in tiny.PROMPTS[:2]:
        answer = oracle.respond(stock[name], prompt, tiny.plain_rule(rules[(name, None, start)]), STEPS)
        limit = tiny.logit_limit(answer["logits"])
        for step, logits in enumerate(answer["logits"]):
            found = steered_logits(stock[name], spec, [*prompt, *answer["ids"][:step]], len(prompt))
            assert float((found - logits).abs().max()) <= limit


def test_the_file_has_the_fields_of_the_documentation_and_names_the_rule(written, rules):
    spec, rule = written("llama"), rules[("llama", None, STARTS[0])]
    [vector] = spec["vectors"]
    assert spec.keys() == {"vectors"}
    assert vector.keys() == {"name", "data", "algorithm", "scale", "normalize", "apply"}
    assert (vector["algorithm"], vector["normalize"], vector["scale"]) == ("direct", False, rule.strength)
    assert vector["apply"] == {"prompt_positions": [-1], "generation": "all"}
    assert vector["name"] == f"adaras-{rule.fingerprint[:12]}"


@pytest.mark.parametrize("layers", [(2, 3), (2, 10)])  # in the order of their names, 10 comes first
def test_the_hash_is_the_one_that_the_server_makes(layers):
    draw = np.random.default_rng(0)
    vectors = {layer: draw.normal(size=5).astype(np.float32) for layer in layers}
    data = easysteer.payload(vectors)
    found, digest = directions(data)
    assert digest == data["sha256"]
    assert {layer: vector.tolist() for layer, vector in found.items()} == {
        layer: vector.tolist() for layer, vector in vectors.items()
    }


def test_a_gate_is_lost_by_name_only(rules, folders, tmp_path):
    rule, out = rules[("llama", "causal", STARTS[0])], tmp_path / "request.json"
    with pytest.raises(ExportError, match="easysteer: cannot express gate; drop it with --accept-loss gate"):
        easysteer.write(rule, folders["llama"], out)
    assert not out.exists()
    easysteer.write(rule, folders["llama"], out, without_gate=True)
    gated = json.loads(out.read_text())["vectors"][0]
    easysteer.write(rule.ungated(), folders["llama"], out)
    assert gated | {"name": ""} == json.loads(out.read_text())["vectors"][0] | {"name": ""}


@pytest.mark.parametrize("name", NORMED)
def test_a_family_with_a_norm_behind_its_mlp_is_refused(name, rules, folders, tmp_path):
    with pytest.raises(ExportError, match=rf"easysteer: {name} normalises what leaves its MLP"):
        easysteer.write(rules[(name, None, STARTS[0])], folders[name], tmp_path / "request.json")


def test_a_quantised_base_is_refused(rules, folders, tmp_path):
    base = shutil.copytree(folders["llama"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(ExportError, match="is quantised; expected plain weights"):
        easysteer.write(rules[("llama", None, STARTS[0])], base, tmp_path / "request.json")


def test_a_rule_without_effect_or_of_another_model_is_refused(rules, folders, tmp_path):
    rule, out = rules[("llama", None, STARTS[0])], tmp_path / "request.json"
    with pytest.raises(ExportError, match="easysteer: the rule has strength 0"):
        easysteer.write(rule.with_strength(0), folders["llama"], out)
    with pytest.raises(RuleError):
        easysteer.write(rule, folders["qwen2"], out)
    assert not out.exists()
