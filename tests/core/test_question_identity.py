"""A question is known again whatever is put around it."""

import pytest

from adaras_export.core.question_identity import BOXED, COMPLETE, identity, is_known, parts_of, question_in
from adaras_export.core.traces import digest

QUESTION = "Ann has 3 boxes\nwith 4 pens each. How many pens does Ann have?"
SHOTS = "Question: What is 1 + 1?\nAnswer: 2\n\nQuestion: What is 2 + 2?\nAnswer: 4\n\n"
PLAIN = "ann has 3 boxes with 4 pens each. how many pens does ann have?"


def user(content):
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    "prompt",
    [
        QUESTION,
        f"  {QUESTION.upper()}\t\n",
        QUESTION.replace("pens", "\uff50\uff45\uff4e\uff53"),
        user(QUESTION),
        user(f"{QUESTION}\n\n{BOXED}"),
        user(f"{BOXED}\n{QUESTION}"),
        [
            {"role": "system", "content": "Be brief."},
            *user("Hello"),
            {"role": "assistant", "content": "Hi"},
            *user(QUESTION),
        ],
        f"Question: {QUESTION}\nThinking process:",
        user(
            f"Question: {QUESTION}\nThinking process:\n"
            "Please provide a step-by-step thinking process and put your final answer in \\boxed{}."
        ),
        f"{SHOTS}Question: {QUESTION}\nAnswer:",
        f"Q: {QUESTION}\nA:",
        f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>user\n{QUESTION}\n\n{BOXED}<|im_end|>\n<|im_start|>assistant\n",
        f"<|start_header_id|>user<|end_header_id|>\n\n{QUESTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        f"<bos><start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n",
        f"<s>[INST] {QUESTION} [/INST]",
        f"<\uff5cUser\uff5c>{QUESTION}<\uff5cAssistant\uff5c><think>\n",
    ],
)
def test_the_same_question_in_every_form_is_one(prompt):
    """The reference's GSM8K traces and its question file had no digest in common, though 15 of 15 questions are."""
    assert question_in(prompt) == PLAIN
    assert is_known(prompt, parts_of([identity("Question: " + QUESTION)]))


def test_code_is_known_behind_fences_and_in_quotes():
    function = 'def twice(x: int) -> int:\n    """ Double it.\n    >>> twice(2)\n    4\n    """\n'
    assert (
        question_in(user(f"```python\n{function}```\n\n{COMPLETE}"))
        == question_in(user(function))
        == question_in(f"\n\n{function}")
    )
    ours = user("Write a function to add.\nYour code should pass this test:\nassert add(1, 2) == 3")
    assert question_in(ours) == question_in(user('"""\nWrite a function to add.\nassert add(1, 2) == 3\n"""\n'))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 3 + 4?", "What is 3 - 4?"),
        ("What is 34?", "What is 3 4?"),
        ("A text about A.\nQuestion: What is it about?", "A text about B.\nQuestion: What is it about?"),
        (f"{SHOTS}Question: What is 3 + 3?\nAnswer:", f"{SHOTS}Question: What is 5 + 5?\nAnswer:"),
        ("Is it an answer: or", "Is it an"),
    ],
)
def test_different_questions_stay_different(one, other):
    assert question_in(one) != question_in(other)


@pytest.mark.parametrize("prompt", ["Question:", '"""', BOXED, [{"role": "system", "content": "Question: x"}]])
def test_something_is_left_of_every_prompt(prompt):
    assert question_in(prompt)


def test_digests_of_prompts_alone_are_known_as_before():
    """Rules of earlier versions hold nothing else."""
    assert is_known("2+2=", parts_of([digest("2+2="), digest("3+3=")]))
    assert not is_known("2 + 2=", parts_of([digest("2+2=")]))
    assert identity("2+2=").startswith(digest("2+2="))


def test_identities_of_before_are_kept():
    assert identity("1+1=?") == "6bec24ecfb2e74e8.b9ab5b7f58369cf5"  # files of other runs hold it
