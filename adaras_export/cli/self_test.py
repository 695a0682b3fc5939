"""Whether each target works here: a real export of a toy, verified as any export is. Downloads nothing.

It happens in a process of its own: a broken library may end the process that loads it, and the code of the toys does
not belong into the user's cache.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import adaras_export
from adaras_export.cli.environment import Finding

if TYPE_CHECKING:
    from adaras_export.core.rule import SteeringRule
    from adaras_export.delivery.writer import ExportReport


@dataclass(frozen=True)
class Way:
    """A target with one of its options, which may need an extra of its own."""

    target: str
    option: str | None = None

    @property
    def name(self) -> str:
        """How the command line has it."""
        return self.target if self.option is None else f"{self.target} --{self.option}"


# What docs/which.md has, in its order, but for what needs no other library (onnx --inline, peft --start-at), a file of
# the user's (gguf --into) or a download (onnx --page).
WAYS = (
    Way("hf"),
    Way("hf-thin"),
    Way("peft", "adaptive"),
    Way("onnx"),
    Way("onnx", "genai"),
    Way("peft"),
    Way("stock"),
    Way("stock", "switchable"),
    Way("gguf"),
)
_LOSSES = {"start": "steers every token", "gate": "no gate", "dial": "no dial"}


def try_all(ways: Sequence[Way] = WAYS, progress: Callable[[int, int], None] | None = None) -> list[Finding]:
    """Try all ``ways``; ``progress`` is called with how many are done, and of how many."""
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory(prefix="adaras-doctor-") as scratch:
        while waiting := ways[len(findings) :]:
            for finding in _tried_elsewhere(waiting, Path(scratch)):
                findings.append(finding)
                if progress is not None:
                    progress(len(findings), len(ways))
    return findings


def _tried_elsewhere(ways: Sequence[Way], scratch: Path) -> Iterator[Finding]:
    """What a process finds of ``ways``, in their order: of all, or up to the one that ended it."""
    root = Path(adaras_export.__file__).parents[1]  # the library that asks is the one to be tried
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(scratch),  # torch leaves an empty folder there
    }
    command = [sys.executable, "-m", "adaras_export.cli.self_test", *(str(WAYS.index(way)) for way in ways)]
    errors = scratch / "stderr"
    with (
        errors.open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, cwd=scratch, env=environment, text=True) as child,
    ):
        assert child.stdout is not None
        ready = bool(child.stdout.readline())
        answers = iter(child.stdout)
        tried = 0
        for tried, answer in enumerate(answers, start=1):  # noqa: B007 - used after the loop
            yield Finding(**json.loads(answer))
    for way in ways[tried : tried + 1] if ready else ways:
        yield Finding(f"target {way.name}", ok=False, text=_end(child.returncode, errors))


def _end(status: int, errors: Path) -> str:
    """Why the process ended."""
    if status < 0:
        return f"the process was ended by {signal.Signals(-status).name}; a library that it needs is broken"
    lines = [line for line in errors.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"the process ended with status {status}"


def _main(ways: Sequence[Way]) -> None:
    """Try ``ways`` in the current folder and print, after an empty line, what was found as JSON, a line each."""
    with _own_output() as answers:
        import torch
        from transformers.utils import logging

        from adaras_export.delivery import writer  # noqa: F401 - its libraries, before the clock runs
        from adaras_export.demo import toy

        torch.set_num_threads(1)  # the matrices are so small that a second thread only waits for the first
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        base = toy.write_base(Path(tempfile.mkdtemp(dir=".")) / "toy")
        rule = toy.make_rule(base)
        answers.write("\n")
        for way in ways:
            answers.write(json.dumps(vars(_tried(way, rule, base)), allow_nan=False) + "\n")
            answers.flush()


def _own_output() -> IO[str]:
    """Standard output for us alone: what libraries print goes to standard error."""
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return own


def _tried(way: Way, rule: "SteeringRule", base: Path) -> Finding:
    """Anything but an error of ours ends the process, and is told by what it said."""
    from adaras_export import exporters
    from adaras_export.delivery import writer
    from adaras_export.errors import AdarasError, MissingExtraError

    name = f"target {way.name}"
    options: dict[str, Any] = {} if way.option is None else {way.option: True}
    out = base.parent / way.name.replace(" ", "")
    try:
        exporters.load(way.target)
        began = time.perf_counter()  # without the imports
        report = writer.export(rule, base=base, to=way.target, out=out, accept_loss=[*_LOSSES], **options)
    except MissingExtraError as error:
        return Finding(name, None, str(error).removeprefix(f"{name} "))
    except AdarasError as error:
        return Finding(name, ok=False, text=str(error).removeprefix(f"{out}: ").partition("; ")[0])
    return _verified(name, report, time.perf_counter() - began)


def _verified(name: str, report: "ExportReport", seconds: float) -> Finding:
    share = max(check.figure / check.limit for check in report.parity.checks if check.limit)
    losses = ", ".join(text for feature, text in _LOSSES.items() if feature in report.drops)
    text = f"verified in {seconds:.1f} s (worst figure {share:.2g} of its limit){'; ' if losses else ''}{losses}"
    figures = {"seconds": seconds, "share": share, "drops": [*report.drops], "checks": report.parity.as_record()}
    return Finding(name, ok=True, text=text, figures=figures)


if __name__ == "__main__":
    _main([WAYS[int(number)] for number in sys.argv[1:]])
