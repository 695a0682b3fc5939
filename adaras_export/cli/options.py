"""Options that commands share, and how commands speak: the result on standard output, bars and warnings beside it."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from adaras_export.core.traces import Checker, Question
    from adaras_export.modeling.generation import Sampling

# The choices of options, written out: the libraries that use them take seconds to import. A test compares them.
CheckerName = Literal["last_number", "exact", "math_verify", "regex", "code", "reasoning_gym"]
Dtype = Literal["float32", "bfloat16", "float16"]
Starts = Literal["last_prompt_token", "first_generated_token"]
_NEW_TOKENS = 512


def in_a_folder(path: Path | None) -> Path | None:
    """Refuse a file that could not be written, before the work that it is for."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        found = "is a folder" if path.is_dir() else "its folder does not exist"
        raise typer.BadParameter(f"{path}: {found}; expected a file in a folder that exists")
    return path


A_FILE: dict[str, Any] = {"exists": True, "dir_okay": False}
A_FOLDER: dict[str, Any] = {"exists": True, "file_okay": False}

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
# Headings of --help for options that most users never need, or need together.
ADVANCED, SAMPLING, RANKING = "Advanced", "Sampling", "Ranking"

Model = Annotated[str, typer.Option("--model", "-m", help="Folder or Hub id of the model to steer.")]
Base = Annotated[str, typer.Option("--model", "-m", "--base", help="Folder or Hub id of the base model.")]
MovedBase = Annotated[
    str | None, typer.Option("--model", "-m", "--base", help="The base model, if it moved since the export.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print every check, not only those that failed.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.", rich_help_panel=ADVANCED)]
Out = Annotated[Path, typer.Option("--out", "-o", help="File to write.", callback=in_a_folder)]
Check = Annotated[CheckerName | None, typer.Option(help="Answer checker.", show_default="the questions'")]
NewTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens that a completion may have.",
        show_default=f"{_NEW_TOKENS}, or what fits the model's context",
        rich_help_panel=SAMPLING,
    ),
]
Stop = Annotated[
    str | None,
    typer.Option(help="A completion ends before a token with this text (\\n: a line end).", rich_help_panel=SAMPLING),
]
Start = Annotated[Starts, typer.Option(help="First steered token.")]
Precision = Annotated[
    Dtype, typer.Option("--dtype", help="Numbers that the model computes with.", rich_help_panel=ADVANCED)
]
Engine = Annotated[
    Literal["transformers", "vllm"],
    typer.Option("--backend", help="What runs the model here.", rich_help_panel=ADVANCED),
]
Rows = Annotated[int, typer.Option("--batch-size", help="Rows of one batch.", rich_help_panel=ADVANCED)]
TokenBudget = Annotated[int, typer.Option("--token-budget", help="Tokens of one batch.", rich_help_panel=ADVANCED)]
Seen = Annotated[
    bool,
    typer.Option(
        "--allow-seen", help="Accept questions that an earlier stage was fitted on.", rich_help_panel=ADVANCED
    ),
]


def warn(text: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"warning: {text}\n")


def show(record: dict[str, Any], text: str, as_json: bool) -> None:
    """The result: one JSON object, or text for a person."""
    print(json.dumps(_plain(record), sort_keys=True, allow_nan=False) if as_json else text)


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON values, and what only looks like them
    """The same with null for NaN and infinity, which are no JSON, and text for what JSON does not know."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


@contextmanager
def progress() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Bars on standard error: ``bar(name)`` gives a callback of (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining
    from rich.text import Text

    class Rate(ProgressColumn):
        """Of the last half minute, so that what a run found already done is soon forgotten."""

        def render(self, task: Task) -> Text:
            return Text(rate_of(task.finished_speed or task.speed), style="progress.data.speed")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), Remaining())
    console = Console(stderr=True)  # in a file or a pipe, bars are noise around the one line of an error
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def bar(name: str) -> Callable[[int, int], None]:
            task = progress.add_task(name, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield bar


def rate_of(per_second: float | None) -> str:
    """A rate in words: so many a second, or seconds for each where that is less than one."""
    if not per_second:
        return ""
    return f"{per_second:.1f}/s" if per_second >= 1 else f"{1 / per_second:.1f} s each"


def load_model(
    model: str,
    revision: str | None,
    dtype: Dtype = "float32",
    device: str | None = None,
    device_map: str | None = None,
    offload_folder: Path | None = None,
) -> tuple[Any, Any]:
    """The stock model and its tokenizer, without the libraries' own bars."""
    quiet_libraries()
    from adaras_export.modeling.loading import load_model

    return load_model(model, revision, dtype, device, device_map, offload_folder)


def quiet_libraries() -> None:
    """Our own bars and messages are enough."""
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def asked(questions: Path, check: CheckerName | None) -> "tuple[list[Question], Checker]":
    """The questions of a file, and what checks their answers; imports no torch."""
    from adaras_export.core.trace_files import read_questions
    from adaras_export.data.checkers import checker_for

    read = read_questions(questions)
    return read, checker_for(read, check)


def new_tokens(given: int | None) -> int:
    """How many tokens a completion may have, where the model and so its context is not known."""
    return _NEW_TOKENS if given is None else given


def fitting(
    given: int | None, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", questions: "Sequence[Question]"
) -> int:
    """The same where it is known: as given, or so many as fit behind the longest prompt."""
    if given is not None:
        return given
    from adaras_export.modeling.generation import room

    left = room(model, tokenizer, [question.prompt for question in questions])
    return left if 0 < left < _NEW_TOKENS else _NEW_TOKENS


def fitted(sampling: "Sampling", given: int | None) -> str:
    """What is to be said of the number of new tokens where it was chosen here."""
    used = sampling.max_new_tokens
    return f"; --max-new-tokens {used}, which fits the model's context" if used != new_tokens(given) else ""


def unescaped(option: str | None) -> str | None:
    """An option in which a line end is written as backslash n."""
    return None if option is None else option.replace("\\n", "\n")


def numbers_of(option: str, text: str) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(one) for one in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--{option} {text}: expected numbers with commas between them") from error


def counts_of(text: str) -> list[int]:
    """Whole numbers of 1 and more, with commas between them."""
    numbers = numbers_of("counts", text)
    if not all(one.is_integer() and one >= 1 for one in numbers):
        raise typer.BadParameter(f"--counts {text}: expected whole numbers, 1 or more")
    return [int(one) for one in numbers]


def require_model(model: str, revision: str | None) -> None:
    """Refuse a model that is not there, before torch is imported, which takes seconds.

    Raises:
        HubError: it is neither a folder nor a model of the Hub.
    """
    from adaras_export.files.hub import fetch

    fetch(model, revision)


def require_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse what is not among the choices."""
    if value not in choices:
        raise typer.BadParameter(f"--{option} {value}: expected one of: {', '.join(choices)}")


def start_of(value: str) -> Any:  # noqa: ANN401 - a literal that mypy cannot see
    """One of several starts, checked."""
    require_choice("start", value, get_args(Starts))
    return value
