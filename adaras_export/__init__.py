"""Find reasoning-critical neurons, and ship models that steer them at test time, gate included.

The method is AdaRAS (arXiv 2601.19847). One function for each stage of the job, in this order; the command line calls
the same ones:

    load_model, read_questions, collect, read_traces, identify, train_gate, tune, evaluate, report, export, verify, push

Names are loaded when they are first used, so that importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaras_export import demo
    from adaras_export.core.base_model import BaseModel
    from adaras_export.core.gate import Gate
    from adaras_export.core.intervals import auc_interval
    from adaras_export.core.neuron_stats import NeuronStats
    from adaras_export.core.neurons import NeuronSet
    from adaras_export.core.rule import SteeringRule
    from adaras_export.core.trace_files import read_questions, read_traces
    from adaras_export.core.traces import Question, Trace
    from adaras_export.data.checkers import checker_for
    from adaras_export.data.collect import CollectOptions, CollectReport, Recording, collect
    from adaras_export.data.sampling_plan import Goal
    from adaras_export.delivery.artifact_arm import artifact_arm
    from adaras_export.delivery.integrity import verify_files
    from adaras_export.delivery.push import Pushed, push
    from adaras_export.delivery.verifier import verify
    from adaras_export.delivery.writer import ExportReport, export, refresh
    from adaras_export.discovery.gate_metrics import Costs
    from adaras_export.discovery.gate_report import GateReport
    from adaras_export.discovery.gate_training import GateOptions, train_gate
    from adaras_export.discovery.identify import Identified, IdentifyOptions, identify
    from adaras_export.discovery.rankings import Refinement
    from adaras_export.evaluation.answers_by_arm import EvaluationOptions
    from adaras_export.evaluation.evaluate import evaluate
    from adaras_export.evaluation.record import Evaluation
    from adaras_export.evaluation.report.render import Report, report
    from adaras_export.evaluation.task import EvaluationTask
    from adaras_export.evaluation.tune import TuneOptions, tune
    from adaras_export.evaluation.tune_report import TuneReport
    from adaras_export.evaluation.tune_search import Search, Span
    from adaras_export.exporters.checks import ParityReport
    from adaras_export.modeling.activations import Reading
    from adaras_export.modeling.gate import gate_probabilities
    from adaras_export.modeling.generation import Sampling
    from adaras_export.modeling.loading import load_model
    from adaras_export.modeling.steering import steered

__version__ = "0.1.0"

_HOMES = {
    "BaseModel": "core.base_model",
    "CollectOptions": "data.collect",
    "CollectReport": "data.collect",
    "Costs": "discovery.gate_metrics",
    "Evaluation": "evaluation.record",
    "EvaluationOptions": "evaluation.answers_by_arm",
    "EvaluationTask": "evaluation.task",
    "ExportReport": "delivery.writer",
    "Gate": "core.gate",
    "GateOptions": "discovery.gate_training",
    "GateReport": "discovery.gate_report",
    "Goal": "data.sampling_plan",
    "Identified": "discovery.identify",
    "IdentifyOptions": "discovery.identify",
    "NeuronSet": "core.neurons",
    "NeuronStats": "core.neuron_stats",
    "ParityReport": "exporters.checks",
    "Pushed": "delivery.push",
    "Question": "core.traces",
    "Reading": "modeling.activations",
    "Recording": "data.collect",
    "Refinement": "discovery.rankings",
    "Report": "evaluation.report.render",
    "Sampling": "modeling.generation",
    "Search": "evaluation.tune_search",
    "Span": "evaluation.tune_search",
    "SteeringRule": "core.rule",
    "Trace": "core.traces",
    "TuneOptions": "evaluation.tune",
    "TuneReport": "evaluation.tune_report",
    "artifact_arm": "delivery.artifact_arm",
    "auc_interval": "core.intervals",
    "checker_for": "data.checkers",
    "collect": "data.collect",
    "evaluate": "evaluation.evaluate",
    "export": "delivery.writer",
    "gate_probabilities": "modeling.gate",
    "identify": "discovery.identify",
    "load_model": "modeling.loading",
    "push": "delivery.push",
    "read_questions": "core.trace_files",
    "read_traces": "core.trace_files",
    "refresh": "delivery.writer",
    "report": "evaluation.report.render",
    "steered": "modeling.steering",
    "train_gate": "discovery.gate_training",
    "tune": "evaluation.tune",
    "verify": "delivery.verifier",
    "verify_files": "delivery.integrity",
}

__all__ = [
    "BaseModel",
    "CollectOptions",
    "CollectReport",
    "Costs",
    "Evaluation",
    "EvaluationOptions",
    "EvaluationTask",
    "ExportReport",
    "Gate",
    "GateOptions",
    "GateReport",
    "Goal",
    "Identified",
    "IdentifyOptions",
    "NeuronSet",
    "NeuronStats",
    "ParityReport",
    "Pushed",
    "Question",
    "Reading",
    "Recording",
    "Refinement",
    "Report",
    "Sampling",
    "Search",
    "Span",
    "SteeringRule",
    "Trace",
    "TuneOptions",
    "TuneReport",
    "artifact_arm",
    "auc_interval",
    "checker_for",
    "collect",
    "demo",
    "evaluate",
    "export",
    "gate_probabilities",
    "identify",
    "load_model",
    "push",
    "read_questions",
    "read_traces",
    "refresh",
    "report",
    "steered",
    "train_gate",
    "tune",
    "verify",
    "verify_files",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a class or a function
    if name == "demo":
        return importlib.import_module("adaras_export.demo")
    if name not in _HOMES:
        raise AttributeError(f"module 'adaras_export' has no attribute {name!r}")
    return getattr(importlib.import_module(f"adaras_export.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
