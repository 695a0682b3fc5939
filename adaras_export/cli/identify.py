"""`identify` and `merge`: neurons, from labelled traces, read by one process or shared among many."""

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from adaras_export.cli.options import (
    A_FILE,
    Json,
    Model,
    Out,
    Precision,
    Revision,
    Start,
    load_model,
    progress,
    require_model,
    show,
    warn,
)

if TYPE_CHECKING:
    from adaras_export.core.neuron_stats import NeuronStats
    from adaras_export.core.neurons import Ranking
    from adaras_export.core.traces import Trace
    from adaras_export.discovery.process_group import Group
    from adaras_export.discovery.rankings import Refinement
    from adaras_export.discovery.reading_job import Job, Part, Plan
    from adaras_export.modeling.activations import Progress

RankingName = Annotated[
    Literal["paper", "absolute", "cohen_d", "t", "attribution"],
    typer.Option("--ranking", help="By causal effect (attribution), or by differences of means (the others)."),
]
Keep = Annotated[int, typer.Option(help="Neurons to keep.")]
MinLayer = Annotated[int | None, typer.Option(help="Lowest layer; default: half of the layers.")]
PerLayer = Annotated[int | None, typer.Option(help="At most so many neurons of one layer.")]
Fdr = Annotated[float, typer.Option(help="False discovery rate of --ranking t.")]
Shrink = Annotated[bool, typer.Option("--shrink", help="Attribution: scores lose what their standard error explains.")]
Agree = Annotated[
    bool, typer.Option("--agree", help="Attribution: only neurons whose difference of means has the same sign.")
]


def identify(
    traces: Annotated[Path, typer.Argument(help="JSONL of labelled traces, ours or the reference's.", **A_FILE)],
    model: Model,
    out: Out,
    ranking: RankingName = "paper",
    keep: Keep = 200,
    min_layer: MinLayer = None,
    per_layer: PerLayer = None,
    fdr: Fdr = 0.05,
    shrink: Shrink = False,
    agree: Agree = False,
    margin: Annotated[
        Literal["sum", "mean"],
        typer.Option(help="Attribution: log p of a completion is the sum or the mean over its tokens."),
    ] = "sum",
    per_class: Annotated[int | None, typer.Option(help="Balance: so many traces of each label a question.")] = None,
    unpaired: Annotated[bool, typer.Option("--unpaired", help="Contrast all traces, not within questions.")] = False,
    start: Start = "last_prompt_token",
    stats: Annotated[
        Path | None, typer.Option(help="Statistics that collect --record wrote for these traces.", **A_FILE)
    ] = None,
    tokens: Annotated[
        Literal["all", "completion"], typer.Option(help="Tokens of a trace that count: all is the paper's.")
    ] = "all",
    token_budget: Annotated[int, typer.Option(help="Tokens of one batch.")] = 4096,
    chunk_tokens: Annotated[int, typer.Option(help="Longer traces are read in pieces of so many tokens.")] = 4096,
    too_long: Annotated[
        Literal["refuse", "skip", "read"], typer.Option(help="What to do with traces beyond the model's context.")
    ] = "refuse",
    shard: Annotated[
        str | None, typer.Option(help="i/n: read the i-th (from 0) of n shares and write its sums, for merge.")
    ] = None,
    dtype: Precision = "float32",
    device_map: Annotated[
        Literal["auto", "balanced", "sequential"] | None,
        typer.Option(help="auto: fill GPUs, then memory, then the disk (Accelerate)."),
    ] = None,
    offload_folder: Annotated[Path | None, typer.Option(help="Where a device map may put weights on disk.")] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Rank the model's neurons by labelled traces, and keep the best. Processes of accelerate launch share the work."""
    require_model(model, revision)
    from adaras_export.core.base_model import BaseModel
    from adaras_export.core.neuron_stats import NeuronStats
    from adaras_export.discovery import process_group
    from adaras_export.discovery.identify import Method, job_of, require_of
    from adaras_export.discovery.rankings import require_room
    from adaras_export.modeling.activations import Reading

    choice: dict[str, Any] = {"ranking": ranking, "keep": keep, "min_layer": min_layer}
    choice["refinement"] = _refinement(ranking, per_layer, fdr, shrink=shrink, agree=agree)
    shares = None if shard is None else _shares_of(shard)
    if stats is not None and (per_class is not None or shard is not None):
        found = "--per-class" if shard is None else "--shard"
        raise typer.BadParameter(f"{found} and --stats: the statistics are of all traces; expected one of the two")
    contrast: Any = "unpaired" if unpaired else "within_question"
    method = Method(ranking, contrast, start, stats is not None, margin)
    try:
        with process_group.joined() as group, progress() as bar:
            _require_alone(group, shard, device_map)
            read = _read(traces, per_class)
            recorded = None if stats is None else NeuronStats.load(stats)
            weights = load_model(model, revision, dtype, process_group.device(), device_map, offload_folder)
            told = bar("reading traces") if group.rank == 0 else None
            reading = Reading(token_budget, told, chunk_tokens, tokens, too_long)
            base = BaseModel.of(model, revision)
            if shard is None:
                require_room(base, keep, min_layer, per_layer)  # before the work, not after it
            if recorded is not None:
                require_of(recorded, read, base, reading)
            job = job_of(*weights, read, base, method, reading)
            if group.rank == 0:
                _warn_of(job.plan, unpaired)
            with _shared(job, group, out, shares, told) as part:
                if shard is not None:
                    part.save(out)
                    show(_record(part, shard), f"{out}: {_line(part, shard)}", as_json)
                elif group.rank == 0:
                    _rank(part, recorded, out, choice, as_json)
    except process_group.StoppedError as error:
        raise typer.Exit(2) from error


def merge(
    parts: Annotated[list[Path], typer.Argument(help="The files that identify --shard wrote, all of them.", **A_FILE)],
    out: Out,
    ranking: RankingName = "paper",
    keep: Keep = 200,
    min_layer: MinLayer = None,
    per_layer: PerLayer = None,
    fdr: Fdr = 0.05,
    shrink: Shrink = False,
    agree: Agree = False,
    as_json: Json = False,
) -> None:
    """Rank the neurons by what the shards of one identify have read, and keep the best."""
    from adaras_export.discovery.reading_job import Part, merged
    from adaras_export.errors import TraceError

    refinement = _refinement(ranking, per_layer, fdr, shrink=shrink, agree=agree)
    if len({*parts}) < len(parts):
        raise TraceError(f"{max(parts, key=parts.count)}: is given twice; expected each part once")
    whole = merged({str(path): Part.load(path) for path in parts})
    choice = {"ranking": ranking, "keep": keep, "min_layer": min_layer, "refinement": refinement}
    _rank(whole, None, out, choice, as_json)


def _refinement(ranking: "Ranking", per_layer: int | None, fdr: float, *, shrink: bool, agree: bool) -> "Refinement":
    from adaras_export.discovery.rankings import Refinement

    refinement = Refinement(per_layer, fdr, shrink, agree)
    refinement.require_of(ranking)
    return refinement


def _shares_of(shard: str) -> tuple[int, int]:
    index, slash, count = shard.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise typer.BadParameter(f"--shard {shard}: expected i/n with i from 0 to n - 1, such as 0/4")
    return int(index), int(count)


def _require_alone(group: "Group", shard: str | None, device_map: str | None) -> None:
    """Refuse what makes no sense in one of several processes."""
    if group.size > 1 and (shard or device_map):
        option = f"--shard {shard}" if shard else f"--device-map {device_map}"
        raise typer.BadParameter(
            f"{option} in one of {group.size} processes: they share the traces, on a device each; expected one process"
        )


def _read(traces: Path, per_class: int | None) -> "list[Trace]":
    from adaras_export.core.trace_files import read_traces
    from adaras_export.core.traces import balanced

    read = read_traces(traces)
    return read if per_class is None else balanced(read, 0, per_class)


def _warn_of(plan: "Plan", unpaired: bool) -> None:
    if unpaired:
        warn("unpaired contrast finds what tells easy questions from hard ones; within questions is the method's")
    if plan.skipped:
        warn(f"traces left out because they exceed the model's context of {plan.context} tokens: {plan.skipped}")
    if plan.beyond:
        warn(
            f"traces read beyond the model's context of {plan.context} tokens, which it was not made for: {plan.beyond}"
        )


@contextmanager
def _shared(
    job: "Job", group: "Group", out: Path, shares: tuple[int, int] | None, told: "Progress | None"
) -> Iterator["Part"]:
    """What this process is to write: the sums of its shard, or in process 0 those of all processes.

    They are kept beside the output until it is written.
    """
    index, count = (group.rank, group.size) if shares is None else shares
    partial = out.with_name(f"{out.name}.partial" + (f"-{index}of{count}" if group.size > 1 else ""))
    ours = {f"{out.name}.partial-{rank}of{group.size}" for rank in range(group.size)} | {partial.name}
    for path in sorted(out.parent.glob(f"{glob.escape(out.name)}.partial*")):
        if path.name not in ours and group.rank == 0:
            warn(f"{path}: is of an unfinished run of another number of processes, and is not used")
    part = job.read(job.plan.share(index, count), partial, told, group.check)
    parts = group.gather(part)
    yield reduce(lambda one, other: one.merge(other), parts) if parts else part
    group.wait()
    partial.unlink(missing_ok=True)


def _rank(part: "Part", recorded: "NeuronStats | None", out: Path, choice: dict[str, Any], as_json: bool) -> None:
    from adaras_export.discovery.identify import ranked_part

    found = ranked_part(part, recorded, **choice)
    found.neurons.save(out)
    show(found.as_record(), f"{out}: {found.line()}", as_json)


def _record(part: "Part", shard: str) -> dict[str, Any]:
    return {"shard": shard, "chunks": len(part.done), "all_chunks": part.total}


def _line(part: "Part", shard: str) -> str:
    return f"sums of shard {shard}, {len(part.done)} of {part.total} chunks; adaras-export merge ranks all of them"
