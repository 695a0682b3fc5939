"""`identify` and `merge`: neurons, from labelled traces, read by one process or shared among many."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from adaras_export.cli.options import (
    A_FILE,
    ADVANCED,
    RANKING,
    Json,
    Model,
    Out,
    Precision,
    Revision,
    Start,
    TokenBudget,
    load_model,
    progress,
    require_model,
    show,
    warn,
)

if TYPE_CHECKING:
    from adaras_export.core.neuron_stats import Contrast
    from adaras_export.core.traces import Trace
    from adaras_export.discovery.process_group import Group
    from adaras_export.discovery.reading_job import Part

RankingName = Annotated[
    Literal["paper", "absolute", "cohen_d", "t", "attribution"],
    typer.Option("--ranking", help="By causal effect (attribution), or by differences of means (the others)."),
]
Keep = Annotated[int, typer.Option(help="Neurons to keep.")]
MinLayer = Annotated[int | None, typer.Option(help="Lowest layer; default: half of the layers.")]
PerLayer = Annotated[int | None, typer.Option(help="At most so many neurons of one layer.", rich_help_panel=RANKING)]
Fdr = Annotated[float, typer.Option(help="False discovery rate of --ranking t.", rich_help_panel=RANKING)]
Shrink = Annotated[
    bool,
    typer.Option(
        "--shrink", help="Attribution: scores lose what their standard error explains.", rich_help_panel=RANKING
    ),
]
Agree = Annotated[
    bool,
    typer.Option(
        "--agree",
        help="Attribution: only neurons whose difference of means has the same sign.",
        rich_help_panel=RANKING,
    ),
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
        typer.Option(
            help="Attribution: log p of a completion is the sum or the mean over its tokens.", rich_help_panel=RANKING
        ),
    ] = "sum",
    per_class: Annotated[int | None, typer.Option(help="Balance: so many traces of each label a question.")] = None,
    unpaired: Annotated[
        bool, typer.Option("--unpaired", help="Contrast all traces, not within questions.", rich_help_panel=RANKING)
    ] = False,
    start: Start = "last_prompt_token",
    stats: Annotated[
        Path | None, typer.Option(help="Statistics that collect --record wrote for these traces.", **A_FILE)
    ] = None,
    tokens: Annotated[
        Literal["all", "completion"],
        typer.Option(help="Tokens of a trace that count: all is the paper's.", rich_help_panel=ADVANCED),
    ] = "all",
    token_budget: TokenBudget = 4096,
    chunk_tokens: Annotated[
        int, typer.Option(help="Longer traces are read in pieces of so many tokens.", rich_help_panel=ADVANCED)
    ] = 4096,
    too_long: Annotated[
        Literal["refuse", "skip", "read"],
        typer.Option(help="What to do with traces beyond the model's context.", rich_help_panel=ADVANCED),
    ] = "refuse",
    shard: Annotated[
        str | None,
        typer.Option(
            help="i/n: read the i-th (from 0) of n shares and write its sums, for merge.", rich_help_panel=ADVANCED
        ),
    ] = None,
    dtype: Precision = "float32",
    device_map: Annotated[
        Literal["auto", "balanced", "sequential"] | None,
        typer.Option(help="auto: fill GPUs, then memory, then the disk (Accelerate).", rich_help_panel=ADVANCED),
    ] = None,
    offload_folder: Annotated[
        Path | None, typer.Option(help="Where a device map may put weights on disk.", rich_help_panel=ADVANCED)
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Rank the model's neurons by labelled traces, and keep the best. Processes of accelerate launch share the work."""
    require_model(model, revision)
    from adaras_export.core.base_model import BaseModel
    from adaras_export.core.neuron_stats import NeuronStats
    from adaras_export.discovery import process_group
    from adaras_export.discovery.identify import IdentifyOptions, read_shard
    from adaras_export.discovery.identify import identify as run
    from adaras_export.discovery.rankings import Refinement
    from adaras_export.modeling.activations import Reading

    refinement = Refinement(per_layer, fdr, shrink, agree)
    contrast: Contrast = "unpaired" if unpaired else "within_question"
    options = IdentifyOptions(ranking, keep, min_layer, refinement, contrast, start, margin)
    share = None if shard is None else _share_of(shard)
    if stats is not None and (per_class is not None or shard is not None):
        found = "--per-class" if shard is None else "--shard"
        raise typer.BadParameter(f"{found} and --stats: the statistics are of all traces; expected one of the two")
    try:
        with process_group.joined() as group, progress() as bar:
            _require_alone(group, shard, device_map)
            read = _read(traces, per_class)
            recorded = None if stats is None else NeuronStats.load(stats)
            base = BaseModel.of(model, revision)
            loaded, tokenizer = load_model(model, revision, dtype, process_group.device(), device_map, offload_folder)
            told = bar("reading traces") if group.rank == 0 else None
            reading = Reading(token_budget, told, chunk_tokens, tokens, too_long, warn)
            if share is not None:
                part = read_shard(loaded, tokenizer, read, base, options, share, reading=reading, out=out)
                show(_record(part, shard), f"{out}: {_line(part, shard)}", as_json)
                return
            identified = run(loaded, tokenizer, read, base, options, stats=recorded, reading=reading, out=out)
            if group.rank == 0:
                show(identified.as_record(), f"{out}: {identified.line()}", as_json)
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
    from adaras_export.discovery.identify import IdentifyOptions, merge_shards
    from adaras_export.discovery.rankings import Refinement

    options = IdentifyOptions(ranking, keep, min_layer, Refinement(per_layer, fdr, shrink, agree))
    identified = merge_shards(parts, options, out=out)
    show(identified.as_record(), f"{out}: {identified.line()}", as_json)


def _share_of(shard: str) -> tuple[int, int]:
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


def _record(part: "Part", shard: str | None) -> dict[str, Any]:
    return {"shard": shard, "chunks": len(part.done), "all_chunks": part.total}


def _line(part: "Part", shard: str | None) -> str:
    return f"sums of shard {shard}, {len(part.done)} of {part.total} chunks; adaras-export merge ranks all of them"
