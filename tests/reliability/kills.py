"""Kills exports and verifications with SIGKILL at random moments, and looks at what is left.

    python tests/reliability/kills.py --kills 100 --seed 0

After each kill: under the final name there is nothing, or what a run in peace writes, byte for byte; the base is as it
was; a second run succeeds, gives the same again, and leaves nothing of the dead one. Prints how often each stage was
hit, as a table for docs/reliability.md, and ends with 1 if anything was found.

Most runs are forks of this process, which has all libraries loaded, so that they take a second and the kills hit what
matters and not the imports. Half of the moments are uniform in the time that a run takes in peace, the others are drawn
from what can be seen on the disk, as "when there are five files". Some runs are processes from the start.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[up]) for up in (0, 1, 2)]

import jobs  # noqa: E402
from exporting import finished, fork, load_libraries, spawn  # noqa: E402

PHASES = ("before", "writing", "verifying", "card", "settling", "named", "over")


def phase(out):
    """In which of them an export is, by what is on the disk."""
    if out.exists():
        return "named"
    names = entries(out)
    if names is None:
        return "before"
    marks = {"receipt.json": "settling", "README.md": "card", "rule.safetensors": "verifying"}
    return next((found for name, found in marks.items() if name in names), "writing")


def entries(out):
    """What is in the stage of an export; none before there is one."""
    stages = [*out.parent.glob(f".{out.name}.adaras-export/stage-*")]
    # Unlike Path.rglob, os.walk does not mind that what it walks through gets another name.
    return {name for _, *kinds in os.walk(stages[0]) for names in kinds for name in names} if stages else None


def kill(start, arguments, log, moment):
    """Start a run, and kill it when ``moment(seconds)`` says so; whether it was still alive then."""
    began = time.perf_counter()
    child = start(arguments, log)
    while not moment(time.perf_counter() - began):
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return False
        time.sleep(0.0001)
    os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


class Bench:
    """A folder with bases and rules, what the jobs write there in peace, and what was found."""

    def __init__(self, home, seed, names):
        self.home, self.log, self.draw = jobs.make(home), home / "log", random.Random(seed)
        self.before = {job.name: jobs.snapshot(home / job.name) for job in jobs.JOBS.values()}
        self.counts, self.faults = Counter(), []
        self.peace = {name: self.home / "peace" / jobs.folder_name(name) for name in names}
        self.seconds = {name: self.run(name, jobs.JOBS[name].command(home, out)) for name, out in self.peace.items()}
        self.files = {name: jobs.contents(out) for name, out in self.peace.items()}

    def run(self, name, arguments):
        """Run to the end; how long it takes."""
        status, text, seconds = finished(fork, arguments, self.log)
        self.require(status == 0, f"{name}: ended with {status}: {text}")
        return seconds

    def require(self, is_so, fault):
        if not is_so:
            self.faults.append(fault)
            print("FAULT", fault, flush=True)

    def kill_export(self, name, start):
        out = self.home / "out" / jobs.folder_name(name)
        arguments = jobs.JOBS[name].command(self.home, out)
        is_killed = kill(start, arguments, self.log, self.moment(name, out, start))
        found = phase(out) if is_killed else "over"
        self.counts[name, found] += 1
        self.look(name, found, out, may_lack=is_killed)
        shutil.rmtree(out, ignore_errors=True)
        self.run(name, arguments)
        self.look(f"{name} after {found}", "second run", out)
        self.require([*out.parent.iterdir()] == [out], f"{name}: {found}: left {[*out.parent.iterdir()]}")
        if self.draw.random() < 0.2:
            self.run(name, ["verify", str(out)])
        shutil.rmtree(out)

    def look(self, name, found, out, *, may_lack=False):
        is_right = may_lack if not out.exists() else jobs.contents(out) == self.files[name.partition(" after ")[0]]
        self.require(is_right, f"{name}: {found}: wrong or missing artifact")
        for base, before in self.before.items():
            self.require(jobs.snapshot(self.home / base) == before, f"{name}: {found}: changed {base}")

    def moment(self, name, out, start):
        """When to kill an export: at a time, or at the sight of something on the disk."""
        at = self.draw.uniform(0, self.seconds[name])
        if start is spawn:  # which imports first, for some seconds
            return _after(at, lambda: entries(out) is not None)
        if self.draw.random() < 0.5:
            return lambda seconds: seconds >= at
        wanted = self.draw.choice([*range(len(self.files[name])), *PHASES[3:6]])
        return lambda _: phase(out) == wanted if isinstance(wanted, str) else len(entries(out) or ()) > wanted

    def kill_verify(self, name):
        out, before = self.peace[name], jobs.snapshot(self.peace[name])
        at = self.draw.uniform(0, self.seconds[name])
        is_killed = kill(fork, ["verify", str(out)], self.log, lambda seconds: seconds >= at)
        self.counts["verify", "verifying" if is_killed else "over"] += 1
        self.require(jobs.snapshot(out) == before, f"verify {name}: changed the artifact")
        self.look(name, "verify", out)
        self.run(name, ["verify", str(out)])

    def table(self):
        names = sorted({name for name, _ in self.counts})
        rows = [(name, [self.counts[name, found] for found in PHASES]) for name in names]
        rows.append(("all", [sum(column) for column in zip(*(row for _, row in rows), strict=True)]))
        lines = [f"| {name} | {' | '.join(map(str, row))} | {sum(row)} |" for name, row in rows]
        return "\n".join([f"| killed while | {' | '.join(PHASES)} | all |", "|---|" + "---|" * 8, *lines])


def _after(delay, is_seen):
    """``delay`` seconds after the first sight of something."""
    first = []

    def moment(seconds):
        if not first and is_seen():
            first.append(seconds)
        return bool(first) and seconds >= first[0] + delay

    return moment


def main():
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--real", type=int, default=10, help="so many of them are processes from the start")
    options.add_argument("--jobs", default=",".join(jobs.QUICK), help="names of jobs.JOBS, with commas between them")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="adaras-kills-") as scratch:
        os.environ["HF_HOME"] = scratch
        load_libraries()
        names = chosen.jobs.split(",")
        bench = Bench(Path(scratch), chosen.seed, names)
        for n in range(chosen.kills):
            if n % 5 == 4:
                bench.kill_verify(names[n // 5 % len(names)])
            else:
                bench.kill_export(names[(n - n // 5) % len(names)], spawn if n < chosen.real else fork)
        print(f"{bench.table()}\n{len(bench.faults)} faults", flush=True)
    sys.exit(bool(bench.faults))


if __name__ == "__main__":
    main()
