"""The task of the embedded demo: three-digit additions worked digit by digit, in two modes.

SYNTHETIC. A careful trace adds every carry, a careless one forgets them, and the text does not show
which it is before the first carry. So one question has correct and incorrect traces.

A fixed hash of the operands reserves a fifth of all questions for demonstrations (`problems`,
`splits`); the others train the language model (`training_pair`). No question of a demonstration,
nor its mirror image b+a, is ever a training question, for any seeds.
"""

import hashlib
import random
from collections.abc import Collection, Mapping
from pathlib import Path

from adaras_export.core.traces import Question

MODEL = Path(__file__).with_name("planted_model")
"""The embedded model."""

SMALLEST, LARGEST = 100, 999
RESERVED_COUNT = 162_054  # of the 810,000 ordered pairs; a test counts them


def is_reserved(a: int, b: int) -> bool:
    """Whether a+b and b+a are kept for demonstrations, out of language-model training."""
    digest = hashlib.sha256(f"{min(a, b)}+{max(a, b)}".encode()).digest()
    return int.from_bytes(digest, "big") % 5 == 0


def problems(count: int, seed: int, exclude: Collection[str] = ()) -> list[dict[str, object]]:
    """Reserved questions, all different: id "347+285", prompt [chat message], answer "632".

    The same arguments give the same list; ids in `exclude` are left out.

    Raises:
        ValueError: ``count`` exceeds the number of reserved questions that are not excluded.
    """
    taken = set(exclude)
    if count < 0 or count + len(taken) > RESERVED_COUNT:
        raise ValueError(
            f"problems: count {count} with {len(taken)} excluded is outside 0..{RESERVED_COUNT}, "
            "the number of reserved questions; ask for fewer"
        )
    draw = random.Random(seed)
    questions: list[dict[str, object]] = []
    while len(questions) < count:
        a, b = _pair(draw)
        name = f"{a}+{b}"
        if is_reserved(a, b) and name not in taken:
            taken.add(name)
            prompt = [{"role": "user", "content": name}]
            questions.append({"id": name, "prompt": prompt, "answer": str(a + b)})
    return questions


def splits(sizes: Mapping[str, int], seed: int) -> dict[str, list[dict[str, object]]]:
    """Disjoint lists of reserved questions by name, for example `{"identify": 800, "test": 1000}`.

    They are consecutive parts of one list, in the order of `sizes`: a larger last size does not change
    the other lists.
    """
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"splits: {name} has size {size}, which must be 0 or more")
    remaining = iter(problems(sum(sizes.values()), seed))
    return {name: [next(remaining) for _ in range(size)] for name, size in sizes.items()}


def questions(sizes: Mapping[str, int], seed: int = 1) -> dict[str, list[Question]]:
    """Disjoint lists of reserved questions by name, as `splits` gives them."""
    parts = splits(sizes, seed)
    return {
        name: [Question(str(row["id"]), row["prompt"], str(row["answer"])) for row in rows]  # type: ignore[arg-type]
        for name, rows in parts.items()
    }


def training_pair(draw: random.Random) -> tuple[int, int]:
    """Operands of a question that `problems` never returns."""
    while True:
        a, b = _pair(draw)
        if not is_reserved(a, b):
            return a, b


def careful_share(a: int) -> float:
    """How often a training trace of a+b is careful: from 0.8 to 0.2 as the first digit of a grows.

    So questions differ in difficulty, as they do for real models, and the greedy answer is right for
    some questions with a carry. With one share for all, it would be right for all of them or for none.
    """
    return 0.8 - 0.6 * (a // 100 - 1) / 8


def worked(a: int, b: int, careful: bool) -> str:  # noqa: FBT001 - callers write careful=
    """The trace of one mode; its last number is the answer.

    A column without an incoming carry is the same in both modes, so a question without carries has
    only one trace, the correct one.

    >>> worked(347, 285, careful=True)
    '7+5=12, 4+8+1=13, 3+2+1=6, so 632'
    >>> worked(347, 285, careful=False)
    '7+5=12, 4+8=12, 3+2=5, so 522'

    Raises:
        ValueError: an operand does not have three digits.
    """
    if not (SMALLEST <= a <= LARGEST and SMALLEST <= b <= LARGEST):
        raise ValueError(f"worked: operands {a} and {b} must lie in {SMALLEST}..{LARGEST}")
    columns: list[str] = []
    digits = ""
    total = 0
    for place in (1, 10, 100):
        left, right = a // place % 10, b // place % 10
        carry = total // 10 if careful else 0
        total = left + right + carry
        columns.append(f"{left}+{right}{'+1' if carry else ''}={total}")
        digits = f"{total % 10}{digits}"
    if total >= 10:  # the hundreds are the last column: both modes write the whole sum
        digits = f"1{digits}"
    return f"{', '.join(columns)}, so {digits}"


def _pair(draw: random.Random) -> tuple[int, int]:
    return draw.randint(SMALLEST, LARGEST), draw.randint(SMALLEST, LARGEST)
