"""Names of others within Markdown and within code: whatever they contain, they stay what they are.

Knows no cards. A repository or a base may be called anything that a folder may.
"""

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LONGEST = 600
_BLOCK = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def plain(text: str) -> str:
    """``text`` on one line, as Markdown that shows it and means nothing else."""
    return re.sub(r"([\\`*\[\]<>|#&~$])", r"\\\1", _one_line(text))


def code(text: str) -> str:
    """``text`` on one line, as a span of code."""
    shown = _one_line(text) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", shown)), default=0))
    edge = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{edge}{shown}{edge}{fence}"


def cell(text: str) -> str:
    """``text`` on one line, as a cell of a table."""
    return _one_line(text).replace("|", "\\|")


@dataclass(frozen=True)
class Example:
    """A question for snippets to ask: as the user's turn of a chat, or as it is."""

    text: str
    chat: bool

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


def filled(markdown: str, repository: str, strength: float, example: Example) -> str:
    """Markdown whose braces have what stands for them.

    A line that begins with ``{chat}`` is there where the example is of a chat, one with ``{plain}`` where it is not.
    Within blocks of code, ``{repo}`` and ``{question}`` stand between double quotes in Python and JavaScript, and are
    words in a shell. ``{strength}`` is the rule's.
    """
    values = {"repo": repository, "question": example.text}
    kept, left_out = ("{chat}", "{plain}") if example.chat else ("{plain}", "{chat}")

    def block(match: re.Match[str]) -> str:
        language, more, body = match.groups()
        pattern, quoted = (r"\{(repo|question)\}", shell_word) if language == "bash" else _QUOTED
        body = re.sub(pattern, lambda found: quoted(values[found[1]]), body)
        return f"```{language}{more}\n{body}```"

    chosen = re.sub(rf"^{left_out}.*\n", "", markdown, flags=re.MULTILINE).replace(kept, "")
    return _BLOCK.sub(block, chosen.replace("{strength}", repr(float(strength))))


def _json(text: str) -> str:
    """``text`` as a string of Python and JavaScript."""
    return json.dumps(text, ensure_ascii=False)


_QUOTED: tuple[str, Callable[[str], str]] = (r'"\{(repo|question)\}"', _json)


def shell_word(text: str) -> str:
    """``text`` as one word of a shell, on one line."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = "".join(one if one.isprintable() and one not in "'\\" else _escaped(one) for one in text)
    return f"$'{escaped}'"


def blocks(markdown: str) -> list[tuple[str, str]]:
    """The blocks of code in a text: what stands behind the fence, and the code."""
    return [(f"{language}{more}", body) for language, more, body in _BLOCK.findall(markdown)]


def _escaped(character: str) -> str:
    return f"\\{character}" if character in "'\\" else f"\\U{ord(character):08x}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
