"""What the code of an export causes where it runs: no file, no network, no process, as Python's audit hooks see it.

What counts as caused, and what an audit hook cannot see, is told in audited_process.py.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest
import tiny
from elsewhere import answered, exports
from tiny import PAD, PROMPTS

from adaras_export.exporters.hf.thin import EXPORTER

pytestmark = pytest.mark.slow  # a process for all, with two models a test

CAUSAL = ("llama", "causal", "last_prompt_token")
KEYS = [
    ("hf", *CAUSAL),
    ("hf", "qwen3", "later", "first_generated_token"),
    ("hf", "gpt2", None, "last_prompt_token"),
    ("hf", "gpt_neox", "causal", "first_generated_token"),
    ("hf-thin", *CAUSAL),
]


def audit(jobs, folder):
    """What `audited_process.py` found, by the keys of ``jobs``: the folders of export and base, and modes or None."""
    environment = {
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder),
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    shared = {"prompts": PROMPTS, "pad": PAD}
    asked = {
        key: {"folder": str(export), "base": str(base), "modes": modes, **shared}
        for key, (export, base, modes) in jobs.items()
    }
    script = Path(__file__).parent / "audited_process.py"
    found, _ = answered([sys.executable, script], asked, folder, environment)
    return dict(zip(jobs, found["results"], strict=True))


@pytest.fixture(scope="module")
def thin(rules, folders, tmp_path_factory):
    return exports(EXPORTER, rules, folders, tmp_path_factory)


@pytest.fixture(scope="module")
def found(written, thin, hostile, folders, tmp_path_factory):
    """Of the exports, and of those with a hostile line, which come last."""
    by_target = {"hf": written, "hf-thin": thin}
    jobs = {key: (by_target[key[0]][key[1:]], folders[key[1]], None) for key in KEYS}
    jobs |= {name: (folder, folders["llama"], ["greedy"]) for name, folder in hostile.items()}
    return audit(jobs, tmp_path_factory.mktemp("audit"))


@pytest.mark.parametrize("key", KEYS, ids=tiny.key_id)
def test_the_code_of_an_export_opens_no_file_no_connection_and_no_process(key, found):
    assert found[key]["caused"] == {}


def test_to_open_an_export_transformers_reads_its_files_and_for_hf_thin_those_of_the_base(found):
    """Weights are not in these lists: safetensors opens them where no audit hook looks."""
    settings = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    for key in KEYS:
        code = {"steering_adaras.py", "modeling_adaras.py"} if key[0] == "hf-thin" else set()
        assert {"generation_config.json"} <= {*found[key]["reads"]} <= settings | code


# The audit can fail. Each line is written into a place of the payload.

FORWARD, MODULE, OPENING = (
    "        output_BTD: Tensor = down(hidden_BTM)\n",
    "THREAD = _Thread()\n",
    "        # Without it, version 4 does not load the buffers",
)
HOSTILE = {
    "a file": (FORWARD, "open('/dev/null').close()", "greedy", "open"),
    "a folder": (FORWARD, "__import__('os').listdir('/')", "greedy", "os.listdir"),
    "a file that is removed": (FORWARD, "__import__('shutil').rmtree('/nothing', True)", "greedy", "shutil.rmtree"),
    "a process": (FORWARD, "__import__('subprocess').run(['true'])", "greedy", "subprocess.Popen"),
    "a shell": (FORWARD, "__import__('os').system('true')", "greedy", "os.system"),
    "a socket": (FORWARD, "__import__('socket').socket().close()", "greedy", "socket.__new__"),
    "a name look-up": (FORWARD, "__import__('socket').gethostbyname('localhost')", "greedy", "socket.gethostbyname"),
    "a pickle": (FORWARD, "__import__('pickle').loads(b'cbuiltins\\nlen\\n.')", "greedy", "pickle.find_class"),
    "code": (FORWARD, "exec('pass')", "greedy", "exec"),
    "a library": (FORWARD, "__import__('ctypes').CDLL(None)", "greedy", "ctypes.dlopen"),
    "a late import": (FORWARD, "import turtledemo", "greedy", "import"),
    "a file at import": (MODULE, "open('/dev/null').close()", "opening", "open"),
    "a process at import": (MODULE, "__import__('subprocess').run(['true'])", "opening", "subprocess.Popen"),
    "a foreign file at opening": (OPENING, "open('/proc/version').close()", "opening", "open"),
    "a file that is written at opening": (OPENING, "open(f'{args[0]}/x', 'w').close()", "opening", "open"),
}


@pytest.fixture(scope="module")
def hostile(written, tmp_path_factory):
    """An export with a line more, by its name."""
    changed = {}
    for number, (name, (place, line, *_)) in enumerate(HOSTILE.items()):
        folder = shutil.copytree(written[CAUSAL], tmp_path_factory.mktemp("hostile") / f"hostile{number}")
        changed[name] = folder
        [path] = [path for path in folder.glob("*.py") if place in path.read_text()]
        code, indent = path.read_text(), place[: len(place) - len(place.lstrip())]
        assert code.count(place) == 1
        path.write_text(code.replace(place, f"{indent}{line}\n{place}"))
    return changed


@pytest.mark.parametrize("name", HOSTILE)
def test_the_audit_catches_code_that_opens(name, found):
    *_, mode, event = HOSTILE[name]
    assert event in {caused[0] for caused in found[name]["caused"][mode]}
