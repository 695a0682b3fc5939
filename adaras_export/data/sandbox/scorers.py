"""Checkers in which a library or a pattern works on a model's text; they run in the sandbox only.

``load`` runs before the process forks and gives up its rights, ``read`` and ``score`` after that. ``read`` raises the
reason if an answer cannot be read, and returns a note of the library with an answer that can.
"""

import importlib
import json
import re
from types import ModuleType
from typing import Any, Protocol


class UnreadableAnswer(Exception):  # noqa: N818 - a verdict on a file, which the caller reports
    """The reason for refusing an answer, as the end of a sentence that begins with the answer."""


class Scorer(Protocol):
    """Reads answers and compares completions with them."""

    def load(self) -> None:
        """Import the library."""

    def read(self, answer: str) -> tuple[Any, Any]:
        """The value to compare completions with, and a note for the caller."""

    def score(self, completion: str, expected: Any) -> bool:  # noqa: ANN401 - the value of `read`
        """Whether the completion is correct."""


class Pattern:
    """A regular expression; in the sandbox, because a pattern may never end."""

    def load(self) -> None:
        """Do nothing: the standard library is enough."""

    def read(self, answer: str) -> tuple[re.Pattern[str], None]:
        """The compiled pattern."""
        try:
            return re.compile(answer), None
        except (re.error, RecursionError, OverflowError) as error:
            raise UnreadableAnswer(f"is no regular expression ({error})") from error

    def score(self, completion: str, expected: re.Pattern[str]) -> bool:
        """Whether the pattern matches in the completion."""
        return expected.search(completion) is not None


class Mathematics:
    """The library math-verify, which parses with SymPy and limits each step to five seconds."""

    def load(self) -> None:
        """Parse once, since the first parse is slow: it builds the parser's tables."""
        self._library = importlib.import_module("math_verify")
        self._library.parse(r"$\frac{1}{2}$")

    def read(self, answer: str) -> tuple[Any, None]:
        """The expressions of LaTeX, with or without dollar signs around it; an escaped dollar sign is a currency."""
        expected = self._library.parse(answer if re.search(r"(?<!\\)\$", answer) else f"${answer}$")
        if not expected:
            raise UnreadableAnswer("holds no mathematical expression; expected LaTeX")
        return expected, None

    def score(self, completion: str, expected: Any) -> bool:  # noqa: ANN401 - the library's own
        """Whether the completion's last expression equals the answer."""
        return bool(self._library.verify(expected, self._library.parse(completion)))


class Tasks:
    """The tasks of reasoning-gym; some evaluate an answer as Python."""

    def load(self) -> None:
        """Import the library, which takes seconds."""
        self._library = importlib.import_module("reasoning_gym")

    def read(self, answer: str) -> tuple[Any, str]:
        """The task and its entry, generated again, and the entry's question as the note."""
        place = json.loads(answer)
        try:
            task = self._library.create_dataset(place["task"], seed=place["seed"], size=place["size"])
        except ValueError as error:
            raise UnreadableAnswer(f"names no task that reasoning-gym makes ({error})") from error
        entry = task[place["index"]]
        return (task, entry), entry["question"]

    def score(self, completion: str, expected: Any) -> bool:  # noqa: ANN401 - the library's own
        """Whether the library gives the full score."""
        task, entry = expected
        return bool(task.score_answer(_last_answer(completion, self._library), entry) >= 1.0)


def _last_answer(completion: str, library: ModuleType) -> str:
    tagged: str | None = library.utils.extract_answer(completion)
    if tagged is not None:
        return tagged
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", completion)
    lines = completion.strip().splitlines()
    return str(boxed[-1] if boxed else lines[-1] if lines else "").strip()


SCORERS: dict[str, Scorer] = {"regex": Pattern(), "math_verify": Mathematics(), "reasoning_gym": Tasks()}
