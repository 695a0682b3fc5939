"""Find, export, push; then, in other processes, from_pretrained and verify. All share nothing but a Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import tiny
import torch
import transformers
from elsewhere import as_output
from hub.conftest import at
from places import PLANTED, ROOT

from adaras_export import cli
from adaras_export.core.rule import SteeringRule
from adaras_export.core.trace_files import write_questions
from adaras_export.core.traces import Question
from adaras_export.demo import planted

pytest.importorskip("sklearn")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")]

MODEL = PLANTED
NAME = "user/steered-planted"
FIND_EXPORT_PUSH = f"""
collect identify.jsonl -m {MODEL} --attempts 4 --max-new-tokens 40 --record stats.safetensors -o traces.jsonl
identify traces.jsonl -m {MODEL} --ranking attribution --stats stats.safetensors -o neurons.safetensors
gate traces.jsonl -m {MODEL} --features 8 -o gate.safetensors
tune validation.jsonl -m {MODEL} --neurons neurons.safetensors --gate gate.safetensors --counts 50 --strengths 1,2 \
--max-new-tokens 40 -o rule.safetensors
export rule.safetensors --base {MODEL} --to hf -o steered
push steered {NAME} --yes
"""


def process(hub, place, code, given="", **settings):
    """What a process printed that has an empty HF_HOME and nothing else of ours but these variables."""
    place.mkdir(exist_ok=True)
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(place / "hf"), "HF_ENDPOINT": hub.endpoint}
    environment |= {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", **settings}
    command = [sys.executable, *code]
    done = subprocess.run(command, input=given, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_what_was_found_here_is_steered_and_verified_elsewhere(hub, tmp_path, monkeypatch):
    here, there, judge = (tmp_path / name for name in ("here", "there", "judge"))
    here.mkdir()
    for name, rows in planted.splits({"identify": 24, "validation": 12, "test": 12}, seed=5).items():
        write_questions(here / f"{name}.jsonl", [Question(r["id"], r["prompt"], r["answer"]) for r in rows])
    monkeypatch.chdir(here)
    with at(hub, here / "hf"):
        for line in FIND_EXPORT_PUSH.strip().splitlines():
            monkeypatch.setattr(sys, "argv", ["adaras-export", *line.split()])
            with pytest.raises(SystemExit) as end:
                cli.main()
            assert not end.value.code, line
    commit = hub.repositories[NAME].branches["main"]

    prompts, answers = expected(here)
    jobs = [{"how": how, "name": NAME, "revision": commit} for how in ("steered", "snapshot")]
    asked = json.dumps({"library": False, "jobs": jobs, "rows": prompts, "pad": 0})
    client = [Path(__file__).parent / "client.py"]
    result, snapshot = json.loads(process(hub, there, client, asked, HF_TOKEN="hf_reader").splitlines()[-1])
    tiny.require_answers(as_output(result), answers)

    command = ["-m", "adaras_export", "verify", snapshot, "--json"]
    said = process(hub, judge, command, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
    assert json.loads(said)["ok"]


def expected(folder):
    """Prompts of the test questions as tokens, and what the oracle answers under the rule that was found."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    rule = tiny.plain_rule(SteeringRule.load(folder / "rule.safetensors"))
    questions = [json.loads(line)["prompt"] for line in (folder / "test.jsonl").read_text().splitlines()]
    how = {"add_generation_prompt": True, "return_dict": False}
    prompts = [tokenizer.apply_chat_template(question, **how) for question in questions]
    found = [oracle.respond(model, prompt, rule, 6, ends=(model.config.eos_token_id,)) for prompt in prompts]
    assert {answer["steered"] for answer in found} == {True, False}
    return prompts, found
