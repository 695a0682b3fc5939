"""docs/serving.md from top to bottom: its commands are run, and its answers are those that come."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import drive
import pytest
from places import ROOT

PAGE = (ROOT / "docs" / "serving.md").read_text()
INSTALL, START, *ASK, VERIFY = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
HERE = Path(sys.prefix) / "bin"
# The CPU's wheel, as the page says: the command `vllm` is not there.
MODULE = "-m vllm.entrypoints.openai.api_server --model"


def environment(folder):
    shared = {"PATH": os.environ["PATH"], "HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**shared, **drive.RUNTIMES["vllm"].settings, "VLLM_USE_AOT_COMPILE": "0"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pytestconfig):
    """Where the demo has been run."""
    drive.require_built("vllm", required=pytestconfig.option.require_runtimes)
    folder = tmp_path_factory.mktemp("page")
    demo, _ = START.splitlines()
    subprocess.run(shlex.split(demo.replace("served/bin", str(HERE))), cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def port(folder):
    """The port of the server that the page starts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    _, serve = START.splitlines()
    python = drive.RUNTIMES["vllm"].command[0]
    command = shlex.split(serve.replace("served/bin/vllm serve", f"{python} {MODULE}").replace("8000", str(port)))
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=log, stderr=log)
    try:
        for _ in range(240):
            assert server.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:
                time.sleep(1)
        yield port
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.parametrize("number", range(len(ASK)))
def test_curl_gets_the_answer_of_the_page(number, port, tmp_path):
    command = ASK[number].replace("8000", str(port))
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, capture_output=True)
    answer = json.loads(done.stdout)
    behind = PAGE.split(ASK[number])[1].split("```bash")[0]
    assert f"`{answer['choices'][0]['message']['content']}`" in behind
    verdict = answer["kv_transfer_params"]["steering"]
    if number != 1:  # the one that is switched off says nothing of the verdict
        assert f'"steered": {json.dumps(verdict["steered"])}' in behind
    if number == 0:
        shown = float(re.search(r'"p_correct": ([\d.]+)', behind).group(1))
        assert verdict["p_correct"] == pytest.approx(shown, abs=0.02)  # the demo trains the gate on this machine


def test_the_comparison_of_the_page_passes(folder):
    command = VERIFY.replace("served/bin/adaras-export", f"{drive.RUNTIMES['vllm'].command[0]} -m adaras_export")
    done = subprocess.run(shlex.split(command), cwd=folder, env=environment(folder), capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()[-3000:]


def test_the_extras_of_the_page_are_those_of_the_package():
    extras = re.search(r"\[([a-z,]+)\]", INSTALL).group(1).split(",")
    declared = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("[project.")[0]
    assert all(re.search(rf"^{extra} = ", declared, re.MULTILINE) for extra in extras)
