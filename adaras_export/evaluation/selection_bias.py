"""How much of the best of many settings is luck.

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
class Luck:
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


def luck(differences_SN: Array, answered_SN: Array, chosen: int) -> Luck:
    """Of verdicts minus those of no steering (-1, 0 or 1), 0 where a setting did not answer; some answered all."""
    p_value = _p_value(differences_SN.astype(float), answered_SN.sum(axis=1), chosen)
    return Luck(len(differences_SN), p_value, _fresh_gain(differences_SN[answered_SN.all(axis=1)].astype(float)))


def _p_value(differences_SN: Array, answered_S: Array, chosen: int) -> float:
    """Share of draws whose best setting does at least as well as the chosen one.

    Sums are divided by the root of the number of questions: by chance they spread alike, also those of settings that
    were stopped.
    """
    scale_S = 1 / np.sqrt(answered_S)
    found = differences_SN[chosen].sum() * scale_S[chosen] - 1e-9
    random, reached = np.random.default_rng(0), 0
    for _ in range(_DRAWS // _AT_ONCE):
        signs_RN = random.choice([-1.0, 1.0], size=(_AT_ONCE, differences_SN.shape[1]))
        reached += int(((signs_RN @ differences_SN.T) * scale_S >= found).any(axis=1).sum())
    return (1 + reached) / (1 + _DRAWS)


def _fresh_gain(differences_SN: Array) -> float:
    random, count = np.random.default_rng(1), differences_SN.shape[1]
    gains = []
    for _ in range(_DRAWS // 4):
        drawn = random.integers(count, size=count)
        left = np.setdiff1d(np.arange(count), drawn)
        if len(left):
            best = differences_SN[:, drawn].mean(axis=1).argmax()
            gains.append(differences_SN[best, left].mean())
    return float(np.mean(gains)) if gains else float(differences_SN.mean(axis=1).max())
