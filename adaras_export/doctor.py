"""What works here: versions, extras, ONNX Runtime's providers, a GPU. Installs and changes nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

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


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, whether it is as it should be (None: optional and absent), what was found."""

    name: str
    ok: bool | None
    text: str

    def line(self) -> str:
        """One line for a person."""
        verdict = {True: "ok  ", False: "FAIL", None: "    "}[self.ok]
        return f"{verdict} {self.name}: {self.text}"


def examine(installed: Callable[[str], str | None] | None = None) -> list[Finding]:
    """Look at this environment; ``installed`` gives the version of a distribution, or None."""
    installed = installed or _installed
    core = [Finding(name, found is not None, found or "missing") for name in _CORE for found in [installed(name)]]
    return [*core, *_extras(installed), onnxruntime(installed), _providers(installed), _gpu()]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _extras(installed: Callable[[str], str | None]) -> list[Finding]:
    findings = []
    for extra, names in _EXTRAS.items():
        missing = [name for name in names if installed(name) is None]
        found = ", ".join(f"{name} {installed(name)}" for name in names if name not in missing)
        remedy = f"no {', '.join(missing)}; for it, pip install 'adaras-export[{extra}]'"
        findings.append(Finding(f"extra {extra}", None if missing else True, remedy if missing else found))
    return findings


def onnxruntime(installed: Callable[[str], str | None] | None = None) -> Finding:
    """Whether there is one build of ONNX Runtime.

    Both builds unpack into one folder, so that of two the later wins, and removing one breaks the other.
    """
    installed = installed or _installed
    found = [f"{name} {installed(name)}" for name in _RUNTIMES if installed(name)]
    if len(found) == 2:
        remedy = "pip uninstall both, then install one of them"
        return Finding("one ONNX Runtime", ok=False, text=f"{' and '.join(found)} overwrite each other; {remedy}")
    text = found[0] if found else "none; pip install 'adaras-export[onnx]', or [onnx-gpu] on a machine with CUDA"
    return Finding("one ONNX Runtime", True if found else None, text)


def _providers(installed: Callable[[str], str | None]) -> Finding:
    if not any(map(installed, _RUNTIMES)):
        return Finding("execution providers", None, "none without ONNX Runtime")
    import onnxruntime

    return Finding("execution providers", ok=True, text=", ".join(onnxruntime.get_available_providers()))


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", None, "none that PyTorch sees; all works on a CPU")
    return Finding("GPU", ok=True, text=torch.cuda.get_device_name())
