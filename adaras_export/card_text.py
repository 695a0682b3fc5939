"""Names of others within Markdown and within code: whatever they contain, they stay what they are.

Knows no cards. A repository or a base may be called anything that a folder may.
"""

import json
import re
import shlex

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


def filled(markdown: str, repository: str, strength: float) -> str:
    """Markdown whose blocks of code have the repository and the strength in place of their names.

    In Python and JavaScript ``{repo}`` stands between double quotes, in a shell it is a word.
    """

    def block(match: re.Match[str]) -> str:
        language, more, body = match.groups()
        if language == "bash":
            body = body.replace("{repo}", shell_word(repository))
        else:
            body = body.replace('"{repo}"', json.dumps(repository, ensure_ascii=False))
        return f"```{language}{more}\n{body}```"

    return _BLOCK.sub(block, markdown).replace("{strength}", repr(float(strength)))


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
