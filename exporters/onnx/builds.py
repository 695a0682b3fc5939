"""Which builds of ONNX Runtime are installed. Imports none of them."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from adaras_export.errors import BrokenInstallationError, require

_NAMES = ("onnxruntime", "onnxruntime-gpu")
Installed = Callable[[str], str | None]
"""Gives the version of a package, or None."""


def installed(name: str) -> str | None:
    """The version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def builds(installed: Installed = installed) -> list[str]:
    """Name and version of each build."""
    return [f"{name} {installed(name)}" for name in _NAMES if installed(name)]


def conflict(found: list[str]) -> str | None:
    """What is wrong with two builds: both unpack into one folder, so that of two the later wins."""
    if len(found) < 2:
        return None
    return f"{' and '.join(found)} overwrite each other; pip uninstall both, then install one of them"


def require_one(purpose: str) -> None:
    """Raise unless there is one build.

    Raises:
        MissingExtraError: there is none.
        BrokenInstallationError: there are two.
    """
    require("onnxruntime", "onnx", purpose)
    if text := conflict(builds()):
        raise BrokenInstallationError(text)
