"""Runs the code of cards as it stands there, in a process of its own, beside the folder that it is about."""

import os
import re
import subprocess
import sys
from pathlib import Path

from places import ROOT

_BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# Opening a model takes time; what the code prints is compared, so that nothing else may be printed.
PRELUDE = """\
import sys
{absent}
import torch, transformers
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
del sys, torch, transformers
"""
ABSENT = 'sys.modules["adaras_export"] = None  # importing it fails from here on'


def of(card, language):
    """The code of a card in one language, block by block; ``card`` is the text or the folder that has it."""
    text = card if isinstance(card, str) else (card / "README.md").read_text()
    return [body for info, body in _BLOCK.findall(text) if info == language]


def run(code, folder, *, library=False):
    """What Python code prints in ``folder``; without ``library``, importing adaras_export fails there."""
    program = PRELUDE.format(absent="" if library else ABSENT) + code
    return _output([sys.executable, "-c", program], folder)


def run_shell(code, folder):
    """What a shell prints; `adaras-export` and `python` are those of this environment."""
    return _output(["bash", "-euc", code], folder)


def parses(code, folder):
    """Whether a shell takes code for what it is one."""
    return subprocess.run(["bash", "-n"], input=code, text=True, cwd=folder, check=False).returncode == 0


def _output(command, folder):
    (folder / "home").mkdir(exist_ok=True)
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    return done.stdout.decode()
