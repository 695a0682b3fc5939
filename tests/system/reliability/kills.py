"""Kills exports, verifications, new cards and pushes with SIGKILL at random moments, and looks at what is left.

    python tests/system/reliability/kills.py --kills 100 --seed 0

After each kill: under the final name there is nothing, or what a run in peace writes, byte for byte; the base is as it
was; a second run succeeds, gives the same again, and leaves nothing of the dead one. A repository of the Hub, here one
on loopback, has no file of the artifact or all of them, and all after the second run. Prints how often each stage was
hit, as a table for docs/reliability.md, and ends with 1 if anything was found.

Most runs are forks of this process, which has all libraries loaded, so that they take a second and the kills hit what
matters and not the imports. Half of the moments are uniform in the time that a run takes in peace. The others are
uniform in its steps: just before its n-th call that makes, opens for writing, links, renames or removes something
beside the artifact. Some runs are processes from the start. With --every-step, instead, there is one kill at each step.
"""

import argparse
import functools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = map(str, (HERE.parent, HERE.parents[1], HERE.parents[2] / "support", HERE.parents[3]))

import jobs  # noqa: E402
from exporting import finished, fork, load_libraries, spawn  # noqa: E402
from hub.conftest import TOKENS, at  # noqa: E402
from hub.server import Hub  # noqa: E402

from adaras_export.files import atomic  # noqa: E402

PHASES = ("before", "writing", "verifying", "card", "settling", "named", "over")
CARD_PHASES = ("0 replaced", "1 replaced", "2 replaced", "over")
PUSH_PHASES = ("no repository", "no commit", "committed", "over")
_REPOSITORY = "user/steered"


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


def kill(child, moment):
    """Kill a run when ``moment(seconds)`` says so, unless it ends before; whether it died of SIGKILL."""
    began = time.perf_counter()
    while not moment(time.perf_counter() - began):
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        time.sleep(0.0001)
    os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def at_each_step(beside, act):
    """Have this process call ``act`` just before each of its calls that change something in the folder ``beside``."""
    writing, inside = os.O_WRONLY | os.O_RDWR | os.O_CREAT, f"{beside}/"

    def hook(event, args):
        is_change = args[2] & writing if event == "open" else event.startswith("os.") and event not in _LOOKING
        if is_change and any(str(one).startswith(inside) for one in args[:2]):
            act()

    sys.addaudithook(hook)


_LOOKING = {"os.listdir", "os.scandir", "os.walk", "os.fwalk"}


def count_steps(beside, file):
    """Write a byte for each step into ``file``."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    at_each_step(beside, lambda: os.write(descriptor, b"."))


def die_at_step(beside, number):
    """Be killed at that step, counted from 0."""
    steps = iter(range(number, -1, -1))
    at_each_step(beside, lambda: next(steps) or os.killpg(0, signal.SIGKILL))


class Bench:
    """A folder with bases and rules, what the jobs write there in peace, and what was found."""

    def __init__(self, home, seed, names):
        self.home, self.log, self.draw = jobs.make(home), home / "log", random.Random(seed)
        self.before = {job.name: jobs.snapshot(home / job.name) for job in jobs.JOBS.values()}
        self.counts, self.faults = Counter(), []
        self.peace = {name: self.home / "peace" / jobs.folder_name(name) for name in names}
        self.seconds = {name: self.run(name, jobs.JOBS[name].command(home, out)) for name, out in self.peace.items()}
        self.files = {name: jobs.contents(out) for name, out in self.peace.items()}
        self.steps = {name: self.count(name) for name in names}
        self.kill_push(names[0])  # in peace, at first
        self.card_steps = self.count_card(names[0])

    def count(self, name):
        """The number of steps of a job; it must give the same again."""
        out = self.home / "out" / jobs.folder_name(name)
        first = functools.partial(count_steps, out.parent, self.home / "steps")
        self.run(name, jobs.JOBS[name].command(self.home, out), first)
        self.look(name, "again", out)
        shutil.rmtree(out)
        return (self.home / "steps").stat().st_size

    def run(self, name, arguments, first=None):
        """Run to the end; how long it takes."""
        status, text, seconds = finished(functools.partial(fork, first=first), arguments, self.log)
        self.require(status == 0, f"{name}: ended with {status}: {text}")
        return seconds

    def require(self, is_so, fault):
        if not is_so:
            self.faults.append(fault)
            print("FAULT", fault, flush=True)

    def kill_export(self, name, kind):
        out = self.home / "out" / jobs.folder_name(name)
        arguments, at = jobs.JOBS[name].command(self.home, out), self.draw.uniform(0, self.seconds[name])
        if kind == "process":  # which imports for some seconds first
            is_killed = kill(spawn(arguments, self.log), _after(at, lambda: entries(out) is not None))
        elif kind == "time":
            is_killed = kill(fork(arguments, self.log), lambda seconds: seconds >= at)
        else:
            first = functools.partial(die_at_step, out.parent, kind)
            is_killed = kill(fork(arguments, self.log, first), lambda _: False)
        found = phase(out) if is_killed else "over"
        self.counts[name, found] += 1
        self.look(name, found, out, may_lack=is_killed)
        if out.exists():
            status, text, _ = finished(fork, arguments, self.log)
            self.require((status, "exists already" in text) == (2, True), f"{name}: {found}: {text}")
        else:
            self.run(name, arguments)
        self.look(name, f"{found}, second run", out)
        self.require([*out.parent.iterdir()] == [out], f"{name}: {found}: left {[*out.parent.iterdir()]}")
        if self.draw.random() < 0.2:
            self.run(name, ["verify", str(out)])
        shutil.rmtree(out)

    def look(self, name, found, out, *, may_lack=False):
        is_right = may_lack if not out.exists() else jobs.contents(out) == self.files[name]
        self.require(is_right, f"{name}: {found}: wrong or missing artifact")
        for base, before in self.before.items():
            self.require(jobs.snapshot(self.home / base) == before, f"{name}: {found}: changed {base}")

    def kill_verify(self, name):
        out, before = self.peace[name], jobs.snapshot(self.peace[name])
        at = self.draw.uniform(0, self.seconds[name])
        is_killed = kill(fork(["verify", str(out)], self.log), lambda seconds: seconds >= at)
        self.counts["verify", "verifying" if is_killed else "over"] += 1
        self.require(jobs.snapshot(out) == before, f"verify {name}: changed the artifact")
        self.look(name, "verify", out)
        self.run(name, ["verify", str(out)])

    def count_card(self, name):
        """The number of steps of writing a card anew."""
        out = shutil.copytree(self.peace[name], self.home / "card" / "steered")
        first = functools.partial(count_steps, out.parent, self.home / "steps")
        self.run("card", ["card", str(out), "--repository", _REPOSITORY], first)
        shutil.rmtree(out)
        return (self.home / "steps").stat().st_size

    def kill_card(self, name, step):
        """The artifact is the old one, the new one, or becomes it with the second run; nothing is left in it."""
        out = shutil.copytree(self.peace[name], self.home / "card" / "steered")
        arguments = ["card", str(out), "--repository", _REPOSITORY]
        is_killed = kill(fork(arguments, self.log, functools.partial(die_at_step, out.parent, step)), lambda _: False)
        changed = {path for path, one in jobs.contents(out).items() if self.files[name].get(path) != one}
        self.require(changed <= {"README.md", "receipt.json"}, f"card {name}: changed {changed}")
        self.counts["card", f"{len(changed)} replaced" if is_killed else "over"] += 1
        self.run(f"card {name}", arguments)
        self.run(f"card {name}", ["verify", str(out)])
        self.require([*out.parent.iterdir()] == [out], f"card {name}: left {[*out.parent.iterdir()]}")
        shutil.rmtree(out)

    def kill_push(self, name):
        """Each time on a Hub of its own, which wants large files in parts of 50 kB."""
        out, before = self.peace[name], jobs.snapshot(self.peace[name])
        arguments = ["push", str(out), _REPOSITORY, "--yes"]
        with tempfile.TemporaryDirectory(dir=self.home) as scratch, Hub(scratch, TOKENS, part_bytes=50_000) as hub:
            online = functools.partial(at(hub, Path(scratch)).__enter__)
            if "push" not in self.seconds:
                self.seconds["push"] = self.run(f"push {name}", arguments, online)
                return
            moment = self.draw.uniform(0, self.seconds["push"])
            is_killed = kill(fork(arguments, self.log, online), lambda seconds: seconds >= moment)
            found = pushed(hub) if is_killed else "over"
            self.counts["push", found] += 1
            self.look_at_hub(name, found, hub, may_lack=is_killed)
            self.run(f"push {name}", arguments, online)
            self.look_at_hub(name, f"{found}, second run", hub)
            self.require(hub.surprises == [], f"push {name}: {hub.surprises}")
        self.require(jobs.snapshot(out) == before, f"push {name}: changed the artifact")

    def look_at_hub(self, name, found, hub, *, may_lack=False):
        wanted = {
            path.relative_to(self.peace[name]).as_posix() for path in self.peace[name].rglob("*") if path.is_file()
        }
        if (state := pushed(hub)) == "committed":
            there = hub.repositories[_REPOSITORY].files().keys() - {".gitattributes"}
            receipt = json.loads(hub.content(_REPOSITORY, "receipt.json"))
            right = {path: atomic.sha256(hub.content(_REPOSITORY, path)) for path in there - {"receipt.json"}}
            self.require(there == wanted and right == receipt["files"], f"push {name}: {found}: another artifact")
        else:
            self.require(may_lack, f"push {name}: {found}: {state}")

    def kill_at_every_step(self):
        names = [*self.steps]
        for name, steps in self.steps.items():
            for step in range(steps):
                self.kill_export(name, step)
        for step in range(self.card_steps):
            self.kill_card(names[0], step)

    def kill_at_random(self, kills, processes):
        names = [*self.steps]
        for n in range(kills):
            if n % 5 == 3:
                self.kill_push(names[n // 5 % len(names)])
            elif n % 10 == 9:
                self.kill_card(names[n // 10 % len(names)], self.draw.randrange(self.card_steps))
            elif n % 10 == 4:
                self.kill_verify(names[n // 5 % len(names)])
            else:
                name = names[(n - n // 5 * 2) % len(names)]
                drawn = self.draw.choice(["time", self.draw.randrange(self.steps[name])])
                self.kill_export(name, "process" if n < processes else drawn)

    def tables(self):
        exports = [name for name in (*self.steps, "verify") if any(one == name for one, _ in self.counts)]
        about = ((PHASES, exports), (CARD_PHASES, ["card"]), (PUSH_PHASES, ["push"]))
        return "\n\n".join(self.table(phases, names) for phases, names in about)

    def table(self, phases, names):
        rows = [(name, [self.counts[name, found] for found in phases]) for name in names]
        if len(rows) > 1:
            rows.append(("all", [sum(column) for column in zip(*(row for _, row in rows), strict=True)]))
        lines = [f"| {name} | {' | '.join(map(str, row))} | {sum(row)} |" for name, row in rows]
        return "\n".join([f"| killed while | {' | '.join(phases)} | all |", "|---" * (len(phases) + 2) + "|", *lines])


def pushed(hub):
    """How far a push came: the first commit of a repository is the Hub's own."""
    commits = len(hub.repositories[_REPOSITORY].commits) if _REPOSITORY in hub.repositories else 0
    return PUSH_PHASES[min(commits, 2)]


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
    options.add_argument("--every-step", action="store_true", help="one kill at each step of each job instead")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="adaras-kills-") as scratch:
        os.environ["HF_HOME"] = scratch
        load_libraries()
        names = chosen.jobs.split(",")
        bench = Bench(Path(scratch), chosen.seed, names)
        if chosen.every_step:
            bench.kill_at_every_step()
        else:
            bench.kill_at_random(chosen.kills, chosen.real)
        print(f"{bench.tables()}\n\n{len(bench.faults)} faults", flush=True)
    sys.exit(bool(bench.faults))


if __name__ == "__main__":
    main()
