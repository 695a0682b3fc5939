"""Escape untrusted text for Markdown, YAML and code, and fill the Markdown templates of this package.

A name may contain anything that a file name or a JSON string may: readers see that name, and nothing else happens.
Knows no cards and no reports.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from adaras_export.errors import visible

if TYPE_CHECKING:
    from jinja2 import Environment

_LONGEST = 600
# What Markdown, or an extension that a viewer may have, reads as a mark: anywhere; at the edge of a word; before what
# makes it a directive, an emoji or an address; before text that follows; at the start of a line.
_MARKS = re.compile(
    r"[\\`*\[\]<>|#&~$]"
    r"|(?<![^\W_])_|_(?![^\W_])"
    r"|:(?=\S)|(?<=www)\."
    r"|!$"
    r"|^[-+=](?=\s|[-=]*\s*$)"
)
_NUMBER = re.compile(r"^(\s*\d{1,9})([.)])(?=\s|$)")


class Markdown(str):
    """Text that is Markdown already; a template escapes every other value."""

    __slots__ = ()


def plain(text: str) -> Markdown:
    """``text`` on one line, as Markdown that shows it and means nothing else, in a table as well."""
    return Markdown(_NUMBER.sub(r"\1\\\2", _MARKS.sub(r"\\\g<0>", _one_line(text))))


def code(text: str) -> Markdown:
    """``text`` on one line, as a span of code; as words where it has a bar, which would end the cell of a table."""
    shown = _one_line(text).strip() or " "
    if "|" in shown:
        return plain(shown)
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", shown)), default=0))
    edge = " " if shown.startswith("`") or shown.endswith("`") else ""
    return Markdown(f"{fence}{edge}{shown}{edge}{fence}")


def python(text: str) -> Markdown:
    """``text`` as a string of Python."""
    return Markdown(visible(json.dumps(text, ensure_ascii=False)))


def javascript(text: str) -> Markdown:
    """``text`` as a string of JavaScript, which has no escape of eight digits."""
    quoted = json.dumps(text, ensure_ascii=False)
    return Markdown("".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in quoted))


def shell(text: str) -> Markdown:
    """``text`` as one word of a shell, on one line."""
    if text.isprintable():
        return Markdown(shlex.quote(text))
    escaped = "".join(one if one.isprintable() and one not in "'\\" else _escaped(one) for one in text)
    return Markdown(f"$'{escaped}'")


def render(template: str, values: Mapping[str, Any]) -> Markdown:
    """The text of a template, by its path in this package; no value is read as a template.

    The filters ``code``, ``python``, ``javascript`` and ``shell`` are the functions above. A value without a filter
    passes through `plain`, unless it is `Markdown`.
    """
    return Markdown(_templates().get_template(template).render(values))


def front_matter(entries: Mapping[str, Any]) -> Markdown:
    """The YAML header of a card, between its fences."""
    return Markdown(f"---\n{as_yaml(entries)}---\n")


def as_yaml(value: Any) -> str:  # noqa: ANN401 - whatever YAML can say
    """``value`` as YAML that is read back as it was."""
    from yaml import safe_dump, safe_load

    text: str = safe_dump(value, sort_keys=False, allow_unicode=True)
    if safe_load(text) != value:  # PyYAML folds line ends of Unicode, unless it escapes every letter beyond ASCII
        text = safe_dump(value, sort_keys=False)
    return text


@cache
def _templates() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(  # its own escaping is for HTML
        loader=PackageLoader("adaras_export", "."),
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "python": python, "javascript": javascript, "shell": shell}
    return environment


def _shown(value: Any) -> Markdown:  # noqa: ANN401 - whatever a template names
    if value is None:
        raise TypeError("a template shows None; expected a value")
    return value if isinstance(value, Markdown) else plain(str(value))


@dataclass(frozen=True)
class Example:
    """A question for snippets to ask: as the user's turn of a chat, or as it is."""

    text: str
    chat: bool

    @property
    def prompt(self) -> str | list[dict[str, str]]:
        """The prompt that this is the example of."""
        return [{"role": "user", "content": self.text}] if self.chat else self.text

    @classmethod
    def of(cls, prompt: Any) -> "Example | None":  # noqa: ANN401 - a prompt, or what a file has in its place
        """The example that a prompt is: a short text that can be seen, alone or as the only turn of a chat."""
        text, chat = prompt, isinstance(prompt, Sequence) and not isinstance(prompt, str)
        if chat:
            text = prompt[0].get("content") if len(prompt) == 1 and isinstance(prompt[0], Mapping) else None
            if text is None or dict(prompt[0]) != {"role": "user", "content": text}:
                return None
        if not isinstance(text, str) or not 0 < len(text) <= _LONGEST:
            return None
        return cls(text, chat) if all(line.isprintable() for line in text.split("\n")) else None


def _escaped(character: str) -> str:
    return f"\\{character}" if character in "'\\" else f"\\U{ord(character):08x}"


def _one_line(text: str) -> str:
    return visible(re.sub(r"\s+", " ", text))
