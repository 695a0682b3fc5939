"""The evaluation record: what `adaras-export eval` writes, as one value with one strict reader and one writer.

The reader refuses figures that contradict the answers in the same file. Computes no statistic but counts and means.

N questions, n answers to each.
"""

import json
import math
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from adaras_export.core.intervals import Estimate
from adaras_export.core.markdown import Example
from adaras_export.errors import ArtifactError
from adaras_export.evaluation.arms import RULE_ARMS, Arm, arms_table, primary_arm
from adaras_export.files import safe_read
from adaras_export.files.atomic import replace_file, sha256
from adaras_export.files.hub import is_hub_id
from adaras_export.files.safe_read import UnreadableError
from adaras_export.files.safetensors_record import Array

LARGEST = 32 << 20
"""Bytes of a file; 1000 questions with 25 arms and 8 answers each need a few MiB."""

VERSION = 2
_MOST_ARMS = 1000
_MOST = 1 << 30  # of tokens, and of whatever else is counted
_T = TypeVar("_T")


@dataclass(frozen=True)
class Gap:
    """How far one arm is from the reference arm, on the same questions.

    Attributes:
        name: the arm.
        difference: its accuracy minus that of the reference.
        fixed: questions that it answers better than the reference.
        broken: questions that it answers worse than the reference.
        p_value: of the exact paired test between the two.
        kl_reference: KL(reference || arm) of next-token distributions in nats, mean over the tokens of a text.
        kl_reference_first: the same for the first token after the prompt.
        kl_off: KL(off || arm): the size of the arm's own effect.
        kl_off_first: the same for the first token.
    """

    name: str
    difference: Estimate
    fixed: int
    broken: int
    p_value: float
    kl_reference: Estimate
    kl_reference_first: Estimate
    kl_off: Estimate
    kl_off_first: Estimate

    def divergences(self) -> tuple[Estimate, ...]:
        """From the reference and from no steering, each over the tokens and of the first one."""
        return self.kl_reference, self.kl_reference_first, self.kl_off, self.kl_off_first


@dataclass(frozen=True)
class Comparison:
    """Ways to run one rule, side by side.

    Attributes:
        reference: the arm that the others are compared with.
        tokens: the most tokens of the base's own greedy completion that a divergence is a mean over.
        mean_tokens: how many there were, on average.
        gaps: one for each arm, the reference's own first.
    """

    reference: str
    tokens: int
    mean_tokens: float
    gaps: tuple[Gap, ...]

    def as_record(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "gaps": [asdict(gap) for gap in self.gaps]}

    def table(self) -> str:
        """One line for each arm: differences in points, divergences in nats."""
        width = max(len(gap.name) for gap in self.gaps)
        paired = (f"minus {self.reference}", "  95 % interval", "fixed", "broken", "McNemar p")
        heads = (*paired, f"KL({self.reference})/token", "   first", "KL(off)/token", "   first")
        lines = [f"{'':{width}}  " + "  ".join(heads)]
        for gap in self.gaps:
            cells = [*self._paired(gap), *(f"{figure.value:.3g}" for figure in gap.divergences())]
            columns = "  ".join(f"{cell:>{len(head)}}" for cell, head in zip(cells, heads, strict=True))
            lines.append(f"{gap.name:{width}}  {columns}")
        return "\n".join(lines)

    def _paired(self, gap: Gap) -> Sequence[str]:
        if gap.name == self.reference:
            return [""] * 5
        change = gap.difference
        interval = f"{100 * change.low:+.1f} to {100 * change.high:+.1f}"
        return [f"{100 * change.value:+.1f}", interval, str(gap.fixed), str(gap.broken), f"{gap.p_value:.2g}"]

    def sentence(self) -> str:
        """How far the arm that leaves most of the rule out is from the reference; empty without another arm."""
        gap, change = self.gaps[-1], self.gaps[-1].difference
        if gap.name == self.reference:
            return ""
        unshown = " The test shows no difference, which is no proof of equality: the interval says how large it may be."
        return (
            f"{gap.name} against {self.reference}: {100 * change.value:+.1f} points (95 % interval "
            f"{100 * change.low:+.1f} to {100 * change.high:+.1f}; {gap.fixed} fixed, {gap.broken} broken, "
            f"p = {gap.p_value:.2g}), next-token KL {gap.kl_reference.value:.2g} nats."
            f"{unshown if gap.p_value >= 0.05 else ''}"
        )


@dataclass(frozen=True)
class Evaluation:
    """All arms of one evaluation, and every answer that they rest on.

    Attributes:
        rule: fingerprint of the rule.
        ids: of the questions, (N,).
        verdicts: which answers of an arm are right, (N, n) bool; no steering first.
        arms: the figures of every arm, in the same order.
        differences: accuracy of every arm but "off" minus that of "off".
        conclusion: one sentence: what the figures allow to say.
        steered_share: of the questions, that the gate steers.
        model: name, revision, fingerprint and dtype of the base; and the backend, where that was not Transformers.
        checker: name of the function that checks answers.
        sampling: the settings of generation, among them ``temperature``.
        seen: how many of the questions were used to make the rule.
        question_set: name of the questions.
        trained_on: name of the question set that the rule was made with.
        dataset: Hub id of the dataset that the questions are from.
        task: the task of that benchmark.
        example: one of the questions, for a card to ask; None where none is short and plain.
        tokens: generated for every answer of every arm, (N, n).
        cut: which answers reached the limit of tokens, (N, n) bool.
        seconds: that an arm took; a gated arm is put together from two others and has none, and so have arms that
            shared a batch.
        comparison: how far ways to run the rule are apart, where that was measured.
    """

    rule: str
    ids: tuple[str, ...]
    verdicts: Mapping[str, Array]
    arms: tuple[Arm, ...]
    differences: Mapping[str, Estimate]
    conclusion: str
    steered_share: float
    model: Mapping[str, Any]
    checker: str
    sampling: Mapping[str, Any]
    seen: int = 0
    question_set: str | None = None
    trained_on: str | None = None
    dataset: str | None = None
    task: str | None = None
    example: Example | None = None
    tokens: Mapping[str, Array] = field(default_factory=dict)
    cut: Mapping[str, Array] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    comparison: Comparison | None = None

    @property
    def questions(self) -> int:
        """How many there are (N)."""
        return len(self.ids)

    @property
    def samples(self) -> int:
        """Answers to each question (n)."""
        return int(self.verdicts["off"].shape[1])

    @property
    def decoding(self) -> str:
        """How answers were chosen, in words."""
        temperature = self.sampling["temperature"]
        return f"{self.samples} answers each at temperature {temperature:g}" if temperature else "greedy"

    @property
    def interval(self) -> str:
        """The kind of interval that an accuracy has."""
        return "Wilson" if self.samples == 1 else "bootstrap"

    @property
    def questions_digest(self) -> str:
        """The same for the same questions in the same order."""
        return sha256("\n".join(self.ids).encode())

    @property
    def primary(self) -> str:
        """The primary arm: the way to run the rule that is nearest to the paper's; controls are steered like it."""
        return primary_arm(self.verdicts)

    def arm(self, name: str) -> Arm | None:
        """The arm of that name, where it was measured."""
        return next((arm for arm in self.arms if arm.name == name), None)

    def table(self) -> str:
        """All arms, one line each; below it the comparison, where there is one."""
        below = "" if self.comparison is None else f"\n\n{self.comparison.table()}"
        return arms_table(self.arms) + below

    def as_record(self) -> dict[str, Any]:
        """JSON values; `read_evaluation` reads them."""
        return {
            "version": VERSION,
            "rule": self.rule,
            "model": dict(self.model),
            "checker": self.checker,
            "sampling": dict(self.sampling),
            "question_set": self.question_set,
            "trained_on": self.trained_on,
            "questions": self.questions,
            "samples": self.samples,
            "steered_share": self.steered_share,
            "seen": self.seen,
            "dataset": self.dataset,
            "task": self.task,
            "example": None if self.example is None else self.example.prompt,
            "verdict": self.conclusion,
            "arms": [asdict(arm) for arm in self.arms],
            "differences": {name: asdict(figure) for name, figure in self.differences.items()},
            "verdicts": {"id": list(self.ids), **_lists(self.verdicts)},
            "tokens": _lists(self.tokens),
            "cut": _lists(self.cut),
            "seconds": {name: round(seconds, 3) for name, seconds in self.seconds.items()},
            **({} if self.comparison is None else {"comparison": self.comparison.as_record()}),
        }

    def save(self, path: str | Path) -> None:
        """Write `as_record` as a JSON file, atomically.

        Raises:
            ArtifactError: the file cannot be written.
        """
        replace_file(path, (json.dumps(self.as_record(), indent=1, sort_keys=True) + "\n").encode())


def _lists(tables: Mapping[str, Array]) -> dict[str, list[Any]]:
    """One number for each question, or a list of n where there are several answers."""
    return {
        name: (table[:, 0] if table.shape[1] == 1 else table).astype(int).tolist() for name, table in tables.items()
    }


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation in a JSON file.

    Raises:
        ArtifactError: the file is none, or its figures contradict its answers.
    """
    try:
        return evaluation_from_record(safe_read.parsed(safe_read.content(path, LARGEST)))
    except UnreadableError as error:
        expected = f"expected a file of adaras-export eval, version {VERSION}; run eval again"
        raise ArtifactError(f"{path}: {error}; {expected}") from error


def evaluation_from_record(record: Any) -> Evaluation:  # noqa: ANN401 - a JSON value
    """The evaluation in a JSON value that `Evaluation.as_record` gave.

    Raises:
        UnreadableError: the value is none, or its figures contradict its answers.
    """
    if not isinstance(record, dict):
        raise UnreadableError(f"holds a {type(record).__name__}")
    if "version" not in record or record["version"] is True or record["version"] != VERSION:
        raise UnreadableError(f"has version {reprlib.repr(record.get('version'))}")
    values = _object("it", record, _KEYS, optional="comparison")
    arms = _arms(values["arms"])
    ids, verdicts = _verdicts(values["verdicts"], arms)
    shape = verdicts["off"].shape
    _require("questions and samples", (values["questions"], values["samples"]), shape)
    _require_counted(arms, verdicts)

    def table(name: str, rows: Any, most: int = _MOST) -> Array:  # noqa: ANN401 - a JSON value
        return _table(name, rows, shape, most)

    evaluation = Evaluation(
        rule=_text("rule", values["rule"]),
        ids=ids,
        verdicts=verdicts,
        arms=tuple(arms.values()),
        differences=_by_arm("differences", values["differences"], arms, _estimate, optional=("off",)),
        conclusion=_text("verdict", values["verdict"]),
        steered_share=_number("steered_share", values["steered_share"], most=1.0),
        model=_settings("model", values["model"]),
        checker=_text("checker", values["checker"]),
        sampling=_sampling(values["sampling"]),
        seen=_count("seen", values["seen"], shape[0]),
        **{name: _optional(_text, name, values[name]) for name in ("question_set", "trained_on", "dataset", "task")},
        example=_optional(_example, "example", values["example"]),
        tokens=_by_arm("tokens", values["tokens"], arms, table),
        cut={name: cut == 1 for name, cut in _by_arm("cut", values["cut"], arms, partial(table, most=1)).items()},
        seconds=_by_arm("seconds", values["seconds"], arms, _number, optional=arms),
        comparison=_optional(_comparison, "comparison", values.get("comparison")),
    )
    if evaluation.dataset is not None and not is_hub_id(evaluation.dataset):
        raise UnreadableError(f"has dataset {reprlib.repr(evaluation.dataset)}, which is no Hub id")
    return evaluation


_KEYS = (
    *("version", "rule", "model", "checker", "sampling", "question_set", "trained_on", "questions", "samples"),
    *("steered_share", "seen", "dataset", "task", "example", "verdict", "arms", "differences", "verdicts", "tokens"),
    *("cut", "seconds"),
)


def _arms(records: Any) -> dict[str, Arm]:  # noqa: ANN401 - a JSON value
    """The figures of every arm by its name, in the order of the file."""
    if not isinstance(records, list) or len(records) > _MOST_ARMS:
        raise UnreadableError(f"has no list of arms, or one of more than {_MOST_ARMS}")
    listed = [_value(Arm, "an arm", record) for record in records]
    arms = {arm.name: arm for arm in listed}
    if len(arms) < len(listed) or "off" not in arms or not {*RULE_ARMS} & {*arms}:
        names = reprlib.repr([arm.name for arm in listed])
        raise UnreadableError(f"has arms {names}, where there should be off and one of {', '.join(RULE_ARMS)}")
    return arms


def _verdicts(columns: Any, arms: Mapping[str, Arm]) -> tuple[tuple[str, ...], dict[str, Array]]:  # noqa: ANN401
    """Ids of the questions, and the table of every arm."""
    ids = columns.get("id") if isinstance(columns, dict) else None
    if not isinstance(ids, list) or not ids or not all(isinstance(id_, str) for id_ in ids):
        raise UnreadableError("has no ids of questions beside its verdicts")
    if len({*ids}) != len(ids):
        raise UnreadableError("has one question twice")
    if other := (columns.keys() - {"id"}) ^ arms.keys():
        raise UnreadableError(f"has the arm {reprlib.repr(min(other))} in one of arms and verdicts only")
    first = columns["off"][0] if isinstance(columns["off"], list) and columns["off"] else 0
    shape = len(ids), len(first) if isinstance(first, list) else 1
    if not shape[1]:
        raise UnreadableError("has no answer to its first question")
    return tuple(ids), {name: _table(name, columns[name], shape, most=1) == 1 for name in arms}


def _table(name: str, rows: Any, shape: tuple[int, ...], most: int) -> Array:  # noqa: ANN401 - a JSON value
    """Whole numbers from 0 to ``most``, one for each question or n; as (N, n)."""
    if not isinstance(rows, list) or len(rows) != shape[0]:
        raise UnreadableError(f"has another number of values for {name!r} than the {shape[0]} questions")
    table = [row if isinstance(row, list) else [row] for row in rows]
    if any(len(row) != shape[1] for row in table):
        raise UnreadableError(f"has rows of different lengths for {name!r}, where there are {shape[1]} answers each")
    for value in chain.from_iterable(table):
        _count(name, value, most)
    return np.array(table, dtype=np.int64)


def _by_arm(
    key: str,
    values: Any,  # noqa: ANN401 - a JSON value
    arms: Mapping[str, Arm],
    read: Callable[[str, Any], _T],
    optional: Collection[str] = (),
) -> dict[str, _T]:
    """A value for every arm, in the order of the arms."""
    if not isinstance(values, dict):
        raise UnreadableError(f"has {reprlib.repr(values)} for {key}, where there should be an object")
    if unknown := values.keys() - arms.keys():
        raise UnreadableError(f"has {key} of {reprlib.repr(min(unknown))}, which has no verdicts")
    if missing := arms.keys() - values.keys() - {*optional}:
        raise UnreadableError(f"has no {key} of {reprlib.repr(min(missing))}")
    return {name: read(name, values[name]) for name in arms if name in values}


def _require_counted(arms: Mapping[str, Arm], verdicts: Mapping[str, Array]) -> None:
    """Refuse counts and accuracies that do not follow from the answers; intervals and tests are not computed here."""
    off_N = verdicts["off"].sum(axis=1)
    for name, arm in arms.items():
        right_N = verdicts[name].sum(axis=1)
        counted = len(right_N), int((right_N > off_N).sum()), int((right_N < off_N).sum())
        _require(f"questions, fixed and broken of {name!r}", (arm.questions, arm.fixed, arm.broken), counted)
        if abs(arm.accuracy - (share := float(verdicts[name].mean()))) > 1e-9:
            _require(f"accuracy of {name!r}", arm.accuracy, share)


def _example(key: str, value: Any) -> Example:  # noqa: ANN401 - a JSON value
    example = Example.of(value)
    if example is None:
        raise UnreadableError(f"has {reprlib.repr(value)} for {key}, where there should be a short question")
    return example


def _comparison(key: str, value: Any) -> Comparison:  # noqa: ANN401 - a JSON value
    record = _object(key, value, [one.name for one in fields(Comparison)])
    if not isinstance(record["gaps"], list) or not record["gaps"]:
        raise UnreadableError("has no gaps in its comparison")
    return Comparison(
        reference=_text("reference", record["reference"]),
        tokens=_count("tokens", record["tokens"], _MOST),
        mean_tokens=_number("mean_tokens", record["mean_tokens"]),
        gaps=tuple(_value(Gap, "a gap", gap) for gap in record["gaps"]),
    )


def _value(kind: Callable[..., _T], name: str, value: Any) -> _T:  # noqa: ANN401 - a JSON value
    """A dataclass of texts, counts, numbers and estimates."""
    types = {one.name: one.type for one in fields(kind)}  # type: ignore[arg-type]
    record = _object(name, value, [*types])
    return kind(**{key: _READERS[type_](key, record[key]) for key, type_ in types.items()})


def _object(name: str, value: Any, keys: Sequence[str], optional: str = "") -> dict[str, Any]:  # noqa: ANN401
    """An object of exactly these keys."""
    if not isinstance(value, dict):
        raise UnreadableError(f"has {reprlib.repr(value)} for {name}, where there should be an object")
    if missing := [key for key in keys if key not in value]:
        raise UnreadableError(f"has no {missing[0]} in {name}")
    if unknown := sorted(value.keys() - {*keys, optional}):
        raise UnreadableError(f"has the unknown key {reprlib.repr(unknown[0])} in {name}")
    return value


def _settings(name: str, value: Any) -> dict[str, Any]:  # noqa: ANN401 - a JSON value
    if not isinstance(value, dict) or any(isinstance(part, dict | list) for part in value.values()):
        raise UnreadableError(f"has {reprlib.repr(value)} for {name}, where there should be an object of plain values")
    return value


def _sampling(value: Any) -> dict[str, Any]:  # noqa: ANN401 - a JSON value
    settings = _settings("sampling", value)
    _number("temperature", settings.get("temperature"))
    return settings


def _optional(read: Callable[[str, Any], _T], name: str, value: Any) -> _T | None:  # noqa: ANN401 - a JSON value
    return None if value is None else read(name, value)


def _text(name: str, value: Any) -> str:  # noqa: ANN401 - a JSON value
    if not isinstance(value, str):
        raise UnreadableError(f"has {reprlib.repr(value)} for {name}, where there should be text")
    return value


def _count(name: str, value: Any, most: int = _MOST) -> int:  # noqa: ANN401 - a JSON value
    if type(value) is not int or not 0 <= value <= most:
        raise UnreadableError(f"has {reprlib.repr(value)} for {name!r}, where there should be a count from 0 to {most}")
    return value


def _number(name: str, value: Any, least: float = 0.0, most: float = math.inf) -> float:  # noqa: ANN401 - a JSON value
    """A number; `foreign.parsed` takes finite ones only."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise UnreadableError(f"has {reprlib.repr(value)} for {name!r}, where there should be a number from {least:g}")
    return float(value)


def _estimate(name: str, value: Any) -> Estimate:  # noqa: ANN401 - a JSON value
    return _value(Estimate, name, value)


_READERS: dict[Any, Callable[[str, Any], Any]] = {
    str: _text,
    int: _count,
    float: partial(_number, least=-math.inf),
    Estimate: _estimate,
}


def _require(name: str, value: Any, counted: Any) -> None:  # noqa: ANN401 - counts, or a share
    if value != counted:
        raise UnreadableError(f"has {reprlib.repr(value)} for {name}; its verdicts give {counted}")
