"""The verdicts of the answer checkers."""

import importlib
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adaras_export.checkers import CHECKERS, checker, checker_for, exact, last_number, math_verify
from adaras_export.errors import MissingExtraError, TraceError
from adaras_export.traces import Question, read_questions

DATA = Path(__file__).parents[2] / "shared/data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the reference's data is not here")


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("The answer is 42.", "42"),
        ("She pays $1,234.50 a year", "1234.5"),
        ("#### 1,000,000", "1000000"),
        (r"so 2000 is \boxed{2\,000}", "2,000"),
        ("x=-3", "-3"),
        ("a loss of -$5", "-5"),
        (r"\(\$18\)", "$18"),
        ("\u22127", "-7"),
        ("5-3", "3"),
        ("5 - 3", "3"),
        ("(5)-3", "3"),
        ("1,2,3", "3"),
        ("0.1 + 0.2 = 0.3", "0.30"),
        ("about .5", "0.5"),
        ("3e8 metres", "300000000"),
        ("-3/4", "-0.75"),
        ("42%", "42 %"),
        ("+4", "4"),
        ("1" * 6000, "1" * 6000),
    ],
)
def test_the_last_number_is_compared_as_a_number(completion, answer):
    assert last_number(completion, answer)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("no number at all", "0"),
        ("42, no: 43", "42"),
        ("2e8", "3e8"),
        ("1/0", "0"),
        ("3/2", "2"),
        ("0.30000000000000004", "0.3"),
        ("12345678901234567891", "12345678901234567890"),
        ("", "1"),
    ],
)
def test_another_last_number_is_incorrect(completion, answer):
    assert not last_number(completion, answer)


@pytest.mark.parametrize("answer", [r"\frac{1}{2}", "p - q", "1/0", "12, 9", "ten"])
def test_an_answer_that_is_no_number_is_refused_by_last_number(answer):
    with pytest.raises(TraceError, match="is not one number; expected a number, or another checker"):
        last_number("2", answer)


@needs_data
def test_last_number_reads_every_answer_of_the_references_gsm8k():
    questions = read_questions(DATA / "questions/gsm8k_test.jsonl")
    assert all(last_number(f"it is {item.answer}.", item.answer) for item in questions)
    assert not any(last_number(f"it is {item.answer}1.", item.answer) for item in questions)


def test_exact_ignores_white_space_around_only():
    assert exact(" a b\n", "a b")
    assert not exact("a  b", "a b")
    assert not exact("A b", "a b")


def test_math_verify_compares_by_mathematics():
    pytest.importorskip("math_verify")
    assert math_verify(r"Hence $x = \frac{2}{4}$.", r"\frac{1}{2}")
    assert math_verify(r"so \boxed{0.5}", r"$\frac12$")
    assert not math_verify(r"so \boxed{0.6}", r"\frac{1}{2}")
    assert not math_verify("I give up", "3")


def test_math_verify_works_off_the_main_thread(caplog):
    """Its own time limit is a signal, which Python refuses outside the main thread."""
    pytest.importorskip("math_verify")
    with caplog.at_level(logging.ERROR), ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(math_verify, [r"\boxed{4}", r"\boxed{5}"] * 4, ["4"] * 8))
    assert verdicts == [True, False] * 4


def test_an_answer_without_mathematics_is_refused_by_math_verify():
    pytest.importorskip("math_verify")
    with pytest.raises(TraceError, match="holds no mathematical expression; expected LaTeX"):
        math_verify("4", " ")


def test_a_checker_is_found_by_name():
    assert checker("exact") is exact
    assert checker("last_number") is CHECKERS["last_number"]


def test_an_unknown_checker_is_refused_with_the_known_names():
    with pytest.raises(TraceError, match="checker vibes: is not known; expected one of: last_number"):
        checker("vibes")


def test_a_missing_library_names_the_extra_before_anything_is_checked(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name, name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"pip install 'scikit-learn>=1.5' 'scipy>=1.13' 'math-verify>=0.7'"):
        checker("math_verify")


def asked(*checks):
    return [Question(str(number), "p", "1", check) for number, check in enumerate(checks)]


def test_questions_name_their_checker():
    assert checker_for(asked("exact", None)) is checker("exact")
    assert checker_for(asked("exact"), "last_number") is checker("last_number")
    assert checker_for(asked(None)) is checker("last_number")


def test_questions_that_name_two_checkers_want_a_choice():
    with pytest.raises(TraceError, match="name the checkers exact, last_number; expected one"):
        checker_for(asked("last_number", "exact"))
