"""The identity of the question in a prompt, which stays the same when the prompt's wrapping changes.

Removes the instructions that this package and the reference code add, common labels and chat templates. Any other
instruction counts as part of the question. An identity consists of digests, without text.
"""

import re
import unicodedata
from collections.abc import Collection

from adaras_export.core.traces import Prompt, digest
from adaras_export.files.atomic import sha256

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
COMPLETE = "Complete the following Python function. Give the whole function in one ```python block."
SOLVE = "Solve the following task in Python. Give the whole program in one ```python block."
TAGGED = "Give the final answer between <answer> and </answer>."
_REFERENCE = "Please provide a step-by-step thinking process and put your final answer in \\boxed{}."
TEST = "Your code should pass this test:"


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


_AROUND = (*map(_plain, (BOXED, COMPLETE, SOLVE, TAGGED, _REFERENCE)), "```python", "```", '"""')
_PREFIXES = (*_AROUND, "question:", "problem:", "q:")
_SUFFIXES = (*_AROUND, "thinking process:", "answer:", "solution:", "a:")

_USER_TURN = re.compile(
    r"(?:<\|im_start\|>user|<\|start_header_id\|>user<\|end_header_id\|>|<start_of_turn>user|<\|user\|>|\[inst\])"
    r"(.*?)(?:<\|im_end\|>|<\|eot_id\|>|<end_of_turn>|<\|end\|>|<\|assistant\|>|\[/inst\]|\Z)",
    re.DOTALL,
)
_LABEL = re.compile(r"^(?:question|problem|q):", re.MULTILINE)


def identity(prompt: Prompt) -> str:
    """The digests of the prompt and of its question, 16 hex digits each, joined by a dot."""
    return f"{digest(prompt)}.{sha256(question_in(prompt).encode())[:16]}"


def question_in(prompt: Prompt) -> str:
    """The question in a prompt: NFKC-normalised, casefolded, white space as single spaces.

    It is taken from the last user message, or from the last user turn of a rendered chat template. Of several parts
    that begin with a label such as "Question:" it is the last one; the others are examples. Known instructions, labels
    and fences are removed from both ends.
    """
    text = unicodedata.normalize("NFKC", _message(prompt)).casefold()
    text = _USER_TURN.findall(text)[-1] if _USER_TURN.search(text) else text
    parts = _LABEL.split(text)
    return _bare(_plain(parts[-1] if len(parts) > 2 else text).replace(f"{_plain(TEST)} ", ""))


def is_known(prompt: Prompt, used: Collection[str]) -> bool:
    """Whether a prompt, or the question in it, was used; ``used`` holds the single digests that `parts_of` gives.

    Files of earlier releases have digests of prompts in place of identities.
    """
    return any(part in used for part in identity(prompt).split("."))


def parts_of(identities: Collection[str]) -> frozenset[str]:
    """The single digests of all identities."""
    return frozenset(part for item in identities for part in item.split("."))


def _message(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    user_texts = [message["content"] for message in prompt if message["role"] == "user"]
    return user_texts[-1] if user_texts else prompt[-1]["content"]


def _bare(text: str) -> str:
    """Remove known prefixes and suffixes repeatedly, but never the whole text."""
    while True:
        shorter = text
        for prefix in _PREFIXES:
            shorter = shorter.removeprefix(prefix).strip()
        for suffix in _SUFFIXES:
            shorter = shorter.removesuffix(suffix).strip()
        if shorter in ("", text):
            return text
        text = shorter
