"""Which files of code exports of this library have carried, and what the earlier ones lack. Runs none of them.

payload_history.json has the SHA-256 of each version of each file of `adaras_export.runtime`, with a number: how many of
its fixes were made when that version was. tests/support/payload_history.py writes it.
"""

import functools
import json
import shlex
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from adaras_export.exporters.checks import Check
from adaras_export.files import atomic

FILE = "payload_history.json"


def known(folder: Path, name: str) -> bool:
    """Whether a file of an export is code that this library has put there under its name, today or before."""
    versions = _history()["files"].get(name, {})
    return (folder / name).is_file() and atomic.sha256_file(folder / name) in versions


def check(name: str, folder: Path, strange: Sequence[str]) -> Check:
    """The check ``name``, which fails where entries of a folder are not this library's code of today.

    Where all of them were so before, it says what that lacks.
    """
    found = Check.empty(name, strange)
    if not strange or not all(known(folder, one) for one in strange):
        return found
    history = _history()
    made = min(history["files"][one][atomic.sha256_file(folder / one)] for one in strange)
    lacks = "; ".join(history["fixes"][made:]) or "nothing that matters"
    told = f"(earlier code of this library; it lacks: {lacks}; run: adaras-export refresh {shlex.quote(str(folder))})"
    return Check(name, found.figure, found.limit, f"{found.detail} {told}")


@functools.cache
def _history() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((resources.files("adaras_export.exporters") / FILE).read_text(encoding="utf-8"))
    return found
