"""`vllm serve` with a steered model: the OpenAI client, dials, refusals, verdicts, metrics; and `verify --runtime`."""

import itertools
import json
import os
import re
import subprocess
from dataclasses import replace

import drive
import oracle
import pytest
import tiny
import torch
import transformers

from adaras_export import export
from adaras_export.core.base_model import BaseModel

# vLLM's attention on the CPU wants heads of 32 or more.
WIDE = {"hidden_size": 128, "max_position_embeddings": 256, "initializer_range": 0.15, "head_dim": 32}
STEPS = 8
LENGTHS = (1, 2, 3, 7, 16, 31, 33, 64, 100)
SETTINGS = ["--max-num-seqs", "6", "--max-num-batched-tokens", "32", "--block-size", "32"]
DIALS = (
    {"steering_strength": 0.0},
    {"steering_strength": -1.5},
    {"steering_threshold": 2.0},
    {"steering_threshold": 0.0},
)
REFUSED = {
    "a misspelt dial": (
        {"vllm_xargs": {"steering_strenght": 1.0}},
        "steering_strength, steering_threshold, steering_start",
    ),
    "a misspelt prefix": (
        {"vllm_xargs": {"stering_strength": 1.0}},
        "steering_strength, steering_threshold, steering_start",
    ),
    "a dial of a bank": (
        {"vllm_xargs": {"steering_rule": "a"}},
        "steering_strength, steering_threshold, steering_start",
    ),
    "no number": ({"vllm_xargs": {"steering_threshold": "high"}}, "expected a number between"),
    "too large": ({"vllm_xargs": {"steering_strength": 1e9}}, "expected a number between"),
    "a start in the answer": (
        {"vllm_xargs": {"steering_start": 4}},
        "expected a whole number from 1 to the prompt's 3",
    ),
    "half a token": ({"vllm_xargs": {"steering_start": 1.5}}, "expected a whole number from 1 to the prompt's 3"),
    "beam search": (
        {"use_beam_search": True, "n": 2},
        "beam search gives the engine prompt and answer as one new prompt",
    ),
}


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(250, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.save_base("qwen3", tmp_path_factory.mktemp("wide") / "qwen3", **WIDE)
    return folder, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rule(model, rows):
    """Its gate steers about half of the prompts, and none is near its threshold."""
    folder, base = model
    gate = tiny.make_gate()
    judged = sorted(oracle.p_correct(base, row, tiny.plain_gate(gate)) for row in rows)
    _, threshold = max((high - low, (low + high) / 2) for low, high in itertools.pairwise(judged[2:-2]))
    return tiny.make_rule(BaseModel.of(folder), gate=replace(gate, threshold=threshold))


@pytest.fixture(scope="module")
def folder(model, rule, tmp_path_factory):
    return export(rule, base=model[0], to="hf", out=tmp_path_factory.mktemp("export") / "hf").path


@pytest.fixture(scope="module")
def served(folder, rows, tmp_path_factory, pytestconfig):
    """What the server answers to all requests of this file, sent at once."""
    drive.require_built("vllm-server", required=pytestconfig.option.require_runtimes)
    plain = [{"ids": row, "steps": STEPS} for row in rows]
    dialled = [{"ids": row, "steps": STEPS, "body": {"vllm_xargs": dials}} for dials in DIALS for row in rows[3:6]]
    refused = [{"ids": rows[2], "steps": 1, "body": body} for body, _ in REFUSED.values()]
    chats = [{"messages": [{"role": "user", "content": "Hi"}], "steps": STEPS}]
    job = {"folder": str(folder), "vocabulary": tiny.VOCABULARY, "arguments": SETTINGS}
    job["requests"] = [*plain, *dialled, *refused, *chats]
    found = drive.run_driver("vllm-server", {"job": job}, tmp_path_factory.mktemp("server"))["job"]
    answers = iter(found["answers"])
    kinds = {"plain": plain, "dialled": dialled, "refused": refused, "chats": chats}
    return {kind: [next(answers) for _ in requests] for kind, requests in kinds.items()} | found


def expected(model, rule, row, dials):
    plain = tiny.plain_rule(rule.with_strength(dials.get("steering_strength", rule.strength)))
    plain["gate"] = plain["gate"] | {"threshold": dials.get("steering_threshold", rule.gate.threshold)}
    return oracle.respond(model[1], row, plain, STEPS, ends=(tiny.EOS,))


def require_same(found, answer):
    """Assert that tokens, log-probabilities and p(correct) are the oracle's."""
    assert found["ids"] == answer["ids"]
    distance = float((torch.tensor(found["logprobs"]) - answer["logits"].log_softmax(-1)).abs().max())
    assert distance <= 2 * tiny.logit_limit(answer["logits"])  # both the logit and the normaliser may be off
    assert found["verdict"]["p_correct"] == pytest.approx(answer["probability"], abs=1e-5)


def test_each_of_many_requests_at_once_is_answered_by_the_rule(served, model, rule, rows):
    answers = [expected(model, rule, row, {}) for row in rows]
    assert {answer["steered"] for answer in answers} == {True, False}
    for found, answer in zip(served["plain"], answers, strict=True):
        require_same(found, answer)
        assert found["verdict"]["steered"] == answer["steered"]
    steered = next(at for at, answer in enumerate(answers) if answer["steered"])
    with pytest.raises(AssertionError):
        require_same(served["plain"][steered], expected(model, rule, rows[steered], {"steering_strength": 0.0}))


def test_dials_hold_for_their_request_alone(served, model, rule, rows):
    requests = [(dials, row) for dials in DIALS for row in rows[3:6]]
    for found, (dials, row) in zip(served["dialled"], requests, strict=True):
        require_same(found, expected(model, rule, row, dials))


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_steered_in_another_way_is_refused_with_400(what, served):
    found = served["refused"][list(REFUSED).index(what)]
    assert found["status"] == 400
    assert REFUSED[what][1] in found["error"]


def test_a_chat_is_steered_from_the_end_of_its_template_on(served, model, rule, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model[0])
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    answer = expected(model, rule, prompt["input_ids"], {})
    [found] = served["chats"]
    assert found["ids"] == answer["ids"]
    assert found["verdict"]["p_correct"] == pytest.approx(answer["probability"], abs=1e-5)


def test_metrics_and_log_tell_what_the_gate_decided(served):
    answered = [*served["plain"], *served["dialled"], *served["chats"]]
    metrics = dict(re.findall(r"^(steering:\w+) ([\d.e+-]+)$", served["metrics"], re.MULTILINE))
    assert float(metrics["steering:requests_total"]) == len(answered)
    assert float(metrics["steering:requests_steered_total"]) == sum(one["verdict"]["steered"] for one in answered)
    assert float(metrics["steering:p_correct_sum"]) == pytest.approx(
        sum(one["verdict"]["p_correct"] for one in answered)
    )
    assert len(re.findall(r"request \S+: p\(correct\) 0\.\d+, (?:not )?steered", served["log"])) == len(answered)


NEGATED = """
import sys
from adaras_export.serving.vllm import gate
native = gate.Steering.settle
def settle(steering, count):
    native(steering, count)
    steering.amounts[0].neg_()
gate.Steering.settle = settle
from adaras_export.cli import main
main()
"""


@pytest.mark.parametrize("fault", ["", NEGATED], ids=["as it is", "negated"])
def test_verify_compares_an_export_in_the_engine_of_this_machine(fault, folder, tmp_path, pytestconfig):
    drive.require_built("vllm", required=pytestconfig.option.require_runtimes)
    vllm = drive.RUNTIMES["vllm"]
    shared = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_AOT_COMPILE": "0"}
    start = ["-c", fault] if fault else ["-m", "adaras_export"]
    done = subprocess.run(
        [vllm.command[0], *start, "verify", str(folder), "--runtime", "vllm", "--json"],
        env={**shared, **vllm.settings, **own},
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == (1 if fault else 0), done.stderr.decode()[-3000:]
    checks = {check["check"]: check["ok"] for check in json.loads(done.stdout)["checks"]}
    assert checks["steered always, decode logits"] == (not fault)
    assert checks["off, decode logits"]


def test_the_runtime_vllm_does_not_run_other_targets(model, rule, tmp_path):
    from adaras_export import verify
    from adaras_export.errors import ExportError

    out = export(rule, base=model[0], to="peft", out=tmp_path / "peft", accept_loss=["gate", "start"]).path
    with pytest.raises(ExportError, match="the runtime vllm does not run it; expected hf or hf-thin"):
        verify(out, runtime="vllm")
