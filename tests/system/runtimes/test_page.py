"""The web page in headless Chromium: both columns are the oracle's, token for token, and nothing leaves the machine."""

import shutil
from dataclasses import replace
from urllib.parse import urlsplit

import drive
import oracle
import pytest
import tiny
import transformers

from adaras_export.core.base_model import BaseModel
from adaras_export.delivery.verifier import verify
from adaras_export.delivery.writer import export

TOKENS = 12
ASKS = [{"prompt": tiny.build_tokenizer().decode(prompt), "tokens": TOKENS} for prompt in tiny.PROMPTS]

pytestmark = [pytest.mark.onnx, pytest.mark.network]  # npm fetches the page's libraries


@pytest.fixture(scope="module")
def chromium(pytestconfig):
    """Its path; skips, or fails, where something that the tests need is absent."""
    drive.require_built("page", required=pytestconfig.option.require_runtimes)
    found = {name: shutil.which(name) for name in ("npm", "chromium")}
    if absent := [name for name, path in found.items() if path is None]:
        (pytest.fail if pytestconfig.option.require_runtimes else pytest.skip)(f"not installed: {', '.join(absent)}")
    return found["chromium"]


class Page:
    """An export with a page, and what the oracle says of its prompts."""

    def __init__(self, folder, base, rule, *, chat):
        self.base = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        self.chat = chat
        self.rule = rule if rule.gate is None else replace(rule, gate=self.calibrated(rule.gate))
        self.folder = folder
        export(self.rule, base=base, to="onnx", out=folder, page=True)

    def ids(self, ask):
        chat = [{"role": "user", "content": ask["prompt"]}]
        templated = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True) if self.chat else None
        return templated["input_ids"] if self.chat else self.tokenizer(ask["prompt"])["input_ids"]

    def calibrated(self, gate):
        """The gate with a threshold that steers half of the prompts."""
        found = sorted(oracle.p_correct(self.base, self.ids(ask), tiny.plain_gate(gate)) for ask in ASKS)
        return replace(gate, threshold=(found[1] + found[2]) / 2)

    def told(self, ask, rule):
        return oracle.respond(self.base, self.ids(ask), tiny.plain_rule(rule), TOKENS, ends=(tiny.EOS,))

    def require(self, found, ask, rule):
        """Assert that the columns are the oracle's, unsteered and by ``rule``."""
        assert found["status"] == "Done."
        for column, asked in (("base", self.rule.with_strength(0.0)), ("steered", rule)):
            ids = self.told(ask, asked)["ids"]
            assert found[column]["ids"] == ids
            assert found[column]["text"] == self.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def gated(chromium, folders, rules, tmp_path_factory):
    return Page(
        tmp_path_factory.mktemp("page") / "gated",
        folders["llama"],
        rules["llama", "causal", "last_prompt_token"],
        chat=True,
    )


@pytest.fixture(scope="module")
def ungated(chromium, folders, tmp_path_factory):
    """Of a base without a chat template."""
    base = shutil.copytree(folders["qwen3"], tmp_path_factory.mktemp("base") / "plain")
    (base / "chat_template.jinja").unlink()
    rule = tiny.make_rule(BaseModel.of(base), start="first_generated_token")
    return Page(tmp_path_factory.mktemp("page") / "ungated", base, rule, chat=False)


@pytest.fixture(scope="module")
def found(chromium, gated, ungated, tmp_path_factory):
    """What the browser showed: of every prompt by the rule; of the first with strength 0, with -0.5 of the rule's,
    whatever the gate says, and when it was stopped. Of a page whose weights are missing, too.
    """
    more = ({"times": 0}, {"times": -0.5}, {"always": True}, {"stop": True, "tokens": 4000})
    asks = [*ASKS, *({**ASKS[0], **one} for one in more)]
    broken = shutil.copytree(gated.folder, tmp_path_factory.mktemp("page") / "broken")
    (broken / "onnx" / "model.onnx_data").unlink()
    (ungated.folder / "evaluation.json").write_text('{"example": "1 + 2 ="}')
    wanted = {"gated": (gated.folder, asks), "ungated": (ungated.folder, asks), "broken": (broken, [])}
    jobs = {
        name: {"chromium": chromium, "folder": str(folder), "asks": asks} for name, (folder, asks) in wanted.items()
    }
    return drive.run_driver("page", jobs, tmp_path_factory.mktemp("chromium"))


def test_both_columns_are_the_oracles_token_for_token(found, gated, ungated):
    for page, answers in ((gated, found["gated"]["answers"]), (ungated, found["ungated"]["answers"])):
        for ask, answer in zip(ASKS, answers, strict=False):
            page.require(answer, ask, page.rule)
            same = answer["base"]["ids"] == answer["steered"]["ids"]
            assert answer["parting"].startswith("Both answers are the same" if same else "They part at token")
        assert any(answer["base"]["ids"] != answer["steered"]["ids"] for answer in answers[:4])


def test_the_gates_decision_and_probability_are_the_oracles(found, gated):
    decisions = []
    for ask, answer in zip(ASKS, found["gated"]["answers"], strict=False):
        expected = gated.told(ask, gated.rule)
        probability, steered = answer["decision"]
        assert probability == pytest.approx(expected["probability"], abs=1e-4)
        assert steered == expected["steered"]
        decisions.append(steered)
    assert {*decisions} == {True, False}
    assert "decision" not in found["ungated"]["answers"][0]


def test_the_slider_sets_the_strength_and_0_gives_equal_columns(found, gated, ungated):
    for page, answers in ((gated, found["gated"]["answers"]), (ungated, found["ungated"]["answers"])):
        off, turned = answers[4:6]
        assert off["base"] == off["steered"]
        assert off["parting"] == "Both answers are the same, token for token."
        page.require(turned, ASKS[0], page.rule.with_strength(-0.5 * page.rule.strength))


def test_the_gate_can_be_overruled(found, gated):
    gated.require(found["gated"]["answers"][6], ASKS[0], gated.rule.ungated())


def test_it_can_be_stopped(found):
    stopped = found["gated"]["answers"][7]
    assert stopped["status"] in ("Stopped.", "Done.")  # the model may come to an end before the click arrives
    assert 1 <= len(stopped["base"]["ids"]) < 4000


def test_a_file_that_is_missing_is_said(found):
    assert "model.onnx_data" in found["broken"]["loaded"]


def test_the_prompt_that_it_proposes_is_a_question_of_the_evaluation_where_there_is_one(found):
    assert (found["gated"]["prompt"], found["ungated"]["prompt"]) == ("What is 12 times 7?", "1 + 2 =")


def test_nothing_leaves_the_machine_and_nothing_is_complained_of(found):
    assert {shown["loaded"] for name, shown in found.items() if name != "broken"} == {"Ready."}
    for shown in (found["gated"], found["ungated"]):
        assert {urlsplit(address).hostname for address in shown["requests"]} == {"127.0.0.1"}
        assert any(address.endswith("/onnx/model_dial.onnx") for address in shown["requests"])
        assert shown["complaints"] == []


def test_an_export_with_a_page_is_verified_the_page_too(gated):
    report = verify(gated.folder)
    assert report.ok, [check.line() for check in report.failed()]
    page = gated.folder / "app.js"
    content = page.read_bytes()
    try:
        page.write_bytes(content + b"//")
        failed = {check.name: check.detail for check in verify(gated.folder).failed()}
    finally:
        page.write_bytes(content)
    assert failed == {"files changed": "app.js", "files of the page that differ": "app.js"}
