"""Target `stock` in MLX: the checkpoints open unchanged, and quantising keeps the biases that steer."""

import json

import drive
import numpy as np
import pytest
import tiny
from elsewhere import as_output
from safetensors.numpy import load_file, save_file
from tiny import require_answers

from adaras_export.core.base_model import BaseModel
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.exporters.stock.exporter import StockExporter

# mlx_lm reads the older spelling of rotary settings only; with the usual theta, its default, that would not be seen.
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
WIDE = 4 * tiny.HIDDEN_SIZE  # as MLX takes the MLPs of the GPTs to be
BASES = {
    "llama": {**ROPE, "intermediate_size": 64},  # which groups of 32 divide
    "mistral": ROPE,
    "qwen2": ROPE,
    "granite": ROPE,
    "smollm3": ROPE,
    "gpt2": {"n_inner": WIDE},
    "gpt_neox": {"intermediate_size": WIDE},
}
# gpt_neox has an approximated GELU in MLX, also without steering.
SLACK = {"gpt_neox": 200}
BITS = (4, 8)
each_base = pytest.mark.parametrize("name", BASES)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Folder of the base, rule and stock model by name."""

    def make(name):
        folder = tmp_path_factory.mktemp("base") / name
        tiny.save_base(name, folder, **BASES[name])
        if name == "gpt2":
            name_as_on_the_hub(folder / "model.safetensors")
        return folder, tiny.make_rule(BaseModel.of(folder), strength=tiny.STRENGTHS.get(name, 2.0)), stock_model(folder)

    return tiny.Lazy(make)


def stock_model(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def name_as_on_the_hub(path):
    """Without the prefix that Transformers writes; MLX knows the others only."""
    tensors = load_file(path)
    save_file({name.removeprefix("transformer."): value for name, value in tensors.items()}, path, {"format": "pt"})


@pytest.fixture(scope="module")
def written(cases, tmp_path_factory):
    """The folder of an export, by name and whether it is switchable."""

    def write(key):
        folder, rule, _ = cases[key[0]]
        out = tmp_path_factory.mktemp("stock") / "export"
        out.mkdir()
        StockExporter(switchable=key[1]).write(rule, Checkpoint(folder), out)
        return out

    return tiny.Lazy(write)


@pytest.fixture(scope="module")
def found(cases, written, rules, folders, tmp_path_factory, pytestconfig):
    """What MLX made of everything, in one process."""
    drive.require_built("mlx", required=pytestconfig.option.require_runtimes)
    home, both = tmp_path_factory.mktemp("mlx"), ["single", "library"]
    jobs = {name: job(written[name, False], both) for name in BASES}
    jobs |= {"switchable": job(written["llama", True], ["single"]), "old": job(without_old(written, home), ["single"])}
    jobs |= {bits: job(written["llama", False], ["convert"], bits=bits, into=str(home / str(bits))) for bits in BITS}
    jobs["qwen3"] = job(other_class(rules, folders, home), ["single"])
    return drive.run_driver("mlx", jobs, home)


def job(folder, modes, **more):
    return drive.job(folder, (None, None), modes, **more)


def without_old(written, home):
    """An export without the older spelling of its rotary settings."""
    folder = home / "old"
    folder.mkdir()
    for path in written["llama", False].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"], config["rope_scaling"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def other_class(rules, folders, home):
    folder = home / "qwen3"
    folder.mkdir()
    StockExporter().write(rules["qwen3", None, "last_prompt_token"], Checkpoint(folders["qwen3"]), folder)
    return folder


def told(case, strength=None):
    _, rule, model = case
    return tiny.answers_everywhere(model, rule if strength is None else rule.with_strength(strength))


def require_told(results, expected, slack=1):
    for result, answer in zip(results, expected, strict=True):
        require_answers(as_output(result), [answer], slack)


@each_base
def test_a_stock_export_gives_what_the_oracle_gives(name, found, cases):
    expected = told(cases[name])
    require_told(found[name]["single"], expected, SLACK.get(name, 1))
    assert found[name]["library"] == [one["ids"] for one in expected]


@each_base
def test_the_base_is_told_from_it(name, found, cases):
    with pytest.raises(AssertionError):
        require_told(found[name]["single"], told(cases[name], 0.0), SLACK.get(name, 1))


def test_a_switchable_checkpoint_is_the_base_until_its_adapter_is_loaded(found, cases):
    require_told(found["switchable"]["single"], told(cases["llama"], 0.0))


def test_without_the_older_spelling_of_rotary_settings_it_would_be_another_model(found, cases):
    with pytest.raises(AssertionError):
        require_told(found["old"]["single"], told(cases["llama"]))


def test_a_qwen3_is_refused_by_name(found):
    assert found["qwen3"]["single"] == "Model type hy_v3 not supported."


@pytest.mark.parametrize("bits", BITS)
def test_quantising_keeps_the_biases_bit_for_bit(bits, found, written):
    [path] = written["llama", False].glob("*steering.safetensors")
    before = {name: bias for name, bias in load_file(path).items() if "down_proj" in name}
    [path] = (written["llama", False].parent.parent / found[bits]["convert"]).glob("*.safetensors")
    after = load_file(path)
    assert after["model.layers.2.mlp.down_proj.weight"].dtype == np.uint32
    assert before.keys() <= after.keys()
    assert all(after[name].dtype == np.float32 and np.array_equal(after[name], bias) for name, bias in before.items())
