"""The runner answers as the oracle does, without torch; what it cannot run is one line."""

import shutil
import subprocess
import sys

import elsewhere
import numpy as np
import onnx
import oracle
import pytest
import tiny
from tiny import PROMPTS

from adaras_export.errors import ArtifactError, BrokenInstallationError, MissingExtraError, RuleError, TraceError
from adaras_export.exporters.onnx import runner
from adaras_export.exporters.onnx.exporter import OnnxExporter
from adaras_export.exporters.onnx.graph import plain_graph
from adaras_export.exporters.onnx.runner import Decision, Decoding, OnnxModel

CAUSAL = ("llama", "causal", "last_prompt_token")
NONE = ("llama", None, "first_generated_token")
KEYS = [CAUSAL, NONE, ("llama", "later", "first_generated_token"), ("llama", None, "last_prompt_token")]
SIX = Decoding(max_new_tokens=6)

pytestmark = pytest.mark.onnx


@pytest.fixture(scope="module")
def exported(rules, folders, tmp_path_factory):
    """The folder of an export, by the keys of ``rules``; all from one plain graph, which is the slow part."""
    plain = tmp_path_factory.mktemp("plain")
    plain_graph(tiny.build_model("llama"), plain / "model.onnx")

    class Sharing(OnnxExporter):
        def _write_plain(self, base, graph):
            shutil.copytree(plain, graph.parent, dirs_exist_ok=True)

    return elsewhere.exports(Sharing(), rules, folders, tmp_path_factory)


@pytest.fixture(scope="module")
def opened(exported):
    return tiny.Lazy(lambda key: OnnxModel(exported[key]))


@pytest.fixture
def folder(exported, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(exported[CAUSAL], tmp_path / "export")


def text(prompt):
    return tiny.build_tokenizer().decode(prompt)


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_tokens_text_and_decision_are_the_oracles(key, opened, told, tokenizer):
    model = opened[key]
    for prompt, answer in zip(PROMPTS, told[key], strict=True):
        assert model.encode(text(prompt), raw=True) == prompt
        assert [*model.tokens(prompt, SIX)] == answer["ids"]
        assert "".join(model.stream(text(prompt), SIX, raw=True)) == tokenizer.decode(
            answer["ids"], skip_special_tokens=True
        )
        assert model.decision.steered == answer["steered"]
        assert model.decision.probability == pytest.approx(answer["probability"], abs=1e-5)


@pytest.mark.parametrize("key", [CAUSAL, NONE], ids=str)
def test_strength_0_is_the_base_model(key, opened, rules, stock):
    off = tiny.answers(stock["llama"], rules[NONE].with_strength(0.0))
    for prompt, answer in zip(PROMPTS, off, strict=True):
        assert [*opened[key].tokens(prompt, SIX, strength=0)] == answer["ids"]
        assert not opened[key].decision.steered


def test_dials_are_for_one_answer_only(opened, rules, stock, told):
    always = tiny.answers(stock["llama"], rules[CAUSAL].ungated())
    model = opened[CAUSAL]
    assert [[*model.tokens(prompt, SIX, threshold=2)] for prompt in PROMPTS] == [one["ids"] for one in always]
    assert [[*model.tokens(prompt, SIX)] for prompt in PROMPTS] == [one["ids"] for one in told[CAUSAL]]
    assert [one["ids"] for one in always] != [one["ids"] for one in told[CAUSAL]]


def test_pieces_joined_are_the_decoded_whole(opened):
    """Most of a tiny model's bytes are no text, so that many pieces are held back, the last one too."""
    for seed in range(5):
        how = Decoding(40, temperature=2.0, seed=seed)
        ids = [*opened[CAUSAL].tokens(PROMPTS[0], how)]
        pieces = [*opened[CAUSAL].stream(text(PROMPTS[0]), how, raw=True)]
        assert "".join(pieces) == opened[CAUSAL].decode(ids)
        assert len(pieces) > 3


def test_a_letter_of_several_tokens_comes_whole(opened, monkeypatch, tokenizer):
    ids = tokenizer("aé東🙂!")["input_ids"]
    monkeypatch.setattr(OnnxModel, "tokens", lambda self, *_, **__: iter(ids))
    assert [*opened[NONE].stream("Hi!")] == ["a", "é", "東", "🙂", "!"]


def test_the_chat_template_is_applied_as_transformers_does(opened, tokenizer):
    chat = [{"role": "user", "content": "Hi!"}]
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    assert opened[CAUSAL].encode("Hi!") == expected["input_ids"]


def test_templates_may_use_what_transformers_gives_them(folder):
    template = (
        "{%- for m in messages %}{%- if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
        "{% generation %}{{ eos_token }}{% endgeneration %}{{ strftime_now('%%') }}"
    )
    (folder / "chat_template.jinja").write_text(template)
    model = OnnxModel(folder)
    assert model.decode(model.encode("é")) == '{"role": "user", "content": "é"}%'
    assert tiny.EOS in model.encode("é")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system') }}")
    with pytest.raises(TraceError, match=r"the chat template refuses it \(no system\); leave it out with --raw"):
        OnnxModel(folder).encode("é")


def test_sampling_follows_seed_temperature_and_top_p(opened):
    def draw(seed, top_p=1.0, temperature=1.5):
        how = Decoding(12, temperature=temperature, top_p=top_p, seed=seed)
        return [*opened[NONE].tokens(PROMPTS[2], how)]

    assert draw(1) == draw(1) != draw(2)
    assert draw(1, top_p=1e-9) == [*opened[NONE].tokens(PROMPTS[2], Decoding(12))]


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    random = np.random.default_rng(0)
    for top_p, expected in ((0.4, {1}), (0.6, {1, 3}), (0.8, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        how = Decoding(1, temperature=1.0, top_p=top_p)
        assert {how.choose(logits, random) for _ in range(200)} == expected


def test_drawn_tokens_have_the_models_probabilities(stock, rules, opened):
    """4000 draws of the first token; a frequency is off by 5 of its standard errors once in a million."""
    found = oracle.respond(stock["llama"], PROMPTS[0], tiny.plain_rule(rules[NONE]), 1)["logits"][0].softmax(-1)
    random, how = np.random.default_rng(0), Decoding(1, temperature=1.0)
    logits, _ = opened[NONE]._call(PROMPTS[0], 0, opened[NONE]._empty_cache(), {})
    counts = np.bincount([how.choose(logits, random) for _ in range(4000)], minlength=tiny.VOCABULARY)
    p = found.numpy().astype(float)
    assert np.all(np.abs(counts - 4000 * p) < 5 * np.sqrt(4000 * p * (1 - p)) + 5)


def test_it_stops_at_every_end_of_generation_config(folder, told):
    first, second, *_ = told[CAUSAL][0]["ids"]
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [{tiny.EOS}, {second}]}}')
    assert [*OnnxModel(folder).tokens(PROMPTS[0], SIX)] == [first, second]


@pytest.mark.parametrize("strength", [None, "0"])
def test_the_command_prints_answer_and_decision_without_torch(strength, exported, opened, told):
    arguments = [str(exported[CAUSAL]), text(PROMPTS[0]), "--raw", "--max-new-tokens", "6"]
    arguments += [] if strength is None else ["--strength", strength]
    code = (
        "import sys; from adaras_export.exporters.onnx.runner import main; status = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers', 'onnx'} & {*sys.modules}; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = told[CAUSAL][0]
    verdict = "steered" if answer["steered"] and strength is None else "not steered"
    assert done.stderr == f"p(correct) {answer['probability']:.4f}: {verdict}\n"
    if strength is None:
        assert done.stdout == opened[CAUSAL].decode(answer["ids"]) + "\n"


def test_the_module_is_a_command(exported):
    done = subprocess.run(
        [sys.executable, "-m", "adaras_export.exporters.onnx.runner", exported[NONE], "Hi!", "--max-new-tokens", "1"],
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"no gate: steered\n")


def test_an_answer_without_text_has_a_decision(exported, opened, monkeypatch, capsys):
    monkeypatch.setattr(OnnxModel, "decode", lambda self, ids: "")
    assert runner.main([str(exported[CAUSAL]), "Hi!", "--max-new-tokens", "1"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "\n"
    assert printed.err.startswith("p(correct) 0.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "TraceError: sampling: temperature -1.0 (expected 0 or more)"),
        (["--temperature", "nan"], "TraceError: sampling: temperature nan (expected 0 or more)"),
        (
            ["--top-p", "0", "--seed", "-1"],
            "TraceError: sampling: top_p 0.0 (expected above 0, at most 1); seed -1 (ex",
        ),
        (["--max-new-tokens", "0"], "TraceError: sampling: max_new_tokens 0 (expected 1 or more)"),
        (["--strength", "inf"], "RuleError: steering_strength inf; expected a finite number"),
        (["--threshold", "0.5"], "RuleError: threshold 0.5: the rule has no gate; expected none"),
        (["--provider", "cuda"], "MissingExtraError: provider cuda: onnxruntime"),
    ],
)
def test_what_cannot_be_done_is_one_line(options, message, exported, capsys):
    assert runner.main([str(exported[NONE]), "Hi!", *options]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_threshold_for_a_rule_without_a_gate_is_refused(opened):
    with pytest.raises(RuleError, match=r"threshold 0\.5: the rule has no gate"):
        next(opened[NONE].tokens(PROMPTS[0], threshold=0.5))


def test_a_prompt_without_tokens_is_refused(opened):
    with pytest.raises(TraceError, match="prompt: has no tokens; expected some text"):
        opened[NONE].encode("", raw=True)


def test_an_unknown_provider_is_refused(exported):
    with pytest.raises(MissingExtraError, match="provider abacus: unknown; expected one of: cpu, cuda"):
        OnnxModel(exported[NONE], provider="abacus")


def test_a_folder_that_is_no_export_is_refused(folders, tmp_path, folder):
    for wrong in (tmp_path / "absent", folders["llama"]):
        with pytest.raises(ArtifactError, match=r"is no export to target onnx; expected onnx/model\.onnx"):
            OnnxModel(wrong)
    shutil.copy(folders["llama"] / "config.json", folder)
    with pytest.raises(ArtifactError, match="is no export to target onnx"):
        OnnxModel(folder)


def test_a_missing_or_damaged_tokenizer_is_named(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: .*; expected a tokenizer of the tokenizers library"):
        OnnxModel(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: no such file; expected the tokenizer of the base"):
        OnnxModel(folder)


def test_a_graph_of_a_later_opset_is_named_with_both_versions(folder):
    path = folder / "onnx" / "model.onnx"
    graph = onnx.load(path, load_external_data=False)
    next(one for one in graph.opset_import if one.domain == "").version = 99
    onnx.save(graph, path)
    with pytest.raises(ArtifactError, match=r"onnxruntime \d+\.\S+ cannot open this graph \(.*Opset 99 .*\); expected"):
        OnnxModel(folder)


@pytest.mark.parametrize("content", [b"", b"no graph", b"\xff" * 40])
def test_a_file_that_is_no_graph_is_named(content, folder):
    (folder / "onnx" / "model.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.onnx: onnxruntime .* cannot open this graph"):
        OnnxModel(folder)


def test_weights_that_are_missing_are_named(folder):
    (folder / "onnx" / "model.onnx_data").unlink()
    with pytest.raises(ArtifactError, match=r"cannot open this graph \(.*model\.onnx_data"):
        OnnxModel(folder)


def test_two_onnxruntimes_in_one_environment_are_refused(exported, tmp_path, monkeypatch):
    for name in ("onnxruntime", "onnxruntime_gpu"):
        (tmp_path / f"{name}-1.2.3.dist-info").mkdir()
        (tmp_path / f"{name}-1.2.3.dist-info" / "METADATA").write_text(
            f"Name: {name.replace('_', '-')}\nVersion: 1.2.3\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        BrokenInstallationError, match=r"^onnxruntime 1\.2\.3 and onnxruntime-gpu .* overwrite each other"
    ):
        OnnxModel(exported[NONE])


def test_a_decision_without_a_gate_has_no_probability(opened):
    next(opened[NONE].tokens(PROMPTS[0]))
    assert opened[NONE].decision == Decision(None, steered=True)
    assert (opened[NONE].gated, opened[CAUSAL].gated) == (False, True)
