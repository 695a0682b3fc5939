"""Which question a prompt asks, whatever is put around it, so that one that was used is known again in another form.

Knows the wrappings that this package and the reference code use, and common labels and chat templates; an instruction
of somebody else's is part of the question. Keeps digests, no texts.
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
_BEFORE = (*_AROUND, "question:", "problem:", "q:")
_BEHIND = (*_AROUND, "thinking process:", "answer:", "solution:", "a:")

_USER_TURN = re.compile(
    r"(?:<\|im_start\|>user|<\|start_header_id\|>user<\|end_header_id\|>|<start_of_turn>user|<\|user\|>|\[inst\])"
    r"(.*?)(?:<\|im_end\|>|<\|eot_id\|>|<end_of_turn>|<\|end\|>|<\|assistant\|>|\[/inst\]|\Z)",
    re.DOTALL,
)
_LABEL = re.compile(r"^(?:question|problem|q):", re.MULTILINE)


def identity(prompt: Prompt) -> str:
    """The digest of the prompt and that of the question in it, 16 hex digits each, with a point between them."""
    return f"{digest(prompt)}.{sha256(asked(prompt).encode())[:16]}"


def asked(prompt: Prompt) -> str:
    """The question in a prompt: in Unicode's NFKC, without case, white space as single spaces.

    Of messages it is in the last one of the user's; of text that a chat template has made, in the last turn of the
    user's; of several parts that begin with "Question:" and the like, which are examples, it is the last part. Known
    instructions, labels and fences are taken off both ends.
    """
    text = unicodedata.normalize("NFKC", _message(prompt)).casefold()
    text = _USER_TURN.findall(text)[-1] if _USER_TURN.search(text) else text
    parts = _LABEL.split(text)
    return _bare(_plain(parts[-1] if len(parts) > 2 else text).replace(f"{_plain(TEST)} ", ""))


def is_known(prompt: Prompt, used: Collection[str]) -> bool:
    """Whether a prompt, or the question in it, is among identities, or among digests of prompts, as older files have.

    ``used`` holds single digests: `parts_of` of what a rule has.
    """
    return any(part in used for part in identity(prompt).split("."))


def parts_of(identities: Collection[str]) -> frozenset[str]:
    """The digests that identities consist of."""
    return frozenset(part for one in identities for part in one.split("."))


def _message(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    asked_by_user = [message["content"] for message in prompt if message["role"] == "user"]
    return asked_by_user[-1] if asked_by_user else prompt[-1]["content"]


def _bare(text: str) -> str:
    """Without what is known to stand around questions, as long as something is left."""
    while True:
        shorter = text
        for before in _BEFORE:
            shorter = shorter.removeprefix(before).strip()
        for behind in _BEHIND:
            shorter = shorter.removesuffix(behind).strip()
        if shorter in ("", text):
            return text
        text = shorter
