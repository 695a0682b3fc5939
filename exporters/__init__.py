"""The export targets, by name. Each module is imported only when its target is used."""

import importlib
from typing import TYPE_CHECKING

from adaras_export.errors import ExportError, require

if TYPE_CHECKING:  # it brings torch along
    from adaras_export.exporters.base import Exporter

TARGETS = {
    "hf": "adaras_export.exporters.hf.exporter",
    "hf-thin": "adaras_export.exporters.hf.thin",
    "onnx": "adaras_export.exporters.onnx.exporter",
    "peft": "adaras_export.exporters.peft.exporter",
    "stock": "adaras_export.exporters.stock.exporter",
    "gguf": "adaras_export.exporters.gguf.exporter",
}
_NEEDS = {  # what their extra, of the same name, brings
    "onnx": ("onnx", "onnx_ir", "onnxruntime", "onnxscript"),
    "peft": ("peft",),
    "gguf": ("gguf",),
}


def load(target: str) -> "Exporter":
    """The exporter of a target.

    Raises:
        ExportError: there is no such target.
        MissingExtraError: a library that it needs is not installed.
    """
    if target not in TARGETS:
        raise ExportError(f"{target}: no such target; expected one of: {', '.join(TARGETS)}")
    for library in _NEEDS.get(target, ()):
        require(library, target, f"target {target}")
    exporter: Exporter = importlib.import_module(TARGETS[target]).EXPORTER
    return exporter
