"""Checks of an adapter_config.json of the method ADARAS, before memory is allocated for its sizes."""

import reprlib
from collections.abc import Mapping
from typing import Any, get_args

from adaras_export.core.rule import Start
from adaras_export.core.value import check_choice, check_count, check_number
from adaras_export.errors import RuleError

_SUBJECT = "adapter_config.json"
_LARGEST_GATE = 1 << 24  # weights of its hidden layer; those of a gate of 64 features are 4096


def require(settings: Mapping[str, Any]) -> None:
    """Refuse malformed settings, and a gate that is too large.

    Raises:
        RuleError: a setting has another form than in `AdarasConfig`, or the gate is too large.
    """
    for name in ("strength", "threshold"):
        check_number(_SUBJECT, name, settings[name])
    for name in ("gate_size", "hidden_size"):
        check_count(_SUBJECT, name, settings[name])
    check_choice(_SUBJECT, "start", settings["start"], get_args(Start))
    steered, features = settings["steered"], settings["features"]
    if not isinstance(steered, list) or not all(isinstance(name, str) for name in steered):
        raise RuleError(f"{_SUBJECT}: steered is {reprlib.repr(steered)}; expected names of modules")
    if not isinstance(features, dict) or not all(_are_neurons(index) for index in features.values()):
        raise RuleError(f"{_SUBJECT}: features is {reprlib.repr(features)}; expected neurons by name of a module")
    if settings["gate_module"] is not None and not isinstance(settings["gate_module"], str):
        raise RuleError(f"{_SUBJECT}: gate_module is {reprlib.repr(settings['gate_module'])}; expected a module's name")
    count, size = sum(map(len, features.values())), settings["gate_size"]
    if count * size > _LARGEST_GATE:
        raise RuleError(f"{_SUBJECT}: a gate of {count} features and {size} hidden units; expected a small classifier")


def require_fits(name: str, settings: Mapping[str, Any], width: int, hidden_size: int) -> None:
    """Refuse settings that do not fit a module of ``width`` inputs (neurons) and ``hidden_size`` outputs.

    Raises:
        RuleError: the settings have another hidden size, or a neuron outside the module.
    """
    if name in settings["steered"] and settings["hidden_size"] != hidden_size:
        raise RuleError(f"{_SUBJECT}: hidden_size is {settings['hidden_size']}; expected {hidden_size}, as {name} has")
    if outside := [neuron for neuron in settings["features"].get(name, ()) if neuron >= width]:
        raise RuleError(f"{_SUBJECT}: {name} has no neuron {outside[0]}; expected 0 to {width - 1}")


def _are_neurons(index: object) -> bool:
    return isinstance(index, list) and all(type(neuron) is int and neuron >= 0 for neuron in index)
