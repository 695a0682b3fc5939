"""Find reasoning-critical neurons, and ship models that steer them at test time, gate included.

The method is AdaRAS (arXiv 2601.19847). Names are loaded when they are first used, so that importing the package
costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaras_export.core.base_model import BaseModel
    from adaras_export.core.gate import Gate
    from adaras_export.core.neuron_stats import NeuronStats
    from adaras_export.core.neurons import NeuronSet
    from adaras_export.core.rule import SteeringRule
    from adaras_export.delivery.integrity import verify_files
    from adaras_export.delivery.verifier import verify
    from adaras_export.delivery.writer import ExportReport, export
    from adaras_export.exporters.checks import ParityReport
    from adaras_export.modeling.steering import steered

__version__ = "0.1.0"

_HOMES = {
    "BaseModel": "core.base_model",
    "ExportReport": "delivery.writer",
    "Gate": "core.gate",
    "NeuronSet": "core.neurons",
    "NeuronStats": "core.neuron_stats",
    "ParityReport": "exporters.checks",
    "SteeringRule": "core.rule",
    "export": "delivery.writer",
    "refresh": "delivery.writer",
    "steered": "modeling.steering",
    "verify": "delivery.verifier",
    "verify_files": "delivery.integrity",
}

__all__ = [
    "BaseModel",
    "ExportReport",
    "Gate",
    "NeuronSet",
    "NeuronStats",
    "ParityReport",
    "SteeringRule",
    "export",
    "refresh",
    "steered",
    "verify",
    "verify_files",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a class or a function
    if name not in _HOMES:
        raise AttributeError(f"module 'adaras_export' has no attribute {name!r}")
    return getattr(importlib.import_module(f"adaras_export.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
