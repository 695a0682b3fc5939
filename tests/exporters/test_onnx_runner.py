"""The loop over an exported graph and the runner answer as the oracle does, without torch; what fails is one line."""

import shutil
import subprocess
import sys
from itertools import islice

import elsewhere
import numpy as np
import onnx
import pytest
import tiny
from onnx import TensorProto, helper, numpy_helper
from tiny import PROMPTS

from adaras_export.errors import ArtifactError, BrokenInstallationError, TraceError
from adaras_export.exporters.onnx import __main__ as runner
from adaras_export.exporters.onnx import graph
from adaras_export.exporters.onnx.chat_template import chat_template
from adaras_export.exporters.onnx.exporter import OnnxExporter
from adaras_export.exporters.onnx.session import STRENGTH, THRESHOLD, Session

CAUSAL = ("llama", "causal", "last_prompt_token")
NONE = ("llama", None, "first_generated_token")
KEYS = [CAUSAL, NONE, ("llama", "later", "first_generated_token"), ("llama", None, "last_prompt_token")]

pytestmark = pytest.mark.onnx


@pytest.fixture(scope="module")
def exported(rules, folders, tmp_path_factory):
    """The folder of an export, by the keys of ``rules``; all from one plain graph, which is the slow part."""
    plain = tmp_path_factory.mktemp("plain")
    graph.plain_graph(tiny.build_model("llama"), plain / "model.onnx")

    class Sharing(OnnxExporter):
        def _write_plain(self, base, out):
            shutil.copytree(plain, out.parent, dirs_exist_ok=True)

    return elsewhere.exports(Sharing(), rules, folders, tmp_path_factory)


@pytest.fixture(scope="module")
def opened(exported):
    return tiny.Lazy(lambda key: Session(exported[key] / runner.GRAPH))


@pytest.fixture
def folder(exported, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(exported[CAUSAL], tmp_path / "export")


@pytest.fixture
def printed(capsys):
    """What a run of the command prints: status, standard output, standard error."""

    def run(folder, *options):
        status = runner.main([str(folder), *map(str, options)])
        return status, *capsys.readouterr()

    return run


def text(prompt):
    return tiny.build_tokenizer().decode(prompt)


def answers_of(session, rows, **dials):
    """Six greedy tokens of each row; an end token does not stop them."""
    steps = islice(session.decode(rows, dials=dials), 6)
    return np.stack([step.tokens_B for step in steps], 1).tolist()


def begin_alike(found, answers):
    """Whether tokens are the oracle's up to its end."""
    return all(row[: len(one["ids"])] == one["ids"] for row, one in zip(found, answers, strict=True))


# The loop


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_batch_and_each_row_alone_are_the_oracles(key, opened, told):
    assert begin_alike(answers_of(opened[key], PROMPTS), told[key])
    for prompt, answer in zip(PROMPTS, told[key], strict=True):
        assert begin_alike(answers_of(opened[key], [prompt]), [answer])


def test_the_gate_decides_as_the_oracles_at_every_step(opened, told):
    for step in islice(opened[CAUSAL].decode(PROMPTS), 3):
        assert step.probability == pytest.approx([answer["probability"] for answer in told[CAUSAL]], abs=1e-5)
        assert step.steered.tolist() == [answer["steered"] for answer in told[CAUSAL]]
    step = next(opened[NONE].decode(PROMPTS))
    assert (step.probability, step.steered) == (None, None)


def write_echo(path):
    """A graph whose logits are what it is fed: the token, its position, the mask's sum, the sum of all cached ids."""
    node, value = helper.make_node, helper.make_tensor_value_info
    fed, parts = ("input_ids", "position_ids", "attention_mask"), ("key", "value")
    nodes = [
        *(node("Cast", [name], [f"{name} as float"], to=TensorProto.FLOAT) for name in fed),
        node("Unsqueeze", ["input_ids as float", "1 and 3"], ["column"]),
        *(node("Concat", [f"past_key_values.0.{part}", "column"], [f"present.0.{part}"], axis=2) for part in parts),
        node("ReduceSum", ["attention_mask as float", "1"], ["real"]),
        node("ReduceSum", ["present.0.key", "1 and 2"], ["cached"], keepdims=0),
        node("Sub", ["input_ids as float", "input_ids as float"], ["zeros"]),
        *(node("Add", ["zeros", name], [f"{name} everywhere"]) for name in ("real", "cached")),
        node(
            "SequenceConstruct",
            [*(f"{name} as float" for name in fed[:2]), "real everywhere", "cached everywhere"],
            ["all"],
        ),
        node("ConcatFromSequence", ["all"], ["logits"], axis=-1, new_axis=1),
    ]
    cache = {part: [f"past_key_values.0.{part}", f"present.0.{part}"] for part in parts}
    inputs = [value(name, TensorProto.INT64, ["B", None]) for name in fed]
    inputs += [value(old, TensorProto.FLOAT, ["B", 1, None, 1]) for old, _ in cache.values()]
    outputs = [value("logits", TensorProto.FLOAT, ["B", None, 4])]
    outputs += [value(new, TensorProto.FLOAT, ["B", 1, None, 1]) for _, new in cache.values()]
    axes = {"1": [1], "1 and 2": [1, 2], "1 and 3": [1, 3]}
    constants = [numpy_helper.from_array(np.array(numbers), name) for name, numbers in axes.items()]
    graph = helper.make_graph(nodes, "echo", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def test_each_call_is_fed_the_chosen_tokens_their_positions_the_mask_and_the_cache(tmp_path):
    write_echo(tmp_path / "echo.onnx")
    chosen = iter(np.array([[1, 2], [3, 4], [0, 0]]))
    steps = islice(Session(tmp_path / "echo.onnx").decode([[5, 6], [7, 8, 9]], lambda logits_BV: next(chosen)), 3)
    assert [step.logits_BV.tolist() for step in steps] == [
        [[6, 1, 2, 11], [9, 2, 3, 24]],
        [[1, 2, 3, 12], [2, 3, 4, 26]],
        [[3, 3, 4, 15], [4, 4, 5, 30]],
    ]


@pytest.mark.parametrize("key", [CAUSAL, NONE], ids=str)
def test_strength_0_is_the_base_model(key, opened, rules, stock):
    off = tiny.answers(stock["llama"], rules[NONE].with_strength(0.0))
    assert begin_alike(answers_of(opened[key], PROMPTS, **{STRENGTH: 0}), off)


def test_dials_are_for_one_answer_only(opened, rules, stock, told):
    always = tiny.answers(stock["llama"], rules[CAUSAL].ungated())
    assert begin_alike(answers_of(opened[CAUSAL], PROMPTS, **{THRESHOLD: 2}), always)
    found = answers_of(opened[CAUSAL], PROMPTS)
    assert begin_alike(found, told[CAUSAL])
    assert not begin_alike(found, always)


# The command


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_text_and_decision_are_the_oracles(key, exported, printed, told, tokenizer):
    for prompt, answer in zip(PROMPTS, told[key], strict=True):
        gate = "no gate" if key[1] is None else f"p(correct) {answer['probability']:.4f}"
        verdict = "steered" if answer["steered"] else "not steered"
        expected = tokenizer.decode(answer["ids"], skip_special_tokens=True)
        found = printed(exported[key], text(prompt), "--raw", "--max-new-tokens", 6)
        assert found == (0, f"{expected}\n", f"{gate}: {verdict}\n")


def test_a_dial_of_the_command_reaches_the_graph(exported, printed, told):
    common = (exported[CAUSAL], text(PROMPTS[0]), "--raw", "--max-new-tokens", 6)
    gate = f"p(correct) {told[CAUSAL][0]['probability']:.4f}"
    assert printed(*common, "--strength", 0)[2] == f"{gate}: not steered\n"
    assert printed(*common, "--threshold", 1)[2] == f"{gate}: steered\n"
    assert printed(*common, "--threshold", 0)[1:] == (printed(*common, "--strength", 0)[1], f"{gate}: not steered\n")


def test_pieces_joined_are_the_decoded_whole(tokenizer):
    """Most of a tiny model's bytes are no text, so that many pieces are held back, the last one too."""

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    for seed in range(20):
        ids = np.random.default_rng(seed).integers(tiny.VOCABULARY, size=40).tolist()
        found = [*runner.pieces(decode, ids)]
        assert "".join(found) == decode(ids)
        assert len(found) > 3
    assert [*runner.pieces(decode, tokenizer("aé東🙂!")["input_ids"])] == ["a", "é", "東", "🙂", "!", ""]


def test_the_chat_template_is_applied_as_transformers_does(exported, tokenizer):
    chat = [{"role": "user", "content": "Hi!"}]
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    own = runner.open_tokenizer(exported[CAUSAL])
    assert runner.encode(exported[CAUSAL], own, "Hi!") == expected["input_ids"]
    assert runner.encode(exported[CAUSAL], own, text(PROMPTS[0]), raw=True) == PROMPTS[0]
    with pytest.raises(TraceError, match="prompt: has no tokens; expected some text"):
        runner.encode(exported[CAUSAL], own, "", raw=True)


def test_templates_may_use_what_transformers_gives_them_and_nothing_else(folder):
    def rendered(template):
        (folder / "chat_template.jinja").write_text(template)
        return chat_template(folder).render("é")

    template = (
        "{%- for m in messages %}{%- if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
        "{% generation %}{{ eos_token }}{% endgeneration %}{{ strftime_now('%%') }}"
    )
    eos = tiny.build_tokenizer().eos_token
    assert rendered(template) == f'{{"role": "user", "content": "é"}}{eos}%'
    for wrong, message in (
        ("{{ raise_exception('no system') }}", "no system"),
        ("{{ messages.append(1) }}", "access to attribute 'append' .* is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' .* is unsafe"),
    ):
        with pytest.raises(
            TraceError, match=rf"the chat template refuses it \(.*{message}.*\); leave it out with --raw"
        ):
            rendered(wrong)


def test_it_stops_at_every_end_of_generation_config(folder, printed, told, tokenizer):
    first, second, *_ = told[CAUSAL][0]["ids"]
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [{tiny.EOS}, {second}]}}')
    assert printed(folder, text(PROMPTS[0]), "--raw")[1] == f"{tokenizer.decode([first, second])}\n"


def test_the_module_is_a_command_without_torch(exported):
    code = (
        "import runpy, sys; sys.argv[0] = 'x'\n"
        "try: runpy.run_module('adaras_export.exporters.onnx', run_name='__main__')\n"
        "finally: assert not {'torch', 'transformers', 'onnx'} & {*sys.modules}"
    )
    command = [sys.executable, "-c", code, exported[NONE], "Hi!", "--max-new-tokens", "1"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"no gate: steered\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "0"], "TraceError: max_new_tokens 0; expected 1 or more"),
        (["--strength", "inf"], "RuleError: steering_strength inf; expected a finite number"),
        (["--strength", "1e300"], "RuleError: steering_strength 1e+300; expected a finite number"),
        (["--threshold", "0.5"], "RuleError: threshold 0.5: the rule has no gate; expected none"),
        (["--provider", "cuda"], "MissingExtraError: provider cuda: onnxruntime"),
    ],
)
def test_what_cannot_be_done_is_one_line(options, message, exported, printed):
    status, out, err = printed(exported[NONE], "Hi!", *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(message)


def test_a_folder_that_is_no_export_is_refused(folders, tmp_path, folder, printed):
    shutil.copy(folders["llama"] / "config.json", folder)
    for wrong in (tmp_path / "absent", folders["llama"], folder):
        assert printed(wrong, "Hi!")[2].startswith(
            f"ArtifactError: {wrong}: is no export to target onnx; expected onnx"
        )


def test_a_missing_or_damaged_tokenizer_is_named(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: .*; expected a tokenizer of the tokenizers library"):
        runner.open_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: no such file; expected the tokenizer of the base"):
        runner.open_tokenizer(folder)


def later_opset(path):
    graph = onnx.load(path, load_external_data=False)
    next(one for one in graph.opset_import if one.domain == "").version = 99
    onnx.save(graph, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (later_opset, r"onnxruntime \d+\.\S+ cannot open this graph \(.*Opset 99 .*\); expected"),
        (lambda path: path.write_bytes(b""), r"onnxruntime .* cannot open this graph"),
        (lambda path: path.write_bytes(b"\xff" * 40), r"onnxruntime .* cannot open this graph"),
        (lambda path: (path.parent / "model.onnx_data").unlink(), r"cannot open this graph \(.*model\.onnx_data"),
    ],
)
def test_a_graph_that_does_not_open_is_named(damage, message, folder):
    damage(folder / runner.GRAPH)
    with pytest.raises(ArtifactError, match=rf"model\.onnx: .*{message}"):
        Session(folder / runner.GRAPH)


def test_two_builds_of_onnxruntime_are_refused(exported, tmp_path, monkeypatch):
    for name in ("onnxruntime", "onnxruntime_gpu"):
        (tmp_path / f"{name}-1.2.3.dist-info").mkdir()
        (tmp_path / f"{name}-1.2.3.dist-info" / "METADATA").write_text(
            f"Name: {name.replace('_', '-')}\nVersion: 1.2.3\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        BrokenInstallationError, match=r"^onnxruntime 1\.2\.3 and onnxruntime-gpu .* overwrite each other"
    ):
        Session(exported[NONE] / runner.GRAPH)
