"""Checkers that let a library, or a pattern, work on a model's text: they run in the sandbox only.

``load`` comes before the process forks and gives up its rights, ``read`` and ``score`` behind that. An answer that
cannot be read raises an exception that says why; what a library says of a readable one goes along as a note.
"""

import importlib
import json
import re
from types import ModuleType
from typing import Any, Protocol


class UnreadableAnswer(Exception):  # noqa: N818 - a verdict on a file, told by whoever asked
    """Why an answer is refused, in words that fit behind it."""


class Scorer(Protocol):
    """How answers are read, and completions compared with them."""

    def load(self) -> None:
        """Import what the others need."""

    def read(self, answer: str) -> tuple[Any, Any]:
        """What a completion is compared with, and a note for whoever asked."""

    def score(self, completion: str, expected: Any) -> bool:  # noqa: ANN401 - what `read` gave
        """Whether the completion is correct."""


class Pattern:
    """A regular expression; here, because there are patterns that take for ever."""

    def load(self) -> None:
        """It needs the standard library only."""

    def read(self, answer: str) -> tuple[re.Pattern[str], None]:
        """The pattern."""
        try:
            return re.compile(answer), None
        except (re.error, RecursionError, OverflowError) as error:
            raise UnreadableAnswer(f"is no regular expression ({error})") from error

    def score(self, completion: str, expected: re.Pattern[str]) -> bool:
        """Whether it occurs."""
        return expected.search(completion) is not None


class Mathematics:
    """The library math-verify, which parses by SymPy and has a limit of its own for each step, of five seconds."""

    def load(self) -> None:
        """Parse once: the first LaTeX takes long, since it builds the parser's tables."""
        self._library = importlib.import_module("math_verify")
        self._library.parse(r"$\frac{1}{2}$")

    def read(self, answer: str) -> tuple[Any, None]:
        """The expressions of LaTeX, with or without dollar signs around it; one behind a backslash is a currency's."""
        expected = self._library.parse(answer if re.search(r"(?<!\\)\$", answer) else f"${answer}$")
        if not expected:
            raise UnreadableAnswer("holds no mathematical expression; expected LaTeX")
        return expected, None

    def score(self, completion: str, expected: Any) -> bool:  # noqa: ANN401 - the library's own
        """Whether the last expression equals them."""
        return bool(self._library.verify(expected, self._library.parse(completion)))


class Tasks:
    """The tasks of reasoning-gym, of which some evaluate an answer as Python."""

    def load(self) -> None:
        """The library takes seconds to import."""
        self._library = importlib.import_module("reasoning_gym")

    def read(self, answer: str) -> tuple[Any, str]:
        """The task with its entry, made again, and the entry's question as the note."""
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
