"""`python -m adaras_export.exporters.onnx DIR "prompt"` runs an export to target onnx, and needs no torch.

Prompt in, text out while it comes, and what the gate decided. Needs onnxruntime and tokenizers, and Jinja2 for a chat
template. Knows no rules.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from adaras_export.errors import AdarasError, ArtifactError, TraceError, require
from adaras_export.exporters.onnx.chat_template import chat_template
from adaras_export.exporters.onnx.session import GRAPH, PROVIDERS, STRENGTH, THRESHOLD, Session, Step, end_ids
from adaras_export.files import atomic


def encode(folder: Path, tokenizer: Any, prompt: str, *, raw: bool = False) -> list[int]:  # noqa: ANN401
    """The prompt's tokens: as the user's turn of a chat where the model has a chat template, unless ``raw``.

    Raises:
        TraceError: it has no tokens, or the template refuses it.
        ArtifactError, MissingExtraError: the template is damaged, or needs Jinja2.
    """
    template = None if raw else chat_template(folder)
    text = prompt if template is None else template.render(prompt)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=template is None).ids
    if not ids:
        raise TraceError("prompt: has no tokens; expected some text")
    return ids


def open_tokenizer(folder: Path) -> Any:  # noqa: ANN401 - a class of compiled code
    """The tokenizer of an exported folder, of the library tokenizers.

    Raises:
        ArtifactError: it is missing or damaged.
        MissingExtraError: the library is not installed.
    """
    tokenizers = require("tokenizers", "onnx", "running an ONNX export")
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; expected the tokenizer of the base model: export again")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # what it raises has no class of its own
        raise ArtifactError(f"{path}: {error}; expected a tokenizer of the tokenizers library") from error


def pieces(decode: Callable[[list[int]], str], tokens: Iterable[int]) -> Iterator[str]:
    """Text as its tokens come, never half of a character; joined, the pieces are the text of all tokens."""
    ids: list[int] = []
    done = 0
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        if len(text) > done and not text.endswith("\ufffd"):  # the first bytes of a character
            yield text[done:]
            done = len(text)
    yield decode(ids)[done:]


def _first_row(steps: Iterable[Step], ends: set[int]) -> Iterator[int]:
    """Tokens up to one that ends the text, which is the last."""
    for step in steps:
        token = int(step.tokens_B[0])
        yield token
        if token in ends:
            return


def _graph(folder: Path) -> Path:
    path = folder / GRAPH
    if not path.is_file() or "adaras" not in atomic.read_json(folder / "config.json"):
        raise ArtifactError(f"{folder}: is no export to target onnx; expected {GRAPH} and its config.json")
    return path


def _run(given: argparse.Namespace) -> None:
    """Print what the gate decided on standard error, and the answer as it comes."""
    if given.max_new_tokens < 1:
        raise TraceError(f"max_new_tokens {given.max_new_tokens}; expected 1 or more")
    session, tokenizer = Session(_graph(given.folder), given.provider), open_tokenizer(given.folder)
    prompt, ends = encode(given.folder, tokenizer, given.prompt, raw=given.raw), end_ids(given.folder)
    dials = {STRENGTH: given.strength, THRESHOLD: given.threshold}
    steps = session.decode([prompt], dials={name: value for name, value in dials.items() if value is not None})
    steps = islice(steps, given.max_new_tokens)
    first = next(steps)
    sys.stderr.write(_decision(first, given.strength) + "\n")
    for piece in pieces(tokenizer.decode, _first_row(chain([first], steps), ends)):  # leaves special tokens out
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _decision(step: Step, strength: float | None) -> str:
    probability_B, steered_B = step.probability, step.steered
    is_steered = strength != 0 and (steered_B is None or bool(steered_B[0]))
    gate = "no gate" if probability_B is None else f"p(correct) {probability_B[0]:.4f}"
    return f"{gate}: {'steered' if is_steered else 'not steered'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 2 after a line on standard error for input that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m adaras_export.exporters.onnx", description="Run an ONNX export.")
    parser.add_argument("folder", type=Path, help="folder of an export to target onnx")
    parser.add_argument("prompt")
    parser.add_argument("--strength", type=float, help="in place of the rule's; 0 is the base model")
    parser.add_argument("--threshold", type=float, help="steer where p(correct) is below; in place of the gate's")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--raw", action="store_true", help="leave the chat template out")
    parser.add_argument("--provider", choices=PROVIDERS, default="cpu")
    try:
        _run(parser.parse_args(arguments))
    except AdarasError as error:
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
