"""Decide whether a completion gives the right answer.

Knows no model. A checker is any function of completion and answer; those here are found by name.
A completion that gives no answer is incorrect; an answer that a checker cannot read is refused,
since it would make every completion incorrect.
"""

import re
import threading
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from types import ModuleType
from typing import Any

from adaras_export import foreign, sandbox
from adaras_export.code_answers import code
from adaras_export.errors import TraceError, require
from adaras_export.foreign import UnreadableError
from adaras_export.traces import Question, digest

Checker = Callable[[str, str], bool]
"""Of completion and answer: is the completion correct?"""

# A minus sign counts only where it cannot be a difference ("5-3" ends in 3). Commas only in groups
# of three: "1,2" are two numbers. An exponent of more than four digits is no number to compare.
_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)\]}}])[-+])?\$?(?P<top>(?:{_DECIMAL})(?:[eE][-+]?[0-9]{{1,4}}(?![0-9]))?)"
    rf"(?:\s?/\s?(?P<bottom>{_DECIMAL}))?"
)
# The typographic minus sign, and LaTeX's backslash before a dollar sign or a thousands comma.
_PLAIN = str.maketrans({"\u2212": "-", "\\": None})


def last_number(completion: str, answer: str) -> bool:
    """Whether the last number of the completion equals the answer, as numbers, exactly.

    Reads signs, commas between thousands, decimals, exponents and fractions written with a slash;
    a dollar sign before and a percent sign behind are ignored.

    Raises:
        TraceError: the answer is not one number.
    """
    expected = _whole_number(answer)
    found = list(_NUMBER.finditer(completion.translate(_PLAIN)))
    return bool(found) and _value(found[-1]) == expected


def exact(completion: str, answer: str) -> bool:
    """Whether completion and answer are the same text, apart from white space around them."""
    return completion.strip() == answer.strip()


def math_verify(completion: str, answer: str) -> bool:
    r"""Whether the completion's final expression equals the answer, by the math-verify library.

    The answer is LaTeX, with or without its dollar signs. Parsing and comparing get 5 s each in the
    main thread; elsewhere they have no limit, since the library's limit is a Unix signal.

    Raises:
        MissingExtraError: math-verify is not installed.
        TraceError: the answer holds no expression.
    """
    library = _math_verify_library()
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    expected = library.parse(answer if "$" in answer else f"${answer}$", parsing_timeout=limit)
    if not expected:
        raise TraceError(f"answer {answer!r}: holds no mathematical expression; expected LaTeX")
    found = library.parse(completion, parsing_timeout=limit)
    return bool(library.verify(expected, found, timeout_seconds=limit))


def regex(completion: str, answer: str) -> bool:
    r"""Whether the answer, a regular expression of Python's, occurs in the completion; ``\A`` and ``\Z`` bind it.

    A pattern that takes more than ten seconds counts as not found.

    Raises:
        TraceError: the answer is no regular expression.
    """
    try:
        re.compile(answer)
    except (re.error, RecursionError, OverflowError) as error:
        raise TraceError(f"answer {answer!r}: is no regular expression ({error})") from error
    return sandbox.found_in(answer, completion)


def reasoning_gym(completion: str, answer: str) -> bool:
    """Whether reasoning-gym gives the completion's answer the full score of 1.

    The answer is JSON: ``task``, ``seed``, ``size``, ``index``, and the ``digest`` of the question that these make.
    What is scored stands in the last pair of answer tags, else in the last box, else on the last line.

    Raises:
        MissingExtraError: reasoning-gym is not installed.
        TraceError: the answer has another form, or the installed version makes another question of it.
    """
    library = _reasoning_gym_library()
    try:
        record = foreign.parsed(answer.encode())
        task, seed, size, index, expected = (record[key] for key in ("task", "seed", "size", "index", "digest"))
    except (UnreadableError, KeyError, TypeError) as error:
        raise TraceError(f"answer {answer!r}: expected JSON with task, seed, size, index and digest") from error
    questions = _task(task, seed, size)
    entry = questions[index]
    if digest(entry["question"]) != expected:
        found = f"reasoning-gym {getattr(library, '__version__', '')} makes another question"
        raise TraceError(f"{task} {index} of seed {seed}: {found}; run: adaras-export questions reasoning-gym:{task}")
    return bool(questions.score_answer(_last_answer(completion, library), entry) >= 1.0)


CHECKERS: dict[str, Checker] = {
    "last_number": last_number,
    "exact": exact,
    "math_verify": math_verify,
    "regex": regex,
    "code": code,
    "reasoning_gym": reasoning_gym,
}


def checker(name: str) -> Checker:
    """The checker of that name.

    Raises:
        TraceError: there is none.
        MissingExtraError: its library is not installed.
        BrokenInstallationError: it runs code, and there is no sandbox here.
    """
    if name not in CHECKERS:
        raise TraceError(f"checker {name}: is not known; expected one of: {', '.join(CHECKERS)}")
    if name == "math_verify":
        _math_verify_library()  # tells of a missing library before anything is sampled
    if name == "reasoning_gym":
        _reasoning_gym_library()
    if name in ("code", "regex"):
        sandbox.require_sandbox()
    return CHECKERS[name]


def checker_for(questions: Sequence[Question], name: str | None = None) -> Checker:
    """The checker of that name, else the one that the questions name, else `last_number`.

    Raises:
        TraceError: there is none of the name, or the questions name several.
        MissingExtraError: its library is not installed.
    """
    named = sorted({question.check for question in questions if question.check is not None})
    if name is None and len(named) > 1:
        found = ", ".join(named)
        raise TraceError(f"questions: name the checkers {found}; expected one for all; choose it with --check")
    return checker(name or (named[0] if named else "last_number"))


def name_of(check: Checker) -> str:
    """The name under which files and reports know it."""
    name: str = getattr(check, "__name__", type(check).__name__)
    return name


def _math_verify_library() -> ModuleType:
    return require("math_verify", "eval", "checking answers by their mathematics")


def _reasoning_gym_library() -> ModuleType:
    return require("reasoning_gym", "questions", "scoring the answers of its tasks")


@lru_cache(maxsize=16)
def _task(task: str, seed: int, size: int) -> Any:  # noqa: ANN401 - the library's own
    return _reasoning_gym_library().create_dataset(task, seed=seed, size=size)


def _last_answer(completion: str, library: ModuleType) -> str:
    tagged: str | None = library.utils.extract_answer(completion)
    if tagged is not None:
        return tagged
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", completion)
    lines = completion.strip().splitlines()
    return str(boxed[-1] if boxed else lines[-1] if lines else "").strip()


def _whole_number(answer: str) -> Fraction:
    match = _NUMBER.fullmatch(answer.translate(_PLAIN).strip().strip("$%").strip())
    value = None if match is None else _value(match)
    if value is None:
        raise TraceError(
            f"answer {answer!r}: is not one number; expected a number, or another checker than last_number"
        )
    return value


def _value(match: re.Match[str]) -> Fraction | None:
    """The number of a match; None for a division by zero, which equals nothing."""
    top, bottom = (_fraction(match[name] or "1") for name in ("top", "bottom"))
    if bottom == 0:
        return None
    return -top / bottom if match["sign"] == "-" else top / bottom


def _fraction(digits: str) -> Fraction:
    # By way of Decimal: a Fraction of text refuses more than 4300 digits, which models do repeat.
    return Fraction(Decimal(digits.replace(",", "")))
