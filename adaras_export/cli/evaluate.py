"""`eval`: does the rule help on fresh questions?"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from adaras_export.cli.backends import bank_backend
from adaras_export.cli.options import (
    A_FILE,
    A_FOLDER,
    SAMPLING,
    Check,
    Engine,
    Json,
    Model,
    NewTokens,
    Out,
    Precision,
    Revision,
    Rows,
    Seen,
    Stop,
    asked,
    fitted,
    fitting,
    load_model,
    new_tokens,
    progress,
    show,
    unescaped,
)

_RECORD = "What the record says of the questions"


def evaluate(
    questions: Annotated[Path, typer.Argument(help="JSONL of test questions, unseen so far.", **A_FILE)],
    model: Model,
    rule: Annotated[Path, typer.Option(help="File of tune.", exists=True)],
    out: Out,
    compare: Annotated[str, typer.Option(help="Also how far these are apart: gated,always,everywhere.")] = "",
    artifact: Annotated[
        list[Path] | None, typer.Option(help="An export of the rule, as an arm of its own; repeatable.", **A_FOLDER)
    ] = None,
    random_controls: Annotated[int, typer.Option(help="Random-neuron arms, one seed each.")] = 20,
    check: Check = None,
    samples: Annotated[
        int, typer.Option(help="Answers to each question, for mean@n and pass@k.", rich_help_panel=SAMPLING)
    ] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=SAMPLING)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.", rich_help_panel=SAMPLING)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling; the same for every arm.", rich_help_panel=SAMPLING)] = 0,
    max_new_tokens: NewTokens = None,
    stop: Stop = None,
    batch_size: Rows = 64,
    allow_seen: Seen = False,
    question_set: Annotated[
        str | None, typer.Option(help="Name of the questions; default: that of the file.", rich_help_panel=_RECORD)
    ] = None,
    trained_on: Annotated[
        str | None, typer.Option(help="Name of the set that the rule was made with.", rich_help_panel=_RECORD)
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Hub dataset that the questions are from, for the card.", rich_help_panel=_RECORD)
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Task of that benchmark, for its leaderboard.", rich_help_panel=_RECORD)
    ] = None,
    backend: Engine = "transformers",
    dtype: Precision = "float32",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Compare off, always, gated, sign-flipped and random neurons on fresh questions. Goes on where it was stopped."""
    from adaras_export.core.base_model import BaseModel
    from adaras_export.core.rule import SteeringRule
    from adaras_export.evaluation.claims import arms_of

    read = SteeringRule.load(rule)
    arms = arms_of(read, compare.split(",")) if compare else ()
    listed, chosen = asked(questions, check)
    read.base.require_same(BaseModel.of(model, revision))  # a model in memory has no fingerprint to compare
    from adaras_export.delivery.artifact_arm import artifact_arm
    from adaras_export.evaluation.answers_by_arm import EvaluationOptions
    from adaras_export.evaluation.evaluate import evaluate as run
    from adaras_export.evaluation.task import EvaluationTask
    from adaras_export.modeling.generation import Sampling

    sampling = Sampling(new_tokens(max_new_tokens), temperature, top_p, seed, unescaped(stop))
    answering = EvaluationTask(
        listed,
        chosen,
        sampling,
        batch_size,
        dataset=dataset,
        benchmark_task=task,
        samples=samples,
        name=question_set or questions.stem,
    )
    engine = bank_backend(backend, model, revision, dtype, batch_size)
    loaded, tokenizer = load_model(model, revision, dtype, None if engine is None else "cpu")
    sampling = replace(sampling, max_new_tokens=fitting(max_new_tokens, loaded, tokenizer, listed))
    openers = [partial(artifact_arm, folder, read, tokenizer) for folder in artifact or ()]
    options = EvaluationOptions(
        range(random_controls), allow_seen, artifacts=openers, trained_on=trained_on, backend=engine
    )
    with progress() as bar:
        answering = replace(answering, sampling=sampling, progress=bar("answering"))
        evaluation = run(loaded, tokenizer, read, answering, options, arms=arms, out=out)
    conclusion = evaluation.conclusion.removesuffix(".") + fitted(sampling, max_new_tokens)
    show(evaluation.as_record(), f"{evaluation.table()}\n{out}: {conclusion}", as_json)
