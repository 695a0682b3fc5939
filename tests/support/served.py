"""Requests for a server of steered models, and what the oracle says of them.

A request is {"ids", "steps", "dials", "lora"}; an answer has the oracle's tokens, logits, probability and decision.
"""

from functools import partial
from itertools import pairwise

import drive
import oracle
import pytest
import tiny
import torch
import transformers

from adaras_export.core.base_model import BaseModel

STEPS = 24
BLOCK = 32  # tokens of a KV block
# vLLM's attention on the CPU wants heads of 32 or more; wide sums shall be as large as narrow ones.
WIDE = {"hidden_size": 128, "max_position_embeddings": 256, "initializer_range": 0.15}
HEADS = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
# With Granite's default of 1.0, scores are large, and vLLM's base model is 6e-4 from Transformers'.
SCALE = {"attention_multiplier": 32**-0.5}
OWN = {"qwen3": {"head_dim": 32}, "gemma2": HEADS, "gemma3_text": HEADS, "granite": SCALE}


def _rows():
    """Lengths 1 to 100, around the borders of blocks, too; six share their first 40 tokens."""
    draw = torch.Generator().manual_seed(1)
    tokens = partial(torch.randint, 0, 250, generator=draw)
    shared = tokens((40,)).tolist()
    alone = [tokens((count,)).tolist() for count in (1, 2, 3, 7, 16, 31, 32, 33, 64, 100)]
    return [*alone, *(shared + tokens((count,)).tolist() for count in (1, 5, 9, 20, 24, 30))]


ROWS = _rows()


def save_base(name, folder, **changes):
    return tiny.save_base(name, folder, **WIDE, **OWN.get(name, {}), **changes)


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_rule(folder, model, *, gated=True, layers=(0, 1), seed=0, **fields):
    """A rule whose gate steers about half of `ROWS`: its threshold is in the widest gap of p(correct) among them."""
    name = model.config.model_type
    gate = None
    if gated:
        gate = tiny.make_gate(seed, layers)
        found = sorted(oracle.p_correct(model, row, tiny.plain_gate(gate)) for row in ROWS)[4:-4]
        _, threshold = max((high - low, (low + high) / 2) for low, high in pairwise(found))
        gate = tiny.make_gate(seed, layers, threshold)
    fields = {"neurons": tiny.make_neurons(seed), **fields}
    return tiny.make_rule(BaseModel.of(folder), gate=gate, strength=tiny.STRENGTHS.get(name, 2.0), **fields)


class Oracle:
    """What the oracle says of requests to a model under a rule, by the models that LoRA adapters make of it."""

    def __init__(self, model, rule, adapted=None):
        self.models, self.rule, self.known = {None: model, **(adapted or {})}, tiny.plain_rule(rule), {}

    def answer(self, request):
        """Tokens in front of ``steering_start`` are the prompt; those behind are an answer of the oracle's own."""
        dials = request.get("dials") or {}
        row, lora = request["ids"], request.get("lora")
        start = dials.get("steering_start", len(row))
        gate = self.rule["gate"]
        if gate is not None:
            gate = {**gate, "threshold": dials.get("steering_threshold", gate["threshold"])}
        rule = {**self.rule, "gate": gate, "strength": dials.get("steering_strength", self.rule["strength"])}
        key = (*row, request["steps"], start, str(dials), lora)
        if key not in self.known:
            steps = len(row) - start + request["steps"]
            self.known[key] = oracle.respond(self.models[lora], row[:start], rule, steps, ends=(tiny.EOS,))
        whole = self.known[key]
        assert whole["ids"][: len(row) - start] == row[start:]
        new = {name: whole[name][len(row) - start :] for name in ("ids", "logits")}
        return {**whole, **new, "strength": rule["strength"]}

    def answers(self, requests):
        return [self.answer(request) for request in requests]


def asked(rows, steps=STEPS, **more):
    return [{"ids": list(row), "steps": steps, **more} for row in rows]


def rounds_of(judge):
    """Rounds of requests by name, for the oracle ``judge``; each may use what the ones before left in the cache."""
    first = asked(ROWS)
    answers = judge.answers(first)
    steered = [at for at, answer in enumerate(answers) if answer["steered"] and len(answer["ids"]) == STEPS]
    plain = [at for at, answer in enumerate(answers) if not answer["steered"]]
    assert len(steered) >= 4
    assert len(plain) >= 4
    grown = [(at, BLOCK - len(ROWS[at]) % BLOCK + 1) for at in steered]
    longer = [ROWS[at] + answers[at]["ids"][:more] + [5] for at, more in grown if more <= STEPS]
    assert longer
    turns = [ROWS[at] + answers[at]["ids"] + [4, 8, 15, 16, 23, 42] for at in steered]
    of = [ROWS[steered[-1]], ROWS[plain[-1]]]
    dials = [
        {"steering_strength": 0},
        {"steering_strength": 0.5},
        {"steering_strength": -1.0},
        {"steering_threshold": 2},
        {"steering_threshold": -1},
        {"steering_threshold": 2.0, "steering_strength": 3},
        None,
    ]
    dialled = [request for one in dials for request in asked(of, dials=one)]
    begun = [(ROWS[at], ROWS[at] + answers[at]["ids"][:9]) for at in steered]
    continued = [asked([row], 15, dials={"steering_start": len(prompt)})[0] for prompt, row in begun]
    return {
        "first": first,
        "from the cache": first,
        "grown": asked(longer),
        "second turns": asked(turns),
        "dials": dialled,
        "dials again": dialled,
        "continued": continued,
        "not continued": asked([row for _, row in begun], 15),
    }


def require_round(rows, expected):
    """Assert tokens, log-probabilities and verdicts; (the largest distance in limits, that of p(correct))."""
    worst = drive.require_rows(rows, expected)
    probability = 0.0
    for row, answer in zip(rows, expected, strict=True):
        verdict = row["verdict"]
        assert verdict["steered"] == (answer["steered"] and answer["strength"] != 0)
        assert verdict["strength"] == answer["strength"]
        if answer["probability"] is None:
            assert verdict["p_correct"] is None
            continue
        assert verdict["p_correct"] == pytest.approx(answer["probability"], abs=1e-5)
        probability = max(probability, abs(verdict["p_correct"] - answer["probability"]))
    return worst, probability
