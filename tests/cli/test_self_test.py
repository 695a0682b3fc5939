"""The targets, tried in Python environments of which some are damaged: real ones, with links to what is installed."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from places import ROOT

from adaras_export.cli.self_test import WAYS, Way
from adaras_export.errors import install_command
from adaras_export.exporters import TARGETS

PACKAGE = ROOT / "adaras_export"
STATIC = [Way("peft"), Way("gguf"), Way("stock")]


class Environment:
    """A Python of its own with links to all that is installed here."""

    def __init__(self, folder):
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        self.site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        for entry in installed():
            if not (self.site / entry.name).exists():  # as in an import, the first one counts
                (self.site / entry.name).symlink_to(entry)
        (self.site / PACKAGE.name).symlink_to(PACKAGE)

    def without(self, library):
        for entry in [*self.site.glob(f"{library}-*.dist-info"), self.site / library]:
            entry.unlink()

    def with_code(self, library, code):
        (self.site / library).unlink()
        (self.site / f"{library}.py").write_text(code)

    def with_changed(self, file, before, after):
        """With a copy of our own package that differs in one place."""
        (self.site / PACKAGE.name).unlink()
        shutil.copytree(PACKAGE, self.site / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
        path = self.site / PACKAGE.name / file
        assert path.read_text().count(before) == 1
        path.write_text(path.read_text().replace(before, after))

    def lines(self, ways):
        """What `try_all` says there, by the names of the targets."""
        code = "import sys; from adaras_export.cli.self_test import WAYS, try_all; " + (
            "[print(one.line()) for one in try_all([WAYS[int(n)] for n in sys.argv[1:]])]"
        )
        command = [self.python, "-c", code, *(str(WAYS.index(way)) for way in ways)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=self.site, env=bare())
        return dict(line.split(": ", 1) for line in done.stdout.splitlines())


def installed():
    """All that lies in the folders that this Python imports packages from, but our own package."""
    folders = [Path(folder) for folder in sys.path if Path(folder).name in {"site-packages", "dist-packages"}]
    return [
        entry
        for folder in folders
        for entry in folder.iterdir()
        if entry.suffix != ".pth" and entry.name != PACKAGE.name
    ]


def bare():
    return {"PATH": os.environ["PATH"], "HOME": os.environ["HF_HOME"], "OMP_NUM_THREADS": "1"}


def test_every_target_is_tried():
    assert {way.target for way in WAYS} == TARGETS.keys()
    assert len({way.name for way in WAYS}) == len(WAYS)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """What is said in an environment with a fault for each of four targets, of which one ends the process."""
    environment = Environment(tmp_path_factory.mktemp("damaged") / "environment")
    environment.with_changed("runtime/steering_adaras.py", "output_BTD + (scale *", "output_BTD - (scale *")
    environment.without("onnxruntime")
    environment.with_code("peft", "raise ImportError('libpeft.so.1: cannot open shared object file')")
    environment.with_code("gguf", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    return environment.lines([Way("hf"), Way("onnx"), Way("peft"), Way("gguf"), Way("stock")])


@pytest.mark.slow
@pytest.mark.onnx
def test_a_missing_extra_is_told_with_its_command(damaged):
    remedy = f"run: {install_command('onnx')}"
    assert damaged["     target onnx"] == f"needs onnxruntime, which is not installed; {remedy}"


@pytest.mark.slow
@pytest.mark.onnx
def test_a_library_that_does_not_import_is_a_failure_of_its_target(damaged):
    assert "installed, but does not import (libpeft.so.1: cannot open shared" in damaged["FAIL target peft"]


@pytest.mark.slow
@pytest.mark.onnx
def test_a_library_that_ends_the_process_is_a_failure_of_its_target_and_the_next_is_tried(damaged):
    assert damaged["FAIL target gguf"].startswith("the process was ended by SIGSEGV")
    assert damaged["ok   target stock"].startswith("verified in ")
    assert len(damaged) == 5


@pytest.mark.slow
@pytest.mark.onnx
def test_a_runtime_with_one_sign_flipped_fails_with_the_check_that_found_it(damaged):
    found = damaged["FAIL target hf"]
    assert re.match(r"not written: FAIL [a-z ]+, prefill logits: \S+ +\(limit \S+\)$", found)


@pytest.mark.slow
def test_a_broken_core_library_fails_all_targets_with_its_own_words(tmp_path):
    environment = Environment(tmp_path / "environment")
    environment.with_code("transformers", "raise ImportError('no cuDNN')")
    assert environment.lines(STATIC) == {f"FAIL target {way.name}": "ImportError: no cuDNN" for way in STATIC}
