"""`eval`: does the rule help on fresh questions?"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from adaras_export.cli.options import (
    Check,
    Json,
    Model,
    NewTokens,
    Out,
    Revision,
    Rows,
    Seen,
    Stop,
    exam_of,
    load_model,
    progress,
    show,
    unescaped,
)


def evaluate(
    questions: Annotated[Path, typer.Argument(help="JSONL of test questions, unseen so far.")],
    model: Model,
    rule: Annotated[Path, typer.Option(help="File of tune.")],
    out: Out,
    compare: Annotated[str, typer.Option(help="Also how far these are apart: gated,always,everywhere.")] = "",
    random_controls: Annotated[int, typer.Option(help="Random-neuron arms, one seed each.")] = 20,
    check: Check = None,
    max_new_tokens: NewTokens = 512,
    stop: Stop = None,
    batch_size: Rows = 64,
    allow_seen: Seen = False,
    dataset: Annotated[str | None, typer.Option(help="Hub dataset that the questions are from, for the card.")] = None,
    task: Annotated[str | None, typer.Option(help="Task of that benchmark, for its leaderboard.")] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Compare off, always, gated, sign-flipped and random neurons on fresh questions."""
    from adaras_export.comparison import arms_of, compare_arms
    from adaras_export.evaluate import evaluate as run
    from adaras_export.generation import Sampling
    from adaras_export.models import BaseModel
    from adaras_export.rule import SteeringRule

    read = SteeringRule.load(rule)
    arms = arms_of(read, compare.split(",")) if compare else ()
    exam = exam_of(questions, check, Sampling(max_new_tokens, stop=unescaped(stop)), batch_size)
    exam = replace(exam, dataset=dataset, task=task)
    read.base.require_same(BaseModel.of(model, revision))  # a model in memory has no fingerprint to compare
    loaded, tokenizer = load_model(model, revision)
    how: dict[str, Any] = {"random_seeds": range(random_controls), "allow_seen": allow_seen}
    with progress() as bar:
        watched = replace(exam, progress=bar("answering"))
        if arms:
            report = compare_arms(loaded, tokenizer, read, watched, arms, **how)
        else:
            report = run(loaded, tokenizer, read, watched, **how)
    report.save(out)
    show(report.as_record(), f"{report.table()}\n{out}: {report.verdict}", as_json)
