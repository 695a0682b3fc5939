"""Banks of rules in vLLM: every request under its own rule in one batch, against the oracle."""

from dataclasses import replace

import drive
import oracle
import pytest
import tiny
import torch
import transformers

from adaras_export.core.bank import BankRule
from adaras_export.core.base_model import BaseModel
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.serving.vllm.bank import write_bank

# vLLM's attention on the CPU wants heads of 32 or more.
WIDE = {"hidden_size": 128, "max_position_embeddings": 256, "initializer_range": 0.15}
BASES = {"llama": {}, "qwen3": {"head_dim": 32}}
LONG = [n * 37 % 250 for n in range(70)]  # more than two blocks of the KV cache
ROWS = [*tiny.PROMPTS[1:], LONG, [*LONG[:64], 3, 1, 4]]
STEPS = 5
ENGINE = {"block_size": 32, "skip_tokenizer_init": True}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {name: tiny.save_base(name, tmp_path_factory.mktemp("base") / name, **WIDE, **BASES[name]) for name in BASES}


@pytest.fixture(scope="module")
def models(bases):
    def load(name):
        return transformers.AutoModelForCausalLM.from_pretrained(bases[name], dtype=torch.float32).eval()

    return tiny.Lazy(load)


def between(model, gate, below):
    """The gate with a threshold that ``below`` of `ROWS` are below."""
    found = sorted(oracle.p_correct(model, row, tiny.plain_gate(gate)) for row in ROWS)
    assert found[below] - found[below - 1] > 1e-3
    return replace(gate, threshold=(found[below - 1] + found[below]) / 2)


def bank_of(base, model):
    """Three rules with two gates, of which two share one; one without a gate; and one that steers prompts, too."""
    one, other = tiny.make_gate(0, layers=(0, 1)), tiny.make_gate(3, layers=(0, 1))
    rules = {
        "one": {"gate": between(model, one, 3)},
        "later": {"gate": between(model, other, 1), "start": "first_generated_token", "strength": -3.0},
        "shared": {"gate": between(model, one, 2), "neurons": tiny.make_neurons(7, layers=(2,))},
        "always": {"neurons": tiny.make_neurons(8, layers=(3,)), "strength": 4.0},
        "everywhere": {"neurons": tiny.make_neurons(9)},
    }
    made = {name: tiny.make_rule(BaseModel.of(base), **fields) for name, fields in rules.items()}
    return [BankRule(name, rule, everywhere=name == "everywhere") for name, rule in made.items()]


def answer_of(model, row, one, strength=None):
    plain = tiny.plain_rule(one.rule if strength is None else one.rule.with_strength(strength))
    start = "everywhere" if one.everywhere else plain["start"]
    return oracle.respond(model, row, {**plain, "start": start}, STEPS, ends=(tiny.EOS,))


def require_same(rows, answers):
    for row, answer in zip(rows, answers, strict=True):
        assert row["ids"] == answer["ids"]
        distance = float((torch.tensor(row["logprobs"]) - answer["logits"].log_softmax(-1)).abs().max())
        assert distance <= 2 * tiny.logit_limit(answer["logits"])  # both the logit and the normaliser may be off
        if answer["probability"] is not None:
            assert row["verdict"]["p_correct"] == pytest.approx(answer["probability"], abs=1e-5)
            assert row["verdict"]["steered"] == answer["steered"]


def request(row, name, **dials):
    return {"ids": row, "steps": STEPS, "dials": {"steering_rule": name, **dials}}


@pytest.fixture(scope="module")
def served(bases, models, tmp_path_factory, pytestconfig):
    """What the engine says of every row under every rule, twice, and of requests that are wrong; by base."""
    drive.require_built("vllm", required=pytestconfig.option.require_runtimes)
    jobs, banks = {}, {name: bank_of(folder, models[name]) for name, folder in bases.items()}
    for name, bank in banks.items():
        folder = tmp_path_factory.mktemp("bank")
        write_bank(folder, Checkpoint(bases[name]), bank)
        batch = [request(row, one.name) for row in ROWS for one in bank]
        batch += [request(LONG, "everywhere", steering_strength=0.0), request(LONG, "always", steering_strength=-1.0)]
        shared = {"folder": str(folder), "vocabulary": tiny.VOCABULARY, "engine": ENGINE}
        jobs[name] = {**shared, "rounds": [batch, batch]}
    jobs["wrong"] = {**shared, "rounds": [[request(LONG, "nobody")]]}
    return banks, drive.run_driver("vllm-steered", jobs, tmp_path_factory.mktemp("vllm"))


@pytest.mark.parametrize("name", BASES)
def test_requests_of_one_batch_answer_as_the_oracle_does_under_their_own_rules(name, served, models):
    banks, found = served
    bank, model = banks[name], models[name]
    expected = [answer_of(model, row, one) for row in ROWS for one in bank]
    expected += [answer_of(model, LONG, bank[4], 0.0), answer_of(model, LONG, bank[3], -1.0)]
    decided = [answer["steered"] for answer in expected if answer["probability"] is not None]
    assert 0 < sum(decided) < len(decided)
    assert len({tuple(answer["ids"]) for answer in expected}) > len(ROWS)  # steering changes tokens
    rounds = found[name]["rounds"]
    for rows in rounds:
        require_same(rows, expected)
    assert sum(row["cached"] for row in rounds[1]) >= 32 * len(bank)
    with pytest.raises(AssertionError):
        require_same(rounds[0][1:2], expected[:1])


def test_a_request_for_a_rule_that_is_not_there_is_refused(served):
    error = served[1]["wrong"]["error"]
    assert "'nobody' is not a rule of this model; expected one of: one, later, shared, always, everywhere" in error
