"""Signatures of exported folders: made and checked here, and by the command line of the package model-signing."""

import json
import shutil
import subprocess
import sys

import artifacts
import pytest
import tampering
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaras_export.delivery import integrity, signing, verifier
from adaras_export.errors import ArtifactError, ExportError, MissingExtraError

pytest.importorskip("model_signing")
ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
from cryptography.hazmat.primitives import serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa  # noqa: E402

CHECK = "signature that is missing or does not hold"


def write_key(folder, name, key, password=None):
    """A key pair as ``name.pem`` and ``name.pub.pem``."""
    secret = serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret)
    public = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pem").write_bytes(key.private_bytes(*form))
    (folder / f"{name}.pub.pem").write_bytes(key.public_key().public_bytes(*public))


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A folder of keys."""
    folder = tmp_path_factory.mktemp("keys")
    for name, curve in (("p256", ec.SECP256R1()), ("p384", ec.SECP384R1()), ("p521", ec.SECP521R1())):
        write_key(folder, name, ec.generate_private_key(curve))
    write_key(folder, "other", ec.generate_private_key(ec.SECP256R1()))
    write_key(folder, "locked", ec.generate_private_key(ec.SECP256R1()), b"open sesame")
    write_key(folder, "bitcoin", ec.generate_private_key(ec.SECP256K1()))
    write_key(folder, "ed25519", ed25519.Ed25519PrivateKey.generate())
    write_key(folder, "rsa", rsa.generate_private_key(65537, 2048))
    (folder / "text.pem").write_text("no key\n")
    return folder


@pytest.fixture(scope="module")
def signed(exported, keys, tmp_path_factory):
    """A signed export. Read only."""
    folder = artifacts.copy(exported["hf"], tmp_path_factory.mktemp("signed") / "steered")
    signing.sign(folder, keys / "p256.pem")
    return folder


@pytest.fixture
def folder(signed, tmp_path):
    """A copy of it that may be damaged."""
    return artifacts.copy(signed, tmp_path / "copy")


def failures(folder, key):
    """The failed checks and their details, by name, with nothing but files to look at."""
    return {check.name: check.detail for check in integrity.verify_files(folder, key=key).failed()}


@pytest.mark.parametrize("curve", ["p256", "p384", "p521"])
def test_a_folder_signed_with_a_key_of_each_curve_holds_by_its_public_key_only(curve, exported, keys, tmp_path):
    folder = artifacts.copy(exported["peft"], tmp_path / "copy")
    assert signing.sign(folder, keys / f"{curve}.pem") == folder / "model.sig"
    assert failures(folder, keys / f"{curve}.pub.pem") == {}
    assert CHECK in failures(folder, keys / "other.pub.pem")


@pytest.mark.slow
def test_the_whole_verification_checks_the_signature_too(signed, keys):
    assert verifier.verify(signed, key=keys / "p256.pub.pem").ok
    found = verifier.verify(signed, key=keys / "other.pub.pem").failed()
    assert [check.name for check in found] == [CHECK]
    assert "Key mismatch" in found[0].detail


def test_without_a_key_a_signature_is_told_and_not_checked(signed):
    report = integrity.verify_files(signed)
    assert report.ok
    assert "signed; the signature is not checked without --key" in {check.name for check in report.checks}


def test_a_missing_signature_fails_where_a_key_is_given(exported, keys):
    assert failures(exported["hf"], keys / "p256.pub.pem") == {CHECK: "model.sig: no such file"}


@pytest.mark.slow
def test_the_signature_of_another_folder_fails(signed, exported, keys, tmp_path):
    folder = artifacts.copy(exported["hf-thin"], tmp_path / "copy")
    shutil.copy(signed / "model.sig", folder)
    assert "Signature mismatch" in failures(folder, keys / "p256.pub.pem")[CHECK]


def test_a_folder_may_be_signed_anew_with_another_key(folder, keys):
    signing.sign(folder, keys / "other.pem")
    assert failures(folder, keys / "other.pub.pem") == {}


DAMAGE = {
    "empty": lambda text: "",
    "no json": lambda text: text[:-1],
    "no object": lambda text: "[]",
    "no bundle": lambda text: "{}",
    "nested": lambda text: "[" * 20000,
    "no signature": lambda text: edited(text, ("dsseEnvelope", "signatures"), []),
    "another signature": lambda text: edited(text, ("dsseEnvelope", "signatures", 0, "sig"), "MEUCIQ=="),
    "another payload": lambda text: edited(text, ("dsseEnvelope", "payload"), "e30="),
    "another type": lambda text: edited(text, ("mediaType",), "x"),
    "null": lambda text: edited(text, ("verificationMaterial", "publicKey"), None),
}


def edited(text, keys, value):
    found = holder = json.loads(text)
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    return json.dumps(found)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_signature_fails_in_one_line(damage, folder, keys):
    path = folder / "model.sig"
    path.write_text(damage(path.read_text()))
    found = failures(folder, keys / "p256.pub.pem")
    assert [*found] == [CHECK]
    assert found[CHECK].startswith("model.sig: ")
    assert "\n" not in found[CHECK]


def test_a_signature_that_does_not_say_whose_it_is_is_checked_all_the_same(folder, keys, capsys):
    """That name is no part of what is signed, and the package prints a warning, which is no JSON."""
    path = folder / "model.sig"
    path.write_text(edited(path.read_text(), ("verificationMaterial", "publicKey"), {}))
    assert failures(folder, keys / "p256.pub.pem") == {}
    assert CHECK in failures(folder, keys / "other.pub.pem")
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_signature_that_leaves_out_a_file_fails_and_names_it(folder, keys):
    """The package lets a signer ignore paths, and who verifies ignores them as well."""
    run_package("sign", folder, "--private_key", keys / "p256.pem", "--ignore-paths", folder / "config.json")
    assert run_package("verify", folder, "--public_key", keys / "p256.pub.pem") == 0
    assert failures(folder, keys / "p256.pub.pem") == {CHECK: "does not cover config.json"}


def run_package(job, folder, *arguments):
    """The exit status of the package's own command line."""
    command = [sys.executable, "-m", "model_signing", job, "key", folder, "--signature", folder / "model.sig"]
    return subprocess.run([*command, *arguments], capture_output=True, check=False).returncode


@pytest.mark.slow
def test_the_command_line_of_the_package_agrees_in_both_directions(folder, keys):
    public = ("--public_key", keys / "p256.pub.pem")
    assert run_package("verify", folder, *public) == 0
    assert run_package("sign", folder, "--private_key", keys / "p256.pem") == 0
    assert failures(folder, keys / "p256.pub.pem") == {}
    (folder / "config.json").write_text("{}")
    assert run_package("verify", folder, *public) != 0
    assert CHECK in failures(folder, keys / "p256.pub.pem")


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(way=st.sampled_from(tampering.WAYS), data=st.data())
def test_whatever_is_tampered_with_breaks_the_signature_also_with_a_fitting_receipt(way, data, signed, keys, tmp_path):
    folder = artifacts.copy(signed, tmp_path / "copy")
    way(folder, data.draw)
    artifacts.refit(folder)
    assert not integrity.verify_files(folder, key=keys / "p256.pub.pem").ok


def test_what_the_hub_and_git_put_beside_an_artifact_breaks_no_signature(folder, keys):
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    for name in (".cache/huggingface/download/config.json.metadata", ".git/HEAD"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("x\n")
    assert failures(folder, keys / "p256.pub.pem") == {}


def test_a_snapshot_of_the_hubs_cache_which_is_made_of_links_holds(signed, keys, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in signed.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert failures(snapshot, keys / "p256.pub.pem") == {}


# Keys

NO_PRIVATE = {
    "missing.pem": "No such file or directory; expected the PEM file of a private key",
    "text.pem": "is none that can be read; expected the PEM file of a private key",
    "p256.pub.pem": "is a public key; expected the PEM file of a private key",
    "bitcoin.pem": "Unsupported key for curve 'secp256k1'; expected a key of the curve P-256, P-384 or P-521",
    "ed25519.pem": "is of another kind; expected a private key of the curve P-256, P-384 or P-521",
    "rsa.pem": "is of another kind; expected a private key of the curve P-256, P-384 or P-521",
    "locked.pem": "the key is encrypted; expected a password: ADARAS_SIGN_PASSWORD, or a terminal to ask for it",
}


@pytest.mark.parametrize(("name", "reason"), NO_PRIVATE.items(), ids=NO_PRIVATE)
def test_what_is_no_private_key_is_refused_in_one_line(name, reason, exported, keys, tmp_path):
    folder = artifacts.copy(exported["peft"], tmp_path / "copy")
    with pytest.raises(ExportError) as caught:
        signing.sign(folder, keys / name)
    assert str(caught.value) == f"{keys / name}: {reason}"
    assert not (folder / "model.sig").exists()


NO_PUBLIC = {
    "missing.pem": "No such file or directory; expected the PEM file of a public key",
    "text.pem": "cannot be read ",
    "p256.pem": "is a private key; expected the PEM file of a public key",
    "bitcoin.pub.pem": "cannot be read ",
    "ed25519.pub.pem": "cannot be read ",
    "rsa.pub.pem": "cannot be read ",
}


@pytest.mark.parametrize(("name", "reason"), NO_PUBLIC.items(), ids=NO_PUBLIC)
def test_what_is_no_public_key_is_refused_in_one_line(name, reason, signed, keys):
    with pytest.raises(ArtifactError) as caught:
        integrity.verify_files(signed, key=keys / name)
    assert str(caught.value).startswith(f"{keys / name}: {reason}")
    assert "\n" not in str(caught.value)


def test_an_encrypted_key_signs_with_its_password_only(exported, keys, tmp_path):
    folder = artifacts.copy(exported["peft"], tmp_path / "copy")
    assert signing.is_encrypted(keys / "locked.pem")
    assert not signing.is_encrypted(keys / "p256.pem")
    with pytest.raises(ExportError, match="the password is wrong, or the key damaged"):
        signing.sign(folder, keys / "locked.pem", "close sesame")
    with pytest.raises(ExportError, match="the key is not encrypted; expected no password"):
        signing.sign(folder, keys / "p256.pem", "open sesame")
    signing.sign(folder, keys / "locked.pem", "open sesame")
    assert failures(folder, keys / "locked.pub.pem") == {}


def test_a_folder_that_is_not_as_its_receipt_says_is_not_signed(exported, keys, tmp_path):
    folder = artifacts.copy(exported["hf"], tmp_path / "copy")
    (folder / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"files changed: config.json; expected the files of its receipt only"):
        signing.sign(folder, keys / "p256.pem")
    with pytest.raises(ArtifactError, match=r"is no exported folder, it has no receipt.json"):
        signing.sign(keys, keys / "p256.pem")


def test_without_the_package_the_extra_is_named(exported, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for job in (signing.sign, signing.check):
        with pytest.raises(MissingExtraError, match=r"run: pip install 'model-signing>=1.1' '(?i:pyopenssl)>=24'"):
            job(exported["hf"], keys / "p256.pem")


def test_nothing_of_the_private_key_is_written(signed, keys):
    secret = b"".join((keys / "p256.pem").read_bytes().splitlines()[1:-1])[:40]
    assert not [path for path in signed.rglob("*") if path.is_file() and secret in path.read_bytes()]
