"""Whether a folder is the one that its receipt describes: without the base model, and without running anything of it.

Knows no format. It cannot know whether the receipt is the one that the artifact's author wrote: whoever edits files can
edit the receipt to fit. For that, `origin_checks` holds it against a SHA-256 from elsewhere, or a signature.
"""

import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from adaras_export.core.rule import SteeringRule
from adaras_export.delivery.receipt import UNREADABLE, Receipt, file_checks, read
from adaras_export.errors import AdarasError, ArtifactError
from adaras_export.exporters import manifest, payload_history
from adaras_export.exporters.checks import Check, ParityReport
from adaras_export.exporters.manifest import RECEIPT_FILE, RULE_FILE, SIGNATURE_FILE
from adaras_export.files import atomic, hub

_UNREADABLE_RULE = "rule that cannot be read"
FATAL = (UNREADABLE, _UNREADABLE_RULE)
"""The checks without which nothing else of an artifact can be looked into."""

_TEXTS = {".json", ".jinja", ".txt", ".md", ".yaml", ".html", ".css", ".js", ".mjs"}
_DATA = {*_TEXTS, ".safetensors", ".gguf", ".onnx", ".onnx_data", ".model", ".sig", ".wasm"}
"""Suffixes of what artifacts hold besides code of ours: nothing that Python runs or unpickles."""

_PYTHON = {".py", ".pyc", ".pyd", ".so", ".dll", ".dylib"}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz"}
_CODE = _PYTHON | _PICKLES
"""Suffixes that not even a licence may have; those of bases end in all sorts of things."""


def verify_files(path: str | Path, *, receipt: str | None = None, key: str | Path | None = None) -> ParityReport:
    """Check the files of an exported folder against its receipt: no base model, no torch, nothing is run.

    This finds any damage, and any change by somebody who left the receipt alone. Whoever rewrites the receipt as well
    is found only where ``receipt`` or ``key`` is given, or by `adaras_export.verify`, which has the base to compare
    with.

    Args:
        path: the folder.
        receipt: the SHA-256 that ``receipt.json`` must have, as its author told it elsewhere.
        key: PEM file of the public key that the folder must be signed with.

    Raises:
        ArtifactError: the folder is no export, or the key is none.
    """
    folder = Path(path)
    recorded = read(folder)
    return ParityReport((*origin_checks(folder, receipt, key), *content_checks(folder, recorded)))


def origin_checks(folder: Path, receipt: str | None, key: str | Path | None) -> list[Check]:
    """Whether the receipt is the one with this SHA-256, and the folder signed with this key, where they are given."""
    checks = []
    if receipt is not None:
        found = atomic.sha256_file(folder / RECEIPT_FILE)
        if not re.fullmatch("[0-9a-f]{64}", receipt.lower()):
            raise ArtifactError(f"--receipt {receipt}: expected a SHA-256, 64 hexadecimal digits")
        same = found == receipt.lower()
        checks.append(Check("receipt other than the one named", float(not same), 0, "" if same else found))
    if key is not None:
        from adaras_export.delivery import signing

        checks.append(signing.check(folder, key))
    elif (folder / SIGNATURE_FILE).exists():
        checks.append(Check("signed; the signature is not checked without --key", 1, None))
    return checks


def content_checks(folder: Path, receipt: Receipt) -> list[Check]:
    """Whether files, rule, base and code are those of the receipt and of this library."""
    checks = file_checks(folder, receipt)
    if any(check.name == UNREADABLE and not check.ok for check in checks):
        return checks
    failed = [check.name for check in receipt.parity.failed()]
    strange = [*_strange_code(folder), *_strange_pointers(folder)]
    return [
        *checks,
        *_rule_checks(folder, receipt),
        Check("checks that failed by the receipt itself", len(failed), 0, "; ".join(failed)),
        payload_history.check("code, or pointers to code, that are not this library's", folder, strange),
    ]


def _rule_checks(folder: Path, receipt: Receipt) -> list[Check]:
    path = folder / RULE_FILE
    try:
        rule = SteeringRule.load(path)
        found = {rule.fingerprint, atomic.sha256_file(path)}
    except AdarasError as error:
        return [Check(_UNREADABLE_RULE, 1, 0, str(error))]
    other = "" if found == {receipt.rule} else " ".join(sorted(found))
    return [
        Check("rule other than the receipt's", float(bool(other)), 0, f"{RULE_FILE}: {other}" if other else ""),
        _base_check(rule, receipt),
        _source_check(receipt),
    ]


def _base_check(rule: SteeringRule, receipt: Receipt) -> Check:
    name = "base other than the rule's"
    try:
        rule.base.require_same(receipt.base)
    except AdarasError as error:
        return Check(name, 1, 0, str(error))
    return Check(name, 0, 0)


def _source_check(receipt: Receipt) -> Check:
    """A base goes by its Hub id and a commit where it was fetched from the Hub, else by the name of its folder."""
    base, source = receipt.base, receipt.source
    if base.revision is None:
        same = Path(source).is_absolute() and base.id == Path(source).name
    else:
        same = base.id == source and hub.is_commit(base.revision)
    found = "" if same else f"{base.id} at revision {base.revision}, from {source}"
    return Check("base that goes by another name than its source", float(not same), 0, found)


def _strange_code(folder: Path) -> list[str]:
    """Files that could run and are not, byte for byte, what this library puts into artifacts under that name."""
    own = _payload()
    code = {name: path for name, path in manifest.files_of(folder).items() if not _is_data(path)}
    return [manifest.shown(name) for name, path in code.items() if name not in own or own[name] != path.read_bytes()]


def _is_data(path: Path) -> bool:
    suffix, is_licence = path.suffix.lower(), path.name.startswith(("LICENSE", "NOTICE"))
    return suffix in _DATA or (is_licence and suffix not in _CODE)


def _strange_pointers(folder: Path) -> list[str]:
    """Entries of configs that send from_pretrained to code elsewhere."""
    own = {name.removesuffix(".py") for name in _payload()}
    configs = {name: path for name, path in manifest.files_of(folder).items() if name.endswith("config.json")}
    return [
        f"{manifest.shown(name)}:auto_map"
        for name, path in configs.items()
        if not all(module in own for module in _modules(path))
    ]


def _modules(config: Path) -> Iterator[str]:
    """The modules that a config names; a file that is no JSON object names none, and nothing opens it either."""
    try:
        found = atomic.read_json(config)
    except ArtifactError:
        return
    for classes in _auto_maps(found):
        for name in _leaves(classes):
            if name is not None:
                yield str(name).rpartition(".")[0]


def _auto_maps(value: Any) -> Iterator[Any]:  # noqa: ANN401 - JSON
    """The values of all keys "auto_map", at any depth."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from [one] if key == "auto_map" else _auto_maps(one)
    elif isinstance(value, list):
        for one in value:
            yield from _auto_maps(one)


def _leaves(value: Any) -> Iterator[Any]:  # noqa: ANN401 - JSON
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _leaves(one)
    else:
        yield value


def _payload() -> dict[str, bytes]:
    files = resources.files("adaras_export.runtime").iterdir()
    return {file.name: file.read_bytes() for file in files if file.name.endswith(".py") and file.name != "__init__.py"}
