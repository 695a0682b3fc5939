"""`collect`: attempts at questions, checked."""

from pathlib import Path
from typing import Annotated

import typer

from adaras_export.cli.options import (
    Check,
    Json,
    Model,
    NewTokens,
    Out,
    Precision,
    Revision,
    Rows,
    Stop,
    in_a_folder,
    load_model,
    progress,
    show,
    unescaped,
)


def collect(
    questions: Annotated[Path, typer.Argument(help="JSONL: id, prompt or question, answer.")],
    model: Model,
    out: Out,
    attempts: Annotated[int, typer.Option(help="Completions per question.")] = 8,
    temperature: Annotated[float, typer.Option(help="0 is greedy (one attempt).")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    max_new_tokens: NewTokens = 512,
    stop: Stop = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    check: Check = None,
    batch_size: Rows = 32,
    wanted: Annotated[int | None, typer.Option(help="Stop at so many questions with both outcomes.")] = None,
    record: Annotated[
        Path | None, typer.Option(help="Also record activation statistics into this file.", callback=in_a_folder)
    ] = None,
    dtype: Precision = "float32",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Sample several attempts at each question and check them. Goes on where it was interrupted."""
    from adaras_export.checkers import checker_for
    from adaras_export.collect import Recording
    from adaras_export.collect import collect as run
    from adaras_export.generation import Sampling
    from adaras_export.models import BaseModel
    from adaras_export.traces import read_questions

    read = read_questions(questions)
    chosen = checker_for(read, check)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, unescaped(stop))
    loaded, tokenizer = load_model(model, revision, dtype)
    recording = None if record is None else Recording(record, BaseModel.of(model, revision))
    with progress() as bar:
        report = run(
            loaded,
            tokenizer,
            read,
            out,
            attempts=attempts,
            sampling=sampling,
            check=chosen,
            batch_size=batch_size,
            wanted=wanted,
            record=recording,
            progress=bar("sampling"),
        )
    text = (
        f"{out}: {report.traces} traces of {report.questions} questions, {report.correct} correct, "
        f"{report.mixed_questions} questions with both outcomes ({report.resumed} traces were there, "
        f"{report.seconds:.0f} s)"
    )
    show(vars(report), text, as_json)
