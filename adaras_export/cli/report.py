"""`report`: what evaluations show, on one page."""

from pathlib import Path
from typing import Annotated

import typer

from adaras_export.cli.options import A_FILE, Json, Out, show


def report(
    files: Annotated[
        list[Path], typer.Argument(help="JSON of eval; also what tune and gate print with --json.", **A_FILE)
    ],
    out: Out,
    as_json: Json = False,
) -> None:
    """Make a page (.html), a text (.md) or data (.json) of evaluations; of several, rules across question sets."""
    from adaras_export.evaluation.report.render import report as run

    made = run(files, out)
    show(made.as_record(), f"{out}: " + "\n".join(made.lines()), as_json)
