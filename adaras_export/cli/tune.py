"""`tune`: how many neurons and how strong, from validation questions."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from adaras_export.cli.options import (
    Check,
    Json,
    Model,
    NewTokens,
    Out,
    Revision,
    Rows,
    Start,
    Stop,
    counts_of,
    exam_of,
    load_model,
    numbers_of,
    progress,
    show,
    start_of,
    unescaped,
)


def tune(
    questions: Annotated[Path, typer.Argument(help="JSONL of validation questions, unseen so far.")],
    model: Model,
    neurons: Annotated[Path, typer.Option(help="File of identify, or a top_200.csv of the reference.")],
    out: Out,
    gate: Annotated[Path | None, typer.Option(help="File of gate; without it every prompt is steered.")] = None,
    counts: Annotated[str, typer.Option(help="Numbers of neurons to try.")] = "50,200",
    strengths: Annotated[str, typer.Option(help="Signed strengths to try.")] = "-3,-1,-0.3,0.3,1,3",
    start: Start = "last_prompt_token",
    check: Check = None,
    max_new_tokens: NewTokens = 512,
    stop: Stop = None,
    batch_size: Rows = 64,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Choose the number of neurons and the signed strength on validation questions."""
    from adaras_export.generation import Sampling
    from adaras_export.models import BaseModel
    from adaras_export.rule import Gate, NeuronSet
    from adaras_export.tune import tune as run

    first, tried = start_of(start), (counts_of(counts), numbers_of("strengths", strengths))
    exam = exam_of(questions, check, Sampling(max_new_tokens, stop=unescaped(stop)), batch_size)
    base = BaseModel.of(model, revision)
    is_csv = neurons.suffix == ".csv"
    chosen = NeuronSet.from_reference_csv(neurons, base=base) if is_csv else NeuronSet.load(neurons)
    read_gate = None if gate is None else Gate.load(gate)
    loaded, tokenizer = load_model(model, revision)
    with progress() as bar:
        report = run(
            loaded,
            tokenizer,
            chosen,
            read_gate,
            replace(exam, progress=bar("trying settings")),
            base=base,
            counts=tried[0],
            strengths=tried[1],
            start=first,
        )
    report.rule.save(out)
    show(report.as_record(), f"{report.table()}\n{out}: {report.line()}", as_json)
