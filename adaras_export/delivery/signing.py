"""Sign an exported folder with a private key, and check the signature: OpenSSF's format, by its package model-signing.

A signature lies in ``model.sig`` and covers every other file, the receipt included. Keys are PEM files of elliptic
curves; they are read, and never written, copied or shown. What the files are for, it does not know.
"""

import base64
import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaras_export.delivery import receipt
from adaras_export.errors import ArtifactError, ExportError, first_line, require
from adaras_export.exporters import manifest
from adaras_export.exporters.checks import Check
from adaras_export.exporters.manifest import SIGNATURE_FILE
from adaras_export.files import atomic

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

PASSWORD = "ADARAS_SIGN_PASSWORD"
"""The environment variable that the command line takes a key's password from."""

# What git and the Hub put beside an artifact; `receipts.entries` looks at all the rest.
_IGNORED = (SIGNATURE_FILE, ".git", ".gitattributes", ".cache/huggingface")


def is_encrypted(key: str | Path) -> bool:
    """Whether a private key needs a password.

    Raises:
        ExportError: the file is missing, or no private key.
    """
    try:
        _private_key(Path(key), None)
    except TypeError:
        return True
    return False


def require_key(key: str | Path, password: str | None = None) -> None:
    """Refuse a private key that `sign` could not use.

    Raises:
        ExportError: it is no such key, or the password is not its.
        MissingExtraError: model-signing is not installed.
    """
    _signer(_library(), Path(key), password)


def sign(path: str | Path, key: str | Path, password: str | None = None) -> Path:
    """Sign a folder; a signature that it has is replaced. Returns the file of the signature.

    Args:
        path: the folder, with files as its receipt says.
        key: PEM file of a private key on the curve P-256, P-384 or P-521.
        password: of the key, where it is encrypted.

    Raises:
        ExportError: the key is no such key, or the password is not its.
        ArtifactError: the folder is no export, or its files are not those of its receipt.
        MissingExtraError: model-signing is not installed.
    """
    folder, library = Path(path), _library()
    signer = _signer(library, Path(key), password)
    receipt.read_whole(folder)  # what is damaged is not signed
    how = library.hashing.Config().set_ignored_paths(paths=_IGNORED, ignore_git_paths=False)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            signer.set_hashing_config(how).sign(folder, Path(scratch, SIGNATURE_FILE))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{folder}: cannot be signed ({first_line(error)})") from error
        atomic.replace_file(folder / SIGNATURE_FILE, Path(scratch, SIGNATURE_FILE).read_bytes())
    return folder / SIGNATURE_FILE


def check(folder: Path, key: str | Path) -> Check:
    """Whether a folder is signed with the private key of this public one, and every file of it is as it was then.

    Raises:
        ArtifactError: the key is no public key.
        MissingExtraError: model-signing is not installed.
    """
    verifier = _verifier(_library(), Path(key))
    name = "signature that is missing or does not hold"
    path = folder / SIGNATURE_FILE
    if not path.is_file():
        return Check(name, 1, 0, f"{SIGNATURE_FILE}: no such file")
    try:
        _require_valid(verifier, folder)
    except ArtifactError as error:
        return Check(name, 1, 0, f"{SIGNATURE_FILE}: {error}")
    if uncovered := sorted(manifest.entries(folder).keys() - _covered(path) - {SIGNATURE_FILE}):
        return Check(name, len(uncovered), 0, f"does not cover {' '.join(map(manifest.shown, uncovered))}")
    return Check(name, 0, 0)


def _library() -> Any:  # noqa: ANN401 - a module
    return require("model_signing", "sign", "a signature")


def _signer(library: Any, key: Path, password: str | None) -> Any:  # noqa: ANN401 - classes of model-signing
    secret = None if password is None else password.encode()
    try:
        _private_key(key, secret)
        # As bytes: model-signing 1.1 hands it on to cryptography, which takes no text.
        return library.signing.Config().use_elliptic_key_signer(private_key=key, password=secret)
    except TypeError as error:
        found = "is encrypted" if password is None else "is not encrypted"
        wanted = f"a password: {PASSWORD}, or a terminal to ask for it" if password is None else "no password"
        raise ExportError(f"{key}: the key {found}; expected {wanted}") from error
    except ValueError as error:
        raise ExportError(f"{key}: {first_line(error)}; expected a key of the curve P-256, P-384 or P-521") from error


def _private_key(key: Path, password: bytes | None) -> "EllipticCurvePrivateKey":
    """The key in a PEM file.

    Raises:
        ExportError: there is none.
        TypeError: it is encrypted and no password was given, or the other way round.
    """
    _library()  # which needs cryptography, and whose extra the error names
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        content = key.read_bytes()
        found = load_pem_private_key(content, password)
    except OSError as error:
        raise ExportError(f"{key}: {error.strerror}; expected the PEM file of a private key") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        reason = "the password is wrong, or the key damaged" if password is not None else "is none that can be read"
        reason = "is a public key" if b"BEGIN PUBLIC KEY" in content else reason
        raise ExportError(f"{key}: {reason}; expected the PEM file of a private key") from error
    if not isinstance(found, EllipticCurvePrivateKey):
        raise ExportError(f"{key}: is of another kind; expected a private key of the curve P-256, P-384 or P-521")
    return found


def _verifier(library: Any, key: Path) -> Any:  # noqa: ANN401 - classes of model-signing
    try:
        # Links, as the Hub's cache has them, are followed: what counts is the content.
        how = (
            library.hashing.Config().set_allow_symlinks(True).set_ignored_paths(paths=_IGNORED, ignore_git_paths=False)
        )
        return library.verifying.Config().use_elliptic_key_verifier(public_key=key).set_hashing_config(how)
    except OSError as error:
        raise ArtifactError(f"{key}: {error.strerror}; expected the PEM file of a public key") from error
    except Exception as error:  # cryptography has errors of its own for each kind of file that is no such key
        found = "is a private key" if b"PRIVATE KEY" in key.read_bytes() else f"is none ({first_line(error)})"
        raise ArtifactError(
            f"{key}: {found}; expected the PEM file of a public key of the curve P-256, P-384 or P-521"
        ) from error


def _require_valid(verifier: Any, folder: Path) -> None:  # noqa: ANN401 - a class of model-signing
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a warning of signatures that name no key
            verifier.verify(folder, folder / SIGNATURE_FILE)
    except Exception as error:  # a file of others, on which the package fails in many ways
        raise ArtifactError(first_line(error) or "made with another key, or damaged") from error


def _covered(signature: Path) -> set[str]:
    """The names of the files that a signature, which holds, is about: it could have left out some."""
    statement = json.loads(base64.b64decode(json.loads(signature.read_bytes())["dsseEnvelope"]["payload"]))
    return {resource["name"] for resource in statement.get("predicate", {}).get("resources", [])}
