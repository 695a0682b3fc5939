"""What every target promises, asked of one export of each. What one target alone has is in a file of its own."""

import shutil

import artifacts
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from tiny import PROMPTS

from adaras_export.delivery import verifier
from adaras_export.delivery.receipt import read
from adaras_export.delivery.verifier import verify
from adaras_export.delivery.writer import export
from adaras_export.errors import ExportError

NOT_RUN = "not run, because its code or its settings differ"
HF = ("model-steering.safetensors", "model.layers.{}.mlp.steering_vector")
LORA = "base_model.model.model.layers.{}.mlp.down_proj.lora_B."
BIAS = ("model-steering.safetensors", "model.layers.{}.mlp.down_proj.bias")

# Where each artifact keeps what it adds to layers 2 and 3: a file, and a tensor in it.
STEERING = {
    "hf": HF,
    "hf-sharded": HF,
    "hf-thin": ("model-steering.safetensors", "layers.{}.mlp.steering_vector"),
    "onnx": ("onnx/model.onnx", "model.layers.{}.mlp.steering_vector"),
    "peft": ("adapter_model.safetensors", LORA + "bias"),
    "peft-start-at": ("adapter_model.safetensors", LORA + "bias"),
    "peft-adaptive": ("adapter_model.safetensors", "base_model.model.model.layers.{}.mlp.down_proj.adaras_vector"),
    "peft-merge": BIAS,
    "stock": BIAS,
    "stock-switchable": ("steering-lora/adapter_model.safetensors", LORA + "weight"),
    "gguf": ("control-vector.gguf", "direction.{}"),
    "gguf-into": ("model-steered.gguf", "blk.{}.ffn_down.bias"),
    "gguf-switchable": ("steering-lora.gguf", "blk.{}.ffn_down.weight.lora_b"),
}
GATES = {
    "hf": "model.steering_gate.output_bias",
    "hf-thin": "steering_gate.output_bias",
    "onnx": "model.steering_gate.output_bias",
    "peft-adaptive": "base_model.model.model.layers.0.mlp.down_proj.adaras_gate.output_weight",
}


def each(names):
    """Of `artifacts.EXPORTS`."""
    marks = {"onnx": [pytest.mark.onnx, pytest.mark.slow]}  # torch exports a graph for it
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks.get(name, [])) for name in names])


each_export = each(artifacts.EXPORTS)


@pytest.fixture
def folder(name, exported, tmp_path):
    """A copy of an export that may be damaged."""
    return artifacts.copy(exported[name], tmp_path / "copy")


def failures(folder):
    """What `verify` says, although the receipt fits."""
    return {check.name: check.detail for check in verify(artifacts.refit(folder)).failed()}


# As it was exported


@each_export
def test_an_export_verifies_where_it_was_moved_and_so_was_its_base(name, folder, folders, tmp_path):
    base = shutil.copytree(folders[artifacts.EXPORTS[name][1][0]], tmp_path / "base")
    report = verify(folder, base=base)
    assert report.ok, report.failed()
    effect = next(check for check in report.checks if check.name == "effect of steering on logits")
    limit = next(check for check in report.checks if check.name == "by the rule, decode logits").limit
    assert effect.figure > 1000 * limit


@each(name for name, (_, _, how) in artifacts.EXPORTS.items() if "start_at" not in how)  # which needs other prompts
def test_what_it_computes_is_what_the_oracle_says(name, exported, told, told_everywhere):
    _, key, how = artifacts.EXPORTS[name]
    expected = (told_everywhere if "accept_loss" in how else told)[key]
    exporter = verifier.exporter_of(read(exported[name]))
    play = exporter.load(exported[name]).play(PROMPTS, "rule", None)
    for row, answer in enumerate(expected):
        count = len(answer["ids"])
        assert play.tokens_BS[row, :count].tolist() == answer["ids"]
        assert float((play.logits_BSV[row, :count] - answer["logits"]).abs().max()) <= tiny.logit_limit(
            answer["logits"]
        )
        if play.probability_B is not None:
            assert float(play.probability_B[row]) == pytest.approx(answer["probability"], abs=1e-5)
    assert (play.probability_B is None) == ("accept_loss" in how)


@each_export
def test_receipt_and_card_say_rule_options_and_losses_and_no_path_of_this_machine(name, exported, rules):
    _, key, how = artifacts.EXPORTS[name]
    receipt, card = read(exported[name]), (exported[name] / "README.md").read_text()
    assert receipt.rule == rules[key].fingerprint
    assert rules[key].fingerprint in card
    assert how.keys() - {"accept_loss"} <= receipt.options.keys()
    assert {*receipt.drops} <= {*how.get("accept_loss", ())}
    assert all(loss in card for loss in receipt.drops)
    assert str(exported[name].parent) not in card


# What was tampered with, with a receipt that fits


def edit_tensors(path, change):
    """Apply ``change`` to the arrays of a file by name, in any format."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
    elif path.suffix == ".gguf":
        import gguf

        change({tensor.name: tensor.data for tensor in gguf.GGUFReader(path, "r+").tensors})
    else:
        edit_graph(path, change)


def edit_graph(path, change):
    import onnx_ir as ir

    model = ir.load(path)
    steering = {name: value for name, value in model.graph.initializers.items() if "steering" in name}
    tensors = {name: value.const_value.numpy().copy() for name, value in steering.items()}
    change(tensors)
    for name, value in steering.items():
        value.const_value = ir.tensor(tensors[name], name=name)
    ir.save(model, path)


def negate(tensors, name):
    tensors[name][...] = -tensors[name]


def swap(tensors, name, other):
    kept = tensors[name].copy()
    tensors[name][...] = tensors[other]
    tensors[other][...] = kept


@each_export
def test_a_negated_vector_is_named_and_fails_the_comparison(name, folder):
    file, tensor = STEERING[name]
    edit_tensors(folder / file, lambda tensors: negate(tensors, tensor.format(2)))
    found = failures(folder)
    assert any(tensor.format(2) in detail for detail in found.values()), found
    assert "by the rule, prefill logits" in found


@each_export
def test_vectors_in_the_wrong_layers_are_named_and_fail_the_comparison(name, folder):
    file, tensor = STEERING[name]
    edit_tensors(folder / file, lambda tensors: swap(tensors, tensor.format(2), tensor.format(3)))
    found = failures(folder)
    assert all(any(tensor.format(layer) in detail for detail in found.values()) for layer in (2, 3)), found
    assert "by the rule, prefill logits" in found


@each(GATES)
def test_a_gate_with_the_other_sign_is_named_and_fails_the_comparison(name, folder):
    edit_tensors(folder / STEERING[name][0], lambda tensors: negate(tensors, GATES[name]))
    found = failures(folder)
    assert any(GATES[name] in detail for detail in found.values()), found
    assert "gate, p(correct)" in found


@each_export
def test_a_truncated_and_a_missing_file_of_tensors_are_errors_of_one_line(name, folder):
    path = folder / STEERING[name][0]
    path.write_bytes(path.read_bytes()[:-9])
    for _ in range(2):
        found = failures(folder)
        assert {"what it stores cannot be read", "it does not open or run", NOT_RUN} & found.keys(), found
        assert not any("\n" in detail for detail in found.values())
        path.unlink(missing_ok=True)


@each_export
def test_foreign_files_that_could_run_are_named_and_nothing_runs(name, folder):
    foreign = ("adapter_model.bin", "modeling_evil.py")
    for file in foreign:
        (folder / file).write_text("raise SystemExit")
    found = failures(folder)
    assert any(detail.split() == [*foreign] for detail in found.values()), found
    assert NOT_RUN in found or name == "onnx"  # ONNX Runtime reads its graph, and no file beside it


@each(["hf", "hf-thin"])
def test_edited_code_is_named_and_does_not_run(name, folder, tmp_path):
    """test_tampering.py shows that such a trap would run."""
    code = sorted(folder.glob("*.py"))
    for path in code:
        path.write_text(f"{path.read_text()}\nopen({str(tmp_path / 'it-ran')!r}, 'w').close()\n")
    found = failures(folder)
    assert {*found["code files that are not the library's"].split()} == {path.name for path in code}
    assert NOT_RUN in found
    assert not (tmp_path / "it-ran").exists()


# What is refused

LOSSY = [name for name, (_, _, how) in artifacts.EXPORTS.items() if "accept_loss" in how and "into" not in how]


@each(LOSSY)
def test_what_a_format_loses_must_be_accepted_whole(name, exported, rules, folders, tmp_path):
    to, key, how = artifacts.EXPORTS[name]
    lost = read(exported[name]).drops
    assert lost
    for accepted in ([], lost[1:]):
        options = {**how, "accept_loss": accepted}
        missing = ", ".join(one for one in lost if one not in accepted)
        with pytest.raises(ExportError, match=rf"^{to}: cannot express {missing}; drop it with --accept-loss"):
            export(rules[key], base=folders[key[0]], to=to, out=tmp_path / "out", **options)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("to", sorted({to for to, _, _ in artifacts.EXPORTS.values()}))
def test_an_option_that_a_target_does_not_have_is_refused(to, rules, folders, tmp_path):
    with pytest.raises(ExportError, match=f"^{to}: has no option nonsense; expected of: "):
        export(rules[artifacts.KEY], base=folders[artifacts.KEY[0]], to=to, out=tmp_path / "out", nonsense=1)
    assert [*tmp_path.iterdir()] == []
