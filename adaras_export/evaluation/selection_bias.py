"""Selection bias: how much of the gain of the best of many settings is due to choosing it.

The best of many settings looks better than it is on the questions that it was chosen on. Pure statistics over arrays;
knows no model. S settings, N questions.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from adaras_export.files.safetensors_record import Array

_DRAWS = 2000
_AT_ONCE = 200


@dataclass(frozen=True)
class SelectionBias:
    """What chance makes of the best of so many settings.

    Attributes:
        settings: how many were tried.
        p_value: how often the best of them gains as much where steering changes nothing for better or worse
            (signs flipped per question, for all settings together). Exact where every setting answered all questions.
        fresh_gain: gain to expect on fresh questions: of the best setting in a resample of the questions, on those
            that were not drawn; averaged.
    """

    settings: int
    p_value: float
    fresh_gain: float

    def as_record(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def selection_bias(differences_SN: Array, answered_SN: Array, chosen: int) -> SelectionBias:
    """The selection bias of the chosen setting, a row number.

    Args:
        differences_SN: verdicts minus those of no steering (-1, 0 or 1), 0 where a setting did not answer.
        answered_SN: bool; at least one setting answered all questions.
        chosen: the row of the best of those.
    """
    p_value = _p_value(differences_SN.astype(float), answered_SN.sum(axis=1), chosen)
    fresh_gain = _fresh_gain(differences_SN[answered_SN.all(axis=1)].astype(float))
    return SelectionBias(len(differences_SN), p_value, fresh_gain)


def _p_value(differences_SN: Array, answered_S: Array, chosen: int) -> float:
    """Share of draws whose best setting does at least as well as the chosen one.

    Sums are divided by the root of the number of questions: by chance they spread alike, also those of settings that
    were stopped.
    """
    scale_S = 1 / np.sqrt(answered_S)
    observed = differences_SN[chosen].sum() * scale_S[chosen] - 1e-9
    draw, reached = np.random.default_rng(0), 0
    for _ in range(_DRAWS // _AT_ONCE):
        signs_RN = draw.choice([-1.0, 1.0], size=(_AT_ONCE, differences_SN.shape[1]))
        reached += int(((signs_RN @ differences_SN.T) * scale_S >= observed).any(axis=1).sum())
    return (1 + reached) / (1 + _DRAWS)


def _fresh_gain(differences_SN: Array) -> float:
    draw, count = np.random.default_rng(1), differences_SN.shape[1]
    gains = []
    for _ in range(_DRAWS // 4):
        drawn = draw.integers(count, size=count)
        left_out = np.setdiff1d(np.arange(count), drawn)
        if len(left_out):
            best = differences_SN[:, drawn].mean(axis=1).argmax()
            gains.append(differences_SN[best, left_out].mean())
    return float(np.mean(gains)) if gains else float(differences_SN.mean(axis=1).max())
