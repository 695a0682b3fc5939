"""The manifest of an artifact: its tensors that the base lacks or has with other bytes, and its files.

The receipt lists these tensors, the card shows them, and `verify` compares them.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

from adaras_export.errors import ArtifactError

RECEIPT_FILE = "receipt.json"
RULE_FILE = "rule.safetensors"
CARD_FILE = "README.md"
EVALUATION_FILE = "evaluation.json"
RESULTS_FILE = ".eval_results/adaras.yaml"
SIGNATURE_FILE = "model.sig"
DESCRIBING = {CARD_FILE, EVALUATION_FILE, RESULTS_FILE, RECEIPT_FILE, RULE_FILE, SIGNATURE_FILE}
_NOT_OURS = re.compile(r"\.git/|\.gitattributes\Z|\.cache/huggingface/")  # written by git and the Hub

What = Literal["added", "changed"]


@dataclass(frozen=True)
class Disclosed:
    """A tensor, or a function of a graph, that the base lacks or has with other bytes.

    Attributes:
        name: name in the file.
        file: path within the artifact.
        dtype: safetensors' name of the type (F32, I64, ...); "function" for a function of a graph.
        shape: empty for a scalar and for a function.
        sha256: SHA-256 of the bytes.
        what: "added" if the base has no tensor of this name, "changed" if it has one with other bytes.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    what: What

    def __post_init__(self) -> None:
        texts = (self.name, self.file, self.dtype, self.sha256)
        good = all(isinstance(text, str) for text in texts) and self.what in get_args(What)
        if not good or not all(type(size) is int and size >= 0 for size in self.shape):
            raise ArtifactError(f"tensor {self.name!r}: damaged entry; expected name, file, dtype, shape, sha256, what")

    def as_record(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_record(cls, record: Any) -> "Disclosed":  # noqa: ANN401 - comes from a file
        """The value that `as_record` described.

        Raises:
            ArtifactError: the record has another form.
        """
        try:
            return cls(**{**record, "shape": tuple(record["shape"])})
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"tensors: damaged entry ({error}); expected name, file, dtype, ...") from error

    @property
    def only_zeros(self) -> bool:
        """Whether all bytes are 0, by the hash."""
        size = _SIZES.get(self.dtype, 0) * prod(self.shape)
        return 0 < size <= _LARGEST and self.sha256 == _hash_of_zeros(size)


_LARGEST = 1 << 26  # enough for a bias or a vector; a hostile receipt can claim any shape
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}


def differing(found: Sequence[Disclosed], expected: Sequence[Disclosed]) -> list[str]:
    """Names of tensors that only one list has, or whose entries differ."""
    return sorted({tensor.name for tensor in {*found} ^ {*expected}})


@cache
def _hash_of_zeros(count: int) -> str:
    digest, piece = hashlib.sha256(), bytes(1 << 20)
    for start in range(0, count, 1 << 20):
        digest.update(piece[: count - start])
    return digest.hexdigest()


def entries(folder: Path) -> dict[str, Path]:
    """All entries of an artifact's folder by path within it, except folders: files, links to folders, pipes, ...

    Files of git and of the Hub's cache are left out.
    """
    paths: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=lambda error: paths.append(Path(error.filename))):
        links = [name for name in folders if Path(parent, name).is_symlink()]  # os.walk does not follow them
        paths.extend(Path(parent, name) for name in (*files, *links))
    named = {path.relative_to(folder).as_posix(): path for path in sorted(paths)}
    return {name: path for name, path in named.items() if not _NOT_OURS.match(name)}


def files_of(folder: Path) -> dict[str, Path]:
    """The files among the `entries` of a folder."""
    return {name: path for name, path in entries(folder).items() if is_file(path)}


def shown(name: str) -> str:
    """A file name for output; escaped if it has spaces, unprintable characters or characters beyond ASCII."""
    return name if name.isascii() and name.isprintable() and " " not in name else ascii(name)


def is_file(path: Path) -> bool:
    """Whether a path is a file, or a link to one."""
    try:
        return path.is_file()
    except OSError:  # a link through a folder without access
        return False
