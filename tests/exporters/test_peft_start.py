"""Target `peft` with `start_at`: a stock adapter that starts at the last prompt token.

Tests below "Documented faults" show where PEFT steers otherwise. If one fails, PEFT has changed: change the card.
"""

import json
import shutil

import oracle
import pytest
import tiny
import torch
import transformers
from receipts import failures
from tiny import CACHE, EOS, PROMPTS, build_tokenizer, greedy, require_answers

from adaras_export.core.checkpoint import Checkpoint
from adaras_export.delivery import verifier
from adaras_export.delivery.verifier import open_artifact, verify
from adaras_export.delivery.writer import export
from adaras_export.errors import ArtifactError, ExportError
from adaras_export.exporters.base import ExportContext
from adaras_export.exporters.peft.exporter import EXPORTER
from adaras_export.exporters.peft.start import last_token
from adaras_export.modeling.generation import Sampling
from adaras_export.runtime.steering_adaras import cache_of

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
]
END = "<assistant>"  # of prompts of `tiny.TEMPLATE`
LAST = 29  # ">"
# The token in the middle of a prompt, twice at its end, and alone.
ROWS = [[*PROMPTS[0], LAST], [LAST], [54, LAST, 64, 83, LAST, LAST], [*PROMPTS[3], LAST]]
KEY = ("qwen3", "causal", "last_prompt_token")
KEYS = [
    pytest.param((name, *KEY[1:]), marks=() if name in ("qwen3", "gpt2") else pytest.mark.slow) for name in tiny.KINDS
]
every_base = pytest.mark.parametrize("key", KEYS, ids=lambda key: key[0])


@pytest.fixture(scope="module")
def adapters(rules, folders, tmp_path_factory):
    """Folder of an adapter by the keys of ``rules``."""

    def write(key):
        out, context = (
            tmp_path_factory.mktemp("adapter"),
            ExportContext(str(folders[key[0]]), options={"start_at": END}),
        )
        EXPORTER.with_context(context).write(rules[key], Checkpoint(folders[key[0]]), out)
        return out

    return tiny.Lazy(write)


def plain_model(folder, **how):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **how}).eval()


def adapted(folder, adapter, **how):
    with torch.random.fork_rng():  # PEFT draws adapters before it reads them
        return peft.PeftModel.from_pretrained(plain_model(folder, **how), adapter).eval()


@pytest.fixture(scope="module")
def opened(adapters, folders):
    """PeftModel by key."""

    return tiny.Lazy(lambda key: adapted(folders[key[0]], adapters[key]))


@pytest.fixture(scope="module")
def oracles(stock, rules):
    """What the oracle says of rows without the gate: ``oracles(key, rows, start, strength)``."""

    def answers(key, rows=ROWS, start="last_prompt_token", strength=None):
        rule = rules[key] if strength is None else rules[key].with_strength(strength)
        plain = {**tiny.plain_rule(rule), "gate": None, "start": start}
        return [oracle.respond(stock[key[0]], row, plain, 6, ends=(EOS,)) for row in rows]

    return answers


def distance(logits, expected):
    """The largest difference, in limits."""
    return float((logits.float() - expected).abs().max()) / tiny.logit_limit(expected)


# What an opened adapter does


@every_base
def test_a_padded_batch_equals_the_oracle_that_starts_at_the_last_prompt_token(key, opened, oracles):
    require_answers(greedy(opened[key], ROWS), oracles(key))


def test_a_row_alone_and_a_static_cache_equal_the_oracle_too(opened, oracles):
    expected = oracles(KEY)
    require_answers(greedy(opened[KEY], ROWS[2:3]), expected[2:3])
    require_answers(greedy(opened[KEY], ROWS, cache_implementation="static"), expected)


def test_rows_choose_the_adapter_or_the_base(opened, oracles):
    names = ["default", "__base__", "__base__", "default"]
    answers = {"default": oracles(KEY), "__base__": oracles(KEY, strength=0.0)}
    expected = [answers[name][row] for row, name in enumerate(names)]
    require_answers(greedy(opened[KEY], ROWS, adapter_names=names), expected)


def test_set_scale_dials_the_strength(opened, rules, oracles):
    layers = [module for module in opened[KEY].modules() if hasattr(module, "set_scale")]
    try:
        for layer in layers:
            layer.set_scale("default", 0.5)
        require_answers(greedy(opened[KEY], ROWS), oracles(KEY, strength=0.5 * rules[KEY].strength))
    finally:
        for layer in layers:
            layer.set_scale("default", 1.0)


def test_switched_off_it_is_the_base_bit_for_bit(opened, folders):
    base = plain_model(folders["qwen3"]).requires_grad_(False)  # as PEFT has it
    with opened[KEY].disable_adapter():
        off = torch.stack(greedy(opened[KEY], ROWS).logits)
    assert torch.equal(off, torch.stack(greedy(base, ROWS).logits))


def test_a_base_in_bfloat16_is_steered(adapters, folders, oracles):
    model = adapted(folders["qwen3"], adapters[KEY], dtype=torch.bfloat16)
    found = greedy(model, ROWS).logits[0].float()
    steered, base = (
        torch.stack([one["logits"][0] for one in answers]) for answers in (oracles(KEY), oracles(KEY, strength=0.0))
    )
    assert (found - steered).norm() < 0.1 * (found - base).norm()


def test_a_prompt_without_the_token_is_not_steered(opened, oracles):
    require_answers(greedy(opened[KEY], PROMPTS), oracles(KEY, PROMPTS, strength=0.0))


def test_a_prompt_that_ends_otherwise_is_steered_from_the_last_such_token_on(opened, stock, rules):
    row = [54, LAST, 64, LAST, 83, 72]
    expected = oracle.logits_of(stock["qwen3"], row, tiny.plain_rule(rules[KEY]), range(3, 6))[-1]
    assert distance(greedy(opened[KEY], [row]).logits[0][0], expected) <= 1


# Documented faults


WRONG = {
    "no cache": (ROWS, {"use_cache": False}),
    "prefill in chunks": (ROWS, {"prefill_chunk_size": 2}),
    "assisted decoding": (ROWS[3:], {"assistant_model": "base"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_the_card_warns_of_steers_otherwise_without_an_error(name, opened, stock, oracles):
    rows, how = WRONG[name]
    found = greedy(
        opened[KEY], rows, **{key: stock["qwen3"] if value == "base" else value for key, value in how.items()}
    )
    logits_BSV = torch.stack(found.logits, 1)
    pairs = zip(logits_BSV, oracles(KEY, rows), strict=True)
    assert max(distance(logits_SV[: len(one["logits"])], one["logits"]) for logits_SV, one in pairs) > 50


def test_a_loop_over_forward_does_not_steer_what_it_generates(opened, stock, rules):
    row, new = ROWS[0], 5
    with torch.no_grad():
        first = opened[KEY](input_ids=torch.tensor([row]))
        state = {CACHE: cache_of(first)}
        second = opened[KEY](input_ids=torch.tensor([[new]]), **state).logits[0, -1]
    rule = tiny.plain_rule(rules[KEY])
    only, both = (
        oracle.logits_of(stock["qwen3"], [*row, new], rule, where)[-1]
        for where in ([len(row) - 1], [len(row) - 1, len(row)])
    )
    assert distance(second, only) <= 1
    assert distance(second, both) > 100


def test_scoring_starts_at_the_last_token_of_the_answer_that_equals_it(opened, stock, rules):
    row = [*ROWS[0], 5, LAST, 6]
    with torch.no_grad():
        found = opened[KEY](input_ids=torch.tensor([row])).logits[0, -1]
    expected = oracle.logits_of(stock["qwen3"], row, tiny.plain_rule(rules[KEY]), [len(row) - 2, len(row) - 1])[-1]
    assert distance(found, expected) <= 1


@pytest.mark.parametrize("way", ["load_adapter", "from_pretrained"])
def test_transformers_alone_does_not_steer(way, adapters, folders, oracles):
    with torch.random.fork_rng():
        model = plain_model(adapters[KEY] if way == "from_pretrained" else folders["qwen3"])
        if way == "load_adapter":
            model.load_adapter(str(adapters[KEY]))
    require_answers(greedy(model, ROWS), oracles(KEY, strength=0.0))


def test_beams_and_several_answers_to_a_prompt_are_errors(opened):
    with pytest.raises(ValueError, match="Beam search not yet supported for aLoRA"):
        greedy(opened[KEY], ROWS, num_beams=2)
    with torch.random.fork_rng(), pytest.raises(IndexError, match="shape of the mask"):
        greedy(opened[KEY], ROWS, do_sample=True, num_return_sequences=2)


def test_it_cannot_be_merged(adapters, folders):
    with pytest.raises(NotImplementedError, match="aLoRA does not support merging"):
        adapted(folders["gpt2"], adapters[("gpt2", *KEY[1:])]).merge_and_unload()


# Exported, verified, damaged


@pytest.fixture(scope="module")
def delivered(rules, folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "steered"
    return export(rules[KEY], base=folders["qwen3"], to="peft", out=out, start_at=END, accept_loss=["gate"])


@pytest.fixture
def folder(delivered, tmp_path):
    """A delivered copy that may be damaged."""
    return shutil.copytree(delivered.path, tmp_path / "damaged")


def test_an_export_loses_the_gate_and_keeps_the_start(delivered):
    assert delivered.drops == ("gate",)
    report = verify(delivered.path)
    assert report.ok
    figures = {check.name: check.figure for check in report.checks}
    assert figures["accepted loss: next-token KL from the whole rule, nats, on random tokens"] > 1e-4
    assert figures["effect of steering on logits"] > 0.1
    assert "evaluates" not in (delivered.path / "README.md").read_text()


def test_a_rule_without_a_gate_loses_nothing(rules, folders, tmp_path):
    rule = rules[("qwen3", None, "last_prompt_token")]
    report = export(rule, base=folders["qwen3"], to="peft", out=tmp_path / "out", start_at=END)
    assert report.drops == ()
    assert not [check.name for check in report.parity.checks if "loss" in check.name]


def test_another_token_is_named_and_fails_the_comparison(folder, rules, folders):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alora_invocation_tokens": [LAST, LAST]}))
    assert failures(folder)["adapter_config.json entries that differ"] == "alora_invocation_tokens"
    exporter = EXPORTER.with_context(ExportContext(str(folders["qwen3"]), options={"start_at": END}))
    script = verifier.rehearse(exporter.reference(folder, rules[KEY], Checkpoint(folders["qwen3"])))
    found = {check.name for check in verifier.compare(script, exporter.load(folder)) if not check.ok}
    assert {"by the rule, prefill logits", "generate(), a batch, logits"} <= found


def test_an_opened_export_answers_only_prompts_that_end_with_the_token(delivered, tokenizer, oracles):
    artifact, _, _ = open_artifact(delivered.path)
    keys = [str(row) for row, _ in enumerate(ROWS)]
    answers = artifact.answer(tokenizer, ROWS, Sampling(6), keys)
    assert answers == [[id_ for id_ in one["ids"] if id_ != EOS] for one in oracles(KEY)]
    with pytest.raises(ArtifactError, match="question 2: its prompt does not end with token 29"):
        artifact.answer(tokenizer, [*ROWS[:2], [1, 2]], Sampling(6), keys[:3])


# What is refused


def test_a_start_behind_the_prompt_is_refused(rules, folders, tmp_path):
    with pytest.raises(ExportError, match="start_at cannot express start first_generated_token"):
        export(
            rules[("qwen3", None, "first_generated_token")],
            base=folders["qwen3"],
            to="peft",
            out=tmp_path / "out",
            start_at=END,
        )


@pytest.mark.parametrize("value", ["", 29, ["a"]])
def test_a_start_that_is_no_text_is_refused(value):
    with pytest.raises(ExportError, match="expected the text that every prompt ends with"):
        EXPORTER.with_context(ExportContext("x", options={"start_at": value}))


@pytest.fixture
def base(folders, tmp_path):
    """A base that may be changed."""
    return shutil.copytree(folders["qwen3"], tmp_path / "base")


def test_a_text_that_does_not_end_the_prompts_of_the_chat_template_is_refused_with_their_end(base):
    with pytest.raises(ExportError, match="end with '<eos><assistant>'; expected the end of that text"):
        last_token("<assistant>\\n", Checkpoint(base))


def test_without_a_chat_template_any_text_does(base):
    (base / "chat_template.jinja").unlink()
    assert last_token("\nAnswer:", Checkpoint(base)) == build_tokenizer().encode(":")[0]


def test_a_last_token_that_depends_on_the_prompt_is_refused(base):
    (base / "chat_template.jinja").unlink()
    path = base / "tokenizer.json"
    settings = json.loads(path.read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary["x!"] = vocabulary.pop("Ł")  # a byte that no text here has
    settings["model"]["merges"] = [["x", "!"]]
    path.write_text(json.dumps(settings))
    with pytest.raises(ExportError, match="have the last tokens '!', 'x!'; expected one and the same"):
        last_token("!", Checkpoint(base))
    assert last_token("?!", Checkpoint(base)) == build_tokenizer().encode("!")[0]


def test_a_tokenizer_that_ends_prompts_with_a_token_of_its_own_is_refused(base):
    (base / "chat_template.jinja").unlink()
    path = base / "tokenizer.json"
    ending = {"SpecialToken": {"id": "<eos>", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, ending],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [EOS], "tokens": ["<eos>"]}},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": processor}))
    with pytest.raises(ExportError, match="have the last tokens '!', '<eos>'"):
        last_token("!", Checkpoint(base))


def test_a_base_without_a_tokenizer_is_refused(base):
    for path in base.glob("tokenizer*"):
        path.unlink()
    # Transformers 5 makes an empty one.
    with pytest.raises(ExportError, match=r"gives no token with the tokenizer of|has no tokenizer for start_at"):
        last_token(END, Checkpoint(base))
    (base / "tokenizer.json").write_text("x")
    with pytest.raises(ExportError, match="has no tokenizer for start_at"):
        last_token(END, Checkpoint(base))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_base_whose_generate_has_no_cache_is_refused(file, base, rules, tmp_path):
    path = base / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_cache": False}))
    exporter = EXPORTER.with_context(ExportContext(str(base), options={"start_at": END}))
    with pytest.raises(ExportError, match=f"{file}: says use_cache false"):
        exporter.config(rules[KEY], Checkpoint(base))
