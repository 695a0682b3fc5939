"""An exported graph as the comparison, an evaluation and a calibration run it: with torch, in batches."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adaras_export.errors import ExportError
from adaras_export.exporters.checks import Check
from adaras_export.exporters.onnx.session import STRENGTH, THRESHOLD, Session, end_ids, greedy
from adaras_export.exporters.parity import STEPS, Mode, Play, Tolerance
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.generation import Sampling, stop_ids


class SteeredGraph:
    """An opened graph. Modes are set with the dials that users have: the two overridable initialisers.

    Raises:
        ArtifactError: ONNX Runtime does not open it, or later, does not run it.
    """

    switchable = True

    def __init__(self, path: Path, tolerance: Tolerance) -> None:
        self.session = Session(path)
        self.tolerance = tolerance

    def findings(self) -> Sequence[Check]:
        """As `Artifact` says."""
        return []

    def play(self, rows: Sequence[Sequence[int]], mode: Mode, follow_BS: Tensor | None) -> Play:
        """As `Player` says."""
        dials: dict[str, float] = {}
        if mode == "off":
            dials = {STRENGTH: 0.0}
        elif mode != "rule" and self.session.gated:
            dials = {THRESHOLD: 2.0 if mode == "always" else mode}  # p(correct) is below 2
        batches = self.session.batches(len(rows))
        follow = [None if follow_BS is None else follow_BS[batch].numpy() for batch in batches]
        plays = [self._play(rows[batch], tokens, dials) for batch, tokens in zip(batches, follow, strict=True)]
        logits, tokens, probability = zip(*(vars(play).values() for play in plays), strict=True)
        return Play(torch.cat(logits), torch.cat(tokens), torch.cat(probability) if self.session.gated else None)

    def _play(self, rows: Sequence[Sequence[int]], follow_BS: Array | None, dials: Mapping[str, float]) -> Play:
        choose: Callable[[Array], Array] = greedy
        if follow_BS is not None:
            columns = iter(follow_BS.T)
            choose = lambda _: next(columns)  # noqa: E731
        steps = [*islice(self.session.decode(rows, choose, dials), STEPS)]
        logits_BSV = torch.from_numpy(np.stack([step.logits_BV for step in steps], 1)).float()
        probability_B = steps[-1].probability
        judged = None if probability_B is None else torch.from_numpy(probability_B)
        return Play(logits_BSV, logits_BSV.argmax(-1), judged)

    def answer(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Sequence[int]],
        sampling: Sampling,
        keys: Sequence[str],  # noqa: ARG002 - the protocol
    ) -> list[list[int]]:
        """As `parity.Answering` says; greedy only."""
        path = self.session.path
        if sampling.temperature != 0:
            raise ExportError(f"{path}: temperature {sampling.temperature}; expected 0, graphs answer greedily")
        ends = end_ids(path.parent.parent) | {*(stop_ids(tokenizer, sampling.stop) if sampling.stop else ())}
        batches = self.session.batches(len(rows))
        return [ids for batch in batches for ids in self._answers(rows[batch], ends, sampling.max_new_tokens)]

    def _answers(self, rows: Sequence[Sequence[int]], ends: set[int], most: int) -> list[list[int]]:
        answers, unfinished = [list[int]() for _ in rows], {*range(len(rows))}
        for step in islice(self.session.decode(rows), most):
            unfinished -= {row for row in unfinished if int(step.tokens_B[row]) in ends}
            for row in unfinished:
                answers[row].append(int(step.tokens_B[row]))
            if not unfinished:
                break
        return answers

    def p_correct(self, rows: Sequence[Sequence[int]]) -> Array:
        """p(correct) of each prompt of token ids, (N,) float32."""
        return np.array([next(self.session.decode([row])).probability for row in rows], np.float32)[:, 0]
