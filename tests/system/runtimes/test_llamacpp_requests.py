"""`--to gguf --switchable` in llama-server, steered per request: the card's recipe, and what goes wrong without it."""

import json
import random
import shlex

import cards
import drive
import llamacpp
import pytest
import tiny
import torch
from tiny import PROMPTS

# Below 64 neurons llama.cpp sums a row in another way, steered or not, and the model's rows are longer than the base's.
WIDTH = 64
RECIPE = {"cache_ram_mib": 0}  # --cache-ram 0
AT_ONCE, CLIENTS, SLOTS = 60, 4, 2

# Log-probabilities, in limits of `tiny.logit_limit`: measured up to 0.9. The effect of steering is 10^4 of them.
SLACK = 4


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return llamacpp.cases(tmp_path_factory, intermediate_size=WIDTH)


@pytest.fixture(scope="module")
def jobs(cases):
    """What the servers are asked, by base and by what for."""
    asked = {(name, what): job for name in llamacpp.SWITCHABLE for what, job in wanted(cases[name]).items()}
    return asked | {("llama", trap): job for trap, job in trapped(cases["llama"]).items()}


@pytest.fixture(scope="module")
def found(jobs, tmp_path_factory, pytestconfig):
    """What they answered."""
    drive.require_built("llamacpp-server", required=pytestconfig.option.require_runtimes)
    return drive.run_driver("llamacpp-server", jobs, tmp_path_factory.mktemp("server"))


def wanted(case):
    """The jobs of a base: servers that do as the card says, and one of the model that ours was written from."""
    off, on = asked(case, 0), asked(case, 1)
    alone = [*on, *off, *asked(case, -0.5), *asked(case, 1, like=-1), *asked(case, 1, file=1)]
    base = {**job(case, [[prompt, {}] for prompt, _ in off]), "model": str(case.gguf), "loras": []}
    together = {**job(case, mixed([*off, *on]), n_parallel=SLOTS), "clients": CLIENTS}
    return {"alone": job(case, alone), "base": base, "together": together}


def job(case, requests, *, scale=0.0, settings=RECIPE, **more):
    """A server of an export; its second LoRA has the vector of layer 0 in layer 1."""
    lora = case.switchable / "steering-lora.gguf"
    shifted = case.folder / "shifted.gguf"
    shifted.write_bytes(lora.read_bytes().replace(b"blk.0.", b"blk.1."))
    asked = {
        "model": str(case.switchable / "model-switchable.gguf"),
        "loras": [[str(lora), scale], [str(shifted), 0.0]],
    }
    return {
        **asked,
        "settings": {**settings, **more},
        "clients": 1,
        "requests": requests,
        "vocabulary": tiny.VOCABULARY,
    }


def told(case, scale):
    """What the oracle says at a scale of the LoRA."""
    return case.told(case.low_rule.with_strength(scale * case.low_rule.strength))


def asked(case, scale, *, like=None, file=0):
    """Requests for each step of the oracle's answers at ``scale``, or at ``like`` instead, of one of the LoRAs."""
    use = {"lora": [{"id": file, "scale": scale if like is None else like}]}
    rows = zip(PROMPTS, told(case, scale), strict=True)
    return [[row + answer["ids"][:step], use] for row, answer in rows for step in range(len(answer["ids"]))]


def mixed(requests):
    """As many as are asked at once, in an order of no kind."""
    draw = random.Random(0)
    return [requests[at % len(requests)] for at in draw.sample(range(2 * len(requests)), AT_ONCE)]


def split(case, answers):
    """The answers of the job "alone" by what was asked."""
    sizes = {"on": 1, "off": 0, "dialled": -0.5, "negated": 1, "one layer off": 1}
    counts = {what: sum(len(answer["ids"]) for answer in told(case, scale)) for what, scale in sizes.items()}
    parts = torch.tensor(answers).split([*counts.values()])
    return {what: (part, told(case, sizes[what])) for what, part in zip(counts, parts, strict=True)}


def distance(answers, expected):
    """The largest distance of log-probabilities from the oracle's, in limits."""
    logits = torch.cat([answer["logits"] for answer in expected])
    return float((answers - logits.log_softmax(-1)).abs().max()) / tiny.logit_limit(logits)


@pytest.mark.parametrize("what", ["on", "off", "dialled"])
@pytest.mark.parametrize("name", llamacpp.SWITCHABLE)
def test_at_each_scale_a_request_gets_what_the_oracle_says_in_layer_0_too(name, what, found, cases):
    assert distance(*split(cases[name], found[name, "alone"])[what]) <= SLACK


@pytest.mark.parametrize("what", ["negated", "one layer off"])
@pytest.mark.parametrize("name", llamacpp.SWITCHABLE)
def test_what_steers_otherwise_is_told_from_it(name, what, found, cases):
    assert distance(*split(cases[name], found[name, "alone"])[what]) > 100 * SLACK


@pytest.mark.parametrize("name", [name for name in llamacpp.SWITCHABLE if name != "qwen2"])
def test_scale_0_is_the_model_that_ours_was_written_from_bit_for_bit(name, found, cases):
    """A qwen2's rotary pairs are summed in another order: its base is met by the oracle alone."""
    off, _ = split(cases[name], found[name, "alone"])["off"]
    assert torch.equal(off, torch.tensor(found[name, "base"]))


@pytest.mark.parametrize("name", llamacpp.SWITCHABLE)
def test_of_requests_at_once_each_is_steered_or_not_as_it_asks(name, jobs, found, cases):
    case, requests = cases[name], jobs[name, "together"]["requests"]
    steps = {scale: [row for answer in told(case, scale) for row in answer["logits"]] for scale in (0, 1)}
    known = {
        json.dumps(one): row for scale in (0, 1) for one, row in zip(asked(case, scale), steps[scale], strict=True)
    }
    assert 20 < sum(use["lora"][0]["scale"] for _, use in requests) < 40
    expected = [{"logits": torch.stack([known[json.dumps(one)] for one in requests])}]
    assert distance(torch.tensor(found[name, "together"]), expected) <= SLACK


@pytest.mark.parametrize("chat", [True, False])
def test_the_card_prints_what_is_tested_here(chat):
    lines = cards.text("gguf-switchable", chat_template=chat).splitlines()
    [server] = [line for line in lines if line.startswith("llama-server")]
    assert server.endswith(" -m steered/model-switchable.gguf --lora-scaled steered/steering-lora.gguf:0 --cache-ram 0")
    [request] = [line for line in lines if line.startswith("curl")]
    assert json.loads(shlex.split(request)[-1])["lora"] == ON["lora"]


# What the card warns of, shown. Where one of these fails, llama.cpp has changed: change the card and docs/which.md.

ON, OFF = {"lora": [{"id": 0, "scale": 1}]}, {"lora": [{"id": 0, "scale": 0}]}
CHANGED = "llama.cpp does better than the card says: change exporters/gguf/card_switchable.md and docs/which.md"


def trapped(case):
    """Jobs that leave out a part of the recipe, or ask as it must not be asked."""
    first_on = [[prompt, ON] for prompt in PROMPTS]
    uncached = {"cache_prompt": False}
    turns = [request for prompt in PROMPTS for request in ([prompt, ON], [prompt, {}])]
    return {
        "cache in RAM": job(case, first_on + [[prompt, OFF] for prompt in PROMPTS], settings={}),
        "no cache": job(case, [[prompt, {**use, **uncached}] for use in (ON, OFF) for prompt in PROMPTS], settings={}),
        "unnamed": job(case, turns),
        "not applied": job(case, [[prompt, {}] for prompt in PROMPTS], scale=1.0, lora_init_without_apply=True),
    }


def first_steps(case, scale):
    """What the oracle says behind each prompt."""
    return [{"logits": answer["logits"][:1]} for answer in told(case, scale)]


def nats(answers, expected):
    """The largest distance of log-probabilities from the oracle's."""
    logits = torch.cat([answer["logits"] for answer in expected])
    return float((torch.tensor(answers) - logits.log_softmax(-1)).abs().max())


def test_the_cache_in_ram_takes_a_steered_prompt_for_an_unsteered_one(found, cases):
    """Measured: 0.106 nats, of an effect of 1.1. Without that cache, or where no prompt is cached, 5e-6."""
    base = first_steps(cases["llama"], 0)
    assert nats(found["llama", "no cache"][4:], base) < 1e-4
    assert nats(found["llama", "cache in RAM"][4:], base) > 0.01, CHANGED


def test_a_request_without_a_scale_continues_another_requests_cache(found, cases):
    """Measured: 0.028 nats from the server's scale, 0."""
    assert nats(found["llama", "unnamed"][1::2], first_steps(cases["llama"], 0)) > 0.01, CHANGED


def test_a_lora_that_is_loaded_but_not_applied_is_applied(found, cases):
    """`--lora FILE --lora-init-without-apply`: steered, to 5e-6 nats."""
    assert nats(found["llama", "not applied"], first_steps(cases["llama"], 1)) < 1e-4, CHANGED
