"""verify --offline-hashes, --receipt and --key, sign, export --sign, as typed; the commands of docs/signing.md."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import artifacts
import pytest
import transformers
from places import DOCS

from adaras_export import cli
from adaras_export.files import atomic

PAGE = (DOCS / "signing.md").read_text(encoding="utf-8")
NEITHER = "not checked: that the receipt is its author's: give --key or --receipt, or compare the receipt's SHA-256"
COMPUTED = "not checked: what it stores and computes against its base: leave out --offline-hashes"


@pytest.fixture
def run(capsys, monkeypatch):
    """Status, output and errors of `adaras-export` with these arguments."""

    def go(*arguments):
        verbosity = transformers.logging.get_verbosity()
        monkeypatch.setattr(sys, "argv", ["adaras-export", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        transformers.logging.set_verbosity(verbosity)
        printed = capsys.readouterr()
        return end.value.code or 0, printed.out, printed.err

    return go


@pytest.fixture
def folder(exported, tmp_path):
    return artifacts.copy(exported["hf"], tmp_path / "steered")


def test_offline_hashes_say_what_holds_and_what_was_not_checked(run, folder):
    status, out, err = run("verify", folder, "--offline-hashes", "--verbose")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "ok   files changed: 0  (limit 0)"
    assert f"receipt {atomic.sha256_file(folder / 'receipt.json')}" in lines
    assert [line[: len(NEITHER)] for line in lines[-2:]] == [NEITHER, COMPUTED]


def test_offline_hashes_name_a_changed_file_and_fail(run, folder):
    (folder / "config.json").write_text("{}")
    status, out, err = run("verify", folder, "--offline-hashes")
    assert "FAIL files changed: 1  (limit 0)  config.json" in out
    assert (status, err) == (1, f"ParityError: {folder}: 1 of 9 checks failed\n")


def test_a_known_receipt_is_compared_and_json_has_its_hash(run, folder):
    known = atomic.sha256_file(folder / "receipt.json")
    status, out, _ = run("verify", folder, "--offline-hashes", "--receipt", known, "--json")
    record = json.loads(out)
    assert (status, record["ok"], record["receipt"], record["unproven"]) == (0, True, known, [COMPUTED])
    status, out, _ = run("verify", folder, "--offline-hashes", "--receipt", "0" * 64)
    assert status == 1
    assert f"FAIL receipt other than the one named: 1  (limit 0)  {known}" in out


def test_offline_hashes_with_a_base_are_refused(run, folder):
    status, _, err = run("verify", folder, "--offline-hashes", "--base", "x")
    assert status == 2
    assert "--offline-hashes with --model: it compares nothing with a base; leave out one of them" in err


@pytest.fixture
def keys(tmp_path, monkeypatch):
    """The keys that docs/signing.md makes, in the working directory."""
    pytest.importorskip("model_signing")
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    monkeypatch.chdir(tmp_path)
    for command in commands("openssl"):
        password = ["-passout", "pass:open sesame"] if "locked.pem" in command else []
        subprocess.run([*command, *password], check=True, capture_output=True)
    return tmp_path


def commands(program):
    """The commands of the page's bash blocks that run this program, as lists of words."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).splitlines()
    return [shlex.split(line) for line in lines if line.startswith(f"{program} ")]


@pytest.mark.slow
def test_the_commands_of_the_page_work_one_after_the_other(run, keys, folder):
    for command in commands("adaras-export"):
        status, out, err = run(*command[1:])
        assert (status, err) == (0, ""), command
        assert out.startswith("PASS ") or out == "steered/model.sig: written\n"
    assert "not checked: its signature: give --key\n" in run("verify", "steered", "--offline-hashes")[1]
    for _, *words in commands("model_signing"):
        for more in ([], ["--allow_symlinks"]):
            done = subprocess.run(
                [sys.executable, "-m", "model_signing", *words, *more], capture_output=True, check=False
            )
            assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_export_is_signed_where_a_key_is_given(run, keys, folders, rules):
    rules[artifacts.KEY].save("rule.safetensors")
    made = ("rule.safetensors", "--base", folders["llama"], "--to", "hf", "--out", "out", "--sign")
    status, out, err = run("export", *made, "private.pem")
    assert (status, err) == (0, "")
    assert "out: 12 files and a receipt and a signature\nreceipt " in out
    assert run("verify", "out", "--key", "public.pem", "--offline-hashes")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("password", "status"), [("open sesame", 0), ("close sesame", 2), (None, 2)])
def test_a_locked_key_takes_its_password_from_the_environment(password, status, run, keys, folder, monkeypatch):
    monkeypatch.delenv("ADARAS_SIGN_PASSWORD", raising=False)
    if password is not None:
        monkeypatch.setenv("ADARAS_SIGN_PASSWORD", password)
    found, _, err = run("sign", folder, "locked.pem")
    assert found == status
    assert ("sesame" in err, "\n" in err[:-1]) == (False, False)
    assert run("sign", folder, "private.pem")[0] == 0  # which needs none


def test_a_key_that_cannot_sign_is_refused_before_the_export(run, keys, folders, rules):
    rules[artifacts.KEY].save("rule.safetensors")
    made = ("rule.safetensors", "--base", folders["llama"], "--to", "hf", "--out", "out", "--sign")
    status, _, err = run("export", *made, "public.pem")
    assert (status, err) == (2, "ExportError: public.pem: is a public key; expected the PEM file of a private key\n")
    assert not Path("out").exists()
