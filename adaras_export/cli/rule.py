"""`rule`: a steering rule of neurons that are known, without any search."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from adaras_export.cli.options import A_FILE, Json, Out, Revision, Start, show


def rule(
    neurons: Annotated[
        Path,
        typer.Argument(
            help="CSV with the columns layer, index, delta (all from 0, a header or none), a top_200.csv of the "
            "reference, or a file of identify.",
            **A_FILE,
        ),
    ],
    out: Out,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", "--base", help="Folder or Hub id of the base model; a CSV needs it."),
    ] = None,
    keep: Annotated[int | None, typer.Option(min=1, help="The first so many neurons.", show_default="all")] = None,
    strength: Annotated[float, typer.Option(help="Factor on every delta; negative reverses the direction.")] = 1.0,
    start: Start = "last_prompt_token",
    gate: Annotated[
        Path | None, typer.Option(help="File of gate; without it every prompt is steered.", **A_FILE)
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Steer where p(correct) is below it.", show_default="the gate's")
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Make a rule of known neurons: of a CSV, or of a file of identify. Nothing is measured; see eval."""
    from adaras_export.core.base_model import BaseModel
    from adaras_export.core.gate import Gate
    from adaras_export.core.neurons import NeuronSet
    from adaras_export.core.rule import SteeringRule

    if threshold is not None and gate is None:
        raise typer.BadParameter("--threshold: is the gate's; expected --gate with it")
    given = None if model is None else BaseModel.of(model, revision)
    read = NeuronSet.from_csv(neurons, base=given) if neurons.suffix == ".csv" else NeuronSet.load(neurons)
    base = given or read.base
    if base is None:
        raise typer.BadParameter(f"{neurons}: does not say which model its neurons belong to; expected --model with it")
    read_gate = None if gate is None else Gate.load(gate)
    if read_gate is not None and threshold is not None:
        read_gate = replace(read_gate, threshold=threshold)
    made = SteeringRule(read if keep is None else read.top(keep), strength, base, start, read_gate)
    made.save(out)
    record = {"rule": made.fingerprint, "neurons": len(made.neurons), "layers": made.layers(), "strength": strength}
    record |= {"start": start, "gate": None if read_gate is None else {"threshold": read_gate.threshold}}
    gated = "every prompt" if read_gate is None else f"prompts with p(correct) below {read_gate.threshold:.4g}"
    layers = ", ".join(map(str, made.layers()))
    text = f"{len(made.neurons)} neurons of layers {layers} at strength {strength:g} from {start} on, for {gated}"
    show(record, f"{out}: {text}; rule {made.fingerprint[:12]}", as_json)
