"""Exports onto a disk of one megabyte with less and less room on it, and onto one that is read-only.

    unshare --user --map-root-user --mount python tests/system/reliability/small_disk.py HOME JOB ...

Mounts the disk, which needs rights that `unshare` gives, or root. Prints a line of JSON for each export: the bytes that
were free, the exit status, what was printed, and what is on the disk afterwards besides what fills it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = map(str, (HERE.parent, HERE.parents[1], HERE.parents[2] / "support", HERE.parents[3]))

import jobs  # noqa: E402
from exporting import finished, fork, load_libraries  # noqa: E402

SIZE, PAGE = 1 << 20, 4096
STEPS = 2


class Disk:
    """A disk at ``place``, and the toys in ``home``."""

    def __init__(self, home):
        self.home, self.place, self.filler = home, home / "disk", home / "disk" / "filler"
        self.place.mkdir(exist_ok=True)
        self.mount("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs")

    def mount(self, *how):
        subprocess.run(["mount", *how, str(self.place)], check=True)

    def run(self, arguments, **about):
        """Run the command line, and say what came of it."""
        status, text, _ = finished(fork, arguments, self.home / "log")
        left = sorted(path.name for path in self.place.iterdir() if path != self.filler)
        print(json.dumps({**about, "status": status, "text": text, "left": left}), flush=True)

    def leave_free(self, size):
        self.filler.unlink(missing_ok=True)
        room = os.statvfs(self.place)
        self.filler.write_bytes(bytes(room.f_bavail * room.f_frsize - size))

    def fill(self, name):
        """Less and less room for one job, from none at all to all but a page of what it needs; then enough."""
        peace, out = self.home / "elsewhere" / jobs.folder_name(name), self.place / "out"
        finished(fork, jobs.JOBS[name].command(self.home, peace), self.home / "log")
        files = [path.stat().st_size for path in peace.rglob("*") if path.is_file()]
        need = sum(-(-size // PAGE) for size in files) * PAGE
        for free in (*range(0, need, max(PAGE, need // STEPS // PAGE * PAGE)), need - PAGE, need + 8 * PAGE):
            self.leave_free(free)
            self.run(jobs.JOBS[name].command(self.home, out), job=name, free=free, need=need)
        shutil.rmtree(out)

    def lock(self, name):
        """Read-only, with an artifact on it: that can be verified, and another one cannot be written."""
        self.filler.unlink()
        here, there = self.place / "here", self.place / "there"
        self.run(jobs.JOBS[name].command(self.home, here), job=name)
        self.mount("-o", "remount,ro")
        self.run(["verify", str(here)], job="verify")
        self.run(jobs.JOBS[name].command(self.home, there), job="read-only")


def main():
    disk = Disk(Path(sys.argv[1]))
    load_libraries()
    for name in sys.argv[2:]:
        disk.fill(name)
    disk.lock(sys.argv[2])


if __name__ == "__main__":
    main()
