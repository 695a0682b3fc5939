"""The command line: parse, call one function, print. Each stage reads files and writes one file.

Exit status 2 for input that the user can mend, 1 for an artifact that failed its checks; a traceback is our bug.
One module a stage; what a command needs of the library it imports when it runs.
"""

import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from adaras_export import __version__
from adaras_export.cli import collect, demo, doctor, evaluate, export, gate, identify, questions, report, rule, tune
from adaras_export.cli.examples import epilog
from adaras_export.errors import AdarasError, ParityError, printable

app = typer.Typer(
    name="adaras-export",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo.demo,
    "questions": questions.questions,
    "collect": collect.collect,
    "identify": identify.identify,
    "merge": identify.merge,
    "gate": gate.gate,
    "tune": tune.tune,
    "rule": rule.rule,
    "eval": evaluate.evaluate,
    "report": report.report,
    "export": export.export,
    "request": export.request,
    "verify": export.verify,
    "refresh": export.refresh,
    "card": export.card,
    "sign": export.sign,
    "push": export.push,
    "doctor": doctor.doctor,
}
for _name, _command in _COMMANDS.items():
    app.command(_name, epilog=epilog(_name))(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"adaras-export {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Find reasoning-critical neurons, and ship models that steer them at test time, gate included."""


def main() -> None:
    """Run the command line; every error of the user's input is one line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        # Not standalone, or Typer would frame errors in boxes.
        status = app(sys.argv[1:] or ["--help"], prog_name="adaras-export", standalone_mode=False)
    except ParityError as error:
        _fail(type(error).__name__, str(error), 1)
    except AdarasError as error:
        _fail(type(error).__name__, str(error), 2)
    except _USAGE_ERROR as error:
        is_of_parsing = getattr(error, "param", None) is not None  # which each process of a group does by itself
        if is_of_parsing and os.environ.get("LOCAL_RANK", "0") != "0":
            sys.exit(2)  # the first one of this machine tells it
        command = "" if error.ctx is None else f"; see {error.ctx.command_path} --help"
        message = error.format_message().rstrip(".").replace(": Value error, ", ": ")  # later versions of Typer say so
        _fail("UsageError", message + command, 2)
    except typer.Abort:
        _fail("Aborted", "nothing more was written", _INTERRUPTED)
    if status == _INTERRUPTED:  # Typer says nothing
        _fail("Interrupted", "run the same again; collect, identify, gate, tune and eval go on where they were", status)
    sys.exit(status)


_INTERRUPTED = 130

# What Typer raises for a wrong command line: click's, or that of its own copy of click in later versions.
_USAGE_ERROR: Any = typer.BadParameter.__base__


def _fail(kind: str, message: str, status: int) -> None:
    sys.stderr.write(f"{kind}: {printable(' '.join(message.split()))}\n")
    sys.exit(status)
