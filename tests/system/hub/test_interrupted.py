"""A push that is killed, or meets another: no half commit, and what was sent is not sent again."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from hub.conftest import TOKENS, at
from hub.server import Fault, Hub
from places import ROOT

from adaras_export.delivery import documents, verifier
from adaras_export.delivery import push as pushing
from adaras_export.delivery.receipt import read
from adaras_export.errors import HubError
from adaras_export.exporters import manifest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")]
NAME = "user/steered"


@pytest.fixture
def hub(tmp_path):
    """One that wants large files in parts of 50 kB."""
    with Hub(tmp_path / "hub", TOKENS, part_bytes=50_000) as found:
        yield found
    assert found.surprises == []


@contextmanager
def pushing_process(hub, folder):
    code = "from adaras_export.cli import main; main()"
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(folder.parent / "home"), "HF_ENDPOINT": hub.endpoint}
    environment |= {"HF_TOKEN": "hf_writer", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", code, "push", str(folder), NAME, "--yes"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def test_a_push_killed_in_the_middle_of_a_file_leaves_no_commit_and_is_repeated(hub, artifact):
    stuck = Fault("PUT", "/3$", after=20_000)
    hub.faults.append(stuck)
    others = {"model-steering.safetensors", "rule.safetensors"}
    with pushing_process(hub, artifact) as first:
        wait_for(lambda: stuck.reached.is_set() and len(hub.parts) == 2 and others <= stored(hub, artifact), first)
    stuck.release.set()
    sent, repository = hub.uploads(), hub.repositories[NAME]
    assert [one["summary"] for one in repository.commits.values()] == ["initial commit"]
    assert stored(hub, artifact) == others

    with at(hub, artifact.parent / "home"):
        pushing.push(artifact, NAME)
    assert len(repository.commits) == 2
    assert {name: hub.content(NAME, name) for name in manifest.files_of(artifact)} == contents(artifact)
    assert {oid for oid, count in hub.uploads().items() if count > sent[oid]} == {digest(artifact, "model-base")}


def contents(folder):
    """The files of an artifact under its new name."""
    receipt = read(folder)
    named = documents.readdressed(folder, receipt, verifier.exporter_of(receipt), NAME)
    return {name: path.read_bytes() for name, path in manifest.files_of(folder).items()} | named


def digest(folder, beginning):
    [found] = [oid for name, oid in read(folder).files.items() if name.startswith(beginning)]
    return found


def stored(hub, folder):
    """The files of an artifact whose content the Hub's large storage has."""
    return {name for name, oid in read(folder).files.items() if hub.stored(oid).exists()}


def test_a_connection_that_breaks_is_tried_again(hub, online, artifact):
    hub.faults += [Fault("PUT", "/2$", after=10_000, drop=True), Fault("PUT", "/1$", status=500)]
    pushing.push(artifact, NAME)
    assert {name: hub.content(NAME, name) for name in manifest.files_of(artifact)} == contents(artifact)


def test_of_two_pushes_at_once_one_is_told_that_the_other_came_first(online, artifact, exported):
    pushing.push(exported[("stock",)], NAME)
    plans = [pushing.plan(artifact, NAME, message=f"{number}") for number in range(2)]

    def outcome(planned):
        try:
            return pushing.carry_out(planned).commit
        except HubError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        commit, refusal = sorted(pool.map(outcome, plans), key=len)
    assert online.repositories[NAME].branches["main"] == commit
    assert refusal.startswith(
        f"{NAME}: somebody else committed in the meantime (the Hub says 412: A commit has happened"
    )
    assert {name: online.content(NAME, name) for name in manifest.files_of(artifact)} == contents(artifact)
