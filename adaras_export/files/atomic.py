"""Atomic writes, appends, links, hashes, and JSON files. A write replaces the whole file or leaves it unchanged."""

import errno
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from adaras_export.errors import ArtifactError
from adaras_export.files import safe_read
from adaras_export.files.safe_read import UnreadableError


def replace_file(path: str | Path, content: bytes) -> None:
    """Write ``content`` to ``path`` through a temporary file beside it, so that no reader sees a part.

    Raises:
        ArtifactError: the folder is missing, not writable, or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror}); nothing was changed") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def append(path: Path, content: bytes) -> None:
    """Append to a file, or create it; the content is on disk when this returns. The caller handles an OSError."""
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def link_or_copy(source: Path, target: Path, *, copy: bool = False) -> None:
    """Hard-link ``source`` as ``target``; copy it if ``copy`` is set or the file system cannot link it."""
    source = source.resolve()  # the files of a Hub snapshot are symbolic links
    if copy:
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError as error:
        # Another file system, one without hard links, too many links, or a file of another user.
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        shutil.copyfile(source, target)


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ArtifactError: the file is missing, is not JSON, or holds another value than an object.
    """
    try:
        value = safe_read.parsed(safe_read.content(Path(path)))
    except UnreadableError as error:
        raise ArtifactError(f"{path}: {error}; expected a JSON object") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: holds a {type(value).__name__}; expected a JSON object")
    return value


def sha256(content: bytes) -> str:
    """The SHA-256 of ``content``, hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file, hexadecimal, read in pieces of 1 MiB.

    Raises:
        ArtifactError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({safe_read.reason(error)}); expected a file to hash") from error
    return digest.hexdigest()
