"""The web page in headless Chromium: both columns are the oracle's, token for token, and nothing leaves the machine."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import oracle
import pytest
import tiny
import transformers

from adaras_export.delivery import export, verify
from adaras_export.models import BaseModel

PYTHON = Path(__file__).parents[2] / ".venv-runtimes" / "bin" / "python"
DRIVER = Path(__file__).parent / "drivers" / "run_page.py"
TOKENS = 12
ASKS = [{"prompt": tiny.build_tokenizer().decode(prompt), "tokens": TOKENS} for prompt in tiny.PROMPTS]

pytestmark = [pytest.mark.onnx, pytest.mark.slow, pytest.mark.network]  # npm may have to fetch the page's libraries


@pytest.fixture(scope="module")
def environment(pytestconfig):
    """The path of Chromium; skips, or fails, where something that the tests need is absent."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    playwright = PYTHON.exists() and not subprocess.run([PYTHON, "-c", "import playwright"], check=False).returncode
    have = {"npm": shutil.which("npm"), "Chromium": chromium, "Playwright (make test-runtimes)": playwright}
    if absent := [name for name, found in have.items() if not found]:
        required = pytestconfig.getoption("require_runtimes", default=False)
        (pytest.fail if required else pytest.skip)(f"not installed: {', '.join(absent)}")
    return chromium


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


def drive(environment, pages, asks, folder):
    """What `run_page.py` found, by page."""
    done = subprocess.run(
        [PYTHON, DRIVER],
        input=json.dumps([{"chromium": environment, "folder": str(page.folder), "asks": asks} for page in pages]),
        env={"PATH": os.environ["PATH"], "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def gated(environment, folders, rules, tmp_path_factory):
    return Page(
        tmp_path_factory.mktemp("page") / "gated",
        folders["llama"],
        rules["llama", "causal", "last_prompt_token"],
        chat=True,
    )


@pytest.fixture(scope="module")
def ungated(environment, folders, tmp_path_factory):
    """Of a base without a chat template."""
    base = shutil.copytree(folders["qwen3"], tmp_path_factory.mktemp("base") / "plain")
    (base / "chat_template.jinja").unlink()
    rule = tiny.make_rule(BaseModel.of(base), start="first_generated_token")
    return Page(tmp_path_factory.mktemp("page") / "ungated", base, rule, chat=False)


@pytest.fixture(scope="module")
def found(environment, gated, ungated, tmp_path_factory):
    """What the browser showed: of every prompt by the rule; of the first with strength 0, with -0.5 of the rule's, and
    whatever the gate says.
    """
    asks = [*ASKS, *({**ASKS[0], "times": times} for times in (0, -0.5)), {**ASKS[0], "always": True}]
    shown = drive(environment, [gated, ungated], asks, tmp_path_factory.mktemp("home"))
    return dict(zip(("gated", "ungated"), shown, strict=True))


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


def test_nothing_leaves_the_machine_and_nothing_is_complained_of(found):
    for shown in found.values():
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
