"""The verdicts of the answer checkers."""

import importlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from places import SHARED

from adaras_export.core.trace_files import read_questions, write_questions
from adaras_export.core.traces import Question
from adaras_export.data.checkers import CHECKERS, checker, checker_for, exact, last_number, math_verify
from adaras_export.errors import MissingExtraError, TraceError

DATA = SHARED
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


@pytest.mark.parametrize(
    ("completion", "answer", "correct"),
    [
        ("1" * 2_000_000, "1" * 2_000_000, True),
        ("1" * 2_000_000, "2", False),
        ("6/" + "3" * 1_000_000, "2", False),
        ("3" * 1_000_000 + "/" + "3" * 1_000_000, "1", True),
        ("1," * 300_000 + "1", "1", True),
        ("1e9999", "1e9998", False),
        ("0.5e1", "10/2", True),
    ],
)
def test_the_last_number_takes_time_linear_in_its_length(completion, answer, correct):
    """Two million digits took over a minute."""
    begun = time.process_time()
    assert last_number(completion, answer) == correct
    assert time.process_time() - begun < 5


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
    assert math_verify(r"so \boxed{32348}", r"\$32,\!348")  # as of MATH-500
    assert not math_verify(r"so \boxed{0.6}", r"\frac{1}{2}")
    assert not math_verify("I give up", "3")


def test_math_verify_serves_several_threads():
    """They share one process, whose replies must not be mixed up."""
    pytest.importorskip("math_verify")
    with ThreadPoolExecutor(2) as pool:
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
    with pytest.raises(MissingExtraError, match=r"pip install .*'math-verify>=0.7'"):
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


CASES = {"entry_point": "f", "functional": [{"input": [1], "output": 2}]}
INPUTS = {"entry_point": "f", "canonical_solution": "def f(x): return x", "base_input": [[1]]}
UNREADABLE = [
    ("last_number", "ten", "is not one number; expected a number"),
    ("regex", "(", "is no regular expression"),
    ("math_verify", "$$", "holds no mathematical expression; expected LaTeX"),
    ("code", "42", "expected a JSON object with tests"),
    ("code", {"test": 5, "entry_point": "f"}, "its test is 5; expected Python"),
    ("code", {"test": "def check(:", "entry_point": "f"}, "its test is no Python"),
    ("code", {"test": "check(f)", "entry_point": ["f"]}, "its entry_point is .*; expected the name of a function"),
    ("code", {"test": "check(f)", "entry_point": "f", "prompt": 5}, "its prompt is 5; expected text"),
    ("code", CASES | {"functional": {"input": []}}, "its functional is .*; expected a list of objects"),
    ("code", CASES | {"functional": [{"input": [1]}]}, "its functional is .*; expected a list of objects"),
    ("code", CASES | {"functional": [{"input": 1, "output": 2}]}, "its functional is .*; expected a list of objects"),
    ("code", {"stdin": [{"input": "1"}]}, "its stdin is .*; expected a list of objects"),
    ("code", {"stdin": [{"input": 1, "output": "2"}]}, "its stdin is .*; expected a list of objects"),
    ("code", INPUTS | {"base_input": [1]}, "its base_input is .*; expected a list of lists"),
    ("code", INPUTS | {"plus_input": "1"}, "its plus_input is .*; expected a list of lists"),
    ("code", INPUTS | {"canonical_solution": None}, "expected one of test, base_input .with canonical_solution."),
    ("code", INPUTS | {"canonical_solution": 5}, "its canonical_solution is 5; expected Python"),
    ("code", INPUTS | {"atol": "small"}, "its atol is 'small'; expected a number"),
]


@pytest.mark.parametrize(("name", "answer", "said"), UNREADABLE)
def test_an_answer_that_its_checker_cannot_read_is_refused_with_its_line(tmp_path, name, answer, said):
    """Before anything is sampled: behind that, it was a traceback."""
    if name == "math_verify":
        pytest.importorskip(name)
    path = tmp_path / "questions.jsonl"
    text = answer if isinstance(answer, str) else json.dumps(answer)
    write_questions(path, [Question("1", "p", "42", "exact"), Question("2", "q", text, "exact")])
    with pytest.raises(TraceError, match=rf"questions.jsonl:2: .*{said}"):
        checker_for(read_questions(path)[1:], name)
