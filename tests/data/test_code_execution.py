"""Verdicts on code, in each form of tests."""

import json
import platform
import time

import pytest

from adaras_export.data.code_execution import code, solution_of
from adaras_export.errors import TraceError

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="the sandbox is of Linux on x86-64"
)
PROMPT = 'from typing import List\n\n\ndef total(a: List[int]) -> int:\n    """Sum."""\n'
CHECK = "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n"
HUMANEVAL = {"entry_point": "total", "prompt": PROMPT, "test": CHECK}
RIGHT = "def total(a: List[int]):\n    return sum(a)\n"
FORMS = {
    "test": HUMANEVAL,
    "assertions": {"entry_point": "total", "prompt": PROMPT, "test": "assert total([1, 2]) == 3"},
    "inputs": {
        "entry_point": "total",
        "prompt": PROMPT,
        "canonical_solution": "    return sum(a)\n",
        "base_input": [[[1, 2]]],
        "plus_input": [[[0.1, 0.2]]],
        "atol": 1e-6,
    },
    "functional": {"entry_point": "total", "prompt": PROMPT, "functional": [{"input": [[1, 2]], "output": 3}]},
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_tells_right_from_wrong(form):
    answer = json.dumps(FORMS[form])
    assert code(f"Here:\n```python\n{RIGHT}```\nDone.", answer)
    assert not code(f"```python\n{RIGHT.replace('sum(a)', 'len(a)')}```", answer)


def test_a_program_is_judged_by_what_it_prints():
    answer = json.dumps({"stdin": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5", "output": "10"}]})
    assert code("```python\nprint(sum(map(int, input().split())))\n```", answer)
    assert not code("```python\nprint(3)\n```", answer)


def test_a_base_model_goes_on_from_the_prompt_until_it_is_no_more_python():
    assert code("    return sum(a)\n\nSo the function is simple.", json.dumps(HUMANEVAL))


def test_the_last_block_counts():
    assert (
        solution_of(f"```\n{RIGHT}```\nNo:\n```py\ndef total(a): return 1\n```", "", "total")
        == "def total(a): return 1\n"
    )


def test_the_end_of_the_python_is_found_in_bearable_time():
    """Parsing the text again without its last line, and again, took ten seconds."""
    begun = time.process_time()
    for first, other in (("    x = (", "    " + "1," * 60), ("    pass", f"    @({'1,' * 15})")):
        assert solution_of("\n".join([first, *[other] * 480]), PROMPT, "other") is None
    assert time.process_time() - begun < 3
    assert solution_of("    if a:\n        return 1\n    if b:\n        if", PROMPT, "other").endswith("return 1")


@pytest.mark.parametrize("completion", ["", "I cannot.", "```python\ndef total(:\n```", "```python\n", "x" * 99999])
def test_a_completion_without_a_program_is_incorrect(completion):
    assert not code(completion, json.dumps(HUMANEVAL))


@pytest.mark.parametrize("answer", ["42", "{", "{}", '{"test": "", "entry_point": "f"}', '{"test": "x", "stdin": []}'])
def test_an_answer_without_tests_is_refused(answer):
    with pytest.raises(TraceError, match=r"answer: .*expected"):
        code("```\n1\n```", answer)
