"""Toy bases, rules and a GGUF model in one folder, and the command line run where its libraries are loaded already."""

import shutil

import pytest
from reliability import jobs


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """What `jobs.make` writes. Read only."""
    return jobs.make(tmp_path_factory.mktemp("toys"))


@pytest.fixture
def home(toys, tmp_path):
    """A copy of it, with the same times and permissions."""
    return shutil.copytree(toys, tmp_path / "home")
