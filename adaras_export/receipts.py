"""The receipt of an artifact: what it was made of, the SHA-256 of what it holds, and what was measured. One JSON file.

Runs nothing and needs no base model. The format is described in docs/receipt.md.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from adaras_export import storage
from adaras_export.checks import Check, ParityReport
from adaras_export.errors import AdarasError, ArtifactError
from adaras_export.models import BaseModel

RECEIPT_FILE = "receipt.json"
RULE_FILE = "rule.safetensors"
CARD_FILE = "README.md"
EVALUATION_FILE = "evaluation.json"
SIGNATURE_FILE = "model.sig"

DESCRIBING = {CARD_FILE, EVALUATION_FILE, RECEIPT_FILE, RULE_FILE, SIGNATURE_FILE}
"""The files that every artifact may have, whatever its format."""

_NOT_HASHED = {RECEIPT_FILE, SIGNATURE_FILE}  # a signature covers the receipt, the receipt all the rest
_NOT_OURS = {".cache", ".git", ".gitattributes", "__pycache__"}  # put there by the Hub, git and Python

_VERSION = 2
_LIBRARIES = ("adaras-export", "torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Receipt:
    """What was written, from what, and how it was found to behave.

    Attributes:
        target: the exporter's name.
        options: the exporter's own options, as `verify` needs them.
        repository: what the card calls the artifact: the folder's name, or a Hub id.
        drops: the features that the format left out.
        rule: SHA-256 of ``rule.safetensors``, the rule that the artifact carries.
        given_rule: that of the rule that `export` was given, before another strength or threshold.
        base: the model that it was made on.
        source: where that model was: its Hub id, or the absolute path of its folder.
        base_tensors: SHA-256 of the bytes of each tensor of the base, by checkpoint key.
        base_card: what the card says of the base: license, languages and the like, as the base's own card has them.
        parity: every check, with figure and limit.
        files: SHA-256 of every other file, by its path within the folder.
        versions: of Python, this library, and the libraries that it ran with.
    """

    target: str
    options: Mapping[str, Any]
    repository: str
    drops: Sequence[str]
    rule: str
    given_rule: str
    base: BaseModel
    source: str
    base_tensors: Mapping[str, str]
    base_card: Mapping[str, Any]
    parity: ParityReport
    files: Mapping[str, str]
    versions: Mapping[str, str] = field(default_factory=lambda: current_versions())

    def __post_init__(self) -> None:
        _require_types(vars(self), _TYPES)
        for name in ("files", "base_tensors", "versions"):
            _require_types(getattr(self, name), dict.fromkeys(getattr(self, name), str))

    def to_bytes(self) -> bytes:
        """The file's bytes: sorted JSON."""
        values = {**vars(self), "base": self.base.as_record(), "parity": self.parity.as_record()}
        return (json.dumps({"version": _VERSION, **values}, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()

    def write(self, folder: Path) -> None:
        """Put it into the folder, atomically."""
        storage.replace_file(folder / RECEIPT_FILE, self.to_bytes())


_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("target", "repository", "rule", "given_rule", "source"), str),
    **dict.fromkeys(("options", "base_tensors", "base_card", "files", "versions"), Mapping),
    "drops": (list, tuple),
}


def read(folder: Path) -> Receipt:
    """The receipt of an exported folder.

    Raises:
        ArtifactError: there is none, or it is damaged, or of another version.
    """
    path = folder / RECEIPT_FILE
    record = storage.read_json(path)
    if (found := record.pop("version", None)) != _VERSION:
        raise ArtifactError(f"{path}: receipt of version {found}; expected {_VERSION}; export again")
    try:
        base = BaseModel.from_record(record.pop("base"), str(path))
        return Receipt(**{**record, "base": base, "parity": ParityReport.from_record(record.pop("parity"))})
    except (KeyError, TypeError, AdarasError) as error:
        raise ArtifactError(f"{path}: damaged receipt ({error}); export again") from error


def files_of(folder: Path) -> dict[str, Path]:
    """The files of an artifact by path within its folder, without what the Hub, git and Python put beside them."""
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name.as_posix(): path for name, path in files.items() if not _NOT_OURS & {*name.parts}}


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of an artifact but receipt and signature."""
    return {name: storage.sha256_file(path) for name, path in files_of(folder).items() if name not in _NOT_HASHED}


def file_checks(folder: Path, receipt: Receipt) -> list[Check]:
    """Hold the files of a folder against its receipt; needs no base and runs nothing."""
    expected, found = receipt.files, hashes(folder)
    changed = sorted(name for name in expected if name in found and found[name] != expected[name])
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    return [
        Check(f"files {word}", len(names), 0, " ".join(names))
        for word, names in (("changed", changed), ("missing", missing), ("unknown", unknown))
    ]


def current_versions() -> dict[str, str]:
    """Of Python, this library, and the libraries that decide figures."""
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}


def _require_types(values: Mapping[str, Any], types: Mapping[str, type | tuple[type, ...]]) -> None:
    for name, expected in types.items():
        if not isinstance(values[name], expected):
            raise TypeError(f"{name} is a {type(values[name]).__name__}")
