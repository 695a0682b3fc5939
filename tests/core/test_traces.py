"""Traces and questions: reading, writing, identity and splits."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import SHARED

from adaras_export.core.trace_files import (
    question_line,
    read_prompts,
    read_questions,
    read_traces,
    trace_line,
    write_questions,
    write_traces,
)
from adaras_export.core.traces import Question, Trace, balanced, by_question, digest, require_disjoint, split
from adaras_export.errors import ArtifactError, TraceError

DATA = SHARED
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the reference's data is not here")
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1=?"}]
ROW = {"id": "q#0", "question_id": "q", "prompt": "1+1=", "completion": "2", "correct": True}


def trace(id_="q#0", question="q", prompt="1+1=", completion="2", correct=True):
    return Trace(id_, question, prompt, completion, correct)


def jsonl(path, *rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
prompts = texts | st.lists(st.fixed_dictionaries({"role": texts, "content": texts}), min_size=1, max_size=3)


@given(st.lists(st.tuples(prompts, texts, st.booleans(), st.none() | texts), min_size=1, max_size=5))
@settings(max_examples=50, derandomize=True, deadline=None)
def test_written_traces_are_read_as_they_were(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("traces") / "t.jsonl"
    traces = [Trace(f"q{n}#0", f"q{n}", *row) for n, row in enumerate(rows)]
    write_traces(path, traces)
    assert read_traces(path) == traces


def test_a_file_of_traces_and_one_of_questions_are_told_apart_by_their_labels(tmp_path):
    reference = {"id": 1, "_id": 2, "question": "1+1", "thinking": "2", "is_good": True}
    question = {"id": "q", "prompt": "1+1=", "answer": "2"}
    assert read_prompts(jsonl(tmp_path / "a", ROW)) == [trace()]
    assert read_prompts(jsonl(tmp_path / "b", reference))[0].correct
    assert read_prompts(jsonl(tmp_path / "c", question)) == [Question("q", "1+1=", "2")]
    with pytest.raises(TraceError, match="d:2: is not JSON"):
        read_prompts(jsonl(tmp_path / "d", question, "{"))
    with pytest.raises(TraceError, match="e: is empty"):
        read_prompts(jsonl(tmp_path / "e"))


@given(st.lists(st.tuples(prompts, texts), min_size=1, max_size=5))
@settings(max_examples=50, derandomize=True, deadline=None)
def test_written_questions_are_read_as_they_were(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("questions") / "q.jsonl"
    questions = [Question(f"q{n}", prompt, answer) for n, (prompt, answer) in enumerate(rows)]
    write_questions(path, questions)
    assert read_questions(path) == questions


def test_a_line_has_a_stable_key_order():
    assert list(json.loads(trace_line(trace()))) == list(ROW)
    assert question_line(Question("é", "a", "1")) == '{"id": "é", "prompt": "a", "answer": "1"}'


def test_nobody_can_change_the_prompt_of_a_trace_from_outside():
    messages = [dict(message) for message in CHAT]
    made = trace(prompt=messages)
    messages[0]["content"] = "changed"
    messages.clear()
    assert [dict(message) for message in made.prompt] == CHAT


@needs_data
@pytest.mark.parametrize("name", ["gsm8k", "humaneval"])
def test_the_traces_of_the_reference_are_read_with_the_prompt_of_its_authors(name):
    traces = read_traces(DATA / f"traces/{name}_qwen3-32b.jsonl")
    assert len(traces) == 120
    assert sum(item.correct for item in traces) == 60
    assert all(item.id.startswith(f"{item.question_id}#") for item in traces)
    assert traces[0].prompt.startswith("Question: ")
    assert traces[0].prompt.endswith("\nThinking process:")


@needs_data
@pytest.mark.parametrize("name", ["gsm8k", "humaneval"])
def test_the_sets_of_the_reference_are_balanced_four_and_four_already(name):
    traces = read_traces(DATA / f"traces/{name}_qwen3-32b.jsonl")
    assert balanced(traces, seed=0, per_class=4) == traces


@needs_data
def test_every_question_of_the_reference_that_has_an_answer_is_read():
    for path in sorted((DATA / "questions").glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").strip().split("\n")
        if "answer" in json.loads(lines[0]):
            questions = read_questions(path)
            assert len({question.id for question in questions}) == len(lines)
            assert all(question.prompt[0]["role"] == "user" for question in questions)


def test_one_id_for_two_questions_of_the_reference_becomes_two_ids(tmp_path):
    """Nine ids of the reference's AIME_train.jsonl stand for two different questions each."""
    first, second = (
        {"id": 82, "question": text, "answer": 1, "year": year} for text, year in (("a?", 1988), ("b?", 2024))
    )
    questions = read_questions(jsonl(tmp_path / "q.jsonl", first, second))
    assert [item.id for item in questions] == [f"82@{digest(item.prompt)}" for item in questions]
    assert questions[0].id != questions[1].id


def test_an_answer_keeps_the_digits_that_the_file_has(tmp_path):
    rows = ['{"id": 1, "prompt": "a", "answer": 0.10}', '{"id": "2", "prompt": "b", "answer": 7}']
    questions = read_questions(jsonl(tmp_path / "q.jsonl", *rows))
    assert [(item.id, item.answer) for item in questions] == [("1", "0.10"), ("2", "7")]


def test_a_prompt_is_taken_as_it_is_and_a_question_becomes_a_chat(tmp_path):
    rows = [
        {"id": 1, "prompt": "raw", "answer": "1"},
        {"id": 2, "prompt": CHAT, "answer": "1"},
        {"id": 3, "question": "why?", "answer": "1"},
    ]
    read = [item.prompt for item in read_questions(jsonl(tmp_path / "q.jsonl", *rows))]
    assert read == ["raw", tuple(CHAT), ({"role": "user", "content": "why?"},)]


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_no_errors(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n\r\n")
    assert [item.id for item in read_traces(path)] == ["q#0"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON .*column 2"),
        ("[1]", r"is \[1\]; expected a JSON object"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"answer": ' + "9" * 5000 + "}", "a whole number of 5000 digits"),
        ('{"id": "b"}', "has no question_id, prompt, completion, correct .found id.; expected id,"),
        ('{"id": 1, "_id": 2}', "has no question, thinking, is_good"),
        (json.dumps(ROW | {"correct": "yes"}), "correct is 'yes'; expected true or false"),
        (json.dumps(ROW | {"correct": 1}), "correct is 1; expected true or false"),
        (json.dumps(ROW | {"id": None}), "id is None; expected text or a whole number"),
        (json.dumps(ROW | {"id": True}), "id is True; expected text or a whole number"),
        (json.dumps(ROW | {"id": " "}), "id is ' '; expected non-empty text"),
        (json.dumps(ROW | {"completion": ""}), "completion is ''; expected non-empty text"),
        (json.dumps(ROW | {"completion": "\ud800"}), "half of a character"),
        (json.dumps(ROW | {"prompt": []}), r"prompt is \[\]; expected text or a list of messages"),
        (json.dumps(ROW | {"prompt": 3}), "prompt is 3; expected text or a list of messages"),
        (json.dumps(ROW | {"prompt": ["hi"]}), "message is 'hi'; expected an object of role"),
        (
            json.dumps(ROW | {"prompt": [{"role": "user"}]}),
            "expected an object of role and content",
        ),
        (json.dumps(ROW | {"prompt": [{"role": "user", "content": None}]}), "content is None"),
        (json.dumps(ROW | {"id": "a#0"}), "trace a#0 was already on line 1; expected unique ids"),
        (json.dumps(ROW | {"id": "n", "question_id": "a"}), "another prompt than on line 1"),
    ],
)
def test_a_bad_line_is_named_with_path_and_number(tmp_path, line, message):
    good = ROW | {"id": "a#0", "question_id": "a", "prompt": "other"}
    path = jsonl(tmp_path / "t.jsonl", good, line, "and the next is worse")
    with pytest.raises(TraceError, match=f"t.jsonl:2: .*{message}"):
        read_traces(path)


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(TraceError, match=r"t.jsonl:1: is not UTF-8 \(byte 8\)"):
        read_traces(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 1, "prompt": "a", "question": "b", "answer": "1"}, "has both prompt and question"),
        ({"id": 1, "prompt": "a"}, "has no answer"),
        ({"id": 1, "prompt": "a", "answer": True}, "answer is True; expected non-empty text"),
        ({"id": 9, "prompt": "a", "answer": "1"}, "question 9 was already on line 1"),
        ({"id": 9, "question": "z", "answer": "1"}, "question 9 was already on line 1; expected unique ids"),
        ({"id": 9, "question": "another?", "answer": "1"}, "question 9 was already on line 1; expected unique ids"),
        ({"id": 9, "question": "another?", "answer": "1", "year": 2024}, "question 9 was already on line 1"),
    ],
)
def test_a_bad_question_is_named_with_path_and_number(tmp_path, row, message):
    first = {"id": 9, "question" if "question" in row else "prompt": "z", "answer": "1"}
    with pytest.raises(TraceError, match=f"q.jsonl:2: .*{message}"):
        read_questions(jsonl(tmp_path / "q.jsonl", first, row))


@pytest.mark.parametrize("read", [read_traces, read_questions])
def test_a_file_that_is_empty_missing_or_a_folder_is_refused(tmp_path, read):
    with pytest.raises(TraceError, match="is empty; expected one JSON object per line"):
        read(jsonl(tmp_path / "empty.jsonl", ""))
    with pytest.raises(TraceError, match=r"no.jsonl: cannot be read \(no such file"):
        read(tmp_path / "no.jsonl")
    with pytest.raises(TraceError, match=r"cannot be read \(is not a regular file"):
        read(tmp_path)


def test_writing_to_a_missing_folder_names_the_file(tmp_path):
    with pytest.raises(ArtifactError, match=r"no/t\.jsonl: cannot be written"):
        write_traces(tmp_path / "no/t.jsonl", [trace()])


def test_a_digest_depends_on_the_prompt_only_and_not_on_its_containers():
    assert digest(CHAT) == digest(tuple(dict(reversed(message.items())) for message in CHAT))
    assert digest(CHAT) == digest(trace(prompt=CHAT).prompt)
    assert len({digest(CHAT), digest(CHAT[1:]), digest("1+1=?"), digest("1+1=? ")}) == 4
    assert digest("1+1=?") == "6bec24ecfb2e74e8"  # files of other runs hold it


def test_traces_are_grouped_in_the_order_of_their_first_appearance():
    made = [trace("b#0", "b"), trace("a#0", "a"), trace("b#1", "b")]
    groups = by_question(made)
    assert list(groups) == ["b", "a"]
    assert groups["b"] == [made[0], made[2]]


@given(st.integers(5, 200), st.integers(0, 2**31))
@settings(max_examples=50, derandomize=True)
def test_a_split_is_an_exact_partition_of_the_wished_sizes(count, seed):
    ids = [f"q{n}" for n in range(count)]
    parts = split(ids, {"train": 0.5, "validation": 0.25, "test": 0.25}, seed)
    assert sorted(id_ for part in parts.values() for id_ in part) == sorted(ids)
    assert [len(part) for part in parts.values()] == pytest.approx([count / 2, count / 4, count / 4], abs=1)
    require_disjoint(parts)


def test_a_split_depends_on_the_seed_and_not_on_the_order_of_the_ids():
    ids = [f"q{n}" for n in range(50)]
    shuffled = random.Random(0).sample(ids, 50)
    halves = {"a": 0.5, "b": 0.5}
    assert set(split(ids, halves, 0)["a"]) == set(split(shuffled, halves, 0)["a"])
    assert split(ids, halves, 0) != split(ids, halves, 1)
    assert split(shuffled, halves, 0)["a"] == [id_ for id_ in shuffled if id_ in split(ids, halves, 0)["a"]]


@pytest.mark.parametrize(
    ("ids", "shares", "message"),
    [
        (["a", "b"], {"x": 0.5, "y": 0.4}, "expected positive numbers that sum to 1"),
        (["a", "b"], {"x": 1.5, "y": -0.5}, "expected positive numbers that sum to 1"),
        (["a", "b"], {}, "expected positive numbers that sum to 1"),
        (["a", "a", "b"], {"x": 1.0}, "question ids a: given more than once"),
        (["a"], {"x": 0.9, "y": 0.1}, "split y: has none of 1 questions"),
    ],
)
def test_an_impossible_split_is_refused(ids, shares, message):
    with pytest.raises(TraceError, match=message):
        split(ids, shares, 0)


def test_a_question_in_two_splits_is_named_with_both():
    with pytest.raises(TraceError, match=r"question q2 \(in train and test\): in two splits"):
        require_disjoint({"train": ["q1", "q2"], "other": ["q3"], "test": ["q2"]})


def test_of_many_shared_questions_the_first_five_are_named():
    ids = [f"q{n}" for n in range(9)]
    with pytest.raises(TraceError, match=r"q4 \(in a and b\) and 4 more"):
        require_disjoint({"a": ids, "b": ids})


def outcomes(counts):
    return [
        trace(f"{question}#{n}", question, correct=n < correct)
        for question, (correct, incorrect) in counts.items()
        for n in range(correct + incorrect)
    ]


def test_a_balanced_set_has_equal_classes_in_every_question_that_has_both():
    made = outcomes({"mixed": (5, 2), "right": (4, 0), "wrong": (0, 4), "even": (3, 3)})
    kept = by_question(balanced(made, seed=0))
    counts = {question: [sum(item.correct for item in group), len(group)] for question, group in kept.items()}
    assert counts == {"mixed": [2, 4], "even": [3, 6]}
    assert balanced(made, seed=0, per_class=1) != balanced(made, seed=1, per_class=1)


def test_a_balanced_set_keeps_the_given_order_and_its_choice_under_any_order():
    made = outcomes({"a": (9, 3), "b": (2, 5)})
    kept = balanced(made, seed=3, per_class=2)
    assert kept == [item for item in made if item in kept]
    assert len(kept) == 8
    assert {item.id for item in balanced(made[::-1], seed=3, per_class=2)} == {x.id for x in kept}


def test_labels_of_one_class_only_cannot_be_balanced():
    with pytest.raises(TraceError, match="none of 2 questions has both correct and incorrect"):
        balanced(outcomes({"a": (2, 0), "b": (0, 3)}), seed=0)
    with pytest.raises(TraceError, match="per_class is 0; expected a positive number"):
        balanced(outcomes({"a": (2, 2)}), seed=0, per_class=0)


def test_a_question_keeps_the_checker_that_it_names(tmp_path):
    asked = [Question("1", "p", "a", "exact"), Question("2", "q", "b")]
    write_questions(tmp_path / "questions.jsonl", asked)
    assert read_questions(tmp_path / "questions.jsonl") == asked
    assert "check" not in (tmp_path / "questions.jsonl").read_text().splitlines()[1]
