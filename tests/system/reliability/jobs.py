"""What the reliability tests have done to a toy base: one export per target, as its command line.

Everything lies in one folder: `make` writes bases, rules and a GGUF model there, and `JOBS` says what follows
`adaras-export export`. Run in a process that has torch already, a job takes about a second.
"""

import stat
from dataclasses import dataclass
from pathlib import Path

import tiny
import tiny_gguf
import torch
import transformers

from adaras_export.core.base_model import BaseModel
from adaras_export.files import atomic


@dataclass(frozen=True)
class Job:
    """An export of the base ``name``; ``more`` is what its command line has besides."""

    to: str
    name: str = "llama"
    more: tuple[str, ...] = ()

    def command(self, home, out):
        base = ["--base", str(home / self.name), "--to", self.to, "--out", str(out)]
        return ["export", str(home / f"{self.name}.rule"), *base, *(word.format(home=home) for word in self.more)]


_STATIC = ("--accept-loss", "gate,start,dial")

JOBS = {
    "hf": Job("hf"),
    "hf --copy": Job("hf", "qwen3-sharded", ("--copy",)),
    "hf-thin": Job("hf-thin"),
    "peft": Job("peft", more=_STATIC),
    "peft --start-at": Job("peft", more=("--start-at", "<assistant>", "--accept-loss", "gate")),
    "peft --adaptive": Job("peft", more=("--adaptive",)),
    "peft --merge": Job("peft", "llama-biased", ("--merge", *_STATIC)),
    "stock": Job("stock", more=_STATIC),
    "stock --switchable": Job("stock", more=("--switchable", *_STATIC)),
    "gguf": Job("gguf", more=_STATIC),
    "gguf --into": Job("gguf", more=("--into", "{home}/llama.gguf", *_STATIC)),
    "onnx": Job("onnx", "qwen2-shallow"),
    "onnx int8": Job("onnx", "qwen2-shallow", ("--precision", "int8")),
}
# Those that take about a second each.
QUICK = tuple(name for name in JOBS if not name.startswith("onnx"))


def folder_name(job):
    return job.replace(" ", "")


def make(home):
    """Write what the jobs need into the folder ``home``."""
    for name in sorted({job.name for job in JOBS.values()}):
        folder = tiny.save_base(name, home / name)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        rule = tiny.make_rule(
            BaseModel.of(folder), gate=tiny.calibrated_gate(model, "causal"), start="last_prompt_token"
        )
        rule.save(home / f"{name}.rule")
    tiny_gguf.write_model(tiny.build_model("llama"), tiny.build_tokenizer(), home / "llama.gguf")
    return home


def snapshot(folder):
    """Names, bytes, permissions and times of what lies in a folder, but not how many links a file has."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        status = path.lstat()
        content = atomic.sha256_file(path) if stat.S_ISREG(status.st_mode) else None
        found[str(path.relative_to(folder))] = (content, status.st_mode, status.st_mtime_ns, status.st_size)
    return found


def contents(folder):
    """Names, bytes and permissions."""
    return {name: one[:2] for name, one in snapshot(folder).items()}
