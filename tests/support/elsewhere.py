"""Writes exports, runs them in another process, where importing the library fails, and compares with the oracle."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import oracle
import tiny
import torch
from places import TESTS
from tiny import PAD, PROMPTS, require_answers

from adaras_export.core.checkpoint import Checkpoint


def jobs_of(modes, written, trust=True):
    """What `clean_process.py` is to do with each export, by the keys of ``modes``."""
    shared = {"prompts": PROMPTS, "pad": PAD, "end": tiny.EOS, "trust": trust}
    return {key: {"folder": str(written[key]), "modes": wanted, **shared} for key, wanted in modes.items()}


def run_elsewhere(jobs, folder):
    """What `clean_process.py` found, by the keys of ``jobs``; ``folder`` is its HF_HOME."""
    environment = {
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder),
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    script = TESTS / "exporters" / "clean_process.py"
    found, stderr = answered([sys.executable, script], jobs, folder, environment)
    results = dict(zip(jobs, found["results"], strict=True))
    return {"stderr": stderr, **results}


def answered(command, jobs, folder, environment):
    """The last line that a process prints, as JSON, when it reads jobs, and what it said on standard error."""
    done = subprocess.run(
        command,
        input=json.dumps([*jobs.values()]),
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def as_output(result):
    """A result of the other process in the form that generate() gives."""
    return SimpleNamespace(sequences=torch.tensor(result["sequences"]), logits=torch.tensor(result["logits"]).unbind())


def sampled_by_the_oracle(model, rule):
    """The oracle's answers when it draws from its logits with the seed of the other process."""
    answers = []
    for prompt in PROMPTS:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            answers += [
                oracle.respond(
                    model,
                    prompt,
                    tiny.plain_rule(rule),
                    6,
                    pick=lambda logits: int(torch.multinomial(logits.softmax(-1), 1)),
                    ends=(tiny.EOS,),
                )
            ]
    return answers


def require_equal_to_the_oracle(results, modes, key, told, stock, rules):
    """In those of ``modes`` that give answers."""
    for mode in {"greedy", "uncached"}.intersection(modes):
        require_answers(as_output(results[mode]), told[key], tiny.SLACK.get(key[0], 1))
    if "single" in modes:
        for row, answer in enumerate(told[key]):
            require_answers(as_output(results["single"][row]), [answer])
    if "sampled" in modes:
        for result, answer in zip(results["sampled"], sampled_by_the_oracle(stock[key[0]], rules[key]), strict=True):
            require_answers(as_output(result), [answer])


def exports(exporter, rules, folders, tmp_path_factory):
    """The folder of an export, by the keys of ``rules``."""

    def write(key):
        folder = tmp_path_factory.mktemp("export") / "-".join(map(str, key))
        folder.mkdir()
        exporter.write(rules[key], Checkpoint(folders[key[0]]), folder)
        return folder

    return tiny.Lazy(write)
