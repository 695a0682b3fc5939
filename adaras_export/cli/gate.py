"""`gate`: what predicts from a prompt whether the model will be right."""

from pathlib import Path
from typing import Annotated

import typer

from adaras_export.cli.options import Json, Model, Out, Revision, load_model, progress, require_choice, show


def gate(
    traces: Annotated[Path, typer.Argument(help="JSONL of labelled traces of this model.")],
    model: Model,
    out: Out,
    below_layer: Annotated[int | None, typer.Option(help="Read layers below this one; default: half of them.")] = None,
    features: Annotated[int, typer.Option(help="Number of features.")] = 64,
    pooling: Annotated[str, typer.Option(help="logistic, or attention (the paper's classifier).")] = "logistic",
    seed: Annotated[int, typer.Option(help="Seed of the split by question.")] = 0,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Train the gate that predicts from the prompt whether the model will be right."""
    from adaras_export.gate import train_gate
    from adaras_export.models import BaseModel
    from adaras_export.neurons import Reading
    from adaras_export.traces import read_traces

    require_choice("pooling", pooling, ("logistic", "attention"))
    read, base = read_traces(traces), BaseModel.of(model, revision)
    loaded, tokenizer = load_model(model, revision)
    with progress() as bar:
        report = train_gate(
            loaded,
            tokenizer,
            read,
            base,
            below_layer=base.layers // 2 if below_layer is None else below_layer,
            features=features,
            pooling=pooling,  # type: ignore[arg-type]  # checked above
            seed=seed,
            reading=Reading(progress=bar("reading prompts")),
        )
    report.gate.save(out)
    show(report.as_record(), f"{out}: {report.line()}", as_json)
