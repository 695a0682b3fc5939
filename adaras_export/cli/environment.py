"""What is installed here, and whether it is new enough, by the names and versions of packages. Imports none of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

from adaras_export.errors import install_command
from adaras_export.exporters.onnx.builds import Installed, builds, conflict, installed

_CORE = ("adaras-export", "torch", "transformers", "safetensors", "huggingface_hub")
# What each extra brings, by the names of the registry.
_EXTRAS = {
    "identify": ("scikit-learn", "scipy"),
    "eval": ("math-verify",),
    "gguf": ("gguf", "accelerate"),
    "peft": ("peft",),
    "onnx": ("onnx", "onnx-ir", "onnxscript"),
    "genai": ("onnxruntime-genai",),
    "sign": ("model-signing", "pyopenssl"),
}


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


def packages(installed: Installed = installed) -> list[Finding]:
    """The libraries that all of this needs, what the extras bring, and whether the latter get along."""
    wanted = _wanted()
    core = [_package(name, installed(name), wanted.get(name, "")) for name in _CORE]
    return [*core, *(_extra(extra, installed, wanted) for extra in _EXTRAS), onnxruntime(installed)]


def onnxruntime(installed: Installed = installed) -> Finding:
    """Whether there is one build of ONNX Runtime."""
    found = builds(installed)
    if text := conflict(found):
        return Finding("one ONNX Runtime", ok=False, text=text)
    text = found[0] if found else f"none; {install_command('onnx')}; with CUDA, onnxruntime-gpu in its place"
    return Finding("one ONNX Runtime", True if found else None, text)


def _wanted() -> dict[str, str]:
    """The versions that this library asks for, by package: ">=4.57"."""
    from packaging.requirements import Requirement  # Transformers and huggingface_hub bring it

    try:
        asked = [Requirement(line) for line in requires("adaras-export") or ()]
    except PackageNotFoundError:  # run from its source, without an installation
        return {}
    return {one.name: str(one.specifier) for one in asked}


def _fits(found: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(found, prereleases=True)


def _package(name: str, found: str | None, wanted: str) -> Finding:
    if found is not None and _fits(found, wanted):
        return Finding(name, ok=True, text=found)
    text = f"{found or 'missing'}; expected {wanted or 'it'}: pip install --upgrade '{name}{wanted}'"
    return Finding(name, ok=False, text=text)


def _extra(extra: str, installed: Installed, wanted: Mapping[str, str]) -> Finding:
    name, found = f"extra {extra}", {one: installed(one) for one in _EXTRAS[extra]}
    there = {one: here for one, here in found.items() if here is not None}
    if missing := [one for one in found if one not in there]:
        return Finding(name, None, f"no {', '.join(missing)}; for it, {install_command(extra)}")
    old = [one for one, here in there.items() if not _fits(here, wanted.get(one, ""))]
    text = ", ".join(f"{one} {here}{f', expected {wanted[one]}' if one in old else ''}" for one, here in there.items())
    remedy = f"; {install_command(extra)} --upgrade" if old else ""
    return Finding(name, ok=not old, text=text + remedy)
