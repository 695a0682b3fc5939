"""The receipt of an artifact, one JSON file: its inputs, the SHA-256 of its files, and the measurements at the export.

This module runs no code of an artifact and needs no base model. docs/receipt.md describes the format.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

from adaras_export.core.base_model import BaseModel
from adaras_export.errors import AdarasError, ArtifactError
from adaras_export.exporters import manifest
from adaras_export.exporters.checks import Check, ParityReport
from adaras_export.exporters.manifest import RECEIPT_FILE, SIGNATURE_FILE, Disclosed, is_file, shown
from adaras_export.files import atomic
from adaras_export.files.hub import is_hub_id

_NOT_HASHED = {RECEIPT_FILE, SIGNATURE_FILE}  # the signature covers the receipt, and the receipt all other files

OFF = ("off, prefill logits", "off, decode logits")
"""The checks that switch the artifact off, or set strength 0, and compare it with the base."""

_VERSION = 2
_LIBRARIES = ("adaras-export", "torch", "transformers", "safetensors")
_OF_TARGET = {"onnx": ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai")}


@dataclass(frozen=True)
class Receipt:
    """The inputs, files and measurements of an export.

    Attributes:
        target: the exporter's name.
        options: the exporter's options that `verify` needs.
        repository: the artifact's name in the card: the folder's name, or a Hub id.
        drops: the features of the rule that the format cannot express.
        rule: SHA-256 of ``rule.safetensors``, the rule in the artifact.
        given_rule: SHA-256 of the rule given to `export`, before another strength or threshold.
        base: the base model.
        source: the location of the base: its Hub id, or the absolute path of its folder.
        base_tensors: SHA-256 of the bytes of each tensor of the base, by checkpoint key.
        base_card: the fields of the base's card that the artifact's card repeats: license, languages and others.
        parity: every check, with figure and limit.
        files: SHA-256 of every other file, by its path within the folder.
        tensors: every tensor that is not the base's, with its SHA-256.
        chat_template: whether the base has a chat template, which the card's example then uses.
        datasets: Hub ids of the datasets that the rule was made with, if its publisher names them.
        versions: of Python, this library, and the libraries of the export.
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
    tensors: Sequence[Disclosed]
    chat_template: bool = False
    datasets: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_types(vars(self), _TYPES)
        for name in ("files", "base_tensors", "versions"):
            _require_types(getattr(self, name), dict.fromkeys(getattr(self, name), str))
        for name in ("drops", "datasets"):
            listed = {f"{name}[{place}]": entry for place, entry in enumerate(getattr(self, name))}
            _require_types(listed, dict.fromkeys(listed, str))
        if strange := [name for name in self.datasets if not is_hub_id(name)]:
            raise ArtifactError(f"datasets {strange}; expected Hub ids")

    @property
    def strength_zero(self) -> dict[str, float] | None:
        """The largest distance of the logits at strength 0 from the base's, and its limit; 0 and 0 is bit for bit.

        None if the artifact cannot be switched off.
        """
        off = [check for check in self.parity.checks if check.name in OFF]
        if not off:
            return None
        return {"difference": max(check.figure for check in off), "limit": max(check.limit or 0.0 for check in off)}

    def to_bytes(self) -> bytes:
        """The file's bytes: sorted JSON."""
        values = {**vars(self), "base": self.base.as_record(), "parity": self.parity.as_record()}
        values["tensors"] = [tensor.as_record() for tensor in self.tensors]
        values["strength_zero"] = self.strength_zero
        return (json.dumps({"version": _VERSION, **values}, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()

    def write(self, folder: Path) -> None:
        """Write the receipt into the folder, atomically."""
        atomic.replace_file(folder / RECEIPT_FILE, self.to_bytes())


_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("target", "repository", "rule", "given_rule", "source"), str),
    **dict.fromkeys(("options", "base_tensors", "base_card", "files", "versions"), Mapping),
    **dict.fromkeys(("drops", "tensors", "datasets"), (list, tuple)),
    "chat_template": bool,
}


def read(folder: Path) -> Receipt:
    """The receipt of an exported folder.

    Raises:
        ArtifactError: the folder has no receipt, or the receipt is damaged or of another version.
    """
    path = folder / RECEIPT_FILE
    if not path.is_file():
        fault = f"{path}: is no file" if path.exists() else f"{folder}: is no exported folder, it has no {RECEIPT_FILE}"
        raise ArtifactError(f"{fault}; expected a folder that adaras-export export wrote")
    record = atomic.read_json(path)
    if (number := record.pop("version", None)) != _VERSION:
        raise ArtifactError(f"{path}: receipt of version {number}; expected {_VERSION}; export again")
    try:
        base, strength_zero = BaseModel.from_record(record.pop("base"), str(path)), record.pop("strength_zero")
        parity = ParityReport.from_record(record.pop("parity"))
        tensors = tuple(Disclosed.from_record(entry) for entry in record.pop("tensors"))
        receipt = Receipt(**record, base=base, parity=parity, tensors=tensors)
    except (KeyError, TypeError, AdarasError) as error:
        raise ArtifactError(f"{path}: damaged receipt ({error}); export again") from error
    if strength_zero != receipt.strength_zero:
        raise ArtifactError(
            f"{path}: strength_zero {strength_zero}; its checks say {receipt.strength_zero}; export again"
        )
    return receipt


def read_whole(folder: Path) -> Receipt:
    """The receipt of a folder whose files are those that it describes.

    Raises:
        ArtifactError: the receipt cannot be read, or the files differ from it.
    """
    receipt = read(folder)
    if broken := [check for check in file_checks(folder, receipt) if not check.ok]:
        faults = "; ".join(f"{check.name}: {check.detail}" for check in broken)
        raise ArtifactError(f"{folder}: {faults}; expected the files of its receipt only; export again")
    return receipt


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of an artifact except receipt and signature.

    Raises:
        ArtifactError: an entry is not a file, or cannot be read.
    """
    contents = _contents(folder)
    if strange := [shown(name) for name, content in contents.items() if content is None]:
        raise ArtifactError(f"{folder}: {', '.join(strange)}: expected files that can be read; remove it")
    return {name: content for name, content in contents.items() if content is not None}


def file_checks(folder: Path, receipt: Receipt) -> list[Check]:
    """Compare the files of a folder with its receipt; this needs no base and runs no code."""
    expected, actual = receipt.files, _contents(folder)
    kinds = {
        "files changed": [name for name in expected if actual.get(name) not in (None, expected[name])],
        "files missing": expected.keys() - actual.keys(),
        "files unknown": actual.keys() - expected.keys(),
        UNREADABLE: [name for name, content in actual.items() if content is None],
    }
    return [Check.empty(kind, [*map(shown, sorted(names))]) for kind, names in kinds.items()]


UNREADABLE = "entries that are no readable files"


def _contents(folder: Path) -> dict[str, str | None]:
    """SHA-256 of every entry except receipt and signature; None for an entry that is not a readable file."""
    return {name: _content(path) for name, path in manifest.entries(folder).items() if name not in _NOT_HASHED}


def _content(path: Path) -> str | None:
    try:
        return atomic.sha256_file(path) if is_file(path) else None  # reading a pipe could wait for ever
    except ArtifactError:
        return None


def current_versions(target: str) -> dict[str, str]:
    """Versions of Python, this library, and the libraries that affect a target's files and figures."""
    own = {name: found.version for name in _OF_TARGET.get(target, ()) for found in distributions(name=name)}
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}, **own}


def version_checks(receipt: Receipt) -> list[Check]:
    """Report versions of the export that differ from the installed ones; a difference is no failure."""
    here = current_versions(receipt.target)
    other = [
        f"{name} {recorded} (here {here.get(name, 'none')})"
        for name, recorded in sorted(receipt.versions.items())
        if here.get(name) != recorded
    ]
    return [Check("versions other than the export's", len(other), None, ", ".join(other))] if other else []


def _require_types(values: Mapping[str, Any], types: Mapping[str, type | tuple[type, ...]]) -> None:
    for name, expected in types.items():
        if not isinstance(values[name], expected):
            raise TypeError(f"{name} is a {type(values[name]).__name__}")
