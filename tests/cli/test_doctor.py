"""What `adaras-export doctor` says of an environment."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from places import ROOT

from adaras_export import cli
from adaras_export.cli import doctor, self_test
from adaras_export.cli.environment import Finding
from adaras_export.cli.self_test import WAYS

TOKEN = "hf_nobodyshouldseethis"
ASK = "import json; from adaras_export.cli.doctor import hub_access; print(json.dumps(vars(hub_access())))"


class _Hub(BaseHTTPRequestHandler):
    """Knows one token, and answers in its first path segment's way."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        status = 503 if self.path.startswith("/down/") else 200 if known else 401
        answer = b"<p>Sign in" if self.path.startswith("/portal/") else b'{"name": "ada"}' if known else b'{"error": 1}'
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def hub():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        server.asked, server.address = [], f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def access(tmp_path, **settings):
    """What a process with these settings finds, and all that it prints."""
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), **settings}
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True)
    return Finding(**json.loads(done.stdout.splitlines()[-1])), done.stdout + done.stderr


@pytest.mark.slow
def test_the_hub_tells_whose_token_it_is_and_nobody_else_sees_it(hub, tmp_path):
    found, output = access(tmp_path, HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN)
    assert found.line() == f"ok   hub access: {hub.address}, logged in as ada"
    assert hub.asked[-1] == ("/api/whoami-v2", f"Bearer {TOKEN}")
    assert TOKEN not in output


@pytest.mark.slow
def test_without_a_token_the_hub_is_asked_as_anybody_and_the_command_to_log_in_is_named(hub, tmp_path):
    found, _ = access(tmp_path, HF_ENDPOINT=hub.address)
    assert found.ok
    assert found.text.endswith("not logged in, which only push and private models need: hf auth login")
    assert hub.asked[-1] == ("/api/whoami-v2", None)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["variable", "file"])
def test_a_token_that_the_hub_refuses_is_a_failure(place, hub, tmp_path):
    (tmp_path / "token").write_text("hf_old")
    settings, mend = (
        ({"HF_TOKEN": "hf_older"}, "set another HF_TOKEN") if place == "variable" else ({}, "hf auth login")
    )
    found, output = access(tmp_path, HF_ENDPOINT=hub.address, **settings)
    assert found.ok is False
    assert f"refuses the token that it is given; {mend}" in found.text.replace("run: ", "")
    assert "hf_old" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "text"),
    [("/down", "answers with status 503, not as a Hub"), ("/portal", "cannot be asked (JSONDecodeError)")],
)
def test_what_answers_as_no_hub_does_is_no_failure(path, text, hub, tmp_path):
    found, _ = access(tmp_path, HF_ENDPOINT=hub.address + path, HF_TOKEN=TOKEN)
    assert found.ok is None
    assert text in found.text


@pytest.mark.slow
def test_a_hub_that_refuses_connections_is_no_failure(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listened to
        found, _ = access(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert found.ok is None
    assert "only models of the Hub need it" in found.text


@pytest.mark.slow
def test_offline_nothing_is_asked(hub, tmp_path):
    before = len(hub.asked)
    found, _ = access(tmp_path, HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="1", HF_TOKEN=TOKEN)
    assert found.ok is None
    assert found.text.startswith("offline mode; ")
    assert len(hub.asked) == before


@pytest.mark.slow
def test_neither_a_token_that_no_header_can_hold_nor_a_password_in_the_endpoint_is_shown(hub, tmp_path):
    address = hub.address.replace("//", "//ada:secret@")
    found, output = access(tmp_path, HF_ENDPOINT=address, HF_TOKEN=f"{TOKEN}é")
    assert found.ok is None
    assert hub.address in found.text
    assert TOKEN not in output
    assert "secret" not in output


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run of the command: its status, its record, the progress, and what trials leave in the user's folders."""
    folder, printed, steps, left = tmp_path_factory.mktemp("user"), io.StringIO(), [], []
    try_all = self_test.try_all

    def noting(progress):
        before = {*folder.iterdir()}  # ONNX Runtime leaves a file where this process has just imported it
        findings = try_all(progress=lambda *at: (steps.append(at), progress(*at)))
        left.extend({*folder.iterdir()} - before)
        return findings

    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(printed):
        patched.setenv("HF_HOME", str(folder / "home"))
        patched.setenv("TMPDIR", str(folder))
        patched.delenv("HF_MODULES_CACHE")
        patched.setattr("tempfile.tempdir", None)  # which remembers the one from before
        patched.setattr(self_test, "try_all", noting)
        patched.setattr("sys.argv", ["adaras-export", "doctor", "--json"])
        with pytest.raises(SystemExit) as status:
            cli.main()
    return status.value.code, json.loads(printed.getvalue()), steps, left


@pytest.mark.slow
@pytest.mark.onnx
def test_the_command_tells_all_as_json_and_every_target_is_verified_here(whole):
    status, record, steps, _ = whole
    found = {finding["name"]: finding for finding in record["findings"]}
    assert not status
    assert record["ok"] is True
    assert "CPUExecutionProvider" in found["execution providers"]["text"]
    assert found["hub access"]["text"].startswith("offline mode")
    for way in WAYS:
        target = found[f"target {way.name}"]
        assert target["ok"], target["text"]
        assert 0 < target["figures"]["share"] < 1
        assert all(check["ok"] for check in target["figures"]["checks"])
    assert steps == [(done, len(WAYS)) for done in range(1, len(WAYS) + 1)]


@pytest.mark.slow
@pytest.mark.onnx
@pytest.mark.parametrize(
    ("target", "losses"),
    [("hf", ""), ("peft", "; steers every token, no gate"), ("stock", "; steers every token, no gate, no dial")],
)
def test_what_a_target_leaves_out_is_said(target, losses, whole):
    [text] = [finding["text"] for finding in whole[1]["findings"] if finding["name"] == f"target {target}"]
    assert text.endswith(f"of its limit){losses}")


@pytest.mark.slow
@pytest.mark.onnx
def test_trials_leave_nothing_in_the_users_folders(whole):
    assert whole[3] == []


@pytest.mark.parametrize("ok", [True, None])
def test_the_command_prints_a_line_each_where_nothing_is_broken(ok, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda progress: [Finding("one", ok, "is one"), Finding("two", ok, "too")])
    monkeypatch.setattr("sys.argv", ["adaras-export", "doctor"])
    with pytest.raises(SystemExit) as status:
        cli.main()
    assert not status.value.code
    mark = "ok  " if ok else "    "
    assert capsys.readouterr().out == f"{mark} one: is one\n{mark} two: too\n"


def test_the_command_fails_where_something_is_broken(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda progress: [Finding("one", ok=False, text="is two")])
    monkeypatch.setattr("sys.argv", ["adaras-export", "doctor"])
    with pytest.raises(SystemExit) as status:
        cli.main()
    assert status.value.code == 2
    assert "BrokenInstallationError: one: is two" in capsys.readouterr().err
