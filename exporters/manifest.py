"""The tensors of an artifact that are not its base's: what the receipt lists, the card shows and `verify` finds again.

Knows them by name, file and hash; reads no files and knows no format.
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
_NOT_OURS = re.compile(r"\.git/|\.gitattributes\Z|\.cache/huggingface/")  # put there by git and the Hub

What = Literal["added", "changed"]


@dataclass(frozen=True)
class Disclosed:
    """A tensor, or a function of a graph, that the base lacks or has with other bytes.

    Attributes:
        name: as the file has it.
        file: path within the artifact.
        dtype: as safetensors writes types: F32, I64, ...; "function" for a function of a graph.
        shape: empty for a number and for a function.
        sha256: of its bytes.
        what: "added" where the base has no tensor of this name, "changed" where it has another.
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
        """JSON values."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_record(cls, record: Any) -> "Disclosed":  # noqa: ANN401 - comes from a file
        """The value that `as_record` described.

        Raises:
            ArtifactError: the record is not of that form.
        """
        try:
            return cls(**{**record, "shape": tuple(record["shape"])})
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"tensors: damaged entry ({error}); expected name, file, dtype, ...") from error

    @property
    def only_zeros(self) -> bool:
        """Whether every byte of it is 0, by its hash."""
        size = _SIZES.get(self.dtype, 0) * prod(self.shape)
        return 0 < size <= _LARGEST and self.sha256 == _hash_of_zeros(size)


_LARGEST = 1 << 26  # a bias or a vector; larger ones are not looked at, as a hostile receipt may claim any shape
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}


def differing(found: Sequence[Disclosed], expected: Sequence[Disclosed]) -> list[str]:
    """Names of what only one of two lists has, or has with another file, type, shape or hash."""
    return sorted({one.name for one in {*found} ^ {*expected}})


@cache
def _hash_of_zeros(count: int) -> str:
    digest, piece = hashlib.sha256(), bytes(1 << 20)
    for start in range(0, count, 1 << 20):
        digest.update(piece[: count - start])
    return digest.hexdigest()


def entries(folder: Path) -> dict[str, Path]:
    """All that an artifact's folder holds but plain folders, by path within it: files, links to folders, pipes, ...

    Without what the Hub and git put beside it.
    """
    found: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=lambda error: found.append(Path(error.filename))):
        links = [name for name in folders if Path(parent, name).is_symlink()]  # whose content nobody looks at
        found.extend(Path(parent, name) for name in (*files, *links))
    named = {path.relative_to(folder).as_posix(): path for path in sorted(found)}
    return {name: path for name, path in named.items() if not _NOT_OURS.match(name)}


def files_of(folder: Path) -> dict[str, Path]:
    """The files among the `entries` of a folder."""
    return {name: path for name, path in entries(folder).items() if is_file(path)}


def shown(name: str) -> str:
    """A file's name as it is printed: in escapes where it could break a line or look like another one."""
    return name if name.isascii() and name.isprintable() and " " not in name else ascii(name)


def is_file(path: Path) -> bool:
    """Whether it is a file, or a link to one."""
    try:
        return path.is_file()
    except OSError:  # a folder on the way of a link that may not be entered
        return False
