"""The LM Evaluation Harness on a steered repository: its own command line, offline, on tasks in a local folder."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import oracle
import pytest
import tiny
import torch
from places import DOCS
from tiny import PAD, left_padded

from adaras_export.core.checkpoint import Checkpoint
from adaras_export.exporters.hf.exporter import EXPORTER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm_eval is not installed: the extra lm-eval"),
]
KEY = ("qwen3", "causal", "last_prompt_token")
PAGE = DOCS / "evaluating.md"
QUESTIONS = ("Hi!", "Why?", "What is", "hello wor", "is 7 odd?", "Answer:", "2+2=")
CHOICES = ("abc", "d", "e", "ef")  # two of one token: the harness scores those with one forward pass
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
{rest}
"""
GENERATED = """\
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], do_sample: false, max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOSEN = f"""\
doc_to_target: 0
doc_to_choice: {list(CHOICES)}
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
SCORE = """\
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
from steered_lm import SteeredLM

folder, tasks, batch_size = sys.argv[1:]
lm = SteeredLM(pretrained=folder, trust_remote_code=True, dtype="float32", device="cpu", batch_size=int(batch_size))
found = lm_eval.simple_evaluate(lm, tasks=["tiny_chosen"], task_manager=TaskManager(include_path=tasks))
print(json.dumps([sample["resps"] for sample in found["samples"]["tiny_chosen"]]))
"""


@pytest.fixture(scope="module")
def steered(rules, folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("steered")
    EXPORTER.write(rules[KEY], Checkpoint(folders[KEY[0]]), folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with one task that generates and one that scores choices."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps({"question": text, "answer": "?"}) + "\n" for text in QUESTIONS))
    for name, kind, rest in (("generated", "generate_until", GENERATED), ("chosen", "multiple_choice", CHOSEN)):
        task = TASK.format(name=f"tiny_{name}", data=data, kind=kind, rest=rest)
        (folder / f"{name}.yaml").write_text(task)
    return folder


@pytest.fixture(scope="module")
def reference(stock, rules):
    """What the oracle takes: the stock model and the rule."""
    return stock[KEY[0]], tiny.plain_rule(rules[KEY])


def run(command, folder):
    environment = {
        "PATH": os.environ["PATH"],
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def evaluated(steered, folders, tasks, tmp_path_factory):
    """Answers (texts), log-likelihoods (one a choice) and scores of a model, by (name, batch size)."""

    class Evaluated(dict):
        def __missing__(self, key):
            folder = tmp_path_factory.mktemp("lm-eval")
            path = {"steered": steered, "base": folders[KEY[0]]}[key[0]]
            command = ["-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", key[1]]
            command += ["--model_args", f"pretrained={path},trust_remote_code=True,dtype=float32"]
            command += ["--tasks", "tiny_generated,tiny_chosen", "--include_path", tasks]
            run([*command, "--output_path", "out", "--log_samples"], folder)
            answers, choices = (samples(folder, name) for name in ("generated", "chosen"))
            (results,) = folder.rglob("results_*.json")
            self[key] = {
                "answers": [sample["resps"][0][0] for sample in answers],
                "loglikelihoods": [[float(choice[0][0]) for choice in sample["resps"]] for sample in choices],
                "scores": json.loads(results.read_text())["results"],
            }
            return self[key]

    return Evaluated()


def samples(folder, name):
    (path,) = folder.rglob(f"samples_tiny_{name}_*.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(found, key=lambda sample: sample["doc_id"])


def told_loglikelihoods(score, tokenizer):
    """``score(context, continuation)`` of every question and choice, as token ids."""
    ids = {text: tokenizer(text)["input_ids"] for text in (*QUESTIONS, *CHOICES)}
    return [[score(ids[question], ids[choice]) for choice in CHOICES] for question in QUESTIONS]


def loglikelihood(logits_SV, tokens):
    log_p = logits_SV.double().log_softmax(-1)
    return sum(float(log_p[at, token]) for at, token in enumerate(tokens))


def base_score(model):
    """Log-likelihood of a continuation, not steered."""
    return lambda context, continuation: loglikelihood(
        oracle.logits_of(model, context + continuation[:-1], {"neurons": []}, ())[len(context) - 1 :], continuation
    )


def bare_score(model, rule):
    """The same in one bare forward pass, which is all prompt: its last token alone is steered, if the gate says so."""

    def score(context, continuation):
        row = context + continuation[:-1]
        before = oracle.logits_of(model, row, rule, ())[len(context) - 1 : -1]
        last = oracle.respond(model, row, rule, 1)["logits"]
        return loglikelihood(torch.cat([before, last]), continuation)

    return score


@pytest.mark.parametrize("batch_size", [1, 4])
def test_generated_answers_are_those_of_our_own_generate(batch_size, evaluated, steered, tokenizer):
    model = EXPORTER.load(steered).model
    expected, decisions = [], []
    for text in QUESTIONS:
        ids = tokenizer(text)["input_ids"]
        new = model.generate(**left_padded([ids]), do_sample=False, pad_token_id=PAD, max_new_tokens=6)[0, len(ids) :]
        expected.append(tokenizer.decode(new, skip_special_tokens=True).split("\n\n")[0])
        decisions += [on for _, on in model.steering.last_decisions]
    found = evaluated["steered", batch_size]
    assert found["answers"] == expected
    assert set(found["scores"]) == {"tiny_generated", "tiny_chosen"}
    changed = [one != other for one, other in zip(expected, evaluated["base", 1]["answers"], strict=True)]
    pairs = {*zip(decisions, changed, strict=True)}  # a steered answer may be the same text
    assert {(True, True), (False, False)} <= pairs <= {(True, True), (True, False), (False, False)}


def test_a_continuation_that_is_scored_is_prompt_to_a_bare_forward_pass(evaluated, reference, tokenizer):
    """Without padding the last input token is steered, which predicts the continuation's last token."""
    model, rule = reference
    found = torch.tensor(evaluated["steered", 1]["loglikelihoods"])
    bare = torch.tensor(told_loglikelihoods(bare_score(model, rule), tokenizer))
    base = torch.tensor(told_loglikelihoods(base_score(model), tokenizer))
    torch.testing.assert_close(found, bare, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(evaluated["base", 1]["loglikelihoods"]), base, atol=1e-4, rtol=0)
    assert ((bare - base).abs() > 0.01).any()


def test_in_a_batch_of_scored_continuations_shorter_rows_are_not_steered(evaluated, reference, tokenizer):
    """The harness pads on the right and passes no mask: the last column of a shorter row is padding."""
    model, rule = reference
    found = torch.tensor(evaluated["steered", 4]["loglikelihoods"])
    bare = torch.tensor(told_loglikelihoods(bare_score(model, rule), tokenizer))
    base = torch.tensor(told_loglikelihoods(base_score(model), tokenizer))
    as_bare, as_base = ((found - each).abs() < 1e-4 for each in (bare, base))
    assert (as_bare | as_base).all()
    assert (~as_bare).any()
    assert as_bare[3, 0]  # the longest


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_class_of_the_docs_scores_continuations_as_generated(
    batch_size, steered, tasks, reference, tokenizer, tmp_path
):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "steered_lm.py").write_text(code)
    (tmp_path / "score.py").write_text(SCORE)
    printed = run(["score.py", steered, tasks, batch_size], tmp_path)
    found = [[choice[0][0] for choice in resps] for resps in json.loads(printed.splitlines()[-1])]
    model, rule = reference

    def score(context, continuation):
        told = oracle.respond(model, context, rule, len(continuation), follow=continuation)
        return loglikelihood(told["logits"], continuation)

    told = torch.tensor(told_loglikelihoods(score, tokenizer))
    torch.testing.assert_close(torch.tensor(found), told, atol=1e-4, rtol=0)
