"""What is installed here, by the names and versions of packages. Imports none of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_CORE = ("adaras-export", "torch", "transformers", "safetensors", "huggingface_hub")
# What each extra brings, by the names of the registry.
_EXTRAS = {
    "identify": ("scikit-learn", "scipy"),
    "eval": ("math-verify",),
    "gguf": ("gguf", "accelerate"),
    "peft": ("peft",),
    "onnx": ("onnx", "onnx-ir", "onnxscript"),
    "genai": ("onnxruntime-genai",),
}
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
Installed = Callable[[str], str | None]
"""Gives the version of a package, or None."""


@dataclass(frozen=True)
class Finding:
    """One line of `adaras-export doctor`.

    Attributes:
        name: what was looked at.
        ok: whether it is as it should be; None where it is optional and absent.
        text: what was found, with the command that mends it.
        figures: the same as JSON values, where there is more than the text says.
    """

    name: str
    ok: bool | None
    text: str
    figures: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """One line for a person."""
        verdict = {True: "ok  ", False: "FAIL", None: "    "}[self.ok]
        return f"{verdict} {self.name}: {self.text}"


def installed(name: str) -> str | None:
    """The version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def packages(installed: Installed = installed) -> list[Finding]:
    """The libraries that all of this needs, what the extras bring, and whether the latter get along."""
    core = [Finding(name, found is not None, found or "missing") for name in _CORE for found in [installed(name)]]
    return [*core, *_extras(installed), onnxruntime(installed)]


def has_onnxruntime(installed: Installed = installed) -> bool:
    """Whether there is any build of ONNX Runtime."""
    return any(map(installed, _RUNTIMES))


def onnxruntime(installed: Installed = installed) -> Finding:
    """Whether there is one build of ONNX Runtime.

    Both builds unpack into one folder, so that of two the later wins, and removing one breaks the other.
    """
    found = [f"{name} {installed(name)}" for name in _RUNTIMES if installed(name)]
    if len(found) == 2:
        remedy = "pip uninstall both, then install one of them"
        return Finding("one ONNX Runtime", ok=False, text=f"{' and '.join(found)} overwrite each other; {remedy}")
    text = found[0] if found else "none; pip install 'adaras-export[onnx]', or [onnx-gpu] on a machine with CUDA"
    return Finding("one ONNX Runtime", True if found else None, text)


def _extras(installed: Installed) -> list[Finding]:
    findings = []
    for extra, names in _EXTRAS.items():
        missing = [name for name in names if installed(name) is None]
        found = ", ".join(f"{name} {installed(name)}" for name in names if name not in missing)
        remedy = f"no {', '.join(missing)}; for it, pip install 'adaras-export[{extra}]'"
        findings.append(Finding(f"extra {extra}", None if missing else True, remedy if missing else found))
    return findings
