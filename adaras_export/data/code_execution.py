"""Check code by running it in the sandbox, for problems in the forms of evalplus and LiveCodeBench.

The answer of such a question is a JSON object in one of four forms (docs/questions.md): a benchmark's own ``test``;
``base_input`` and ``plus_input`` with a ``canonical_solution``; ``functional`` cases; or ``stdin`` cases. A second
process of the sandbox compares the values that a solution returns; this module compares the text that a program prints.
"""

import ast
import builtins
import re
import reprlib
from collections.abc import Callable
from typing import Any

from adaras_export.data.sandbox import client
from adaras_export.data.sandbox.client import SandboxFailure
from adaras_export.data.sandbox.inputs import encoded
from adaras_export.errors import TraceError
from adaras_export.files import safe_read
from adaras_export.files.safe_read import UnreadableError

_FENCED = re.compile(r"^```[^\n`]*\n(.*?)(?:^```|\Z)", re.MULTILINE | re.DOTALL)
_LONGEST_PROGRAM = 64 << 10
_MOST_CUTS = 20  # ordinary text needs a few; more only if each line is made to be another error


def code(completion: str, answer: str) -> bool:
    """Whether the completion's last fenced block, else the prompt followed by the completion, passes every test.

    Raises:
        TraceError: the answer has none of the known forms.
    """
    problem = problem_of(answer)
    source = solution_of(completion, problem.get("prompt") or "", problem.get("entry_point") or "")
    if source is None:
        return False
    try:
        return _passes(source, problem)
    except SandboxFailure:
        return False


def solution_of(completion: str, prompt: str, entry_point: str) -> str | None:
    """The program in a completion; None if no first part of it is a program.

    A block that defines the function gets the prompt's imports, which chat models omit. Another block, or a completion
    without a block, is appended to the prompt and cut after the last line up to which it is valid Python.
    """
    blocks = _FENCED.findall(completion)
    text = blocks[-1] if blocks else completion
    if len(text) > _LONGEST_PROGRAM:
        return None
    if not entry_point or re.search(rf"^(?:async )?(?:def|class) +{re.escape(entry_point)}\b", text, re.MULTILINE):
        imports = [line for line in prompt.splitlines() if line.startswith(("import ", "from "))]
        return "\n".join([*imports, text])
    if "class Solution" in text:
        return text
    return _longest_program(prompt, text)


def _longest_program(prompt: str, text: str) -> str | None:
    """The prompt and the text, cut after the last line up to which it is valid Python."""
    lines = text.splitlines()[:500]
    for _ in range(_MOST_CUTS):
        if not lines:
            break
        program = prompt + "\n".join(lines)
        try:
            ast.parse(program)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            del lines[_first_wrong(error, prompt, len(lines)) :]
            continue
        return program
    return None


def _first_wrong(error: Exception, prompt: str, count: int) -> int:
    """The index of the line after the prompt that has the error; any text with that line has the error too."""
    if not isinstance(error, SyntaxError) or error.lineno is None:
        return count - 1
    return max(0, min(count, error.lineno - prompt.count("\n")) - 1)


def problem_of(answer: str) -> dict[str, Any]:
    """The problem in an answer, in one of the known forms.

    Raises:
        TraceError: the answer has none of these forms.
    """
    try:
        problem = safe_read.parsed(answer.encode())
    except UnreadableError as error:
        raise TraceError(f"answer: {error}; expected the JSON of a problem with tests") from error
    if not isinstance(problem, dict):
        raise TraceError("answer: expected a JSON object with tests")
    forms = [form for form in _NEEDED if form in problem]
    if len(forms) != 1 or any(problem.get(key) is None for key in _NEEDED[forms[0]]) or not problem[forms[0]]:
        raise TraceError("answer: expected one of test, base_input (with canonical_solution), functional and stdin")
    for key, (fits, expected) in _FIELDS.items():
        if problem.get(key) is not None and not fits(problem[key]):
            raise TraceError(f"answer: its {key} is {reprlib.repr(problem[key])}; expected {expected}")
    if "test" in problem:
        called_names(problem["test"])
    return problem


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_inputs(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(arguments, list) for arguments in value)


def _are_cases(value: object, fits: Callable[[dict[str, Any]], bool]) -> bool:
    return isinstance(value, list) and all(
        isinstance(case, dict) and {"input", "output"} <= case.keys() and fits(case) for case in value
    )


_NEEDED = {
    "test": ("entry_point",),
    "base_input": ("entry_point", "canonical_solution"),
    "functional": ("entry_point",),
    "stdin": (),
}
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "entry_point": (lambda value: _is_text(value) and value.isidentifier(), "the name of a function"),
    "prompt": (_is_text, "text"),
    "test": (_is_text, "Python"),
    "canonical_solution": (_is_text, "Python"),
    "base_input": (_are_inputs, "a list of lists of arguments"),
    "plus_input": (_are_inputs, "a list of lists of arguments"),
    "atol": (lambda value: type(value) in (int, float), "a number"),
    "functional": (
        lambda value: _are_cases(value, lambda case: isinstance(case["input"], list)),
        "a list of objects with input (a list of arguments) and output",
    ),
    "stdin": (
        lambda value: _are_cases(value, lambda case: _is_text(case["input"]) and _is_text(case["output"])),
        "a list of objects with input and output (text)",
    ),
}


def _passes(source: str, problem: dict[str, Any]) -> bool:
    if "stdin" in problem:
        return all(_same_text(client.output_of(source, case["input"]), case["output"]) for case in problem["stdin"])
    with client.solution(source) as solved:
        if "test" in problem:
            return _passes_test(solved, problem)
        if "functional" in problem:
            cases = [(encoded(case["input"], []), encoded(case["output"], [])) for case in problem["functional"]]
            return client.agrees(solved, problem["entry_point"], cases, 0.0)
        return _agrees(solved, problem)


def _passes_test(solved: client.Solution, problem: dict[str, Any]) -> bool:
    """Tests in HumanEval's form define ``check(candidate)``; tests in MBPP's form are assertions."""
    test, entry_point = problem["test"], problem["entry_point"]
    if re.search(r"^def check\(", test, re.MULTILINE):
        test += f"\ncheck({entry_point})\n"
    names = sorted({entry_point, *called_names(test)})
    # Tests of HumanEval also call helper functions that the prompt defines.
    setup = problem.get("prompt") or ""
    if setup and not _is_program(setup := setup + "\n    pass\n"):
        setup = ""
    known = set(re.findall(r"^def +(\w+)", setup, re.MULTILINE)) - {entry_point}
    return client.passes(solved, test, setup, [name for name in names if name not in known])


def _is_program(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def called_names(test: str) -> list[str]:
    """Names that the test calls but does not define, outermost first; the solution must define them.

    Raises:
        TraceError: the test is not valid Python.
    """
    try:
        nodes = list(ast.walk(ast.parse(test)))
    except (SyntaxError, ValueError) as error:
        raise TraceError(f"answer: its test is no Python ({error})") from error
    called = [node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    defined |= {(node.asname or node.name).partition(".")[0] for node in nodes if isinstance(node, ast.alias)}
    defined |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    defined |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return [name for name in dict.fromkeys(called) if name not in defined and not hasattr(builtins, name)]


def _agrees(solved: client.Solution, problem: dict[str, Any]) -> bool:
    """Whether the solution returns the canonical solution's value on every input of evalplus."""
    inputs = [encoded(arguments, []) for arguments in (*problem["base_input"], *(problem.get("plus_input") or ()))]
    canonical = (problem.get("prompt") or "") + problem["canonical_solution"]
    name = problem["entry_point"]
    with client.solution(canonical) as reference:
        try:
            replies = [reference.reply(name, arguments) for arguments in inputs]
        except SandboxFailure as error:
            raise TraceError(f"answer: its canonical solution {error}") from error
    if raised := [content for kind, content in replies if kind == "raised"]:
        raise TraceError(f"answer: its canonical solution raised {raised[0]}")
    cases = [(arguments, content) for arguments, (_, content) in zip(inputs, replies, strict=True)]
    return client.agrees(solved, name, cases, float(problem.get("atol") or 0.0))


def _same_text(printed: str, expected: str) -> bool:
    """Whether two outputs have the same lines, apart from trailing white space; numbers may differ in notation."""
    left, right = ([line.rstrip() for line in text.strip().splitlines()] for text in (printed, expected))
    return len(left) == len(right) and all(map(_same_line, left, right))


def _same_line(printed: str, expected: str) -> bool:
    if printed == expected:
        return True
    try:
        left, right = ([float(word) for word in line.split()] for line in (printed, expected))
    except ValueError:
        return False
    return left == right
