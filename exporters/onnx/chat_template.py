"""The chat template of an exported folder, rendered as Transformers does it: with Jinja2, in a sandbox."""

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from adaras_export.errors import ArtifactError, TraceError, require
from adaras_export.files import atomic, safe_read
from adaras_export.files.safe_read import UnreadableError

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
    settings = atomic.read_json(path) if path.is_file() else {}
    source = settings.get("chat_template")
    if isinstance(source, list) and all(isinstance(named, dict) for named in source):
        source = {str(named.get("name")): named.get("template") for named in source}.get("default")
    try:
        source = safe_read.text(safe_read.content(own)) if own.is_file() else source
    except UnreadableError as error:
        raise ArtifactError(f"{own}: {error}; expected a chat template") from error
    if source is None:
        return None
    if not isinstance(source, str):
        raise ArtifactError(f"{path}: chat_template is {reprlib.repr(source)}; expected text, or a list of named ones")
    tokens = {name: value for name, value in settings.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return ChatTemplate(source, {name: text for name, text in texts.items() if isinstance(text, str)})
