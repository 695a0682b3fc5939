"""`collect`: attempts at questions, checked; by a model in this process, vLLM, or a server."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adaras_export.cli.options import (
    A_FILE,
    SAMPLING,
    Check,
    Dtype,
    Engine,
    Json,
    NewTokens,
    Out,
    Precision,
    Revision,
    Rows,
    Stop,
    asked,
    fitted,
    fitting,
    in_a_folder,
    load_model,
    new_tokens,
    progress,
    quiet_libraries,
    require_model,
    show,
    unescaped,
)

if TYPE_CHECKING:
    from adaras_export.data.collect import CollectReport
    from adaras_export.data.sampling_plan import Backend
    from adaras_export.modeling.generation import Sampling

_KEY = "OPENAI_API_KEY"
_SERVER = "Server"


def collect(
    questions: Annotated[Path, typer.Argument(help="JSONL: id, prompt or question, answer.", **A_FILE)],
    model: Annotated[str, typer.Option("--model", "-m", help="Folder or Hub id; with --endpoint, the served name.")],
    out: Out,
    attempts: Annotated[int, typer.Option(help="Completions per question, at most.")] = 8,
    temperature: Annotated[float, typer.Option(help="0 is greedy (one attempt).", rich_help_panel=SAMPLING)] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.", rich_help_panel=SAMPLING)] = 1.0,
    max_new_tokens: NewTokens = None,
    stop: Stop = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", rich_help_panel=SAMPLING)] = 0,
    check: Check = None,
    batch_size: Rows = 32,
    wanted: Annotated[int | None, typer.Option(help="Stop at so many questions with both outcomes.")] = None,
    per_class: Annotated[
        int | None, typer.Option(help="No more attempts at a question with so many correct and so many incorrect.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Also record activation statistics into this file.", callback=in_a_folder)
    ] = None,
    backend: Engine = "transformers",
    dtype: Precision = "float32",
    revision: Revision = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="Ask a server: what stands before /chat/completions.", rich_help_panel=_SERVER),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Requests at a time.", show_default="16", rich_help_panel=_SERVER)
    ] = None,
    requests_per_minute: Annotated[
        float | None, typer.Option(help="No more requests than that.", rich_help_panel=_SERVER)
    ] = None,
    retries: Annotated[
        int | None, typer.Option(help="Of a request that failed.", show_default="6", rich_help_panel=_SERVER)
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds of one request.", show_default="600", rich_help_panel=_SERVER)
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(help="Environment variable with the key.", show_default=_KEY, rich_help_panel=_SERVER),
    ] = None,
    as_json: Json = False,
) -> None:
    """Sample several attempts at each question and check them. Goes on where it was interrupted."""
    of_server = {
        "concurrency": concurrency,
        "requests-per-minute": requests_per_minute,
        "retries": retries,
        "timeout": timeout,
        "api-key-env": api_key_env,
    }
    local = {"record": record, "revision": revision, "backend": _unless(backend, "transformers")}
    _require_fitting(endpoint, of_server, {**local, "dtype": _unless(dtype, "float32")}, backend)
    read, chosen = asked(questions, check)
    if endpoint is None:
        require_model(model, revision)
    from adaras_export.core.base_model import BaseModel
    from adaras_export.core.checkpoint import version_of
    from adaras_export.data.collect import CollectOptions, Recording, collect_from, require_varied
    from adaras_export.data.collect import collect as run
    from adaras_export.data.sampling_plan import Goal
    from adaras_export.modeling.generation import Sampling

    sampling = Sampling(new_tokens(max_new_tokens), temperature, top_p, seed, unescaped(stop))
    goal = Goal(attempts, wanted, per_class)
    require_varied(attempts, sampling)
    name = Path(model).resolve().name if endpoint is None and Path(model).is_dir() else model
    version = version_of(model, revision) if endpoint is None else None
    with progress() as bar:
        if endpoint is not None or backend == "vllm":
            made = (
                _vllm(model, sampling, dtype, revision)
                if endpoint is None
                else _server(
                    endpoint, model, sampling, _key(api_key_env), concurrency, requests_per_minute, retries, timeout
                )
            )
            options = CollectOptions(chosen, batch_size, name, version, bar("sampling"))
            report = collect_from(made, read, out, goal=goal, options=options)
        else:
            loaded, tokenizer = load_model(model, revision, dtype)
            sampling = replace(sampling, max_new_tokens=fitting(max_new_tokens, loaded, tokenizer, read))
            recording = None if record is None else Recording(record, BaseModel.of(model, revision))
            options = CollectOptions(chosen, batch_size, name, version, bar("sampling"))
            report = run(loaded, tokenizer, read, out, goal=goal, sampling=sampling, record=recording, options=options)
    show(vars(report), f"{out}: {_told(report, sampling, max_new_tokens)}", as_json)


def _told(report: "CollectReport", sampling: "Sampling", max_new_tokens: int | None) -> str:
    """What the file holds, and what to look at."""
    text = (
        f"{report.traces} traces of {report.questions} questions, {report.correct} correct, "
        f"{report.mixed_questions} questions with both outcomes ({report.resumed} traces were there, "
        f"{report.seconds:.0f} s)"
    )
    if report.cut:
        text += f"; {report.cut} of the new ones were cut off at {sampling.max_new_tokens} tokens"
    text += fitted(sampling, max_new_tokens)
    if report.repeated:
        text += f"; {report.repeated} have the text of another attempt"
    return "; ".join([text, *report.cautions()])


def _unless(value: str, default: str) -> str | None:
    return None if value == default else value


def _require_fitting(
    endpoint: str | None, server: Mapping[str, object], local: Mapping[str, object], backend: str
) -> None:
    """Refuse options that nothing would read."""
    if endpoint is None:
        unread, reason = server, "is for a server; expected --endpoint with it"
    else:
        unread, reason = local, "is for a model that is loaded here; expected none of it with --endpoint"
    if given := [f"--{name}" for name, value in unread.items() if value is not None]:
        raise typer.BadParameter(f"{', '.join(given)}: {reason}")
    if backend == "vllm" and local["record"] is not None:
        raise typer.BadParameter("--record: vLLM shows no activations; run identify on the traces instead")


def _server(
    endpoint: str,
    model: str,
    sampling: "Sampling",
    key: str | None,
    concurrency: int | None,
    per_minute: float | None,
    retries: int | None,
    timeout: float | None,
) -> "Backend":
    from adaras_export.data.backends.openai import Endpoint, EndpointBackend

    usual = Endpoint(endpoint, model, key, per_minute=per_minute)
    pressed = replace(
        usual,
        concurrency=usual.concurrency if concurrency is None else concurrency,
        retries=usual.retries if retries is None else retries,
        timeout=usual.timeout if timeout is None else timeout,
    )
    return EndpointBackend(pressed, sampling)


def _key(variable: str | None) -> str | None:
    key = os.environ.get(variable or _KEY)
    if variable is not None and not key:
        raise typer.BadParameter(
            f"--api-key-env {variable}: there is no such environment variable; expected the key in it"
        )
    return key


def _vllm(model: str, sampling: "Sampling", dtype: Dtype, revision: str | None) -> "Backend":
    from adaras_export.data.backends.vllm import VllmBackend

    quiet_libraries()
    return VllmBackend(model, sampling, dtype=dtype, revision=revision)
