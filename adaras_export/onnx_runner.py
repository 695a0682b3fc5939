"""`python -m adaras_export.onnx_runner DIR "prompt"`: an export to target onnx, with onnxruntime and tokenizers alone.

Prompt in, text out while it comes, and what the gate decided. Knows nothing of rules, torch and Transformers.
"""

import argparse
import json
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, islice
from pathlib import Path
from typing import Any

from adaras_export import foreign, storage
from adaras_export.errors import AdarasError, ArtifactError, TraceError, require
from adaras_export.exporters.onnx_session import PROVIDERS, STRENGTH, THRESHOLD, Session, Step, end_ids
from adaras_export.foreign import UnreadableError

GRAPH = "onnx/model.onnx"
# What the expressions of a chat template raise: 1 / 0, [0][1], 1 + "", a macro that calls itself.
_EXPRESSIONS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)


@dataclass(frozen=True)
class ChatTemplate:
    """Jinja, and the special tokens that it may name."""

    source: str
    special: Mapping[str, str]

    def render(self, prompt: str) -> str:
        """A chat of one user's turn, up to where the model's begins; in a sandbox, as Transformers does it.

        Raises:
            TraceError: the template refuses the prompt.
            MissingExtraError: Jinja2 is not installed.
        """
        require("jinja2", "onnx", "a chat template (--raw leaves it out)")
        from jinja2 import TemplateError
        from jinja2.ext import Extension
        from jinja2.nodes import Node
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        class Generation(Extension):
            """What marks an assistant's text; it leaves the text as it is."""

            tags = {"generation"}  # noqa: RUF012 - as the base class has it

            def parse(self, parser: Parser) -> list[Node]:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
        )
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        messages = [{"role": "user", "content": prompt}]
        try:
            template = environment.from_string(self.source)
            return template.render(messages=messages, add_generation_prompt=True, **self.special)
        except (TemplateError, *_EXPRESSIONS) as error:
            raise TraceError(f"prompt: the chat template refuses it ({error}); leave it out with --raw") from error


def chat_template(folder: Path) -> ChatTemplate | None:
    """The template in a file of its own, or the (default) one among the tokenizer's settings.

    Raises:
        ArtifactError: it is no text.
    """
    path, own = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    settings = storage.read_json(path) if path.is_file() else {}
    source = settings.get("chat_template")
    if isinstance(source, list) and all(isinstance(named, dict) for named in source):
        source = {str(named.get("name")): named.get("template") for named in source}.get("default")
    try:
        source = foreign.text(foreign.content(own)) if own.is_file() else source
    except UnreadableError as error:
        raise ArtifactError(f"{own}: {error}; expected a chat template") from error
    if source is None:
        return None
    if not isinstance(source, str):
        raise ArtifactError(f"{path}: chat_template is {reprlib.repr(source)}; expected text, or a list of named ones")
    tokens = {name: value for name, value in settings.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return ChatTemplate(source, {name: text for name, text in texts.items() if isinstance(text, str)})


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
    if not path.is_file() or "adaras" not in storage.read_json(folder / "config.json"):
        raise ArtifactError(f"{folder}: is no export to target onnx; expected onnx/model.onnx and its config.json")
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
    parser = argparse.ArgumentParser(prog="python -m adaras_export.onnx_runner", description="Run an ONNX export.")
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
