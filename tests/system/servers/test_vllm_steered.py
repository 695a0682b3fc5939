"""`hf` exports in vLLM, with the plugin: every answer is the oracle's, whatever vLLM does with batches and caches."""

import shutil
from collections import namedtuple
from functools import cache

import drive
import pytest
import served
import tiny
import torch
import transformers
from tiny import Lazy

DEEP = "qwen3"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return Lazy(lambda name: served.save_base(name, tmp_path_factory.mktemp("bases") / name))


@pytest.fixture(scope="module")
def models(bases):
    return Lazy(lambda name: served.load(bases[name]))


# Name of a rule -> the base it is for, and its fields.
RULES = {
    "generated": (DEEP, {"start": "first_generated_token"}),
    "gateless": (DEEP, {"gated": False}),
    "other": (DEEP, {"seed": 1}),
    "later": (DEEP, {"layers": tiny.GATES[tiny.LAYERS]["later"], "start": "first_generated_token"}),
}


@pytest.fixture(scope="module")
def rules(bases, models):
    """A rule by its name in `RULES`, or by that of a base."""

    def make(name):
        base, fields = RULES.get(name, (name, {}))
        return served.make_rule(bases[base], models[base], **fields)

    return Lazy(make)


@pytest.fixture(scope="module")
def judges(models, rules):
    return Lazy(lambda name: served.Oracle(models[RULES.get(name, (name,))[0]], rules[name]))


@pytest.fixture(scope="module")
def exports(bases, rules, tmp_path_factory):
    from adaras_export import export

    def write(name):
        out = tmp_path_factory.mktemp("exports") / name
        return export(rules[name], base=bases[RULES.get(name, (name,))[0]], to="hf", out=out).path

    return Lazy(write)


@pytest.fixture(scope="module")
def driver(tmp_path_factory, pytestconfig):
    drive.require_built("vllm-steered", required=pytestconfig.option.require_runtimes)
    conversation = drive.Conversation("vllm-steered", tmp_path_factory.mktemp("vllm"))
    yield conversation
    conversation.end()


@pytest.fixture(scope="module")
def rounds(judges):
    """The rounds of requests of the deep family, by name."""
    return served.rounds_of(judges[DEEP])


def job(folder, rounds=(), **more):
    return {"folder": str(folder), "vocabulary": tiny.VOCABULARY, "rounds": [*rounds], **more}


NGRAMS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
SHORT = 10  # tokens of an answer, where the first ones say enough
TWICE = ("first", "from the cache")
ALL = (*TWICE, "grown", "second turns", "dials", "dials again", "continued", "not continued")
COMPILE = {"TORCHDYNAMO_DISABLE": "0"}
Engine = namedtuple("Engine", "settings rounds patches environment shows", defaults=[(), {}, None])
# What vLLM does; ``shows``: what must have been seen of it.
ENGINES = {
    "whole prompts": Engine({}, ALL),
    "chunks": Engine({"max_num_batched_tokens": 16}, ALL, shows="mixed"),
    "ahead": Engine({"max_num_batched_tokens": 24}, ALL, ["ahead"], shows="ahead"),
    "few blocks": Engine({"num_gpu_blocks_override": 11}, (*TWICE, "second turns"), shows="preempted"),
    "drafts": Engine({"speculative_config": NGRAMS}, TWICE, environment={"NUMBA_DISABLE_JIT": "1"}, shows="drafts"),
    "compiled": Engine(
        {"enforce_eager": False}, (*TWICE, "second turns", "dials"), environment=COMPILE, shows="compiled"
    ),
    "pieces": Engine({"enforce_eager": False}, TWICE, ["pieces"], COMPILE, shows="pieces"),
    "two ranks": Engine(RANKS, TWICE, environment={"VLLM_CPU_OMP_THREADS_BIND": "nobind"}),
}


@pytest.fixture(scope="module")
def play(driver, exports, rounds):
    """``play(engine, fault, names)``: what an engine makes of its rounds, or of those named, by their names."""

    @cache
    def played(name, fault=None, names=None):
        engine = ENGINES[name]
        names = names or engine.rounds
        patches = [*engine.patches, *filter(None, [fault])]
        how = {"engine": engine.settings, "patches": patches, "environment": engine.environment}
        [found] = driver.ask(job(exports[DEEP], (rounds[name] for name in names), **how))
        return {**dict(zip(names, started(found)["rounds"], strict=True)), "seen": found["seen"]}

    return played


def started(found):
    assert "error" not in found, found["error"]
    return found


@pytest.mark.parametrize("name", ENGINES)
def test_every_round_is_the_oracles(name, play, rounds, judges, record_property):
    found = play(name)
    record_property("seen", found["seen"])
    for played in ENGINES[name].rounds:
        record_property(played, served.require_round(found[played], judges[DEEP].answers(rounds[played])))
    shows = ENGINES[name].shows
    assert shows is None or found["seen"][shows]


def test_pages_come_from_the_cache(play):
    found = play("whole prompts")
    assert not any(row["cached"] for row in found["first"][:8])
    long = [row["cached"] for row, ids in zip(found["from the cache"], served.ROWS, strict=True) if len(ids) > 32]
    assert min(long) >= 32
    assert min(row["cached"] for row in found["dials again"]) >= 32


def test_the_comparison_notices_another_request_another_dial_and_another_verdict(play, rounds, judges):
    found = play("whole prompts")
    for name in ALL:
        expected = judges[DEEP].answers(rounds[name])
        for row, answer in zip(found[name], expected[1:], strict=False):
            assert drive.distance(row, answer) > 1
        turned = [
            {**row, "verdict": other["verdict"]} for row, other in zip(found[name], found[name][1:], strict=False)
        ]
        for row, answer in zip(turned, expected, strict=False):
            with pytest.raises(AssertionError):
                served.require_round([row], [answer])


def test_without_its_start_a_continued_answer_is_another(play, rounds, judges):
    found = play("whole prompts")["not continued"]
    for row, answer in zip(found, judges[DEEP].answers(rounds["continued"]), strict=True):
        assert drive.distance(row, answer) > 1


# What the driver breaks, an engine, and its rounds: in the last ones some rows must be wrong.
FAULTS = [
    ("no_key", "whole prompts", ("first", "grown", "second turns")),
    ("no_mask", "whole prompts", ("first",)),
    ("by_call", "chunks", ("first",)),
    ("by_call", "few blocks", ("first",)),
]


@pytest.mark.parametrize("case", FAULTS, ids=[f"{fault}-{engine}" for fault, engine, _ in FAULTS])
def test_the_comparison_notices_a_fault(case, play, rounds, judges, record_property):
    fault, engine, names = case
    found = play(engine, fault, names)
    for name in names[1:] or names:
        triples = zip(found[name], judges[DEEP].answers(rounds[name]), rounds[name], strict=True)
        # A prompt of one token is a call of one token, too.
        distances = [drive.distance(row, answer) for row, answer, asked in triples if len(asked["ids"]) > 1]
        record_property(name, distances)
        assert max(distances) > 1


@pytest.fixture(scope="module")
def twice(driver, exports, judges):
    """``twice(name, **how)``: an engine plays `served.ROWS` two times for a rule; (its rounds, what is expected)."""

    def play(name, folder=None, **how):
        requests = served.asked(served.ROWS, SHORT)
        [found] = driver.ask(job(folder or exports[name], [requests, requests], **how))
        return started(found)["rounds"], judges[name].answers(requests)

    return play


OTHERS = ["llama", "mistral-window", "qwen2", "gemma2", "gemma3_text", "granite", "phi3", "gpt2", "olmo2", "smollm3"]
OTHERS += ["gpt_neox"]


@pytest.mark.parametrize("name", [*OTHERS, "generated", "gateless"])
def test_every_family_and_rule_is_the_oracles(name, twice, judges, record_property):
    found, expected = twice(name)
    for at, rows in enumerate(found):
        record_property(str(at), served.require_round(rows, expected))
    unsteered = judges[name].answers(served.asked(served.ROWS, SHORT, dials={"steering_strength": 0}))
    distances = [drive.distance(row, answer) for row, answer in zip(found[0], unsteered, strict=True)]
    assert [far > 1 for far in distances] == [answer["steered"] for answer in expected]


def test_both_decisions_are_in_every_batch(judges):
    for name in [DEEP, *OTHERS]:
        steered = [answer["steered"] for answer in judges[name].answers(served.asked(served.ROWS, SHORT))]
        assert 3 < sum(steered) < 13


# Projections that adapters change: those that no vector is behind, and one that a vector was folded through.
TARGETS = {"unsteered": r".*(q_proj|v_proj|layers\.[01]\.mlp\.down_proj)", "steered": r".*layers\.2\.mlp\.down_proj"}


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory):
    """Folders of LoRA adapters, and the base merged with each, by the names in `TARGETS`."""
    import peft

    def make(name):
        config = peft.LoraConfig(r=4, target_modules=TARGETS[name], init_lora_weights=False)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = peft.get_peft_model(served.load(bases[DEEP]), config)
            folder = tmp_path_factory.mktemp("adapters") / name
            model.save_pretrained(folder)
            return str(folder), model.merge_and_unload()

    return Lazy(make)


def in_transformers(folder, adapter, row):
    """What the export's own code answers, with a LoRA adapter of PEFT's."""
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    with torch.random.fork_rng():
        adapted = peft.PeftModel.from_pretrained(model, adapter).eval()
    out = tiny.greedy(adapted, [row], max_new_tokens=SHORT)
    return {"ids": out.sequences[0, len(row) :].tolist(), "logits": torch.cat(out.logits)}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_adapters_are_used_beside_steering(adapters, driver, exports, models, rules, record_property):
    """An adapter on a projection that a vector was folded through leaves the vector as it is, as in Transformers."""
    (path, merged), (folded, _) = adapters["unsteered"], adapters["steered"]
    judge = served.Oracle(models[DEEP], rules[DEEP], {path: merged})
    plain, adapted = served.asked(served.ROWS, SHORT), served.asked(served.ROWS, SHORT, lora=path)
    mixed = [request for pair in zip(plain, adapted, strict=True) for request in pair]
    behind = served.asked(served.ROWS[2:7], SHORT, lora=folded)
    # One slot stays empty: vLLM's kernels for the CPU give requests without a LoRA what is in the last one.
    settings = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}
    [found] = driver.ask(job(exports[DEEP], [plain, mixed, mixed, behind], engine=settings))
    *rounds, last = started(found)["rounds"]
    for at, (rows, asked) in enumerate(zip(rounds, [plain, mixed, mixed], strict=True)):
        record_property(str(at), served.require_round(rows, judge.answers(asked)))
    assert {answer["steered"] for answer in judge.answers(adapted)} == {True, False}
    assert min(map(drive.distance, rounds[1][1::2], judge.answers(plain))) > 1
    expected = [in_transformers(exports[DEEP], folded, request["ids"]) for request in behind]
    record_property("behind", drive.require_rows(last, expected))
    assert any(row["verdict"]["steered"] for row in last)
    assert min(map(drive.distance, last, judge.answers(plain[2:7]))) > 1


def test_a_thin_export_takes_the_weights_of_its_base(bases, rules, twice, tmp_path, record_property):
    from adaras_export import export

    folder = export(rules[DEEP], base=bases[DEEP], to="hf-thin", out=tmp_path / "thin").path
    found, expected = twice(DEEP, folder)
    record_property("0", [served.require_round(rows, expected) for rows in found])


def test_a_thin_export_refuses_another_base(rules, driver, bases, tmp_path):
    from adaras_export import export

    base = shutil.copytree(bases[DEEP], tmp_path / "base")
    folder = export(rules[DEEP], base=base, to="hf-thin", out=tmp_path / "thin").path
    other = served.load(base)
    other.lm_head.weight.data *= 2
    other.save_pretrained(base)
    [found] = driver.ask(job(folder))
    assert "its tensors' fingerprint is" in found["error"]


def test_decisions_in_bfloat16_are_those_in_float32(twice, record_property):
    found, expected = twice(DEEP, engine={"dtype": "bfloat16"})
    for rows in found:
        verdicts = [row["verdict"] for row in rows]
        far = [abs(one["p_correct"] - answer["probability"]) for one, answer in zip(verdicts, expected, strict=True)]
        record_property("p", max(far))
        assert max(far) < 0.02
        assert [one["steered"] for one in verdicts] == [answer["steered"] for answer in expected]


def test_models_and_rules_in_one_process_are_not_mixed_up(driver, exports, judges):
    requests = served.asked(served.ROWS, SHORT)
    names = ("llama", "other", DEEP)
    found = driver.ask(*(job(exports[name], [requests, requests]) for name in names))
    for name, one in zip(names, found, strict=True):
        for rows in started(one)["rounds"]:
            served.require_round(rows, judges[name].answers(requests))


def test_remote_code_is_not_run_where_the_plugin_serves(twice):
    found, expected = twice(DEEP, engine={"trust_remote_code": True, "model_impl": "vllm"})
    for rows in found:
        served.require_round(rows, expected)


@pytest.mark.parametrize(
    ("trust", "reason"), [(False, "trust"), (True, "vllm does not say where a prompt ends; serve an export to `stock`")]
)
def test_without_the_plugin_an_export_is_not_opened(trust, reason, driver, exports):
    [found] = driver.ask(job(exports[DEEP], engine={"trust_remote_code": trust}, environment={"VLLM_PLUGINS": "none"}))
    assert reason in found["error"]


TRANSFORMERS = {"model_impl": "transformers"}
TRANSFER = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
# What is asked for -> vLLM's settings for it, and what the refusal has.
REFUSED = {
    "stages": ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
    "micro-batches": ({"enable_dbo": True}, "micro-batching"),
    "rounded pages": ({"kv_cache_dtype": "fp8"}, "a KV cache of type fp8"),
    "transferred pages": ({"kv_transfer_config": TRANSFER}, "KV transfer names pages by their tokens"),
    "Transformers' classes": (TRANSFORMERS, "Cannot find model module"),
    "remote classes": ({**TRANSFORMERS, "trust_remote_code": True}, "vllm does not say where a prompt ends"),
    "vectors of texts": ({"runner": "pooling"}, "the runner pooling generates nothing"),
    "embeddings": ({"enable_prompt_embeds": True}, "prompt embeddings"),
    "a scheduler": ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "this scheduler would not tell"),
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_would_make_steering_inexact_is_refused_when_a_model_is_opened(asked, driver, exports):
    settings, reason = REFUSED[asked]
    [found] = driver.ask(job(exports[DEEP], engine=settings))
    assert reason in found["error"]


def test_a_gate_that_reads_steered_layers_is_refused(driver, exports):
    [found] = driver.ask(job(exports["later"]))
    assert "its gate reads layer 3, at or behind the first steered layer 2" in found["error"]


def test_an_unknown_version_of_vllm_is_refused(driver, exports):
    [found] = driver.ask(job(exports[DEEP], patches=["another_version"]))
    assert "vLLM 0.99.1 is not known to steer exactly" in found["error"]


PROMPT = served.ROWS[4]
NUMBERS = [float("nan"), float("inf"), "a", 1e9, True, None]
BAD = [({"steering_strength": value}, "steering_strength: ") for value in NUMBERS]
BAD += [({"steering_threshold": "a"}, "steering_threshold: ")]
BAD += [({"steering_start": value}, "steering_start: ") for value in (0, -1, len(PROMPT) + 1, 1.5, "1")]
BAD += [({name: 1}, f"{name}: not a dial") for name in ("steering_strenght", "stering_strength", "steering_rule")]


def test_wrong_requests_are_refused_and_leave_the_others_alone(driver, exports, judges):
    requests = served.asked(served.ROWS, SHORT)
    wrong = [{**served.asked([PROMPT])[0], "dials": dials} for dials, _ in BAD]
    wrong += [{"ids": PROMPT, "kind": "search"}, {"ids": PROMPT, "kind": "stream"}]
    reasons = [*(reason for _, reason in BAD), "beam search", "streaming input"]
    [found] = driver.ask(job(exports[DEEP], [requests, *wrong, requests]))
    first, *refused, last = started(found)["rounds"]
    for one, reason in zip(refused, reasons, strict=True):
        assert reason in one["error"]
    for rows in (first, last):
        served.require_round(rows, judges[DEEP].answers(requests))
