"""`gate`: what predicts from a prompt whether the model will be right."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from adaras_export.cli.options import (
    A_FILE,
    ADVANCED,
    Json,
    Model,
    Out,
    Precision,
    Revision,
    TokenBudget,
    load_model,
    progress,
    show,
)

if TYPE_CHECKING:
    from adaras_export.discovery.gate_metrics import Costs


def gate(
    traces: Annotated[Path, typer.Argument(help="JSONL of labelled traces of this model.", **A_FILE)],
    model: Model,
    out: Out,
    below_layer: Annotated[int | None, typer.Option(help="Read layers below this one; default: half of them.")] = None,
    features: Annotated[
        str, typer.Option(help="Number of features, or auto: the best of 8, 16, 32, 64, 128 on training questions.")
    ] = "auto",
    pooling: Annotated[
        Literal["logistic", "attention"], typer.Option(help="attention is the paper's classifier.")
    ] = "logistic",
    threshold: Annotated[
        Literal["youden", "cost"], typer.Option(help="Chosen by Youden's J, or by what errors cost.")
    ] = "youden",
    cost_missed: Annotated[
        float | None, typer.Option(help="With --threshold cost: of a wrong answer that is left alone.")
    ] = None,
    cost_needless: Annotated[
        float | None, typer.Option(help="With --threshold cost: of a right answer that is steered.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the splits by question.", rich_help_panel=ADVANCED)] = 0,
    token_budget: TokenBudget = 4096,
    dtype: Precision = "float32",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Train the gate that predicts from the prompt whether the model will be right."""
    from adaras_export.core.base_model import BaseModel
    from adaras_export.core.trace_files import read_traces

    count = _features_of(features)
    read, base = read_traces(traces), BaseModel.of(model, revision)
    costs = _costs_of(threshold, cost_missed, cost_needless)
    from adaras_export.discovery.gate_training import GateOptions, train_gate
    from adaras_export.modeling.activations import Reading

    options = GateOptions(below_layer, count, pooling, costs, seed=seed)
    loaded, tokenizer = load_model(model, revision, dtype)
    with progress() as bar:
        reading = Reading(token_budget, bar("reading prompts"))
        report = train_gate(loaded, tokenizer, read, base, options, reading=reading, out=out)
    show(report.as_record(), f"{report.table()}\n{out}: {report.line()}", as_json)


def _features_of(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise typer.BadParameter(f"--features {text}: expected a number, or auto")
    return int(text)


def _costs_of(threshold: str, missed: float | None, needless: float | None) -> "Costs | None":
    if threshold == "youden":
        if missed is not None or needless is not None:
            raise typer.BadParameter(
                "--cost-missed and --cost-needless: choose nothing here; expected --threshold cost"
            )
        return None
    if missed is None or needless is None:
        raise typer.BadParameter("--threshold cost: expected both --cost-missed and --cost-needless")
    from adaras_export.discovery.gate_metrics import Costs

    return Costs(missed, needless)
