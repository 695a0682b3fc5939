"""Check that a folder matches its receipt, without the base model and without running code of the folder.

The receipt itself may be forged, since anyone who can edit the files can edit the receipt to fit. `origin_checks`
therefore compares it with a SHA-256 from another source, or checks a signature.
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
"""If one of these checks fails, no other part of an artifact can be checked."""

_TEXTS = {".json", ".jinja", ".txt", ".md", ".yaml", ".html", ".css", ".js", ".mjs"}
_DATA = {*_TEXTS, ".safetensors", ".gguf", ".onnx", ".onnx_data", ".model", ".sig", ".wasm"}
"""Suffixes of an artifact's files besides our code; Python neither runs nor unpickles such files."""

_PYTHON = {".py", ".pyc", ".pyd", ".so", ".dll", ".dylib"}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz"}
_CODE = _PYTHON | _PICKLES
"""Suffixes that even a licence file must not have; licence files of bases have many other suffixes."""


def verify_files(path: str | Path, *, receipt: str | None = None, key: str | Path | None = None) -> ParityReport:
    """Check the files of an exported folder against its receipt, without base model or torch; runs no code.

    This finds damage, and any change that leaves the receipt alone. It finds a rewritten receipt only with ``receipt``
    or ``key``; `adaras_export.verify` compares such a folder with the base.

    Args:
        path: the folder.
        receipt: the SHA-256 that ``receipt.json`` must have, as its author published it elsewhere.
        key: PEM file of the public key that the folder must be signed with.

    Raises:
        ArtifactError: the folder has no receipt, ``receipt`` is not a SHA-256, or ``key`` is not a public key.
    """
    folder = Path(path)
    recorded = read(folder)
    return ParityReport((*origin_checks(folder, receipt, key), *content_checks(folder, recorded)))


def origin_checks(folder: Path, receipt: str | None, key: str | Path | None) -> list[Check]:
    """Check the receipt's SHA-256 and the folder's signature, if they are given."""
    checks = []
    if receipt is not None:
        actual = atomic.sha256_file(folder / RECEIPT_FILE)
        if not re.fullmatch("[0-9a-f]{64}", receipt.lower()):
            raise ArtifactError(f"--receipt {receipt}: expected a SHA-256, 64 hexadecimal digits")
        same = actual == receipt.lower()
        checks.append(Check("receipt other than the one named", float(not same), 0, "" if same else actual))
    if key is not None:
        from adaras_export.delivery import signing

        checks.append(signing.check(folder, key))
    elif (folder / SIGNATURE_FILE).exists():
        checks.append(Check("signed; the signature is not checked without --key", 1, None))
    return checks


def content_checks(folder: Path, receipt: Receipt) -> list[Check]:
    """Check files, rule and base against the receipt, and code against this library."""
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
        digests = {rule.fingerprint, atomic.sha256_file(path)}
    except AdarasError as error:
        return [Check(_UNREADABLE_RULE, 1, 0, str(error))]
    other = "" if digests == {receipt.rule} else " ".join(sorted(digests))
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
    """A base from the Hub has its Hub id and a commit; any other base has the name of its folder."""
    base, source = receipt.base, receipt.source
    if base.revision is None:
        same = Path(source).is_absolute() and base.id == Path(source).name
    else:
        same = base.id == source and hub.is_commit(base.revision)
    detail = "" if same else f"{base.id} at revision {base.revision}, from {source}"
    return Check("base that goes by another name than its source", float(not same), 0, detail)


def _strange_code(folder: Path) -> list[str]:
    """Files that could run and differ from this library's own file of that name."""
    own = _payload()
    code = {name: path for name, path in manifest.files_of(folder).items() if not _is_data(path)}
    return [manifest.shown(name) for name, path in code.items() if name not in own or own[name] != path.read_bytes()]


def _is_data(path: Path) -> bool:
    suffix, is_licence = path.suffix.lower(), path.name.startswith(("LICENSE", "NOTICE"))
    return suffix in _DATA or (is_licence and suffix not in _CODE)


def _strange_pointers(folder: Path) -> list[str]:
    """Entries of configs that point from_pretrained to other code."""
    own = {name.removesuffix(".py") for name in _payload()}
    configs = {name: path for name, path in manifest.files_of(folder).items() if name.endswith("config.json")}
    return [
        f"{manifest.shown(name)}:auto_map"
        for name, path in configs.items()
        if not all(module in own or payload_history.known(folder, f"{module}.py") for module in _modules(path))
    ]


def _modules(config: Path) -> Iterator[str]:
    """The modules that a config names; a file that is not a JSON object names none, and no loader opens it."""
    try:
        content = atomic.read_json(config)
    except ArtifactError:
        return
    for classes in _auto_maps(content):
        for name in _leaves(classes):
            if name is not None:
                yield str(name).rpartition(".")[0]


def _auto_maps(value: Any) -> Iterator[Any]:  # noqa: ANN401 - JSON
    """The values of all keys "auto_map", at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from [item] if key == "auto_map" else _auto_maps(item)
    elif isinstance(value, list):
        for item in value:
            yield from _auto_maps(item)


def _leaves(value: Any) -> Iterator[Any]:  # noqa: ANN401 - JSON
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


def _payload() -> dict[str, bytes]:
    files = resources.files("adaras_export.runtime").iterdir()
    return {file.name: file.read_bytes() for file in files if file.name.endswith(".py") and file.name != "__init__.py"}
