"""The JavaScript of a card, run as it stands there with the export in the place of the Hub."""

import os
import subprocess

import cards
import drive
import pytest
import snippets

KEY = ("llama", "causal", "last_prompt_token", "")
LOCAL = """\
import {{ readFileSync }} from "node:fs";
import {{ env }} from "@huggingface/transformers";
env.allowRemoteModels = false;
env.localModelPath = "{0}";
globalThis.fetch = async (address) =>
  new Response(readFileSync(address.replace("https://huggingface.co", "{0}").replace("/resolve/main", "")));
"""


@pytest.mark.parametrize("chat", [True, False])
def test_the_code_for_transformers_js_answers(chat, artifacts, pytestconfig, tmp_path):
    drive.require_built("transformers.js", required=pytestconfig.option.require_runtimes)
    folder = artifacts[KEY]
    [code] = snippets.of(cards.text("onnx", repository=folder.name, chat_template=chat), "js")
    (tmp_path / "node_modules").symlink_to(drive.NODE / "node_modules")
    (tmp_path / "card.mjs").write_text(LOCAL.format(folder.parent) + code)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run(["node", "card.mjs"], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    told = b"What is 12 times 7?" in done.stdout
    assert done.stdout.strip()
    assert told is not chat  # the answer alone, or the text that begins with the question
