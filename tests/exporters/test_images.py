"""Models that read images, whose decoder is steered: text alone, and with a picture."""

import pickle
from pathlib import Path

import oracle
import pytest
import tiny
import torch
import transformers
import wrappers
from tiny import PROMPTS, greedy, left_padded, require_answers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from adaras_export.core.base_model import BaseModel
from adaras_export.delivery.writer import export
from adaras_export.errors import ExportError
from adaras_export.exporters import TARGETS
from adaras_export.modeling.activations import recording, token_means
from adaras_export.modeling.steering import steered

pytestmark = pytest.mark.skipif(transformers.__version__.startswith("4."), reason="needs Transformers 5")

NAMES = tuple(wrappers.WRAPPERS)
EACH = pytest.mark.parametrize("name", NAMES)
# The towers of these take what `wrappers.image` gives.
SEEING = pytest.mark.parametrize("name", [name for name in NAMES if name != "gemma4"])
TRUST = {"trust_remote_code": True, "dtype": torch.float32}


class Case:
    """A base model, a rule for it, the oracle's answers, and an export that has been verified."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.base = wrappers.save_base(name, folder / "base")
        self.model = AutoModelForImageTextToText.from_pretrained(self.base, dtype=torch.float32).eval()
        decoder = wrappers.WRAPPERS[name][0]
        self.rule = tiny.make_rule(
            BaseModel.of(self.base),
            gate=tiny.calibrated_gate(self.model, "causal"),
            strength=tiny.STRENGTHS.get(decoder, 2.0),
        )
        self.slack = tiny.SLACK.get(decoder, 1)
        self.told = tiny.answers(self.model, self.rule)
        self.folder = folder / "out"
        self.report = export(self.rule, base=self.base, to="hf", out=self.folder)

    def open(self, auto=AutoModelForImageTextToText, folder=None):
        with torch.random.fork_rng():  # some of Transformers' classes draw weights before they load them
            model, report = auto.from_pretrained(folder or self.folder, output_loading_info=True, **TRUST)
        unused = {name for name in report.pop("unexpected_keys") if auto is not AutoModel or "lm_head" not in name}
        assert not unused
        assert not any(report.values())
        return model.eval()


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    def make(name):
        with torch.random.fork_rng():
            return Case(name, tmp_path_factory.mktemp(name))

    return tiny.Lazy(make)


@EACH
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_text_alone_equals_the_oracle_by_either_class(auto, name, cases):
    case = cases[name]
    model = case.open(auto)
    assert type(model).__name__ == f"AdaRAS{type(case.model).__name__}"
    require_answers(greedy(model), case.told, case.slack)
    require_answers(greedy(model, use_cache=False), case.told, case.slack)
    assert [steered for _, steered in model.steering.last_decisions] == [answer["steered"] for answer in case.told]


@EACH
def test_a_forward_pass_over_a_padded_batch_knows_its_prompts(name, cases):
    """Such a model gives its decoder a mask with four dimensions, in which padding cannot be seen."""
    case = cases[name]
    with torch.no_grad():
        logits_BV = case.open()(**left_padded(PROMPTS)).logits[:, -1]
    for logits_V, answer in zip(logits_BV, case.told, strict=True):
        assert (logits_V - answer["logits"][0]).abs().max() <= case.slack * tiny.logit_limit(answer["logits"])


@EACH
def test_off_is_the_base_model_bit_for_bit(name, cases):
    model, base = cases[name].open(), greedy(cases[name].model)
    with model.steering.off():
        assert torch.equal(torch.stack(greedy(model).logits), torch.stack(base.logits))


@EACH
def test_saved_again_and_pickled_it_does_the_same(name, cases, tmp_path):
    case, model = cases[name], cases[name].open()
    model.save_pretrained(tmp_path)
    for again in (case.open(folder=tmp_path), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(torch.stack(greedy(again).logits), torch.stack(greedy(model).logits))


@EACH
def test_the_model_without_its_head_is_steered_too(name, cases):
    case = cases[name]
    body = case.open(AutoModel)
    with torch.no_grad():
        hidden = body(torch.tensor([PROMPTS[3]])).last_hidden_state[0, -1]
        expected = case.open()(torch.tensor([PROMPTS[3]]), output_hidden_states=True).hidden_states[-1][0, -1]
    assert torch.allclose(hidden, expected, atol=1e-5)


@EACH
def test_in_memory_it_equals_the_oracle(name, cases):
    case = cases[name]
    with steered(case.model, case.rule):
        require_answers(greedy(case.model), case.told, case.slack)
        with torch.no_grad():
            logits_BV = case.model(**left_padded(PROMPTS)).logits[:, -1]
    for logits_V, answer in zip(logits_BV, case.told, strict=True):
        assert (logits_V - answer["logits"][0]).abs().max() <= case.slack * tiny.logit_limit(answer["logits"])


@EACH
def test_activations_are_read_and_recorded_as_the_oracle_sees_them(name, cases):
    model = cases[name].model
    how = {"suppress_tokens": [tiny.EOS], "pad_token_id": tiny.PAD, "max_new_tokens": 4}
    with recording(model, [tiny.EOS]) as recorder, torch.no_grad():
        out = model.generate(**left_padded(PROMPTS), **how)
    rows = [[*prompt, *new[:-1]] for prompt, new in zip(PROMPTS, out[:, -4:].tolist(), strict=True)]
    read = token_means(model, rows, range(tiny.LAYERS))
    for row, recorded_LM, read_LM in zip(rows, recorder.means(), read, strict=True):
        by_layer = oracle.activations_of(model, row)
        for layer, tokens in enumerate(by_layer):
            expected_M = torch.tensor(tokens).mean(0)
            for found_LM in (recorded_LM, read_LM):
                torch.testing.assert_close(found_LM[layer, : len(expected_M)], expected_M, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", [target for target in TARGETS if not target.startswith("hf")])
def test_targets_other_than_hf_refuse_it_by_name(target, cases, tmp_path):
    case = cases["qwen3_vl"]
    with pytest.raises(ExportError, match="qwen3_vl") as refused:
        export(case.rule, base=case.base, to=target, out=tmp_path / "out", accept_loss=["gate", "start", "dial"])
    assert "choose target hf" in str(refused.value)


def test_a_repository_without_weights_opens_the_base_and_equals_the_oracle(cases, tmp_path):
    case = cases["qwen3_vl"]
    assert export(case.rule, base=case.base, to="hf-thin", out=tmp_path / "out").parity.ok
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        require_answers(greedy(case.open(auto, tmp_path / "out")), case.told, case.slack)


@SEEING
def test_with_a_picture_it_equals_the_oracle(name, cases):
    case, inputs = cases[name], wrappers.image(name, 1)
    seeing = wrappers.Seeing(case.model, inputs)
    for gated in (True, False):
        rule = case.rule if gated else case.rule.ungated()
        model = case.open()
        if not gated:
            model.steering.threshold = 2.0
        out = generated(model, inputs)
        expected = oracle.respond(seeing, wrappers.ROW, tiny.plain_rule(rule), 6, ends=(tiny.EOS,))
        require_answers(out, [expected], 2 * case.slack)
    other = generated(case.open(), wrappers.image(name, 2))
    base = generated(case.model, inputs)
    limit = tiny.logit_limit(base.logits[0])
    assert (other.logits[0] - out.logits[0]).abs().max() > 10 * limit  # the picture counts
    assert (base.logits[0] - out.logits[0]).abs().max() > 10 * limit  # so does steering


def generated(model, inputs):
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tiny.PAD}
    ids = torch.tensor([wrappers.ROW])
    mask = torch.ones_like(ids)
    return model.generate(
        input_ids=ids, attention_mask=mask, **inputs, **settings, return_dict_in_generate=True, output_logits=True
    )
