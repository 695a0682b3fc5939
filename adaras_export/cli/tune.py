"""`tune`: how many neurons and how strong, from validation questions."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adaras_export.cli.backends import bank_backend
from adaras_export.cli.options import (
    A_FILE,
    ADVANCED,
    Check,
    Engine,
    Json,
    Model,
    NewTokens,
    Out,
    Revision,
    Rows,
    Stop,
    asked,
    counts_of,
    fitted,
    fitting,
    in_a_folder,
    load_model,
    new_tokens,
    numbers_of,
    progress,
    require_choice,
    show,
    start_of,
    unescaped,
)

if TYPE_CHECKING:
    from adaras_export.core.base_model import BaseModel
    from adaras_export.core.neurons import NeuronSet
    from adaras_export.evaluation.tune_search import Span


def tune(
    questions: Annotated[Path, typer.Argument(help="JSONL of validation questions, unseen so far.", **A_FILE)],
    model: Model,
    neurons: Annotated[
        list[Path],
        typer.Option(help="File of identify, or a CSV as rule reads it; several: the best one is chosen.", **A_FILE),
    ],
    out: Out,
    gate: Annotated[
        Path | None, typer.Option(help="File of gate; without it every prompt is steered.", **A_FILE)
    ] = None,
    counts: Annotated[str, typer.Option(help="Numbers of neurons to try.")] = "50,200",
    strengths: Annotated[
        str,
        typer.Option(help="Signed strengths; or LOW:HIGH, magnitudes of both signs."),
    ] = "-3,-1,-0.3,0.3,1,3",
    start: Annotated[
        str, typer.Option(help="First steered token: last_prompt_token, first_generated_token, or both with a comma.")
    ] = "last_prompt_token",
    trials: Annotated[
        int | None, typer.Option(min=1, help="Settings that a sampler proposes.", show_default="all there are")
    ] = None,
    first: Annotated[
        int, typer.Option(min=0, help="Questions that every setting answers before two thirds stop; 0: all.")
    ] = 0,
    seed: Annotated[
        int, typer.Option(help="Of the sampler and of the order of questions.", rich_help_panel=ADVANCED)
    ] = 0,
    report: Annotated[Path | None, typer.Option(help="Every trial: a .json or .md file.", callback=in_a_folder)] = None,
    check: Check = None,
    max_new_tokens: NewTokens = None,
    stop: Stop = None,
    batch_size: Rows = 64,
    backend: Engine = "transformers",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Choose the number of neurons and the signed strength on validation questions."""
    from adaras_export.core.base_model import BaseModel
    from adaras_export.core.gate import Gate
    from adaras_export.evaluation.tune_report import FORMATS
    from adaras_export.evaluation.tune_search import Search

    if report is not None:
        require_choice("report", report.suffix, FORMATS)
    starts, search = [start_of(name) for name in start.split(",")], Search(trials, first, seed=seed)
    numbers, signed = counts_of(counts), _strengths_of(strengths)
    read, chosen = asked(questions, check)
    base = BaseModel.of(model, revision)
    rankings, read_gate = _rankings(neurons, base), None if gate is None else Gate.load(gate)
    from adaras_export.evaluation.task import EvaluationTask
    from adaras_export.evaluation.tune import TuneOptions
    from adaras_export.evaluation.tune import tune as run
    from adaras_export.modeling.generation import Sampling

    engine = bank_backend(backend, model, revision, "float32", batch_size)
    options = TuneOptions(numbers, signed, starts, search, backend=engine)
    sampling = Sampling(new_tokens(max_new_tokens), stop=unescaped(stop))
    loaded, tokenizer = load_model(model, revision, device=None if engine is None else "cpu")
    sampling = replace(sampling, max_new_tokens=fitting(max_new_tokens, loaded, tokenizer, read))
    with progress() as bar:
        told = bar("trying settings")
        task = EvaluationTask(read, chosen, sampling, batch_size, progress=told, name=questions.stem)
        found = run(loaded, tokenizer, rankings, read_gate, task, base, options, out=out)
    if report is not None:
        found.save(report)
    notes = _blind(rankings) + fitted(sampling, max_new_tokens)
    show(found.as_record(), f"{found.table()}\n{out}: {found.line()}{notes}", as_json)


def _rankings(files: list[Path], base: "BaseModel") -> "NeuronSet | dict[str, NeuronSet]":
    """The neurons of every file; several are named by their files."""
    from adaras_export.core.neurons import NeuronSet

    read = [NeuronSet.from_csv(one, base=base) if one.suffix == ".csv" else NeuronSet.load(one) for one in files]
    names = [one.stem for one in files]
    if len({*names}) < len(names):  # of the same name in different folders
        names = [str(one) for one in files]
    if len({*names}) < len(names):
        raise typer.BadParameter(f"--neurons {', '.join(names)}: a file is given twice; expected different ones")
    return read[0] if len(read) == 1 else dict(zip(names, read, strict=True))


def _blind(rankings: "NeuronSet | dict[str, NeuronSet]") -> str:
    """A sentence where the rule will not know all questions that made it."""
    if all(one.questions for one in (rankings.values() if isinstance(rankings, dict) else [rankings])):
        return ""
    return "; the neurons do not say with which questions they were found: neither tune nor eval can refuse those"


def _strengths_of(text: str) -> "list[float] | Span":
    """Numbers with commas between them, or LOW:HIGH."""
    from adaras_export.evaluation.tune_search import Span

    if ":" not in text:
        return numbers_of("strengths", text)
    try:
        low, high = map(float, text.split(":"))
    except ValueError as error:
        raise typer.BadParameter(
            f"--strengths {text}: expected LOW:HIGH, or numbers with commas between them"
        ) from error
    return Span(low, high)
