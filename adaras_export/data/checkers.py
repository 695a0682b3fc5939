"""Decide whether a completion gives the right answer.

A checker is a function of completion and answer; this module looks checkers up by name. A completion without an answer
is incorrect. An answer that the checker cannot read is refused, since it would make every completion incorrect.
"""

import re
import reprlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal
from importlib.metadata import version
from itertools import zip_longest
from types import ModuleType
from typing import Any

from adaras_export.core.traces import Checker, Question, digest
from adaras_export.data.code_execution import code, problem_of
from adaras_export.data.sandbox import client
from adaras_export.data.sandbox.client import Limits
from adaras_export.errors import TraceError, require
from adaras_export.files import safe_read
from adaras_export.files.safe_read import UnreadableError

# A minus sign is a sign only if it cannot be a subtraction ("5-3" ends in 3). Commas count only between groups
# of three digits: "1,2" is two numbers. An exponent of more than four digits is not compared.
_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)\]}}])[-+])?\$?(?P<top>(?:{_DECIMAL})(?:[eE][-+]?[0-9]{{1,4}}(?![0-9]))?)"
    rf"(?:\s?/\s?(?P<bottom>{_DECIMAL}))?"
)
# Replaces the typographic minus sign, and removes LaTeX's backslash before a dollar sign or a thousands comma.
_PLAIN = str.maketrans({"\u2212": "-", "\\": None})


def last_number(completion: str, answer: str) -> bool:
    """Whether the last number of the completion equals the answer, as numbers, exactly.

    Reads signs, commas between thousands, decimals, exponents and fractions written with a slash;
    a dollar sign before the number and a percent sign after it are ignored.

    Raises:
        TraceError: the answer is not one number.
    """
    expected = _whole_number(answer)
    last = deque(_NUMBER.finditer(completion.translate(_PLAIN)), maxlen=1)
    number = _value(last[0]) if last else None
    return number is not None and _equal(number, expected)


def exact(completion: str, answer: str) -> bool:
    """Whether completion and answer are the same text, apart from surrounding white space."""
    return completion.strip() == answer.strip()


def math_verify(completion: str, answer: str) -> bool:
    r"""Whether the completion's final expression equals the answer, by the math-verify library.

    The answer is LaTeX, with or without its dollar signs. Parsing and comparing get 5 s each.

    Raises:
        MissingExtraError: math-verify is not installed.
        TraceError: the answer has no mathematical expression.
    """
    _math_verify_library()
    return _scored("math_verify", completion, answer)


def regex(completion: str, answer: str) -> bool:
    r"""Whether the answer, a Python regular expression, matches in the completion; ``\A`` and ``\Z`` anchor it.

    A pattern that takes more than ten seconds counts as not found.

    Raises:
        TraceError: the answer is not a regular expression.
    """
    return _scored("regex", completion, answer)


def reasoning_gym(completion: str, answer: str) -> bool:
    """Whether reasoning-gym gives the completion's answer the full score of 1.

    The answer is JSON: ``task``, ``seed``, ``size``, ``index``, and the ``digest`` of the question that they generate.
    The scored text is in the last pair of answer tags, else in the last box, else on the last line.

    Raises:
        MissingExtraError: reasoning-gym is not installed.
        TraceError: the answer has another form, or the installed version generates another question from it.
    """
    _reasoning_gym_library()
    return _scored("reasoning_gym", completion, answer)


CHECKERS: dict[str, Checker] = {
    "last_number": last_number,
    "exact": exact,
    "math_verify": math_verify,
    "regex": regex,
    "code": code,
    "reasoning_gym": reasoning_gym,
}


_PLACE = "JSON with task, seed, size, index and digest"
_SCORED = ("math_verify", "regex", "reasoning_gym")
_AT_ONCE = 100
_READING = Limits(cpu_seconds=60, wall_seconds=120.0, output=16 << 20)


def checker(name: str) -> Checker:
    """The checker of that name.

    Raises:
        TraceError: no checker has this name.
        MissingExtraError: its library is not installed.
        BrokenInstallationError: it needs the sandbox, which does not work on this machine.
    """
    if name not in CHECKERS:
        raise TraceError(f"checker {name}: is not known; expected one of: {', '.join(CHECKERS)}")
    if name == "math_verify":
        _math_verify_library()  # reports a missing library before sampling starts
    if name == "reasoning_gym":
        _reasoning_gym_library()
    if name == "code" or name in _SCORED:
        client.require_sandbox()
    return CHECKERS[name]


def checker_for(questions: Sequence[Question], name: str | None = None) -> Checker:
    """The checker of that name, else the one that the questions name, else `last_number`; it can read every answer.

    Raises:
        TraceError: no checker has this name, the questions name several, or the checker cannot read an answer.
        MissingExtraError: its library is not installed.
        BrokenInstallationError: it needs the sandbox, which does not work on this machine.
    """
    named = sorted({question.check for question in questions if question.check is not None})
    if name is None and len(named) > 1:
        several = ", ".join(named)
        raise TraceError(f"questions: name the checkers {several}; expected one for all; choose it with --check")
    chosen = name or (named[0] if named else "last_number")
    check = checker(chosen)
    _require_readable(chosen, questions)
    return check


def _require_readable(name: str, questions: Sequence[Question]) -> None:
    """Refuse an answer that the checker cannot read, before sampling starts."""
    distinct = list({question.answer: question for question in reversed(questions)}.values())[::-1]
    for question in distinct:
        with _placed(question):
            _require_form(name, question.answer)
    if name not in _SCORED:
        return
    for start in range(0, len(distinct), _AT_ONCE):
        group = distinct[start : start + _AT_ONCE]
        replies = client.scorer(name).notes([question.answer for question in group], _READING)
        for question, reply in zip_longest(group, replies):
            with _placed(question):
                _require_read(name, question.answer, reply)


@contextmanager
def _placed(question: Question) -> Iterator[None]:
    try:
        yield
    except TraceError as error:
        raise TraceError(f"{question.place or f'question {question.id}'}: {error}") from error


def _require_form(name: str, answer: str) -> None:
    """Refuse an answer whose form is wrong; this needs no library."""
    forms: dict[str, Callable[[str], object]] = {
        "last_number": _whole_number,
        "code": problem_of,
        "reasoning_gym": _task_place,
    }
    if name in forms:
        forms[name](answer)


def _require_read(name: str, answer: str, reply: Sequence[Any] | None) -> None:
    """Refuse an answer that the scorer refused; ``reply`` is None if the scorer did not finish."""
    if reply is None:
        reason = f"checker {name} failed to read it within its limits"
        raise TraceError(f"answer {reprlib.repr(answer)}: {reason}; expected a simpler one")
    kind, note = reply
    if kind == "refused":
        raise TraceError(f"answer {reprlib.repr(answer)}: {note}")
    if name == "reasoning_gym" and digest(note) != (place := _task_place(answer))["digest"]:
        entry = f"{place['task']} {place['index']} of seed {place['seed']}"
        reason = f"reasoning-gym {version('reasoning-gym')} makes another question"
        raise TraceError(f"{entry}: {reason}; run: adaras-export questions reasoning-gym:{place['task']}")


def _scored(name: str, completion: str, answer: str) -> bool:
    """The verdict of a scorer, which works on the completion in the sandbox."""
    _require_form(name, answer)
    reply, correct = client.scorer(name).score(completion, answer)
    _require_read(name, answer, reply)
    return correct


def _task_place(answer: str) -> dict[str, Any]:
    """The task, the entry and the digest of the question that an answer of `reasoning_gym` names."""
    try:
        place = safe_read.parsed(answer.encode())
    except UnreadableError as error:
        raise TraceError(f"answer {reprlib.repr(answer)}: {error}; expected {_PLACE}") from error
    numbers, texts = ("seed", "size", "index"), ("task", "digest")
    if (
        not isinstance(place, dict)
        or not all(type(place.get(key)) is int for key in numbers)
        or not all(isinstance(place.get(key), str) for key in texts)
        or not 0 <= place["index"] < place["size"]
    ):
        raise TraceError(f"answer {reprlib.repr(answer)}: expected {_PLACE}")
    return place


def _math_verify_library() -> ModuleType:
    return require("math_verify", "eval", "checking answers by their mathematics")


def _reasoning_gym_library() -> ModuleType:
    return require("reasoning_gym", "questions", "scoring the answers of its tasks")


def _whole_number(answer: str) -> "_Ratio":
    match = _NUMBER.fullmatch(answer.translate(_PLAIN).strip().strip("$%").strip())
    value = None if match is None else _value(match)
    if value is None:
        raise TraceError(
            f"answer {reprlib.repr(answer)}: is not one number; expected a number, or another checker than last_number"
        )
    return value


_Ratio = tuple[Decimal, Decimal]
# Products without rounding. Models may repeat millions of digits: Fraction takes minutes for them, Decimal does not.
_EXACT = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)


def _value(match: re.Match[str]) -> _Ratio | None:
    """The number of a match; None for a division by zero, which equals no number."""
    top, bottom = (Decimal((match[name] or "1").replace(",", "")) for name in ("top", "bottom"))
    if not bottom:
        return None
    return (top.copy_negate() if match["sign"] == "-" else top), bottom


def _equal(left: _Ratio, right: _Ratio) -> bool:
    return _EXACT.compare(_EXACT.multiply(left[0], right[1]), _EXACT.multiply(right[0], left[1])) == 0
