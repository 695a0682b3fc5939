"""Rankings of neurons, from sums over questions; pure arithmetic over arrays.

What correlates with being right (the paper's and its relatives: absolute, Cohen's d, paired t with a false discovery
rate), and what causes it (attribution), with refinements of either. Knows no model in memory and no traces.

L layers, M MLP neurons, Q questions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaras_export.core.base_model import BaseModel
from adaras_export.core.neuron_stats import AttributionStats, NeuronStats
from adaras_export.core.neurons import NeuronSet, Ranking
from adaras_export.errors import RuleError, require
from adaras_export.files.safetensors_record import Array

RANKINGS: tuple[Ranking, ...] = ("paper", "absolute", "cohen_d", "t", "attribution")


@dataclass(frozen=True)
class Refinement:
    """What a ranking may be refined by.

    Attributes:
        per_layer: at most so many neurons of one layer.
        fdr: share of false discoveries among the neurons that ranking "t" keeps (Benjamini and Hochberg 1995).
        shrink: attribution: scores lose what their standard error explains, by the factor a^2 / (a^2 + error^2).
        agree: attribution: only neurons that are also more active, on average, in the class that they push to.

    Raises:
        RuleError: a value outside its range.
    """

    per_layer: int | None = None
    fdr: float = 0.05
    shrink: bool = False
    agree: bool = False

    def __post_init__(self) -> None:
        if (self.per_layer is not None and self.per_layer < 1) or not 0 < self.fdr <= 1:
            raise RuleError(
                f"ranking: {self.per_layer} neurons a layer, false discovery rate {self.fdr}; "
                "expected 1 or more, and a rate above 0, at most 1"
            )

    def require_of(self, ranking: Ranking) -> None:
        """Refuse refinements that only ranking "attribution" has.

        Raises:
            RuleError: ``shrink`` or ``agree`` is set, and ``ranking`` is another one.
        """
        if (self.shrink or self.agree) and ranking != "attribution":
            raise RuleError(f"ranking: {ranking} is not shrunk, and agrees with itself; expected attribution")


_PLAIN = Refinement()


def rank(
    stats: NeuronStats,
    attribution: AttributionStats | None,
    *,
    ranking: Ranking,
    keep: int,
    min_layer: int = 0,
    refinement: Refinement = _PLAIN,
) -> NeuronSet:
    """The ``keep`` best neurons by a ranking; fewer where a refinement lets fewer pass.

    Raises:
        RuleError: fewer than ``keep`` neurons at ``min_layer`` and above, no neuron passes a refinement, ranking
            "attribution" without ``attribution``, or a refinement that the ranking does not have.
        TraceError: a class has no traces.
    """
    refinement.require_of(ranking)
    if ranking == "attribution":
        if attribution is None:
            raise RuleError(
                "ranking: attribution needs gradients, which were not read; run identify --ranking attribution"
            )
        stats.base.require_same(attribution.base)
        delta, keys, passing = _by_attribution(stats, attribution, refinement)
    else:
        delta, keys, passing = _BY_MEANS[ranking](stats, min_layer, refinement)
    places = _best(stats.base, keys, passing, (keep, min_layer, refinement.per_layer))
    return _neurons(stats, places, delta, keys[0], ranking)


def rank_by_difference(stats: NeuronStats, keep: int, min_layer: int = 0) -> NeuronSet:
    """The neurons whose mean activation differs most between correct and incorrect traces (paper, section 3).

    Score = |correct - incorrect| / (|correct| + |incorrect| + 1e-8), near 1 where the sign flips; then |delta|; ties
    go to the lower (layer, index). delta = mean_correct - mean_incorrect.

    Raises:
        RuleError: fewer than ``keep`` neurons at ``min_layer`` and above.
        TraceError: a class has no traces.
    """
    return rank(stats, None, ranking="paper", keep=keep, min_layer=min_layer)


def rank_by_attribution(stats: NeuronStats, attribution: AttributionStats, keep: int, min_layer: int = 0) -> NeuronSet:
    """The neurons that move the margin between correct and incorrect completions most, per standard deviation.

    Score = |a| * sigma with a from `attribution` and sigma a neuron's standard deviation over traces;
    delta = sign(a) * sigma, so that a positive strength raises the margin. Ties as in `rank_by_difference`.

    Raises:
        RuleError: fewer than ``keep`` neurons at ``min_layer`` and above, or another model's attribution.
        TraceError: there are no questions.
    """
    return rank(stats, attribution, ranking="attribution", keep=keep, min_layer=min_layer)


def require_room(base: BaseModel, keep: int, min_layer: int | None, per_layer: int | None = None) -> None:
    """Refuse a number of neurons that the layers do not have.

    Args:
        base: the model.
        keep: how many neurons.
        min_layer: the lowest layer to take them from, 0-based; None: the first of the upper half.
        per_layer: at most so many of one layer; None: all.

    Raises:
        RuleError: ``keep`` is less than 1 or more than these layers allow, or there is no layer ``min_layer``.
    """
    lowest = base.layers // 2 if min_layer is None else min_layer
    widths = [base.width(layer) for layer in range(max(0, lowest), base.layers)]
    available = sum(widths if per_layer is None else (min(per_layer, width) for width in widths))
    if lowest < 0 or not 1 <= keep <= available:
        budget = "" if per_layer is None else f", and {per_layer} of one are allowed"
        raise RuleError(
            f"neurons: {keep} wanted from layer {lowest} on; {base.id} has {base.layers} layers of "
            f"{base.mlp_size}{budget}"
        )


def paired_t(stats: NeuronStats) -> Array:
    """The t statistic of every neuron's difference within questions, (L, M); 0 where no question differs from another.

    Raises:
        RuleError: the contrast is not within questions, or there is one question.
        TraceError: a class has no traces.
    """
    count = stats.correct_count
    if stats.contrast != "within_question" or count < 2:
        raise RuleError(
            f"ranking t: {count} questions, contrasted {stats.contrast}; expected two or more, within questions"
        )
    correct, incorrect = stats.means()
    mean = correct - incorrect
    variance = np.maximum(stats.difference_square_sum / count - mean**2, 0.0) * count / (count - 1)
    error = np.sqrt(variance / count)
    t: Array = np.divide(mean, error, out=np.zeros_like(mean), where=error > 0)
    return t


_Ranked = tuple[Array, Sequence[Array], Array | None]
"""delta, the keys that count (the first most, it is the score), and which neurons may be taken; (L, M) each."""


def _by_paper(stats: NeuronStats, _lowest: int, _refinement: Refinement) -> _Ranked:
    correct, incorrect = stats.means()
    delta = correct - incorrect
    return delta, [np.abs(delta) / (np.abs(correct) + np.abs(incorrect) + 1e-8), np.abs(delta)], None


def _by_size(stats: NeuronStats, _lowest: int, _refinement: Refinement) -> _Ranked:
    correct, incorrect = stats.means()
    return correct - incorrect, [np.abs(correct - incorrect)], None


def _by_cohen(stats: NeuronStats, _lowest: int, _refinement: Refinement) -> _Ranked:
    correct, incorrect = stats.means()
    delta, sigma = correct - incorrect, stats.deviation()
    return delta, [np.divide(np.abs(delta), sigma, out=np.zeros_like(sigma), where=sigma > 0)], None


def _by_t(stats: NeuronStats, lowest: int, refinement: Refinement) -> _Ranked:
    scipy: Any = require("scipy.stats", "identify", "ranking by t")
    t, (correct, incorrect) = paired_t(stats), stats.means()
    passing, places = np.zeros(t.shape, dtype=bool), stats.base.places(lowest)
    p_values = 2 * scipy.t.sf(np.abs(t[places]), stats.correct_count - 1)
    passing[places] = scipy.false_discovery_control(p_values) <= refinement.fdr
    if not passing.any():
        raise RuleError(
            f"ranking t: none of {p_values.size} neurons passes a false discovery rate of {refinement.fdr:g} (least "
            f"p = {p_values.min():.2g}); expected one or more; give more questions, or a higher --fdr"
        )
    return correct - incorrect, [np.abs(t)], passing


def _by_attribution(stats: NeuronStats, attribution: AttributionStats, refinement: Refinement) -> _Ranked:
    a, sigma = attribution.mean(), stats.deviation()
    score, passing = np.abs(a) * sigma, None
    if refinement.shrink:
        size = a**2 + attribution.standard_error() ** 2
        score = score * np.divide(a**2, size, out=np.zeros_like(a), where=(size > 0) & np.isfinite(size))
    if refinement.agree:
        correct, incorrect = stats.means()
        passing = np.sign(a) == np.sign(correct - incorrect)
    return np.sign(a) * sigma, [score], passing


_BY_MEANS: dict[Ranking, Callable[[NeuronStats, int, Refinement], _Ranked]] = {
    "paper": _by_paper,
    "absolute": _by_size,
    "cohen_d": _by_cohen,
    "t": _by_t,
}


def _best(
    base: BaseModel, keys: Sequence[Array], passing: Array | None, choice: tuple[int, int, int | None]
) -> tuple[Array, Array]:
    """Layer and index of the largest entries by several (L, M) keys, the first counting most."""
    keep, min_layer, per_layer = choice
    require_room(base, keep, min_layer, per_layer)
    places = base.places(min_layer)
    order = np.lexsort((np.arange(len(places[0])), *(-key[places] for key in reversed(keys))))
    if passing is not None:
        order = order[passing[places][order]]
    layer, index = (axis[order] for axis in places)
    if per_layer is not None:
        allowed = np.zeros(len(order), dtype=bool)
        for number in range(min_layer, base.layers):
            allowed[np.flatnonzero(layer == number)[:per_layer]] = True
        layer, index = layer[allowed], index[allowed]
    return layer[:keep], index[:keep]


def _neurons(
    stats: NeuronStats, places: tuple[Array, Array], delta: Array, score: Array, ranking: Ranking
) -> NeuronSet:
    correct, incorrect = stats.means()
    return NeuronSet(
        layer=places[0],
        index=places[1],
        delta=delta[places],
        mean_correct=correct[places],
        mean_incorrect=incorrect[places],
        score=score[places],
        ranking=ranking,
        base=stats.base,
        questions=stats.questions,
    )
