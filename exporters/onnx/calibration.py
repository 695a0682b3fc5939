"""The gate on a base with rounded weights: how often it decides as the rule's own, and a threshold that fits it.

Knows no format: whoever opens an artifact gives its p(correct).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from adaras_export.core import trace_files, traces
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.question_identity import identity
from adaras_export.core.rule import SteeringRule
from adaras_export.core.traces import Prompt, Trace
from adaras_export.errors import TraceError
from adaras_export.exporters.base import Written
from adaras_export.exporters.checks import Check
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling import gate
from adaras_export.modeling.gate import agreeing_threshold, is_below, youden_threshold
from adaras_export.modeling.generation import encode_prompt
from adaras_export.modeling.loading import load_model

AGREEMENT = "gate, share of prompts decided as on the base"
_FEWEST = 2

logger = logging.getLogger(__name__)


class Judge(Protocol):
    """An opened artifact with a gate."""

    def p_correct(self, rows: Sequence[Sequence[int]]) -> Array:
        """p(correct) of each prompt of token ids, (N,) float32."""
        ...


@dataclass(frozen=True)
class Prompts:
    """What the gate is asked.

    Attributes:
        prompts: N prompts.
        source: where they are from, for the report.
        is_correct: (N,) whether most answers to them are correct; None where that is not known.
        calibrates: whether a threshold is to be fitted to them.
    """

    prompts: Sequence[Prompt]
    source: str
    is_correct: Array | None = None
    calibrates: bool = True

    @classmethod
    def of(cls, path: str | Path | None) -> "Prompts":
        """Those of a JSONL file of questions or labelled traces; without one, the library's, which only measure.

        Raises:
            TraceError: the file is neither, or its labels are (nearly) all the same.
        """
        if path is None:
            return cls(_word_questions(), "arithmetic word questions", calibrates=False)
        found = trace_files.read_prompts(path)
        labelled = [one for one in found if isinstance(one, Trace)]
        if not labelled:
            return cls([one.prompt for one in found], "calibration prompts")
        prompts, is_correct = traces.labelled_prompts(labelled)
        traces.require_both(is_correct, "calibration")
        return cls(prompts, "calibration prompts", is_correct)


def calibrated(rule: SteeringRule, base: Checkpoint, artifact: Judge, asked: Prompts) -> Written:
    """The rule with a threshold for the artifact's p(correct), and how often both decide alike.

    Where the prompts have labels, by Youden's J as `train_gate` has it; else the one that agrees most often with what
    the rule's gate decides on the base. The base's p(correct) are PyTorch's, up to the gate's last layer.

    Raises:
        TraceError: there are no labels, and the gate decides (nearly) all prompts alike.
    """
    own = rule.gate
    assert own is not None
    model, tokenizer = load_model(base.folder)
    was_steered = is_below(gate.gate_probabilities(model, tokenizer, own, asked.prompts), own.threshold)
    del model
    p_correct = artifact.p_correct([encode_prompt(tokenizer, prompt) for prompt in asked.prompts])
    before, count = float((is_below(p_correct, own.threshold) == was_steered).mean()), len(p_correct)
    if not asked.calibrates:
        if before < 1:
            logger.warning(
                "warning: the gate decides %.0f %% of %d %s as on the base; give prompts with --calibration",
                100 * before, count, asked.source,
            )  # fmt: skip
        return Written(rule, (Check(AGREEMENT, before, None, f"of {count} {asked.source}"),))
    threshold = _threshold(p_correct, asked, was_steered)
    questions = (*own.questions, *(identity(prompt) for prompt in asked.prompts))
    after = float((is_below(p_correct, threshold) == was_steered).mean())
    detail = f"of {count} {asked.source}; {before:.3g} with threshold {own.threshold:.6g} instead of {threshold:.6g}"
    fitted = replace(rule, gate=replace(own, threshold=threshold, questions=questions))
    return Written(fitted, (Check(AGREEMENT, after, None, detail),))


def _threshold(p_correct: Array, asked: Prompts, was_steered: Array) -> float:
    if asked.is_correct is not None:
        return youden_threshold(p_correct, asked.is_correct)
    count, steered = len(was_steered), int(was_steered.sum())
    if not _FEWEST <= steered <= count - _FEWEST:
        raise TraceError(
            f"calibration: on the base, the gate steers {steered} of {count} prompts; expected {_FEWEST} or more of "
            "either kind"
        )
    return agreeing_threshold(p_correct, was_steered)


_NAMES = ("Ben", "Mia", "Tom", "Ana")
_THINGS = (("boxes", "pens"), ("bags", "apples"), ("shelves", "books"), ("jars", "cookies"))


def _word_questions() -> list[str]:
    """64 questions, some of one step and some of two."""
    questions = []
    for row in range(64):
        name, (holders, things) = _NAMES[row % 4], _THINGS[row // 4 % 4]
        text = f"{name} has {2 + row % 19} {holders} with {3 + row * 7 % 18} {things} each"
        more = f" and gives away {1 + row % 5} {things}" if row % 3 == 0 else ""
        questions.append(f"Question: {text}{more}. How many {things} does {name} have?\nAnswer:")
    return questions
