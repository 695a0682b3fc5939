"""From a rule to an artifact that others can trust: `export`, `verify`, `refresh`, `card`, `sign`, `push`."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast, get_args

import typer

from adaras_export.cli.options import (
    A_FILE,
    A_FOLDER,
    ADVANCED,
    Base,
    Json,
    MovedBase,
    Verbose,
    quiet_libraries,
    require_choice,
    require_model,
    show,
    warn,
)
from adaras_export.errors import ParityError

if TYPE_CHECKING:
    from adaras_export.delivery.push import PushPlan
    from adaras_export.delivery.writer import TargetOptions
    from adaras_export.exporters.checks import ParityReport

_TARGET = "Options of one target"
Exported = Annotated[Path, typer.Argument(help="An exported folder.", **A_FOLDER)]
Feature = Literal["gate", "start", "dial"]
Target = Literal["hf", "hf-thin", "onnx", "peft", "stock", "gguf"]


def export(
    rule: Annotated[Path, typer.Argument(help="Rule file.", **A_FILE)],
    base: Base,
    to: Annotated[Target, typer.Option(help="What to export to.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder.")],
    accept_loss: Annotated[str, typer.Option(help="Features that the format may leave out: gate,start,dial.")] = "",
    evaluation: Annotated[Path | None, typer.Option(help="File of eval, for the model card.", **A_FILE)] = None,
    strength: Annotated[
        float | None, typer.Option(help="Another strength than the rule's.", rich_help_panel=ADVANCED)
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy weight files, do not hard-link them.", rich_help_panel=ADVANCED)
    ] = False,
    precision: Annotated[
        Literal["fp32", "fp16", "int8", "int4"] | None,
        typer.Option(help="onnx: of the weights.", show_default="fp32", rich_help_panel=_TARGET),
    ] = None,
    inline: Annotated[
        bool, typer.Option("--inline", help="onnx: no functions in the graph, for OpenVINO.", rich_help_panel=_TARGET)
    ] = False,
    genai: Annotated[
        bool, typer.Option("--genai", help="onnx: the graph of ONNX Runtime GenAI's builder.", rich_help_panel=_TARGET)
    ] = False,
    page: Annotated[
        bool,
        typer.Option("--page", help="onnx: a web page beside it, with libraries from npm.", rich_help_panel=_TARGET),
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(help="onnx: JSONL of prompts, for the gate's threshold.", rich_help_panel=_TARGET, **A_FILE),
    ] = None,
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="peft: gate and start; needs this library.", rich_help_panel=_TARGET)
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="peft: merged into a base that has the biases.", rich_help_panel=_TARGET)
    ] = False,
    switchable: Annotated[
        bool, typer.Option("--switchable", help="stock: steering as a LoRA, per request.", rich_help_panel=_TARGET)
    ] = False,
    into: Annotated[
        Path | None,
        typer.Option(
            help="gguf: a GGUF model, to be written anew with steering in it.", rich_help_panel=_TARGET, **A_FILE
        ),
    ] = None,
    sign: Annotated[Path | None, typer.Option(help="PEM file of a private key to sign it with.", **A_FILE)] = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Bake a rule into an artifact that runs without this library, verify it, and give it card and receipt."""
    from adaras_export.core.rule import SteeringRule

    accepted = [feature for feature in accept_loss.split(",") if feature]
    for feature in accepted:
        require_choice("accept-loss", feature, get_args(Feature))
    read = SteeringRule.load(rule)
    require_model(base, read.base.revision)
    signature = None if sign is None else _signature(sign)
    from adaras_export.delivery.writer import export as run

    quiet_libraries()
    chosen = {  # by the names of `TargetOptions`
        "precision": precision,
        "inline": inline,
        "genai": genai,
        "page": page,
        "calibration": calibration,
        "adaptive": adaptive,
        "merge": merge,
        "switchable": switchable,
        "into": into,
    }
    report = run(
        read,
        base=base,
        to=to,
        out=out,
        accept_loss=accepted,
        evaluation=evaluation,
        strength=strength,
        copy=copy,
        **_given(chosen),
    )
    if signature is not None:
        signature(out)
    signed, receipt = "" if signature is None else " and a signature", _receipt_hash(out)
    record = {"path": str(report.path), "target": to, "files": report.files, "parity": report.parity.as_record()}
    text = (
        f"{_checks(report.parity, verbose)}\n{out}: {len(report.files)} files and a receipt{signed}\nreceipt {receipt}"
    )
    show(record | {"receipt": receipt}, text, as_json)


def verify(
    folder: Exported,
    base: MovedBase = None,
    offline_hashes: Annotated[
        bool, typer.Option("--offline-hashes", help="Files against the receipt only: needs no base, runs nothing.")
    ] = False,
    receipt: Annotated[str | None, typer.Option(help="The SHA-256 of the receipt, from its author.")] = None,
    key: Annotated[
        Path | None, typer.Option(help="PEM file of the public key that it must be signed with.", **A_FILE)
    ] = None,
    runtime: Annotated[
        Literal["own", "vllm"],
        typer.Option(help="What computes: the target's own runtime, or vLLM, as it serves hf and hf-thin."),
    ] = "own",
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Check an exported folder: its files, what it stores, and what it computes."""
    from adaras_export.delivery import receipt as delivery_receipt
    from adaras_export.exporters import manifest

    if offline_hashes and base is not None:
        raise typer.BadParameter(
            "--offline-hashes with --model: it compares nothing with a base; leave out one of them"
        )
    if offline_hashes:  # without torch, which takes longer to import than most folders to read
        from adaras_export.delivery.integrity import verify_files

        report = verify_files(folder, receipt=receipt, key=key)
    else:
        delivery_receipt.read(folder)  # refuses what is no export before torch is imported
        if base is not None:
            require_model(base, None)
        from adaras_export.delivery.verifier import verify as run

        quiet_libraries()
        report = run(folder, base, receipt=receipt, key=key, runtime=runtime)
    left_out = _unproven(known=receipt is not None or key is not None) if offline_hashes else []
    if key is None and (folder / manifest.SIGNATURE_FILE).exists():
        left_out.append("not checked: its signature: give --key")
    record = {"ok": report.ok, "checks": report.as_record(), "receipt": _receipt_hash(folder), "unproven": left_out}
    text = "\n".join([_checks(report, verbose), f"receipt {record['receipt']}", *left_out])
    show(record, text, as_json)
    if not report.ok:
        raise ParityError(f"{folder}: {len(report.failed())} of {len(report.checks)} checks failed")


def refresh(
    folder: Exported,
    base: MovedBase = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Give an export to hf or hf-thin of an earlier version the code of this one, and verify it; its weights stay."""
    from adaras_export.delivery import receipt as delivery_receipt

    before = delivery_receipt.read(folder).files  # refuses what is no export before torch is imported
    if base is not None:
        require_model(base, None)
    from adaras_export.delivery import writer

    quiet_libraries()
    report = writer.refresh(folder, base)
    changed = sorted(name for name, found in report.files.items() if before.get(name) != found)
    receipt = _receipt_hash(folder)
    record = {"path": str(folder), "changed": changed, "parity": report.parity.as_record(), "receipt": receipt}
    written = f"written: {', '.join(changed)}" if changed else "as it was"
    show(record, f"{_checks(report.parity, verbose)}\n{folder}: {written}\nreceipt {receipt}", as_json)


def card(
    folder: Exported,
    repository: Annotated[str | None, typer.Option(help="What the card calls it: USER/REPO on the Hub.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="File of eval; default: the one that is in it.", **A_FILE)
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Hub dataset that the rule was made with; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the model card of an exported folder anew, and its receipt; nothing else of it changes."""
    from adaras_export.delivery import receipt as delivery_receipt
    from adaras_export.files import hub

    if repository is not None and not ("/" in repository and hub.is_hub_id(repository)):
        raise typer.BadParameter(f"--repository {repository}: cannot be a Hub id; expected USER/NAME")
    before = delivery_receipt.read(folder).files
    from adaras_export.delivery import writer

    receipt = writer.rewrite_card(folder, repository, evaluation, dataset or None)
    changed = sorted(name for name, found in receipt.files.items() if before.get(name) != found)
    gone = sorted(before.keys() - receipt.files.keys())
    record = {"path": str(folder), "repository": receipt.repository, "changed": changed, "removed": gone}
    told = [f"written: {', '.join(changed)}" if changed else "as it was", *(f"removed: {name}" for name in gone)]
    show(record, f"{folder}: {'; '.join(told)}", as_json)


def sign(
    folder: Exported,
    key: Annotated[Path, typer.Argument(help="PEM file of a private key: P-256, P-384 or P-521.", **A_FILE)],
    as_json: Json = False,
) -> None:
    """Sign an exported folder, as it is to be published: card and receipt included."""
    path = _signature(key)(folder)
    show({"signature": str(path), "receipt": _receipt_hash(folder)}, f"{path}: written", as_json)


def push(
    folder: Exported,
    repository: Annotated[str, typer.Argument(help="USER/NAME.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Who may see it.", show_default="private, if it is new")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, new or not.", show_default="main")] = None,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Put an exported folder on the Hub, with one commit. Goes on where it was interrupted."""
    from adaras_export.delivery import receipt as delivery_receipt

    if not (yes or dry_run or sys.stdin.isatty()):
        raise typer.BadParameter("nobody is there to be asked; expected --yes, or --dry-run to see what would be done")
    delivery_receipt.read(folder)  # refuses what is no export before torch is imported
    from adaras_export.delivery.push import plan
    from adaras_export.delivery.push import push as run

    quiet_libraries()
    if dry_run:
        planned = plan(folder, repository, private=private, revision=revision, message=message)
        _warn_of(planned)
        show(planned.as_record(), planned.text(), as_json)
        return

    def confirm(planned: "PushPlan") -> None:
        _warn_of(planned)
        sys.stderr.write(f"{planned.text()}\n")
        if not (yes or planned.empty):
            typer.confirm("push this?", abort=True, err=True)

    done = run(folder, repository, private=private, revision=revision, message=message, confirm=confirm)
    did = f"{len(done.uploaded)} files sent, {len(done.removed)} removed, {len(done.unchanged)} were there"
    show(done.as_record(), f"{done.url}: {did}\nreceipt {done.receipt}", as_json)


def _warn_of(planned: "PushPlan") -> None:
    for warning in planned.warnings:
        warn(warning)


def _signature(key: Path) -> Callable[[Path], Path]:
    """What signs a folder with a key; refuses the key, or asks for its password, before there is work to lose."""
    import os

    from adaras_export.delivery import signing

    password = os.environ.get(signing.PASSWORD)
    if not signing.is_encrypted(key):
        password = None
    elif password is None and sys.stdin.isatty():
        password = typer.prompt(f"Password of {key}", hide_input=True, err=True)
    signing.require_key(key, password)
    return lambda folder: signing.sign(folder, key, password)


def _receipt_hash(folder: Path) -> str:
    from adaras_export.exporters import manifest
    from adaras_export.files import atomic

    return atomic.sha256_file(folder / manifest.RECEIPT_FILE)


def _unproven(*, known: bool) -> list[str]:
    """What `verify --offline-hashes` says nothing about."""
    forged = "that the receipt is its author's: give --key or --receipt, or compare the receipt's SHA-256 yourself"
    computed = "what it stores and computes against its base: leave out --offline-hashes"
    return [f"not checked: {text}" for text in ([computed] if known else [forged, computed])]


def _checks(report: "ParityReport", verbose: bool) -> str:
    return "\n".join(check.line() for check in report.checks) if verbose else report.verdict()


def _given(options: Mapping[str, object]) -> "TargetOptions":
    """The options that were given, which have the types of the command line."""
    return cast("TargetOptions", {name: value for name, value in options.items() if value not in (None, False)})
