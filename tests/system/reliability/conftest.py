"""Toy bases, rules and a GGUF model in one folder, and the command line run where its libraries are loaded already."""

import shutil

import pytest
import tiny
from reliability import jobs
from reliability.exporting import command


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """What `jobs.make` writes. Read only."""
    return jobs.make(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="session")
def made(toys, tmp_path_factory):
    """The folder that a job writes from the toys, by its name. Read only."""

    def make(name):
        out = tmp_path_factory.mktemp("made") / jobs.folder_name(name)
        assert command(jobs.JOBS[name].command(toys, out))[0] == 0
        return out

    return tiny.Lazy(make)


@pytest.fixture
def home(toys, tmp_path):
    """A copy of it, with the same times and permissions."""
    return shutil.copytree(toys, tmp_path / "home")
