"""What `push` puts on the Hub, and what it says where it cannot."""

import json
import os
import pty
import shutil
import sys
from pathlib import Path

import pytest
from hub.server import Fault
from huggingface_hub import constants, snapshot_download

from adaras_export import cli
from adaras_export.delivery import documents, verifier
from adaras_export.delivery import push as pushing
from adaras_export.delivery.receipt import file_checks, read
from adaras_export.errors import ArtifactError, ExportError, HubError
from adaras_export.exporters import manifest
from adaras_export.files import hub as files_hub
from adaras_export.files.atomic import sha256

# huggingface_hub hands files to its HTTP client by a name that this calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
NAME = "user/steered"
slow = pytest.mark.slow  # dozens that are together
WRITES = ("POST /api/repos", "/commit/", "/preupload/", "/branch/", "PUT ")


def run(monkeypatch, *words):
    """The exit status of a command."""
    monkeypatch.setattr("sys.argv", ["adaras-export", *map(str, words)])
    with pytest.raises(SystemExit) as status:
        cli.main()
    return status.value.code or 0


def writes(hub):
    """What of the log changed or sent anything."""
    lines = [f"{method} {path}" for method, path, *_ in hub.log]
    return [line for line in lines if any(one in line for one in WRITES)]


def local(folder):
    return {name: path.read_bytes() for name, path in manifest.files_of(folder).items()}


def expected(folder):
    """The files of an artifact under its new name."""
    receipt = read(folder)
    return local(folder) | documents.readdressed(folder, receipt, verifier.exporter_of(receipt), NAME)


def remote(hub, revision="main"):
    files = hub.repositories[NAME].files(revision)
    return {name: hub.content(NAME, name, revision) for name in files if name != ".gitattributes"}


def test_a_new_repository_is_private_and_has_one_commit(online, artifact):
    done = pushing.push(artifact, NAME)
    found = online.repositories[NAME]
    assert found.private
    assert len(found.commits) == 2  # the Hub's own first one, and ours
    assert found.branches == {"main": done.commit}
    assert done.url == f"{online.endpoint}/{NAME}/commit/{done.commit}"
    assert remote(online) == expected(artifact)


@slow
def test_card_and_receipt_name_the_repository_and_the_folder_stays_as_it_is(online, artifact):
    before = local(artifact)
    folder = Path(snapshot_download(NAME, revision=pushing.push(artifact, NAME).commit))
    assert local(artifact) == before
    assert f"# {NAME}\n" in (folder / "README.md").read_text()
    assert read(folder).repository == NAME
    assert all(check.ok for check in file_checks(folder, read(folder)))
    assert {name for name, content in local(folder).items() if content != before[name]} == {"README.md", "receipt.json"}


@slow
def test_the_same_again_changes_nothing(online, artifact):
    first = pushing.push(artifact, NAME)
    sent = writes(online)
    planned = pushing.plan(artifact, NAME)
    assert planned.empty
    assert pushing.carry_out(planned).commit == first.commit
    assert writes(online) == sent


@slow
def test_files_of_an_earlier_artifact_are_removed_by_the_same_commit(online, artifact, exported, tmp_path):
    before = pushing.push(artifact, NAME).commit
    later = shutil.copytree(exported[("stock",)], tmp_path / "later")
    planned = pushing.plan(later, NAME)
    done = pushing.carry_out(planned)
    assert done.removed == ("modeling_adaras.py", "steering_adaras.py")
    assert "config.json" in planned.replaced
    assert "tokenizer.json" in done.unchanged
    assert online.repositories[NAME].commits[done.commit]["parent"] == before
    assert remote(online) == expected(later)


@slow
def test_a_branch_is_made_and_main_stays_as_it_is(online, artifact, exported):
    pushing.push(exported[("stock",)], NAME)
    main = remote(online)
    assert pushing.plan(artifact, NAME, revision="v/2").remote.new_branch
    pushing.push(artifact, NAME, revision="v/2")
    assert remote(online) == main
    assert remote(online, "v/2") == expected(artifact)


@slow
def test_a_branch_of_a_new_repository_leaves_main_empty(online, artifact):
    pushing.push(artifact, NAME, revision="first")
    assert remote(online) == {}
    assert remote(online, "first") == expected(artifact)


@slow
def test_a_commit_is_no_branch(online, artifact):
    with pytest.raises(
        HubError, match=rf"{NAME}: {'5' * 40} is a commit, which cannot get new commits; expected a branch"
    ):
        pushing.push(artifact, NAME, revision="5" * 40)


@slow
def test_visibility_is_what_was_asked_for_and_else_what_it_is(online, artifact):
    assert not pushing.push(artifact, NAME, private=False).private
    assert not pushing.plan(artifact, NAME).private
    with pytest.raises(
        HubError, match=rf"{NAME}: is public; expected private; push with --public, or make it private at"
    ):
        pushing.plan(artifact, NAME, private=True)
    assert not online.repositories[NAME].private


def test_a_dry_run_says_what_would_be_done_and_does_nothing(online, artifact, monkeypatch, capsys):
    before = local(artifact)
    assert run(monkeypatch, "push", artifact, NAME, "--dry-run", "--revision", "v2") == 0
    said = capsys.readouterr().out
    assert f"add     {len(before['config.json']):>15,} config.json\n" in said
    assert f"{NAME}, a new private repository, branch v2" in said
    assert writes(online) == []
    assert local(artifact) == before


@slow
def test_the_command_says_what_it_did_as_json(online, artifact, monkeypatch, capsys):
    assert run(monkeypatch, "push", artifact, NAME, "--public", "--yes", "--json", "--message", "why") == 0
    said = capsys.readouterr()
    done = json.loads(said.out)
    assert online.repositories[NAME].commits[done["commit"]]["summary"] == "why"
    assert (done["repository"], done["private"], done["removed"]) == (NAME, False, [])
    assert done["receipt"] == sha256(remote(online)["receipt.json"])
    assert done["uploaded"] == {name: len(content) for name, content in expected(artifact).items()}
    assert "a new PUBLIC repository" in said.err


@slow
@pytest.mark.parametrize(("answer", "pushed"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_it_asks_first(answer, pushed, online, artifact, monkeypatch):
    own, other = pty.openpty()
    os.write(own, answer.encode())
    with os.fdopen(other) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        assert run(monkeypatch, "push", artifact, NAME) == (0 if pushed else 130)
    os.close(own)
    assert (NAME in online.repositories) == pushed


def test_where_nobody_can_be_asked_it_says_so_at_once(online, artifact, monkeypatch, capsys):
    with Path(os.devnull).open() as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        assert run(monkeypatch, "push", artifact, NAME) == 2
    assert capsys.readouterr().err.startswith("UsageError: ")
    assert online.log == []


def damaged(folder, damage):
    if damage == "no receipt":
        (folder / "receipt.json").unlink()
    elif damage == "changed":
        (folder / "config.json").write_text("{}")
    else:
        (folder / damage).parent.mkdir(exist_ok=True)
        (folder / damage).write_text("HF_TOKEN=secret")
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no receipt", "is no exported folder, it has no receipt.json"),
        ("changed", r"files changed: config.json; expected the files of its receipt only; export again"),
        (".env", r"files unknown: .env; expected the files of its receipt only"),
        ("__pycache__/a.pyc", r"files unknown: __pycache__/a.pyc"),
    ],
)
def test_what_is_not_as_its_receipt_says_is_not_pushed(damage, message, online, artifact):
    with pytest.raises(ArtifactError, match=message):
        pushing.push(damaged(artifact, damage), NAME)
    assert online.log == []


@slow
def test_what_git_and_the_hub_leave_in_a_folder_is_not_sent(online, artifact):
    for name in (".git/config", ".cache/huggingface/x", ".gitattributes"):
        (artifact / name).parent.mkdir(parents=True, exist_ok=True)
        (artifact / name).write_text("x")
    assert pushing.push(artifact, NAME).uploaded.keys() == local(artifact).keys()
    assert not any("/" in name or name.startswith(".") for name in remote(online))


@slow
def test_a_signed_folder_must_have_the_right_name_already(online, artifact):
    (artifact / manifest.SIGNATURE_FILE).write_text("{}")
    with pytest.raises(
        ExportError, match=rf"is signed as steered; expected {NAME}; remove model.sig, run: adaras-export"
    ):
        pushing.push(artifact, NAME)
    assert online.log == []


@slow
@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        ("hf_wrong", NAME, "the token is not accepted (the Hub says 401: Invalid credentials in Authorization header)"),
        ("hf_reader", NAME, "the token may not do this (the Hub says 403: You don't have the rights"),
        ("hf_writer", "other/steered", "the token may not do this (the Hub says 403: You don't have the rights"),
        ("", NAME, "no token was found; expected one: run `hf auth login`, or set HF_TOKEN"),
        ("hf_writer", "user/a b", "is not a repository name"),
        ("hf_writer", "user/x/y", "is not a repository name"),
    ],
)
def test_who_may_not_push_is_told_why(token, name, message, online, artifact, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError) as raised:
        pushing.push(artifact, name)
    assert str(raised.value).startswith(f"{name}: {message}")
    assert online.repositories == {}


@slow
def test_a_private_repository_of_others_is_as_if_it_were_not(online, artifact):
    online.create("other/steered", private=True)
    with pytest.raises(HubError, match="the token may not do this"):
        pushing.push(artifact, "other/steered")


@slow
def test_a_token_of_a_login_is_used(online, artifact, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    Path(constants.HF_TOKEN_PATH).parent.mkdir(parents=True)
    Path(constants.HF_TOKEN_PATH).write_text("hf_writer")
    assert pushing.push(artifact, NAME).private


@slow
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("HF_HUB_OFFLINE", True, "HF_HUB_OFFLINE is set, and the local cache does not have it; unset HF_HUB_OFFLINE"),
        ("ENDPOINT", "http://127.0.0.1:9", r"http://127.0.0.1:9 cannot be reached \(.*\); check the network, and HF_"),
        ("HF_HUB_DISABLE_XET", False, r"no Xet storage there \(.*404 Not Found.*\); set HF_HUB_DISABLE_XET=1"),
    ],
)
def test_without_a_hub_the_reason_is_named(setting, value, message, online, artifact, monkeypatch):
    monkeypatch.setattr(constants, setting, value)
    with pytest.raises(HubError, match=message):
        pushing.push(artifact, NAME)


FULL = "Private repository storage limit reached"


@slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            Fault("POST", "/commit/", 500, "try later"),
            "the Hub has a problem (the Hub says 500: try later); repeat later",
        ),
        (
            Fault("POST", "/commit/", 412, "has changed"),
            "somebody else committed in the meantime (the Hub says 412: has",
        ),
        (
            Fault("POST", "objects/batch", 403, FULL),
            f"the token may not do this (the Hub says 403: {FULL}); expected one",
        ),
        (Fault("POST", "/validate-yaml", 400, "no YAML"), "Invalid metadata in README.md"),
        (Fault("POST", "/preupload/", 402, "pay"), "the Hub refuses (the Hub says 402: pay)"),
        (
            Fault("POST", "/repos/create", 409, "is there"),
            "somebody else changed it in the meantime (the Hub says 409: is",
        ),
    ],
    ids=lambda value: f"{value.status}" if isinstance(value, Fault) else "",
)
def test_a_refusal_is_one_line_and_commits_nothing(fault, message, online, artifact):
    online.faults.append(fault)
    with pytest.raises(HubError) as raised:
        pushing.push(artifact, NAME)
    assert str(raised.value).startswith(f"{NAME}: {message}")
    assert "\n" not in str(raised.value)
    assert NAME not in online.repositories or remote(online) == {}


@slow
def test_who_commits_in_between_is_not_overwritten(online, artifact, exported):
    planned = pushing.plan(artifact, NAME)
    pushing.push(exported[("stock",)], NAME)
    theirs = remote(online)
    with pytest.raises(HubError, match="somebody else changed it in the meantime"):
        pushing.carry_out(planned)
    planned = pushing.plan(artifact, NAME)
    online.repositories[NAME].commit("main", "theirs", online.repositories[NAME].files())
    with pytest.raises(HubError, match=r"somebody else committed in the meantime .*; nothing was committed"):
        pushing.carry_out(planned)
    assert remote(online) == theirs


@pytest.mark.parametrize("small", [1 << 25, 0])
@pytest.mark.parametrize("name", ["config.json", "model-steering.safetensors"])
def test_a_file_that_was_swapped_after_it_was_checked_is_not_pushed(name, small, online, artifact, monkeypatch):
    """Symptom: between plan and commit a link to a secret was put in a file's place, and the secret was uploaded."""
    monkeypatch.setattr(files_hub, "_SMALL", small)
    planned = pushing.plan(artifact, NAME)
    secret = artifact.parent / "secret"
    secret.write_text("HF_TOKEN=secret")
    (artifact / name).unlink()
    (artifact / name).symlink_to(secret)
    with pytest.raises(HubError, match=f"{name}: has changed since it was checked; .*; nothing was committed"):
        pushing.carry_out(planned)
    assert writes(online) == []


def test_a_large_file_that_is_swapped_while_it_is_sent_is_not_committed(online, artifact, monkeypatch):
    """Large files are read from the disk, so what was read is compared as well, before the commit."""
    name = "model-steering.safetensors"
    monkeypatch.setattr(files_hub, "_SMALL", 0)
    planned, additions = pushing.plan(artifact, NAME), files_hub._additions

    def swapped(files):
        found, size = additions(files), (artifact / name).stat().st_size
        (artifact / name).unlink()
        (artifact / name).write_bytes(bytes(size))
        return found

    monkeypatch.setattr(files_hub, "_additions", swapped)
    with pytest.raises(HubError, match="has changed since it was checked"):
        pushing.carry_out(planned)
    assert remote(online) == {}


def test_large_files_are_sent_as_they_are(online, artifact, monkeypatch):
    monkeypatch.setattr(files_hub, "_SMALL", 0)
    pushing.push(artifact, NAME)
    assert remote(online) == expected(artifact)


def test_a_password_in_the_hubs_address_is_not_shown(online, artifact, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://ada:s3cret@127.0.0.1:9")
    with pytest.raises(HubError, match=r"http://127.0.0.1:9 cannot be reached") as raised:
        pushing.plan(artifact, NAME)
    assert "s3cret" not in str(raised.value)
    said = files_hub.without_password("404 for http://a:b@c/d?e=f@g, https://h:i@j@k:1/l and m@n://o")
    assert said == "404 for http://c/d?e=f@g, https://k:1/l and m@n://o"


@slow
def test_a_base_that_is_a_folder_is_warned_of(online, artifact, monkeypatch, capsys):
    assert run(monkeypatch, "push", artifact, NAME, "--dry-run") == 0
    assert "warning: its base is a folder of this machine (/" in capsys.readouterr().err


@slow
@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "the token is not accepted"), (403, "the token may not do this"), (402, "the Hub refuses")],
)
def test_what_xets_client_meets_is_one_line_too(status, message, online, artifact, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    online.faults.append(Fault("GET", "/xet-write-token/", status, times=99))
    with pytest.raises(HubError, match=f"{NAME}: {message}") as raised:
        pushing.push(artifact, NAME)
    assert "\n" not in str(raised.value)


@slow
def test_xets_own_client_sends_and_fetches_large_files(online, artifact, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    online.xet = tmp_path / "xet"
    online.xet.mkdir()
    done = pushing.push(artifact, NAME)
    folder = Path(snapshot_download(NAME, revision=done.commit))
    assert local(folder) == expected(artifact)
    assert online.uploads() == {}
    assert online.requests("GET", "/xet-read-token/")
