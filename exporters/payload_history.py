"""All versions of the code files in exports, and the fixes that earlier versions lack.

payload_history.json has the SHA-256 of each version of each file of `adaras_export.runtime`, with the number of fixes
that the version contains. tests/support/payload_history.py writes it.
"""

import functools
import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from adaras_export.exporters.checks import Check
from adaras_export.files import atomic

FILE = "payload_history.json"


def known(folder: Path, name: str) -> bool:
    """Whether a file of an export is any version of this library's code of that name."""
    versions = _history()["files"].get(name, {})
    return (folder / name).is_file() and atomic.sha256_file(folder / name) in versions


def check(name: str, folder: Path, strange: Sequence[str]) -> Check:
    """The check ``name`` of the ``strange`` files of an export, whose code is not that of today.

    It passes if all of them are earlier versions that lack no fix; the detail says so, or lists the fixes.
    """
    result = Check.empty(name, strange)
    if not strange or not all(known(folder, file) for file in strange):
        return result
    history = _history()
    fixes = min(history["files"][file][atomic.sha256_file(folder / file)] for file in strange)
    lacks = "; ".join(history["fixes"][fixes:])
    earlier = f"it lacks: {lacks}" if lacks else "it lacks no fix"
    hint = f"(earlier code of this library; {earlier}; run: adaras-export refresh {shlex.quote(str(folder))})"
    return replace(result, figure=len(strange) if lacks else 0, detail=f"{result.detail} {hint}")


@functools.cache
def _history() -> dict[str, Any]:
    text = (resources.files("adaras_export.exporters") / FILE).read_text(encoding="utf-8")
    history: dict[str, Any] = json.loads(text)
    return history
