"""The command line: parse, call one function, print. Each stage reads files and writes one file.

Exit status 2 for input that the user can mend, 1 for an artifact that failed its checks; a traceback is our bug.
"""

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adaras_export.errors import AdarasError, ParityError, printable

if TYPE_CHECKING:
    from adaras_export.checks import ParityReport
    from adaras_export.evaluate import Exam
    from adaras_export.generation import Sampling

app = typer.Typer(
    name="adaras-export",
    help="Find reasoning-critical neurons, and ship models that steer them at test time, gate included.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _in_a_folder(path: Path | None) -> Path | None:
    """Refuse a file that could not be written, before the work that it is for."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        found = "is a folder" if path.is_dir() else "its folder does not exist"
        raise typer.BadParameter(f"{path}: {found}; expected a file in a folder that exists")
    return path


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Model = Annotated[str, typer.Option("--model", "-m", help="Folder or Hub id of the model to steer.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="File to write.", callback=_in_a_folder)]
Check = Annotated[str, typer.Option(help="Answer checker: last_number, exact or math_verify.")]
NewTokens = Annotated[int, typer.Option(help="Tokens that a completion may have.")]
Stop = Annotated[str | None, typer.Option(help="A completion ends before a token with this text (\\n: a line end).")]
Start = Annotated[str, typer.Option(help="First steered token: last_prompt_token or first_generated_token.")]
Rows = Annotated[int, typer.Option("--batch-size", help="Rows of one batch.")]
Seen = Annotated[bool, typer.Option("--allow-seen", help="Accept questions that an earlier stage was fitted on.")]


@app.command()
def demo(
    model: Annotated[
        str, typer.Option(help="planted (embedded, synthetic) or smollm2 (from its PyPI wheel).")
    ] = "planted",
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder for all files.")] = Path("demo-out"),
    as_json: Json = False,
) -> None:
    """The whole job on a model that is at hand: sample, identify, gate, tune, evaluate, export, verify."""
    _quiet_libraries()
    import torch

    from adaras_export.demo import pipeline

    if model == "planted":  # its matrices are so small that a second thread only waits for the first
        torch.set_num_threads(1)
    with _progress() as bar:
        summary = pipeline.run(model, out, bar)
    _print(summary.as_record(), summary.text(), as_json)


@app.command()
def collect(
    questions: Annotated[Path, typer.Argument(help="JSONL: id, prompt or question, answer.")],
    model: Model,
    out: Out,
    attempts: Annotated[int, typer.Option(help="Completions per question.")] = 8,
    temperature: Annotated[float, typer.Option(help="0 is greedy (one attempt).")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    max_new_tokens: NewTokens = 512,
    stop: Stop = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    check: Check = "last_number",
    batch_size: Rows = 32,
    wanted: Annotated[int | None, typer.Option(help="Stop at so many questions with both outcomes.")] = None,
    record: Annotated[
        Path | None, typer.Option(help="Also record activation statistics into this file.", callback=_in_a_folder)
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Sample several attempts at each question and check them. Goes on where it was interrupted."""
    from adaras_export.checkers import checker
    from adaras_export.collect import Recording
    from adaras_export.collect import collect as run
    from adaras_export.generation import Sampling
    from adaras_export.models import BaseModel
    from adaras_export.traces import read_questions

    read, chosen = read_questions(questions), checker(check)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, _text(stop))
    loaded, tokenizer = _load(model, revision)
    recording = None if record is None else Recording(record, BaseModel.of(model, revision))
    with _progress() as bar:
        report = run(
            loaded,
            tokenizer,
            read,
            out,
            attempts=attempts,
            sampling=sampling,
            check=chosen,
            batch_size=batch_size,
            wanted=wanted,
            record=recording,
            progress=bar("sampling"),
        )
    text = (
        f"{out}: {report.traces} traces of {report.questions} questions, {report.correct} correct, "
        f"{report.mixed_questions} questions with both outcomes ({report.resumed} traces were there, "
        f"{report.seconds:.0f} s)"
    )
    _print(vars(report), text, as_json)


@app.command()
def identify(
    traces: Annotated[Path, typer.Argument(help="JSONL of labelled traces, ours or the reference's.")],
    model: Model,
    out: Out,
    ranking: Annotated[str, typer.Option(help="paper (difference of means) or attribution (causal effect).")] = "paper",
    keep: Annotated[int, typer.Option(help="Neurons to keep.")] = 200,
    min_layer: Annotated[int | None, typer.Option(help="Lowest layer; default: half of the layers.")] = None,
    per_class: Annotated[int | None, typer.Option(help="Balance: so many traces of each label a question.")] = None,
    unpaired: Annotated[bool, typer.Option("--unpaired", help="Contrast all traces, not within questions.")] = False,
    start: Start = "last_prompt_token",
    stats: Annotated[Path | None, typer.Option(help="Statistics that collect --record wrote for these traces.")] = None,
    token_budget: Annotated[int, typer.Option(help="Tokens of one batch.")] = 4096,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Rank the model's neurons by labelled traces, and keep the best."""
    from adaras_export import neurons
    from adaras_export.models import BaseModel
    from adaras_export.statistics import NeuronStats
    from adaras_export.traces import balanced, read_traces

    _choice("ranking", ranking, ("paper", "attribution"))
    first = _start(start)
    if stats is not None and per_class is not None:
        raise typer.BadParameter("--per-class and --stats: the statistics are of all traces; expected one of the two")
    read = read_traces(traces)
    read = read if per_class is None else balanced(read, 0, per_class)
    recorded = None if stats is None else NeuronStats.load(stats)
    loaded, tokenizer = _load(model, revision)
    if unpaired:
        _warn("unpaired contrast finds what tells easy questions from hard ones; within questions is the method's")
    with _progress() as bar:
        found = neurons.identify(
            loaded,
            tokenizer,
            read,
            BaseModel.of(model, revision),
            ranking=ranking,  # type: ignore[arg-type]  # checked above
            keep=keep,
            min_layer=min_layer,
            start=first,
            contrast="unpaired" if unpaired else "within_question",
            stats=recorded,
            reading=neurons.Reading(token_budget, bar("reading traces")),
        )
    found.neurons.save(out)
    _print(found.as_record(), f"{out}: {found.line()}", as_json)


@app.command()
def gate(
    traces: Annotated[Path, typer.Argument(help="JSONL of labelled traces of this model.")],
    model: Model,
    out: Out,
    below_layer: Annotated[int | None, typer.Option(help="Read layers below this one; default: half of them.")] = None,
    features: Annotated[int, typer.Option(help="Number of features.")] = 64,
    pooling: Annotated[str, typer.Option(help="logistic, or attention (the paper's classifier).")] = "logistic",
    seed: Annotated[int, typer.Option(help="Seed of the split by question.")] = 0,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Train the gate that predicts from the prompt whether the model will be right."""
    from adaras_export.gate import train_gate
    from adaras_export.models import BaseModel
    from adaras_export.neurons import Reading
    from adaras_export.traces import read_traces

    _choice("pooling", pooling, ("logistic", "attention"))
    read, base = read_traces(traces), BaseModel.of(model, revision)
    loaded, tokenizer = _load(model, revision)
    with _progress() as bar:
        report = train_gate(
            loaded,
            tokenizer,
            read,
            base,
            below_layer=base.layers // 2 if below_layer is None else below_layer,
            features=features,
            pooling=pooling,  # type: ignore[arg-type]  # checked above
            seed=seed,
            reading=Reading(progress=bar("reading prompts")),
        )
    report.gate.save(out)
    _print(report.as_record(), f"{out}: {report.line()}", as_json)


@app.command()
def tune(
    questions: Annotated[Path, typer.Argument(help="JSONL of validation questions, unseen so far.")],
    model: Model,
    neurons: Annotated[Path, typer.Option(help="File of identify, or a top_200.csv of the reference.")],
    out: Out,
    gate: Annotated[Path | None, typer.Option(help="File of gate; without it every prompt is steered.")] = None,
    counts: Annotated[str, typer.Option(help="Numbers of neurons to try.")] = "50,200",
    strengths: Annotated[str, typer.Option(help="Signed strengths to try.")] = "-3,-1,-0.3,0.3,1,3",
    start: Start = "last_prompt_token",
    check: Check = "last_number",
    max_new_tokens: NewTokens = 512,
    stop: Stop = None,
    batch_size: Rows = 64,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Choose the number of neurons and the signed strength on validation questions."""
    from adaras_export.generation import Sampling
    from adaras_export.models import BaseModel
    from adaras_export.rule import Gate, NeuronSet
    from adaras_export.tune import tune as run

    first, tried = _start(start), (_counts(counts), _numbers("strengths", strengths))
    exam = _exam(questions, check, Sampling(max_new_tokens, stop=_text(stop)), batch_size)
    base = BaseModel.of(model, revision)
    is_csv = neurons.suffix == ".csv"
    chosen = NeuronSet.from_reference_csv(neurons, base=base) if is_csv else NeuronSet.load(neurons)
    read_gate = None if gate is None else Gate.load(gate)
    loaded, tokenizer = _load(model, revision)
    with _progress() as bar:
        report = run(
            loaded,
            tokenizer,
            chosen,
            read_gate,
            replace(exam, progress=bar("trying settings")),
            base=base,
            counts=tried[0],
            strengths=tried[1],
            start=first,
        )
    report.rule.save(out)
    _print(report.as_record(), f"{report.table()}\n{out}: {report.line()}", as_json)


@app.command(name="eval")
def evaluate(
    questions: Annotated[Path, typer.Argument(help="JSONL of test questions, unseen so far.")],
    model: Model,
    rule: Annotated[Path, typer.Option(help="File of tune.")],
    out: Out,
    compare: Annotated[str, typer.Option(help="Also how far these are apart: gated,always,everywhere.")] = "",
    random_controls: Annotated[int, typer.Option(help="Random-neuron arms, one seed each.")] = 5,
    check: Check = "last_number",
    max_new_tokens: NewTokens = 512,
    stop: Stop = None,
    batch_size: Rows = 64,
    allow_seen: Seen = False,
    dataset: Annotated[str | None, typer.Option(help="Hub dataset that the questions are from, for the card.")] = None,
    task: Annotated[str | None, typer.Option(help="Task of that benchmark, for its leaderboard.")] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Compare off, always, gated, sign-flipped and random neurons on fresh questions."""
    from adaras_export.comparison import arms_of, compare_arms
    from adaras_export.evaluate import evaluate as run
    from adaras_export.generation import Sampling
    from adaras_export.models import BaseModel
    from adaras_export.rule import SteeringRule

    read = SteeringRule.load(rule)
    arms = arms_of(read, compare.split(",")) if compare else ()
    exam = _exam(questions, check, Sampling(max_new_tokens, stop=_text(stop)), batch_size)
    exam = replace(exam, dataset=dataset, task=task)
    read.base.require_same(BaseModel.of(model, revision))  # a model in memory has no fingerprint to compare
    loaded, tokenizer = _load(model, revision)
    how: dict[str, Any] = {"random_seeds": range(random_controls), "allow_seen": allow_seen}
    with _progress() as bar:
        watched = replace(exam, progress=bar("answering"))
        if arms:
            report = compare_arms(loaded, tokenizer, read, watched, arms, **how)
        else:
            report = run(loaded, tokenizer, read, watched, **how)
    report.save(out)
    _print(report.as_record(), f"{report.table()}\n{out}: {report.verdict}", as_json)


@app.command()
def export(
    rule: Annotated[Path, typer.Argument(help="Rule file.")],
    base: Annotated[str, typer.Option(help="Folder or Hub id of the base model.")],
    to: Annotated[str, typer.Option(help="Target: hf, hf-thin, onnx, peft, stock or gguf.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder.")],
    accept_loss: Annotated[str, typer.Option(help="Features that the format may leave out: gate,start,dial.")] = "",
    evaluation: Annotated[Path | None, typer.Option(help="File of eval, for the model card.")] = None,
    strength: Annotated[float | None, typer.Option(help="Another strength than the rule's.")] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy weight files instead of hard-linking them.")] = False,
    precision: Annotated[str | None, typer.Option(help="onnx: fp32 (default), fp16, int8 or int4 weights.")] = None,
    inline: Annotated[bool, typer.Option("--inline", help="onnx: no functions in the graph, for OpenVINO.")] = False,
    genai: Annotated[bool, typer.Option("--genai", help="onnx: the graph of ONNX Runtime GenAI's builder.")] = False,
    page: Annotated[bool, typer.Option("--page", help="onnx: a web page beside it, with libraries from npm.")] = False,
    calibration: Annotated[Path | None, typer.Option(help="onnx: JSONL of prompts, for the gate's threshold.")] = None,
    adaptive: Annotated[bool, typer.Option("--adaptive", help="peft: gate and start; needs this library.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="peft: merged into a base that has the biases.")] = False,
    switchable: Annotated[bool, typer.Option("--switchable", help="stock: steering as a LoRA, per request.")] = False,
    into: Annotated[
        Path | None, typer.Option(help="gguf: a GGUF model, to be written anew with steering in it.")
    ] = None,
    sign: Annotated[Path | None, typer.Option(help="PEM file of a private key to sign it with.")] = None,
    as_json: Json = False,
) -> None:
    """Bake a rule into an artifact that runs without this library, verify it, and give it card and receipt."""
    from adaras_export.delivery import export as run
    from adaras_export.rule import SteeringRule

    _quiet_libraries()
    signature = None if sign is None else _signature(sign)
    accepted = [feature for feature in accept_loss.split(",") if feature]
    chosen = {
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
    how: dict[str, Any] = {"accept_loss": accepted, "evaluation": evaluation, "strength": strength, "copy": copy}
    how |= {name: value for name, value in chosen.items() if value not in (None, False)}
    report = run(SteeringRule.load(rule), base=base, to=to, out=out, **how)
    if signature is not None:
        signature(out)
    signed, receipt = "" if signature is None else " and a signature", _receipt_hash(out)
    record = {"path": str(report.path), "target": to, "files": report.files, "parity": report.parity.as_record()}
    text = f"{_checks(report.parity)}\n{out}: {len(report.files)} files and a receipt{signed}\nreceipt {receipt}"
    _print(record | {"receipt": receipt}, text, as_json)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="An exported folder.")],
    base: Annotated[str | None, typer.Option(help="The base model, if it moved since the export.")] = None,
    offline_hashes: Annotated[
        bool, typer.Option("--offline-hashes", help="Files against the receipt only: needs no base, runs nothing.")
    ] = False,
    receipt: Annotated[str | None, typer.Option(help="The SHA-256 of the receipt, from its author.")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file of the public key that it must be signed with.")] = None,
    as_json: Json = False,
) -> None:
    """Check an exported folder: its files, what it stores, and what it computes."""
    if offline_hashes and base is not None:
        raise typer.BadParameter("--offline-hashes with --base: it compares nothing with a base; leave out one of them")
    if offline_hashes:  # without torch, which takes longer to import than most folders to read
        from adaras_export.integrity import verify_files

        report = verify_files(folder, receipt=receipt, key=key)
    else:
        from adaras_export.delivery import verify as run

        _quiet_libraries()
        report = run(folder, base, receipt=receipt, key=key)
    left_out = _unproven(known=receipt is not None or key is not None) if offline_hashes else []
    record = {"ok": report.ok, "checks": report.as_record(), "receipt": _receipt_hash(folder), "unproven": left_out}
    text = "\n".join([_checks(report), f"receipt {record['receipt']}", *left_out])
    _print(record, text, as_json)
    if not report.ok:
        raise ParityError(f"{folder}: {len(report.failed())} of {len(report.checks)} checks failed")


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="An exported folder.")],
    repository: Annotated[str | None, typer.Option(help="What the card calls it: USER/REPO on the Hub.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="File of eval; default: the one that is in it.")] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Hub dataset that the rule was made with; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the model card of an exported folder anew, and its receipt; nothing else of it changes."""
    from adaras_export import delivery, receipts

    before = receipts.read(folder).files
    receipt = delivery.recard(folder, repository, evaluation, dataset or None)
    changed = sorted(name for name, found in receipt.files.items() if before.get(name) != found)
    gone = sorted(before.keys() - receipt.files.keys())
    record = {"path": str(folder), "repository": receipt.repository, "changed": changed, "removed": gone}
    told = [f"written: {', '.join(changed)}" if changed else "as it was", *(f"removed: {name}" for name in gone)]
    _print(record, f"{folder}: {'; '.join(told)}", as_json)


@app.command()
def sign(
    folder: Annotated[Path, typer.Argument(help="An exported folder.")],
    key: Annotated[Path, typer.Argument(help="PEM file of a private key: P-256, P-384 or P-521.")],
    as_json: Json = False,
) -> None:
    """Sign an exported folder, as it is to be published: card and receipt included."""
    path = _signature(key)(folder)
    _print({"signature": str(path), "receipt": _receipt_hash(folder)}, f"{path}: written", as_json)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="An exported folder.")],
    repository: Annotated[str, typer.Argument(help="USER/NAME.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Who may see it. [default: private, if it is new]")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, new or not. [default: main]")] = None,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Put an exported folder on the Hub, with one commit. Goes on where it was interrupted."""
    from adaras_export import hub

    if not (yes or dry_run or sys.stdin.isatty()):
        raise typer.BadParameter("nobody is there to be asked; expected --yes, or --dry-run to see what would be done")
    _quiet_libraries()
    planned = hub.plan(folder, repository, private=private, revision=revision, message=message)
    for warning in planned.warnings:
        _warn(warning)
    if dry_run:
        _print(planned.as_record(), planned.text(), as_json)
        return
    sys.stderr.write(f"{planned.text()}\n")
    if not (yes or planned.empty):
        typer.confirm("push this?", abort=True, err=True)
    done = hub.carry_out(planned)
    did = f"{len(done.uploaded)} files sent, {len(done.removed)} removed, {len(done.unchanged)} were there"
    _print(done.as_record(), f"{done.url}: {did}\nreceipt {done.receipt}", as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what works here: libraries, a GPU, the Hub, and every target, tried on a toy. Takes half a minute."""
    from adaras_export.doctor import examine
    from adaras_export.errors import BrokenInstallationError

    with _progress() as bar:
        findings = examine(bar("trying targets"))
    broken = [finding for finding in findings if finding.ok is False]
    record = {"ok": not broken, "findings": [vars(finding) for finding in findings]}
    _print(record, "\n".join(finding.line() for finding in findings), as_json)
    if broken:
        raise BrokenInstallationError("; ".join(f"{finding.name}: {finding.text}" for finding in broken))


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
        command = "" if error.ctx is None else f"; see {error.ctx.command_path} --help"
        _fail("UsageError", error.format_message().rstrip(".") + command, 2)
    except typer.Abort:
        _fail("Aborted", "nothing more was written", 130)
    sys.exit(status)


# What Typer raises for a wrong command line: click's, or that of its own copy of click in later versions.
_USAGE_ERROR: Any = typer.BadParameter.__base__


def _fail(kind: str, message: str, status: int) -> None:
    sys.stderr.write(f"{kind}: {printable(' '.join(message.split()))}\n")
    sys.exit(status)


def _warn(text: str) -> None:
    sys.stderr.write(f"warning: {text}\n")


def _print(record: dict[str, Any], text: str, as_json: bool) -> None:
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
def _progress() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Bars on standard error: ``bar(name)`` gives a callback of (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)  # in a file or a pipe, bars are noise around the one line of an error
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def bar(name: str) -> Callable[[int, int], None]:
            task = progress.add_task(name, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield bar


def _load(model: str, revision: str | None) -> tuple[Any, Any]:
    _quiet_libraries()
    from adaras_export.generation import load_model

    return load_model(model, revision)


def _quiet_libraries() -> None:
    """Our own bars and messages are enough."""
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def _exam(questions: Path, check: str, sampling: "Sampling", rows: int) -> "Exam":
    from adaras_export.checkers import checker
    from adaras_export.evaluate import Exam
    from adaras_export.traces import read_questions

    return Exam(read_questions(questions), checker(check), sampling, rows)


def _signature(key: Path) -> Callable[[Path], Path]:
    """What signs a folder with a key; refuses the key, or asks for its password, before there is work to lose."""
    import os

    from adaras_export import signing

    password = os.environ.get(signing.PASSWORD)
    if not signing.is_encrypted(key):
        password = None
    elif password is None and sys.stdin.isatty():
        password = typer.prompt(f"Password of {key}", hide_input=True, err=True)
    signing.require_key(key, password)
    return lambda folder: signing.sign(folder, key, password)


def _receipt_hash(folder: Path) -> str:
    from adaras_export import receipts, storage

    return storage.sha256_file(folder / receipts.RECEIPT_FILE)


def _unproven(*, known: bool) -> list[str]:
    """What `verify --offline-hashes` says nothing about."""
    forged = "that the receipt is its author's: give --key or --receipt, or compare the receipt's SHA-256 yourself"
    computed = "what it stores and computes against its base: leave out --offline-hashes"
    return [f"not checked: {text}" for text in ([computed] if known else [forged, computed])]


def _text(option: str | None) -> str | None:
    """An option in which a line end is written as backslash n."""
    return None if option is None else option.replace("\\n", "\n")


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(one) for one in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--{option} {text}: expected numbers with commas between them") from error


def _counts(text: str) -> list[int]:
    numbers = _numbers("counts", text)
    if not all(one.is_integer() and one >= 1 for one in numbers):
        raise typer.BadParameter(f"--counts {text}: expected whole numbers, 1 or more")
    return [int(one) for one in numbers]


def _choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise typer.BadParameter(f"--{option} {value}: expected one of: {', '.join(choices)}")


def _start(value: str) -> Any:  # noqa: ANN401 - a literal that mypy cannot see
    _choice("start", value, ("last_prompt_token", "first_generated_token"))
    return value


def _checks(report: "ParityReport") -> str:
    return "\n".join(check.line() for check in report.checks)
