"""Rows become questions: each preset's columns, procedural tasks, files and their parts."""

import base64
import json
import pickle
import zlib
from dataclasses import replace

import pytest
from places import SHARED

from adaras_export import cli
from adaras_export.core.trace_files import read_questions, write_questions
from adaras_export.core.traces import Question
from adaras_export.data.checkers import checker_for, math_verify, reasoning_gym
from adaras_export.data.question_sets import BOXED, PRESETS, Source, deal, distinct, of_preset, of_task, pickled_string
from adaras_export.data.sandbox.client import Limits, scorer
from adaras_export.errors import TraceError

datasets = pytest.importorskip("datasets")
DATA = SHARED / "questions"
PRIVATE = [{"input": "2\n", "output": "3\n", "testtype": "stdin"}]
PUBLIC = json.dumps([{"input": "1\n", "output": "2\n", "testtype": "stdin"}])
FUNCTION = {
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n",
}
ASSERTIONS = {"task_id": 2, "code": "", "test_list": ["assert set(f((1,))) == {1}"]}
ROWS = {
    "gsm8k": {"question": "How many?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
    "math-500": {"problem": "How many?", "answer": "2", "unique_id": "test/a.json"},
    "aime-24": {"id": 60, "problem": "How many?", "answer": "2"},
    "aime-25": {"id": "0", "problem": "How many?", "answer": "2"},
    "amc-23": {"id": 0, "question": "How many?", "answer": "2.0"},
    "humaneval": {"task_id": "HumanEval/0", **FUNCTION},
    "humaneval+": {"task_id": "HumanEval/0", **FUNCTION},
    "mbpp": {**ASSERTIONS, "text": "Write f.", "test_setup_code": ""},
    "mbpp+": {**ASSERTIONS, "prompt": "Write f.", "test_imports": [], "test": "assert set(f((1,))) == {1}"},
    "livecodebench": {
        "question_id": "a1",
        "question_content": "Add one.",
        "starter_code": "",
        "public_test_cases": PUBLIC,
        "private_test_cases": json.dumps(PRIVATE),
        "metadata": "{}",
    },
}
RIGHT = {
    "humaneval": "```\ndef f(x): return x + 1\n```",
    "mbpp": "```\ndef f(x): return list(x)\n```",
    "livecodebench": "```\nprint(int(input()) + 1)\n```",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def source(folder, *rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(folder / "rows.jsonl")


@pytest.mark.parametrize("name", PRESETS)
def test_a_right_completion_of_each_preset_is_correct_and_another_is_not(name, tmp_path):
    (question,) = of_preset(name, source(tmp_path, ROWS[name]))
    write_questions(tmp_path / "q.jsonl", [question])
    assert read_questions(tmp_path / "q.jsonl") == [question]
    check, right = checker_for([question]), RIGHT.get(name.rstrip("+"), "so \\boxed{2}.")
    assert check(right, question.answer)
    assert not check(right.replace("1", "9").replace("2", "3").replace("list(x)", "[]"), question.answer)


def test_parquet_has_the_same_questions(tmp_path):
    given = source(tmp_path, ROWS["gsm8k"])
    datasets.Dataset.from_list([ROWS["gsm8k"]]).to_parquet(str(tmp_path / "rows.parquet"))
    assert of_preset("gsm8k", Source(tmp_path / "rows.parquet")) == of_preset("gsm8k", given)


def test_an_instruction_ends_the_prompt_and_can_be_replaced(tmp_path):
    given = source(tmp_path, ROWS["gsm8k"])
    assert of_preset("gsm8k", given)[0].prompt[0]["content"] == f"How many?\n\n{BOXED}"
    assert of_preset("gsm8k", given, "")[0].prompt[0]["content"] == "How many?"


def test_every_preset_is_pinned_to_a_commit():
    assert all(len(preset.revision) == 40 and int(preset.revision, 16) for preset in PRESETS.values())


def test_rows_of_another_form_are_refused_by_their_number(tmp_path):
    with pytest.raises(TraceError, match="row gsm8k/1: has no answer"):
        of_preset("gsm8k", source(tmp_path, ROWS["gsm8k"], {"question": "x"}))
    with pytest.raises(TraceError, match=r"rows\.jsonl: no such file; expected JSONL or Parquet"):
        of_preset("gsm8k", Source(tmp_path / "none" / "rows.jsonl"))
    with pytest.raises(TraceError, match="gsm9k: is no preset; expected one of: gsm8k"):
        of_preset("gsm9k", Source())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("text", ["[]", "ü" * 300, "x" * 70_000])
def test_a_pickled_string_is_read_without_unpickling(protocol, text):
    assert pickled_string(pickle.dumps(text, protocol)) == text


@pytest.mark.parametrize("value", [1, ["a"], {"a": 1}, pickle.loads, b"a", ("a",), None])
def test_any_other_pickle_is_refused(value):
    for protocol in (0, 2, 4, 5):
        with pytest.raises(ValueError, match="pickled string"):
            pickled_string(pickle.dumps(value, protocol))
    with pytest.raises(ValueError, match="pickled string"):
        pickled_string(pickle.dumps("a", 4)[:-1] + pickle.dumps(value, 4))


def test_private_tests_count(tmp_path):
    packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(PRIVATE)))).decode()
    (question,) = of_preset("livecodebench", source(tmp_path, {**ROWS["livecodebench"], "private_test_cases": packed}))
    assert len(json.loads(question.answer)["stdin"]) == 2


def test_a_method_of_livecodebench_is_called_with_json(tmp_path):
    cases = json.dumps([{"input": "[1, 2]\n3", "output": "[0]", "testtype": "functional"}])
    row = {**ROWS["livecodebench"], "public_test_cases": cases, "private_test_cases": "[]"}
    row |= {"metadata": '{"func_name": "two"}', "starter_code": "class Solution:\n    def two(self, a, b):\n        "}
    (question,) = of_preset("livecodebench", source(tmp_path, row))
    right = "```python\nclass Solution:\n    def two(self, a, b):\n        return [len(a) + 1 - b]\n```"
    assert checker_for([question])(right, question.answer)
    assert not checker_for([question])(right.replace("+ 1", "+ 2"), question.answer)


def test_a_task_is_scored_by_its_own_library():
    pytest.importorskip("reasoning_gym")
    (question, _) = of_task("leg_counting", 2, seed=1)
    assert reasoning_gym("legs: <answer>292</answer>", question.answer)
    assert reasoning_gym("so \\boxed{292}", question.answer)
    assert reasoning_gym("so it is\n292", question.answer)
    assert not reasoning_gym("<answer>293</answer>\n292", question.answer)
    assert not reasoning_gym("", question.answer)


def test_a_task_that_another_version_makes_otherwise_is_refused():
    pytest.importorskip("reasoning_gym")
    answer = json.loads(of_task("gcd", 1, seed=1)[0].answer)
    with pytest.raises(TraceError, match="makes another question; run: adaras-export questions reasoning-gym:gcd"):
        reasoning_gym("1", json.dumps(answer | {"seed": 2}))
    with pytest.raises(TraceError, match="reasoning-gym:nothing"):
        of_task("nothing", 1, seed=1)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": "1"}, "expected JSON with task, seed, size, index and digest"),
        ({"index": 2}, "expected JSON with task"),
        ({"digest": None}, "expected JSON with task"),
        ({"task": "nothing"}, "names no task that reasoning-gym makes"),
        ({"digest": "0" * 16}, "makes another question"),
    ],
)
def test_an_answer_that_means_no_entry_is_refused_on_reading(changed, said):
    pytest.importorskip("reasoning_gym")
    (question,) = of_task("gcd", 1, seed=1)
    other = replace(question, answer=json.dumps(json.loads(question.answer) | changed))
    with pytest.raises(TraceError, match=f"question gcd/1/0: .*{said}"):
        checker_for([question, other])
    checker_for([question])


# Tasks whose scorers evaluate an answer, as Python or by SymPy.
EVALUATED = ["spiral_matrix", "binary_matrix", "string_insertion", "n_queens", "countdown", "puzzle24"]
EVALUATED += ["simple_integration", "intermediate_integration"]


@pytest.mark.parametrize("task", EVALUATED)
def test_an_answer_is_evaluated_in_the_sandbox_only(tmp_path, task):
    reasoning_gym_library = pytest.importorskip("reasoning_gym")
    (question,) = of_task(task, 1, seed=1)
    right = reasoning_gym_library.create_dataset(task, seed=1, size=1)[0]["answer"]
    mark = tmp_path / "was here"
    for hostile in (f"__import__('pathlib').Path({str(mark)!r}).touch()", "exit(0)"):
        assert not reasoning_gym(f"<answer>{hostile}</answer>", question.answer)
    assert not mark.exists()
    assert reasoning_gym(f"<answer>{right}</answer>", question.answer)


def test_an_answer_does_not_reach_the_scoring_of_another_one():
    pytest.importorskip("reasoning_gym")
    (question,) = of_task("spiral_matrix", 1, seed=1)
    other = "__import__('reasoning_gym').algorithmic.SpiralMatrixDataset.score_answer = lambda *a, **b: 1.0"
    reasoning_gym(f"<answer>exec({other!r})</answer>", question.answer)
    assert not reasoning_gym("<answer>1</answer>", question.answer)


def test_an_answer_that_takes_for_ever_is_incorrect():
    pytest.importorskip("reasoning_gym")
    (question,) = of_task("spiral_matrix", 1, seed=1)
    limits = Limits(wall_seconds=0.5)
    assert scorer("reasoning_gym").score("<answer>9**9**9**9</answer>", question.answer, limits)[1] is False


def test_parts_are_disjoint_and_do_not_depend_on_the_order():
    asked = [Question(str(number), f"p{number}", "1") for number in range(20)]
    parts = deal(asked, {"a": 5, "b": 10}, seed=1)
    assert (len(parts["a"]), len(parts["b"])) == (5, 10)
    assert len({one.id for part in parts.values() for one in part}) == 15
    assert deal(asked[::-1], {"a": 5, "b": 10}, seed=1) == parts
    assert deal(asked, {"a": 5, "b": 10}, seed=2) != parts
    with pytest.raises(TraceError, match="take 21 questions; there are 20 different"):
        deal(asked, {"a": 21}, seed=1)


def test_a_prompt_is_asked_once():
    assert [one.id for one in distinct([Question("a", "p", "1"), Question("b", "p", "1")])] == ["a"]


@pytest.mark.skipif(not DATA.exists(), reason="the reference's data is not here")
def test_answers_of_the_references_mathematics_are_read():
    """Math-verify gives up after five seconds of the clock, which a busy machine may need: a try is repeated then."""
    for name in ("gsm8k_test", "Math500_test", "AIME_test_24", "AMC_test"):
        for question in read_questions(DATA / f"{name}.jsonl")[:25]:
            completion = f"Hence \\boxed{{{question.answer}}}."
            assert any(math_verify(completion, question.answer) for _ in range(3)), question.id


def test_the_command_writes_disjoint_parts_and_refuses_what_it_would_not_read(tmp_path, monkeypatch, capsys):
    pytest.importorskip("reasoning_gym")
    assert run(monkeypatch, "reasoning-gym:gcd", "--parts", "a=3,b=4", "-o", tmp_path / "parts") == 0
    parts = [read_questions(tmp_path / "parts" / f"{part}.jsonl") for part in "ab"]
    assert ([*map(len, parts)], len({str(one.prompt) for part in parts for one in part})) == ([3, 4], 7)
    assert run(monkeypatch, "reasoning-gym:gcd", "--split", "test", "-o", tmp_path / "q.jsonl") == 2
    assert run(monkeypatch, "reasoning-gym:gcd", "--parts", "a=3,a=4", "-o", tmp_path / "parts") == 2
    assert run(monkeypatch, tmp_path / "parts/a.jsonl", "--instruction", "x", "-o", tmp_path / "q.jsonl") == 2
    assert "its prompts are taken as they are" in capsys.readouterr().err


def test_the_command_takes_rows_from_a_file_and_lists_the_presets(tmp_path, monkeypatch, capsys):
    given = source(tmp_path, ROWS["gsm8k"], ROWS["gsm8k"])
    assert run(monkeypatch, "gsm8k", "--source", given.file, "-o", tmp_path / "q.jsonl") == 0
    assert len(read_questions(tmp_path / "q.jsonl")) == 1
    assert "1 of 2 questions left out" in capsys.readouterr().err
    assert run(monkeypatch, "--list", "--json") == 0
    assert json.loads(capsys.readouterr().out).keys() == PRESETS.keys()


def run(monkeypatch, *args):
    """The exit status of `questions` with these arguments."""
    monkeypatch.setattr("sys.argv", ["adaras-export", "questions", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0
