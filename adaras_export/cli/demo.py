"""`demo`: the whole job on a model at hand."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from adaras_export.cli.options import Json, progress, quiet_libraries, show

Model = Literal["planted", "smollm2"]


def demo(
    model: Annotated[Model, typer.Option(help="Embedded and synthetic, or from its PyPI wheel.")] = "planted",
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder for all files.")] = Path("demo-out"),
    as_json: Json = False,
) -> None:
    """The whole job on a model that is at hand: sample, identify, gate, tune, evaluate, export, verify."""
    quiet_libraries()
    import torch

    from adaras_export.cli import demo_job

    if model == "planted":  # its matrices are so small that a second thread only waits for the first
        torch.set_num_threads(1)
    with progress() as bar:
        summary = demo_job.run(model, out, bar)
    show(summary.as_record(), summary.text(), as_json)
