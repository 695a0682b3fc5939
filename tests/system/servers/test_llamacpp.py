"""llama-server and llama-completion, built from source: the command lines of the card, token by token.

The file that they read, its layers, the scale behind the colon: all is llama.cpp's own reading. Whether the families'
sums come out right is in tests/system/runtimes, too.
"""

import shlex
import subprocess

import drive
import llamacpp
import pytest
import tiny
import tiny_gguf
import torch
from tiny import PROMPTS
from transformers.convert_slow_tokenizer import bytes_to_unicode

from adaras_export.delivery.writer import export

# Exact in float32: by default its cache has 16 bits. One sequence at a time, on one processor.
EXACT = ["-fa", "off", "-ctk", "f32", "-ctv", "f32", "-c", "256", "-np", "1", "-t", "1", "--no-warmup"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return llamacpp.cases(tmp_path_factory)


@pytest.fixture(scope="module")
def exported(cases):
    """The folder of an export of the whole delivery, with its card, by name of a base."""

    def make(name):
        case, out = cases[name], cases[name].folder / "delivered"
        export(case.rule, base=case.base, to="gguf", out=out, accept_loss=["start"])
        return out

    return tiny.Lazy(make)


@pytest.fixture(scope="module")
def required(pytestconfig):
    drive.require_built("llama-server", required=pytestconfig.option.require_runtimes)


@pytest.fixture(scope="module")
def found(required, cases, exported, tmp_path_factory):
    """Log-probabilities by base and by what was asked of it, of each prompt's answer, step by step."""
    jobs = {(name, what): job(cases[name], options) for name in llamacpp.NAMES
            for what, options in wanted(cases[name], exported[name]).items()}  # fmt: skip
    return drive.run_driver("llama-server", jobs, tmp_path_factory.mktemp("server"))


def wanted(case, folder):
    """Options by what they are for: the first ones are right, the others must be told from them."""
    strength = case.rule.strength
    shifted = tiny_gguf.shifted(case.vector, case.folder / "shifted.gguf")
    by_the_card = printed(folder, "llama-server")[3:]
    options = {"base": [], "vector": by_the_card, "one layer off": ["--control-vector-scaled", f"{shifted}:{strength}"]}
    options["negated"] = [*by_the_card[:-1], by_the_card[-1].replace(":", ":-")]
    options["at 0"] = [*by_the_card[:-1], by_the_card[-1].rpartition(":")[0] + ":0"]
    options["strength left out"] = ["--control-vector", str(folder / "control-vector.gguf")]
    return options | ({"model": ["-m", str(case.steered)]} if case.name in llamacpp.CARRIERS else {})


def printed(folder, program):
    """The command line of the card for a program, as a list; the download that it follows is the export's folder."""
    lines = (folder / "README.md").read_text().replace("\\\n", "").splitlines()
    [line] = [line for line in lines if line.startswith(program)]
    return [word.replace("steered/", f"{folder}/") for word in shlex.split(line)]


def job(case, options):
    model = [] if "-m" in options else ["-m", str(case.gguf)]
    command = [str(drive.LLAMA_CPP / "llama-server"), *model, *options, *EXACT]
    prompts = [row + answer["ids"][:step] for row, answer in told(case, options) for step in range(len(answer["ids"]))]
    return {"command": command, "prompts": prompts, "vocabulary": tiny.VOCABULARY}


def told(case, options):
    """The prompts, and what the oracle says of them."""
    return zip(PROMPTS, case.told(case.low_rule if "-m" in options else case.rule), strict=True)


def worst(result, expected):
    """The largest distance of log-probabilities from the oracle's, in limits."""
    logits = torch.cat([answer["logits"] for answer in expected])
    distance = (torch.tensor(result) - logits.log_softmax(-1)).abs().max()
    return float(distance) / tiny.logit_limit(logits)


@pytest.mark.parametrize("name", llamacpp.NAMES)
def test_the_command_line_of_the_card_gives_what_the_oracle_gives(name, found, cases):
    assert worst(found[(name, "vector")], cases[name].told(cases[name].rule)) <= llamacpp.SLACK[name]


@pytest.mark.parametrize("what", ["one layer off", "negated", "at 0", "strength left out"])
@pytest.mark.parametrize("name", llamacpp.NAMES)
def test_another_file_or_scale_is_told_from_it(name, what, found, cases):
    assert worst(found[(name, what)], cases[name].told(cases[name].rule)) > 10 * llamacpp.SLACK[name]


@pytest.mark.parametrize("name", llamacpp.CARRIERS)
def test_a_steered_model_gives_what_the_oracle_gives_in_layer_0_too(name, found, cases):
    assert worst(found[(name, "model")], cases[name].told(cases[name].low_rule)) <= llamacpp.SLACK[name]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_scale_of_0_is_the_base_model_bit_for_bit(name, found):
    assert found[(name, "at 0")] == found[(name, "base")]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_llama_completion_writes_what_the_oracle_says(name, required, cases, exported):
    """As the card has it, but greedily and not as a chat: the prompt "Hi!", then the bytes of the oracle's tokens."""
    case = cases[name]
    command = [{"-st": "-no-cnv"}.get(word, word) for word in printed(exported[name], "llama-completion")]
    command = [drive.LLAMA_CPP / command[0], "-m", case.gguf, *command[3:-1], "Hi!", "--temp", "0", *EXACT]
    done = subprocess.run(command, capture_output=True, check=True, stdin=subprocess.DEVNULL)
    [answer, *_] = case.told(case.rule)
    letters = tiny.build_tokenizer().convert_ids_to_tokens(answer["ids"])
    bytes_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    assert done.stdout.startswith(b"Hi!" + bytes(bytes_of[letter] for letter in letters))
