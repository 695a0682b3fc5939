"""Runs the code of cards as it stands there, in a process of its own, beside the folder that it is about."""

import atexit
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from places import ROOT

_BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# Loads the libraries once and runs each code that it reads in a fork. What the code prints is compared, so that
# nothing else may be printed.
FORKING = """
import json, os, sys, tempfile, traceback
import torch, transformers
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

def finish(code, folder, library):
    os.chdir(folder)
    sys.stdin.close()
    if not library:
        sys.modules["adaras_export"] = None  # importing it fails from here on
    status = 1
    try:
        exec(compile(code, "card", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

for line in sys.stdin:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            finish(**json.loads(line))
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, errors):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    print(json.dumps([status, *texts]), flush=True)
"""


@functools.cache
def forking():
    """The process; it ends with this one, whose pipe it reads."""
    home = Path(tempfile.mkdtemp(prefix="adaras-snippets-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", FORKING], env=environment(home), cwd=home, **pipes)


def of(card, language):
    """The code of a card in one language, block by block; ``card`` is the text or the folder that has it."""
    text = card if isinstance(card, str) else (card / "README.md").read_text()
    return [body for info, body in _BLOCK.findall(text) if info == language]


def run(code, folder, *, library=False):
    """What Python code prints in ``folder``; without ``library``, importing adaras_export fails there."""
    process = forking()
    process.stdin.write(json.dumps({"code": code, "folder": str(folder), "library": library}) + "\n")
    process.stdin.flush()
    status, printed, errors = json.loads(process.stdout.readline())
    assert status == 0, errors[-3000:]
    return printed


def run_shell(code, folder):
    """What a shell prints; `adaras-export` and `python` are those of this environment."""
    return _output(["bash", "-euc", code], folder)


def parses(code, folder):
    """Whether a shell takes code for what it is one."""
    return subprocess.run(["bash", "-n"], input=code, text=True, cwd=folder, check=False).returncode == 0


def environment(home):
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def _output(command, folder):
    (folder / "home").mkdir(exist_ok=True)
    done = subprocess.run(command, cwd=folder, env=environment(folder / "home"), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    return done.stdout.decode()
