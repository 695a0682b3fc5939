"""`questions`: a benchmark, a procedural task or a file, as the JSONL that the other commands read."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adaras_export.cli.options import A_FILE, Json, quiet_libraries, show, warn

if TYPE_CHECKING:
    from adaras_export.core.traces import Question
    from adaras_export.data.question_sets import Source


def questions(
    name: Annotated[str | None, typer.Argument(help="A preset, reasoning-gym:TASK, or a JSONL file.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write; with --parts, the folder for them.")
    ] = None,
    source: Annotated[Path | None, typer.Option(help="JSONL or Parquet with the preset's columns.", **A_FILE)] = None,
    revision: Annotated[str | None, typer.Option(help="Another commit than the pinned one.")] = None,
    split: Annotated[str | None, typer.Option(help="Another split than the preset's.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="So many questions, chosen by the seed.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice, the parts and the tasks.")] = 0,
    parts: Annotated[str | None, typer.Option(help="Disjoint parts: identify=400,validation=300,test=1000.")] = None,
    instruction: Annotated[str | None, typer.Option(help="Instead of the preset's; empty for none.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show the presets.")] = False,
    as_json: Json = False,
) -> None:
    """Write a question set, whole or in disjoint parts."""
    from adaras_export.core.trace_files import write_questions
    from adaras_export.data.question_sets import Source, deal, distinct

    if listed:
        _show_presets(as_json)
        return
    if name is None or out is None:
        raise typer.BadParameter("expected the name of a question set and --out; --list shows the presets")
    quiet_libraries()
    sizes = None if parts is None else _sizes(parts)
    made = size or (sum(sizes.values()) if sizes else 500)
    read = _read(name, Source(source, revision, split), made, seed, instruction)
    kept = distinct(read)
    if len(kept) < len(read):
        warn(f"{name}: {len(read) - len(kept)} of {len(read)} questions left out: asked before, or longer than is read")
    if sizes is None:
        written = {out: kept if size is None else deal(kept, {"": size}, seed)[""]}
    else:
        out.mkdir(parents=True, exist_ok=True)
        pool = kept if size is None else deal(kept, {"": size}, seed)[""]
        written = {out / f"{part}.jsonl": members for part, members in deal(pool, sizes, seed).items()}
    for path, members in written.items():
        write_questions(path, members)
    record = {str(path): len(members) for path, members in written.items()}
    checkers = ", ".join(sorted({one.check or "last_number" for one in kept}))
    text = "\n".join(f"{path}: {count} questions of {name}, checked by {checkers}" for path, count in record.items())
    show({"files": record, "checkers": checkers}, text, as_json)


def _read(name: str, source: "Source", size: int, seed: int, instruction: str | None) -> "list[Question]":
    from adaras_export.data.question_sets import PRESETS, of_file, of_preset, of_task

    kind, _, task = name.partition(":")
    elsewhere = [option for option in ("file", "revision", "split") if getattr(source, option) is not None]
    if name not in PRESETS and elsewhere:
        raise typer.BadParameter(f"{name}: --source, --revision and --split are for presets; --list shows them")
    if kind == "reasoning-gym":
        return of_task(task, size, seed, instruction)
    if name not in PRESETS and Path(name).suffix:
        if instruction is not None:
            raise typer.BadParameter(
                f"{name}: its prompts are taken as they are; --instruction is for presets and tasks"
            )
        return of_file(Path(name))
    return of_preset(name, source, instruction)


def _sizes(parts: str) -> dict[str, int]:
    pairs = [one.partition("=") for one in parts.split(",")]
    sizes = {part: int(count) for part, _, count in pairs if part.isidentifier() and count.isdecimal() and int(count)}
    if len(sizes) < len(pairs):
        raise typer.BadParameter(f"--parts {parts}: expected names with numbers: identify=400,validation=300,test=1000")
    return sizes


def _show_presets(as_json: bool) -> None:
    from adaras_export.data.question_sets import PRESETS

    fields = ("repository", "revision", "split", "licence", "checker")
    rows = {name: {field: getattr(preset, field) for field in fields} for name, preset in PRESETS.items()}
    text = "\n".join(f"{name}: {'  '.join(row.values())}" for name, row in rows.items())
    show(rows, f"{text}\nreasoning-gym:TASK  any task of reasoning-gym, by --seed and --size", as_json)
