"""Which neurons: read labelled traces with a model, rank its neurons, return the best.

Two rankings stand side by side. The paper's asks which activations differ between correct and incorrect traces; it
is correlational. The attribution ranking asks what changing an activation does to the margin between them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaras_export.activations import MAX_ROWS, trace_means
from adaras_export.attribution import WeightedCompletion, margin_gradients
from adaras_export.errors import RuleError, TraceError
from adaras_export.generation import batches, encode_prompt, encode_trace, pad_id, prefill
from adaras_export.models import BaseModel
from adaras_export.rule import NeuronSet, Ranking, Start
from adaras_export.statistics import AttributionStats, Contrast, NeuronStats, with_question
from adaras_export.storage import Array
from adaras_export.traces import Trace, by_question, digest

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Reading:
    """How traces are read: tokens of one batch (padding included), and whom to tell about questions done."""

    token_budget: int = 4096
    progress: Progress | None = None


def rank_by_difference(stats: NeuronStats, keep: int, min_layer: int = 0) -> NeuronSet:
    """The neurons whose mean activation differs most between correct and incorrect traces (paper, section 3).

    Score = |correct - incorrect| / (|correct| + |incorrect| + 1e-8), near 1 where the sign flips; then |delta|; ties
    go to the lower (layer, index). delta = mean_correct - mean_incorrect.

    Raises:
        RuleError: fewer than ``keep`` neurons at ``min_layer`` and above.
        TraceError: a class has no traces.
    """
    correct, incorrect = stats.means()
    delta = correct - incorrect
    score = np.abs(delta) / (np.abs(correct) + np.abs(incorrect) + 1e-8)
    places = _best(stats.base, [score, np.abs(delta)], keep, min_layer)
    return _neurons(stats, places, delta, score, "paper")


def rank_by_attribution(stats: NeuronStats, attribution: AttributionStats, keep: int, min_layer: int = 0) -> NeuronSet:
    """The neurons that move the margin between correct and incorrect completions most, per standard deviation.

    Score = |a| * sigma with a from `attribution` and sigma a neuron's standard deviation over traces;
    delta = sign(a) * sigma, so that a positive strength raises the margin. Ties as in `rank_by_difference`.

    Raises:
        RuleError: fewer than ``keep`` neurons at ``min_layer`` and above, or another model's attribution.
        TraceError: there are no questions.
    """
    stats.base.require_same(attribution.base)
    a, sigma = attribution.mean(), stats.deviation()
    score = np.abs(a) * sigma
    places = _best(stats.base, [score], keep, min_layer)
    return _neurons(stats, places, np.sign(a) * sigma, score, "attribution")


def read_stats(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    base: BaseModel,
    *,
    contrast: Contrast = "within_question",
    reading: Reading | None = None,
) -> NeuronStats:
    """Read traces with teacher forcing and sum up their activations, question by question.

    Raises:
        TraceError: no question has both outcomes (or, unpaired, a class is empty), or activations are not finite.
    """
    reading = reading or Reading()
    questions: list[Sequence[Trace]] = list(by_question(traces).values())
    if contrast == "within_question":
        questions = mixed(questions)
    stats = NeuronStats.empty(base, contrast=contrast)
    for chunk in _chunks(questions, reading):
        together = [trace for question in chunk for trace in question]
        means = trace_means(model, tokenizer, together, reading.token_budget)
        for question in chunk:
            stats = with_question(stats, question, means)
    stats.means()  # refuses a class without traces
    return stats


def read_attribution(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    base: BaseModel,
    *,
    start: Start = "last_prompt_token",
    reading: Reading | None = None,
) -> AttributionStats:
    """The gradient of every mixed question's margin, summed up.

    Raises:
        TraceError: no question has both outcomes, or a gradient is not finite.
    """
    reading = reading or Reading()
    questions = mixed(list(by_question(traces).values()))
    stats = AttributionStats.empty(base)
    for chunk in _chunks(questions, reading):
        prompts = prefill(model, [encode_prompt(tokenizer, one[0].prompt) for one in chunk], pad_id(tokenizer))
        completions = [
            _weighted(tokenizer, row, trace, question) for row, question in enumerate(chunk) for trace in question
        ]
        gradients = np.zeros((len(chunk), base.layers, base.mlp_size))
        lengths = [len(completion.ids) + 1 for completion in completions]
        for indices in batches(lengths, reading.token_budget // 4, MAX_ROWS):
            batch = [completions[index] for index in indices]
            parts = margin_gradients(model, prompts, batch, start).numpy()
            np.add.at(gradients, [completion.prompt_row for completion in batch], parts)
        for question, gradient in zip(chunk, gradients, strict=True):
            stats = stats.update(digest(question[0].prompt), gradient)
    return stats


@dataclass(frozen=True)
class Identified:
    """What `identify` found, and how stable it is.

    ``split_half_cosine`` compares the attributions of two halves of the questions; None for the paper's ranking.
    """

    neurons: NeuronSet
    stats: NeuronStats
    split_half_cosine: float | None

    def line(self) -> str:
        """One line for a person."""
        layers = f"layers {self.neurons.layer.min()} to {self.neurons.layer.max()}"
        text = f"{len(self.neurons)} neurons of {layers} from {len(self.stats.questions)} questions"
        if self.split_half_cosine is None:
            return f"{text}, by difference of means"
        return f"{text}, by attribution (split-half cosine {self.split_half_cosine:.2f})"

    def as_record(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "neurons": len(self.neurons),
            "ranking": self.neurons.ranking,
            "questions": len(self.stats.questions),
            "traces": self.stats.trace_count,
            "split_half_cosine": self.split_half_cosine,
        }


def identify(  # noqa: PLR0913 - one decision of the researcher each
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    base: BaseModel,
    *,
    ranking: Ranking = "paper",
    keep: int = 200,
    min_layer: int | None = None,
    start: Start = "last_prompt_token",
    contrast: Contrast = "within_question",
    stats: NeuronStats | None = None,
    reading: Reading | None = None,
) -> Identified:
    """The ``keep`` best neurons by a ranking, from traces with both outcomes per question.

    Args:
        model: the model to steer; it reads the traces, whoever wrote them.
        tokenizer: its tokenizer.
        traces: labelled traces.
        base: the model's identity.
        ranking: "paper" or "attribution".
        keep: number of neurons.
        min_layer: the lowest layer to choose from; half of the layers, so that a causal gate fits below.
        start: the first token that the rule will steer (attribution only).
        contrast: "within_question", or "unpaired" (paper only), which mistakes difficulty for reasoning.
        stats: statistics of the same traces, if they were recorded while the traces were sampled.
        reading: batch size and progress.

    Raises:
        TraceError: the traces do not allow a contrast, or the statistics are of other questions.
        RuleError: too few neurons, or statistics of another model.
    """
    lowest = base.layers // 2 if min_layer is None else min_layer
    if stats is None:
        stats = read_stats(model, tokenizer, traces, base, contrast=contrast, reading=reading)
    else:
        _require_of(stats, traces)
    stats.base.require_same(base)
    if ranking == "paper":
        return Identified(rank_by_difference(stats, keep, lowest), stats, None)
    found = read_attribution(model, tokenizer, traces, base, start=start, reading=reading)
    return Identified(rank_by_attribution(stats, found, keep, lowest), stats, found.split_half_cosine())


def mixed(questions: Sequence[Sequence[Trace]]) -> list[Sequence[Trace]]:
    """The questions that have both correct and incorrect traces.

    Raises:
        TraceError: there is none.
    """
    found = [question for question in questions if len({trace.correct for trace in question}) == 2]
    if not found:
        raise TraceError(
            f"traces: none of {len(questions)} questions has both correct and incorrect traces; sample more attempts "
            "per question, or contrast them unpaired"
        )
    return found


def _require_of(stats: NeuronStats, traces: Sequence[Trace]) -> None:
    groups = by_question(traces).values()
    expected = {digest(group[0].prompt) for group in mixed(list(groups))}
    if stats.contrast == "within_question" and expected != {*stats.questions}:
        raise TraceError(
            f"statistics: {len(expected ^ {*stats.questions})} questions are in the statistics or the traces only; "
            "expected the file that collect --record wrote with these traces"
        )


def _weighted(
    tokenizer: PreTrainedTokenizerBase, row: int, trace: Trace, question: Sequence[Trace]
) -> WeightedCompletion:
    same = sum(other.correct is trace.correct for other in question)
    ids = encode_trace(tokenizer, trace)[1]
    return WeightedCompletion(row, ids, (1 if trace.correct else -1) / same)


def _chunks(questions: Sequence[Sequence[Trace]], reading: Reading) -> Iterator[list[Sequence[Trace]]]:
    """Questions, about `MAX_ROWS` traces at a time; tells the progress behind each chunk."""
    chunk: list[Sequence[Trace]] = []
    for done, question in enumerate(questions, start=1):
        chunk.append(question)
        if sum(map(len, chunk)) >= MAX_ROWS or done == len(questions):
            yield chunk
            chunk = []
            if reading.progress is not None:
                reading.progress(done, len(questions))


def _best(base: BaseModel, keys: Sequence[Array], keep: int, min_layer: int) -> tuple[Array, Array]:
    """Layer and index of the ``keep`` largest entries by several (L, M) keys, the first counting most."""
    available = (base.layers - min_layer) * base.mlp_size
    if not 0 <= min_layer < base.layers or not 1 <= keep <= available:
        raise RuleError(
            f"neurons: {keep} wanted from layer {min_layer} on; {base.id} has {base.layers} layers of {base.mlp_size}"
        )
    flat = [key[min_layer:].ravel() for key in keys]
    position = np.arange(flat[0].size)
    order = np.lexsort((position, *(-key for key in reversed(flat))))[:keep]
    return min_layer + order // base.mlp_size, order % base.mlp_size


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
