"""`identify`: neurons, from labelled traces."""

from pathlib import Path
from typing import Annotated

import typer

from adaras_export.cli.options import (
    Json,
    Model,
    Out,
    Precision,
    Revision,
    Start,
    load_model,
    progress,
    require_choice,
    show,
    start_of,
    warn,
)


def identify(
    traces: Annotated[Path, typer.Argument(help="JSONL of labelled traces, ours or the reference's.")],
    model: Model,
    out: Out,
    ranking: Annotated[str, typer.Option(help="paper (difference of means) or attribution (causal effect).")] = "paper",
    keep: Annotated[int, typer.Option(help="Neurons to keep.")] = 200,
    min_layer: Annotated[int | None, typer.Option(help="Lowest layer; default: half of the layers.")] = None,
    per_class: Annotated[int | None, typer.Option(help="Balance: so many traces of each label a question.")] = None,
    unpaired: Annotated[bool, typer.Option("--unpaired", help="Contrast all traces, not within questions.")] = False,
    start: Start = "last_prompt_token",
    stats: Annotated[Path | None, typer.Option(help="Statistics that collect --record wrote for these traces.")] = None,
    token_budget: Annotated[int, typer.Option(help="Tokens of one batch.")] = 4096,
    dtype: Precision = "float32",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Rank the model's neurons by labelled traces, and keep the best."""
    from adaras_export import neurons
    from adaras_export.models import BaseModel
    from adaras_export.statistics import NeuronStats
    from adaras_export.traces import balanced, read_traces

    require_choice("ranking", ranking, ("paper", "attribution"))
    first = start_of(start)
    if stats is not None and per_class is not None:
        raise typer.BadParameter("--per-class and --stats: the statistics are of all traces; expected one of the two")
    read = read_traces(traces)
    read = read if per_class is None else balanced(read, 0, per_class)
    recorded = None if stats is None else NeuronStats.load(stats)
    loaded, tokenizer = load_model(model, revision, dtype)
    if unpaired:
        warn("unpaired contrast finds what tells easy questions from hard ones; within questions is the method's")
    with progress() as bar:
        found = neurons.identify(
            loaded,
            tokenizer,
            read,
            BaseModel.of(model, revision),
            ranking=ranking,  # type: ignore[arg-type]  # checked above
            keep=keep,
            min_layer=min_layer,
            start=first,
            contrast="unpaired" if unpaired else "within_question",
            stats=recorded,
            reading=neurons.Reading(token_budget, bar("reading traces")),
        )
    found.neurons.save(out)
    show(found.as_record(), f"{out}: {found.line()}", as_json)
