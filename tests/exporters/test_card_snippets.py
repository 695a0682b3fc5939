"""The code of real cards, run as it stands there, in a clean process beside the folder; answers are the oracle's."""

import json
import shutil
from dataclasses import replace

import oracle
import pytest
import snippets
import tiny

from adaras_export.delivery.writer import export, rewrite_card

KEY = ("llama", "causal", "last_prompt_token")
QUESTION = "What is 12 times 7?"
STATIC = ("gate", "start", "dial")

# Name -> target, features that it leaves out, options, and the folder that its code stands beside, where it has one.
TARGETS = {
    "hf": ("hf", (), {}, None),
    "hf-thin": ("hf-thin", (), {}, None),
    "peft": ("peft", STATIC, {}, None),
    "peft-start-at": ("peft", ("gate",), {"start_at": "<assistant>"}, None),
    "peft-adaptive": ("peft", (), {"adaptive": True}, None),
    "stock": ("stock", STATIC, {}, None),
    "stock-switchable": ("stock", STATIC, {"switchable": True}, "model"),
    "onnx": ("onnx", (), {}, "steered"),
}
PLAIN = ("hf-thin", "peft-adaptive")  # on a base without a chat template: their code is that of hf and of peft
each_target = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.onnx] if name == "onnx" else []) for name in TARGETS]
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rule(rules):
    """A rule whose gate steers nearly every prompt, the question of the cards among them."""
    return replace(rules[KEY], gate=replace(rules[KEY].gate, threshold=0.99))


@pytest.fixture(scope="module")
def origins(folders, tmp_path_factory):
    """The base with and without a chat template, and with a tokenizer that gives what models take.

    Transformers 4 gives the tiny one BERT's inputs else.
    """

    def make(chat):
        folder = shutil.copytree(folders[KEY[0]], tmp_path_factory.mktemp("base") / "base")
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["model_input_names"] = ["input_ids", "attention_mask"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        if not chat:
            (folder / "chat_template.jinja").unlink()
        return folder

    return tiny.Lazy(make)


@pytest.fixture(scope="module")
def place(rule, origins, tmp_path_factory):
    """The folder above an export, by name; the card calls the export by its full path."""

    def make(name):
        target, loss, options, beside = TARGETS[name]
        above = tmp_path_factory.mktemp("snippets")
        folder = above / (beside or "a 'steered' model")
        export(rule, base=origins[name not in PLAIN], to=target, out=folder, accept_loss=loss, **options)
        rewrite_card(folder, repository=str(folder))
        return above, folder

    return tiny.Lazy(make)


@pytest.fixture(scope="module")
def answer(rule, stock, tokenizer):
    """What the oracle says to the question of all cards, a turn of a chat or not: by the rule, everywhere, or off."""

    def make(key):
        way, chat = key
        whole = tiny.plain_rule(rule)
        plain = {
            "rule": whole,
            "everywhere": {**whole, "gate": None, "start": "everywhere"},
            "off": {**whole, "gate": None, "strength": 0.0},
        }
        messages = [{"role": "user", "content": QUESTION}]
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(asked, add_special_tokens=False) if chat else tokenizer(QUESTION)
        found = oracle.respond(stock[KEY[0]], ids["input_ids"], plain[way], 32, ends=(tiny.EOS,))["ids"]
        return tokenizer.decode(found, skip_special_tokens=True)

    return tiny.Lazy(make)


# How often the answer is printed, and what asks once more behind the code that switches steering off.
ASK = "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))"
OFF = f"with model.disable_adapter():\n    {ASK}"
ASKED = {
    "hf": (2, ASK),
    "hf-thin": (2, ASK),
    "peft": (2, OFF),
    "peft-start-at": (1, OFF),
    "peft-adaptive": (2, OFF),
    "stock": (2, ""),
    "stock-switchable": (1, OFF),
    "onnx": (1, ""),
}


@pytest.mark.parametrize("chat", [True, False])
def test_steering_changes_the_answer_and_so_does_the_chat_template(chat, answer):
    """Otherwise the other tests would prove nothing."""
    assert answer["off", chat] not in (answer["rule", chat], answer["everywhere", chat])
    assert answer["rule", True] != answer["rule", False]


@each_target
def test_the_python_code_of_a_card_gives_the_answers_of_the_oracle_on_and_off(name, place, answer):
    above, folder = place[name]
    times, ask = ASKED[name]
    code = "".join(snippets.of(folder, "python")) + ask
    printed = snippets.run(code, above, library=name == "peft-adaptive")
    chat = name not in PLAIN
    assert printed.count(answer["everywhere" if "start" in TARGETS[name][1] else "rule", chat]) == times
    assert (answer["off", chat] in printed) == bool(ask)


@each_target
def test_the_shell_commands_of_a_card_parse(name, place):
    above, folder = place[name]
    commands = snippets.of(folder, "bash")
    assert commands
    assert all(snippets.parses(code, above) for code in commands)


@pytest.mark.onnx
def test_the_runner_of_the_onnx_card_answers(place, answer):
    above, folder = place["onnx"]
    [command] = [code for code in snippets.of(folder, "bash") if "python -m adaras_export.exporters.onnx" in code]
    assert answer["rule", True] in snippets.run_shell(f"{command.strip()} --max-new-tokens 32", above)


def test_the_commands_that_verify_pass_as_they_stand_in_the_card(place):
    """Behind the download, which needs a Hub."""
    above, folder = place["hf"]
    (above / "steered").symlink_to(folder)
    [code] = [code for code in snippets.of(folder, "bash") if "adaras-export verify" in code]
    download, *commands = code.splitlines()
    assert download.startswith("hf download ")
    assert "FAILED" not in snippets.run_shell("\n".join(commands), above)
