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
from types import ModuleType

from adaras_export.errors import TraceError, require
from adaras_export.traces import Question

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


CHECKERS: dict[str, Checker] = {
    "last_number": last_number,
    "exact": exact,
    "math_verify": math_verify,
}


def checker(name: str) -> Checker:
    """The checker of that name.

    Raises:
        TraceError: there is none.
        MissingExtraError: its library is not installed.
    """
    if name not in CHECKERS:
        raise TraceError(f"checker {name}: is not known; expected one of: {', '.join(CHECKERS)}")
    if name == "math_verify":
        _math_verify_library()  # tells of a missing library before anything is sampled
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


def _math_verify_library() -> ModuleType:
    return require("math_verify", "eval", "checking answers by their mathematics")


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
