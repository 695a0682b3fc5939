"""Sign an exported folder with a private key, and check the signature, with the OpenSSF's package model-signing.

The signature is ``model.sig`` and covers every other file, including the receipt. Keys are PEM files of elliptic
curves; they are only read, never written, copied or shown.
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
"""The environment variable from which the command line reads a key's password."""

# The signature and the files of git and the Hub; `manifest.entries` lists all others.
_IGNORED = (SIGNATURE_FILE, ".git", ".gitattributes", ".cache/huggingface")


def is_encrypted(key: str | Path) -> bool:
    """Whether a private key needs a password.

    Raises:
        ExportError: the file is missing, or is not a private key.
    """
    try:
        _private_key(Path(key), None)
    except TypeError:
        return True
    return False


def require_key(key: str | Path, password: str | None = None) -> None:
    """Refuse a private key that `sign` cannot use.

    Raises:
        ExportError: the file is not a private key on a supported curve, or the password is wrong.
        MissingExtraError: model-signing is not installed.
    """
    _signer(_library(), Path(key), password)


def sign(path: str | Path, key: str | Path, password: str | None = None) -> Path:
    """Sign a folder, replacing an earlier signature; return the path of the signature.

    Args:
        path: the folder, whose files must match its receipt.
        key: PEM file of a private key on the curve P-256, P-384 or P-521.
        password: the key's password, if it is encrypted.

    Raises:
        ExportError: the file is not a private key on such a curve, or the password is wrong.
        ArtifactError: the folder has no receipt, or its files differ from the receipt.
        MissingExtraError: model-signing is not installed.
    """
    folder, library = Path(path), _library()
    signer = _signer(library, Path(key), password)
    receipt.read_whole(folder)  # refuses a damaged folder
    hashing = library.hashing.Config().set_ignored_paths(paths=_IGNORED, ignore_git_paths=False)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            signer.set_hashing_config(hashing).sign(folder, Path(scratch, SIGNATURE_FILE))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{folder}: cannot be signed ({first_line(error)})") from error
        atomic.replace_file(folder / SIGNATURE_FILE, Path(scratch, SIGNATURE_FILE).read_bytes())
    return folder / SIGNATURE_FILE


def check(folder: Path, key: str | Path) -> Check:
    """Check that a folder is signed with this public key's private key, and that no file has changed since.

    Raises:
        ArtifactError: the file is not a public key.
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
        # As bytes: model-signing 1.1 passes the password to cryptography, which accepts no text.
        return library.signing.Config().use_elliptic_key_signer(private_key=key, password=secret)
    except TypeError as error:
        state = "is encrypted" if password is None else "is not encrypted"
        expected = f"a password: {PASSWORD}, or a terminal to ask for it" if password is None else "no password"
        raise ExportError(f"{key}: the key {state}; expected {expected}") from error
    except ValueError as error:
        raise ExportError(f"{key}: {first_line(error)}; expected a key of the curve P-256, P-384 or P-521") from error


def _private_key(key: Path, password: bytes | None) -> "EllipticCurvePrivateKey":
    """The key in a PEM file.

    Raises:
        ExportError: the file has no private key on an elliptic curve that can be read.
        TypeError: the key is encrypted and no password was given, or the reverse.
    """
    _library()  # it installs cryptography; if it is missing, the error names the extra
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        content = key.read_bytes()
        private = load_pem_private_key(content, password)
    except OSError as error:
        raise ExportError(f"{key}: {error.strerror}; expected the PEM file of a private key") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        reason = "the password is wrong, or the key damaged" if password is not None else "is none that can be read"
        reason = "is a public key" if b"BEGIN PUBLIC KEY" in content else reason
        raise ExportError(f"{key}: {reason}; expected the PEM file of a private key") from error
    if not isinstance(private, EllipticCurvePrivateKey):
        raise ExportError(f"{key}: is of another kind; expected a private key of the curve P-256, P-384 or P-521")
    return private


def _verifier(library: Any, key: Path) -> Any:  # noqa: ANN401 - classes of model-signing
    try:
        # Links are followed, since the Hub's cache consists of them; their content is checked.
        hashing = (
            library.hashing.Config().set_allow_symlinks(True).set_ignored_paths(paths=_IGNORED, ignore_git_paths=False)
        )
        return library.verifying.Config().use_elliptic_key_verifier(public_key=key).set_hashing_config(hashing)
    except OSError as error:
        raise ArtifactError(f"{key}: {error.strerror}; expected the PEM file of a public key") from error
    except Exception as error:  # cryptography raises another error for each kind of wrong file
        reason = "is a private key" if b"PRIVATE KEY" in key.read_bytes() else f"cannot be read ({first_line(error)})"
        raise ArtifactError(
            f"{key}: {reason}; expected the PEM file of a public key of the curve P-256, P-384 or P-521"
        ) from error


def _require_valid(verifier: Any, folder: Path) -> None:  # noqa: ANN401 - a class of model-signing
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the package prints a warning if a signature names no key
            verifier.verify(folder, folder / SIGNATURE_FILE)
    except Exception as error:  # on an untrusted file the package fails in many ways
        raise ArtifactError(first_line(error) or "made with another key, or damaged") from error


def _covered(signature: Path) -> set[str]:
    """The names of the files that a valid signature covers; it may leave out some."""
    statement = json.loads(base64.b64decode(json.loads(signature.read_bytes())["dsseEnvelope"]["payload"]))
    return {resource["name"] for resource in statement.get("predicate", {}).get("resources", [])}
