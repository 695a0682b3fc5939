"""Ten faults that users would suffer from, put into the package one at a time: a test must fail for each.

Run by `make mutants`; arguments go to pytest where the files that should notice a fault do not, and all tests run.
Where a snippet is no longer found once in the package, write it anew: find the line that does the job today.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# Its tests know every payload file by its hash, so they fail for any change of one, harmful or not.
HASHED = "test_refresh.py"


class Mutant(NamedTuple):
    """A fault: what it does to a user, the code before and after, and the test file that should notice it."""

    name: str
    harm: str
    before: str
    after: str
    first: str


MUTANTS = (
    Mutant(
        "negated delta",
        "every target pushes the chosen neurons away from the correct answers, and agrees with its reference",
        "return self.neurons.index[rows], self.neurons.delta[rows]",
        "return self.neurons.index[rows], -self.neurons.delta[rows]",
        "test_steering.py",
    ),
    Mutant(
        "shifted layer",
        "neurons found in one layer are steered in the layer below, and read there, too",
        "module: nn.Module = layers[layer]",
        "module: nn.Module = layers[layer - 1]",
        "test_checkpoint.py",
    ),
    Mutant(
        "flipped gate sign",
        "exports steer the prompts that the model would get right, and leave the others alone",
        ".probability_of(self.gate, like.shape[0]) < self.dials.threshold",
        ".probability_of(self.gate, like.shape[0]) >= self.dials.threshold",
        "test_steering.py",
    ),
    Mutant(
        "start off by one",
        "steering begins one token late: the first answer token comes from the base model",
        "valid_BT & (column_T >= first)",
        "valid_BT & (column_T > first)",
        "test_runtime.py",
    ),
    Mutant(
        "dropped norm",
        "random controls are weaker or stronger than the rule, so beating them shows nothing",
        "scale = own_norm / drawn_norm if drawn_norm else 0.0",
        "scale = 1.0 if drawn_norm else 0.0",
        "test_evaluate.py",
    ),
    Mutant(
        "stale receipt hash",
        "an artifact with a new card has a receipt of the old one, so whoever downloads it cannot verify it",
        "complete = replace(receipt, files=",
        "complete = replace(receipt, files=receipt.files or ",
        "test_writer.py",
    ),
    Mutant(
        "lost journal line",
        "a resumed evaluation cuts off answers that hours were spent on",
        "end += self._take(",
        "end = self._take(",
        "test_append_log.py",
    ),
    Mutant(
        "doubled trace",
        "a resumed collection samples and writes attempts that the file has already",
        "for attempt in batch if attempt.id not in self.traces}",
        "for attempt in batch}",
        "test_collect.py",
    ),
    Mutant(
        "wrong Holm rank",
        "adjusted p-values are too small: a card claims a gain that chance explains",
        "(count - rank) * p_values[place]",
        "(count - rank - 1) * p_values[place]",
        "test_claims.py",
    ),
    Mutant(
        "unescaped character",
        "a model of a hostile name puts HTML into the card of whoever exports it",
        r"*\[\]<>|#&~$]",
        r"*\[\]>|#&~$]",
        "test_markdown.py",
    ),
)


def main() -> None:
    """Print which test noticed each fault; exit with 1 where one stays unnoticed."""
    noticed = {}
    for mutant in MUTANTS:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            tree = copy(Path(folder))
            put_in(mutant, tree)
            test = first_failure(tree, *located(mutant.first, tree)) or first_failure(tree, "tests", *sys.argv[1:])
        print(
            f"{mutant.name:20} {time.perf_counter() - started:4.0f} s  {test or 'SURVIVES: ' + mutant.harm}", flush=True
        )
        noticed[mutant.name] = test
    if not all(noticed.values()):
        sys.exit(1)
    with tempfile.TemporaryDirectory() as folder:
        if failing := first_failure(copy(Path(folder)), *dict.fromkeys(noticed.values())):
            sys.exit(f"{failing} fails without a mutant, too")
    print("without a mutant, these tests pass")


def copy(folder: Path) -> Path:
    """The files of the working tree that git knows, in another folder."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def put_in(mutant: Mutant, tree: Path) -> None:
    """Change the one place in the package that has the snippet; what comes out is Python still."""
    sources = [path for part in ("adaras_export", "exporters") for path in (tree / part).rglob("*.py")]
    places = [path for path in sources for _ in range(path.read_text(encoding="utf-8").count(mutant.before))]
    if len(places) != 1:
        sys.exit(f"{mutant.name}: {mutant.before!r} stands {len(places)} times in the package; expected once")
    source = places[0].read_text(encoding="utf-8").replace(mutant.before, mutant.after)
    ast.parse(source)
    places[0].write_text(source, encoding="utf-8")


def located(name: str, tree: Path) -> list[str]:
    """The test files of a name, wherever they lie."""
    paths = [str(path.relative_to(tree)) for path in (tree / "tests").rglob(name)]
    return paths or sys.exit(f"{name}: no test file has this name; expected one that should notice the fault")


def first_failure(tree: Path, *arguments: str) -> str | None:
    """The first quick test of a tree that fails, or None. A tree whose tests cannot be collected shows nothing."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", f"--ignore-glob=*/{HASHED}", *arguments]
    variables = {**os.environ, "PYTHONPATH": str(tree)}  # before the installed package
    done = subprocess.run(command, cwd=tree, env=variables, capture_output=True, text=True, check=False)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+?::.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode and not failed:
        sys.exit(f"pytest {' '.join(arguments)} ran no test to its end:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return failed[1] if failed else None


if __name__ == "__main__":
    main()
