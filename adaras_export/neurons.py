"""Which neurons: read labelled traces with a model, rank its neurons, return the best.

Two rankings stand side by side. The paper's asks which activations differ between correct and incorrect traces; it
is correlational. The attribution ranking asks what changing an activation does to the margin between them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaras_export.activations import MAX_ROWS, trace_means
from adaras_export.activations import Reading as Reading  # for whoever reads traces by way of this module
from adaras_export.attribution import WeightedCompletion, margin_gradients
from adaras_export.errors import RuleError, TraceError
from adaras_export.generation import batches, encode_prompt, encode_trace, pad_id, prefill
from adaras_export.models import BaseModel
from adaras_export.reading import Job, Part, Question, digest_of, mixed, plan
from adaras_export.rule import NeuronSet, Ranking, Start
from adaras_export.statistics import AttributionStats, Contrast, NeuronStats, is_first_half, with_question
from adaras_export.storage import Array
from adaras_export.traces import Trace, by_question, digest


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
    job = job_of(model, tokenizer, traces, base, Method(contrast=contrast), reading)
    stats = job.read(range(len(job.plan.chunks)), progress=reading.progress).stats
    assert stats is not None  # asked for
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
class Method:
    """What is read off traces.

    Attributes:
        ranking: "paper" or "attribution".
        contrast: "within_question", or "unpaired" (paper only), which mistakes difficulty for reasoning.
        start: the first token that the rule will steer (attribution only).
        has_stats: the statistics were recorded while the traces were sampled, so that only gradients are read.
    """

    ranking: Ranking = "paper"
    contrast: Contrast = "within_question"
    start: Start = "last_prompt_token"
    has_stats: bool = False


def job_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    base: BaseModel,
    method: Method,
    reading: Reading,
) -> Job:
    """The work of `identify`, in chunks that any number of processes can share.

    Raises:
        TraceError: the traces do not allow the contrast, or exceed the model's context.
        RuleError: gradients are wanted of a model whose weights are not all in memory.
    """
    by_gradient = method.ranking == "attribution"
    if by_gradient and (offloaded := sum(one.is_meta for one in model.parameters())):
        raise RuleError(
            f"attribution: {offloaded} tensors of {base.id} are offloaded; expected all in memory, as gradients need "
            "them; use --ranking paper, or a device map without offloading"
        )
    is_needed = by_gradient or not method.has_stats
    planned = plan(model, tokenizer, traces if is_needed else (), method.contrast, reading)
    labels: dict[str, str] = {"contrast": method.contrast, "tokens": reading.tokens}
    empty = None if method.has_stats else NeuronStats.empty(base, **labels)

    def read_chunk(chunk: Sequence[Question]) -> tuple[NeuronStats | None, AttributionStats | None]:
        stats, attribution = empty, AttributionStats.empty(base) if by_gradient else None
        if stats is not None:
            means = trace_means(model, tokenizer, [trace for question in chunk for trace in question], reading)
            for question in chunk:
                stats = with_question(stats, question, means)
        own = [trace for question in chunk if len({one.correct for one in question}) == 2 for trace in question]
        if by_gradient and own:
            silent = replace(reading, progress=None)
            attribution = read_attribution(model, tokenizer, own, base, start=method.start, reading=silent)
        return stats, attribution

    key = {
        "model": base.fingerprint or base.id,
        "dtype": str(model.dtype).removeprefix("torch."),
        "traces": digest_of(traces),
        **labels,
        "token_budget": reading.token_budget,
        "chunk_tokens": reading.chunk_tokens,
        "too_long": reading.too_long,
        "skipped": planned.skipped,
        "statistics": not method.has_stats,
        "attribution": method.start if by_gradient else None,
    }
    start = Part(key, (), len(planned.chunks), empty, AttributionStats.empty(base) if by_gradient else None)
    return Job(planned, start, read_chunk)


@dataclass(frozen=True)
class Identified:
    """What `identify` found, and how stable it is.

    Attributes:
        neurons: those that were kept.
        stats: the statistics that they were ranked by.
        split_half_cosine: between the attributions of two halves of the questions; None for the paper's ranking.
        split_half_overlap: share of as many neurons, ranked on either half of the questions alone, that both halves
            keep; None where a half is empty.
        skipped: traces that were left out because they exceed the model's context.
    """

    neurons: NeuronSet
    stats: NeuronStats
    split_half_cosine: float | None
    split_half_overlap: float | None = None
    skipped: int = 0

    def line(self) -> str:
        """One line for a person."""
        layers = f"layers {self.neurons.layer.min()} to {self.neurons.layer.max()}"
        text = f"{len(self.neurons)} neurons of {layers} from {len(self.stats.questions)} questions"
        found = []
        if self.split_half_cosine is not None:
            found.append(f"split-half cosine {self.split_half_cosine:.2f}")
        if self.split_half_overlap is not None:
            found.append(f"the best {len(self.neurons)} of two halves of the questions share {self._percent()}")
        how = "difference of means" if self.split_half_cosine is None else "attribution"
        return f"{text}, by {how}" + (f" ({'; '.join(found)})" if found else "")

    def _percent(self) -> str:
        return "none" if self.split_half_overlap is None else f"{100 * self.split_half_overlap:.0f}%"

    def as_record(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "neurons": len(self.neurons),
            "ranking": self.neurons.ranking,
            "questions": len(self.stats.questions),
            "traces": self.stats.trace_count,
            "tokens": self.stats.tokens,
            "skipped_traces": self.skipped,
            "split_half_cosine": self.split_half_cosine,
            "split_half_overlap": self.split_half_overlap,
            "split_half_neurons": len(self.neurons),
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
    partial: Path | None = None,
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
        reading: batch size, which tokens count, and progress.
        partial: where sums are kept meanwhile, so that a run that was killed goes on; the caller removes the file.

    Raises:
        TraceError: the traces do not allow a contrast, or the statistics are of other questions.
        RuleError: too few neurons, or statistics of another model.
    """
    require_room(base, keep, min_layer)
    reading = reading or Reading()
    if stats is not None:
        require_of(stats, traces, base, reading)
    method = Method(ranking, contrast, start, has_stats=stats is not None)
    job = job_of(model, tokenizer, traces, base, method, reading)
    part = job.read(range(len(job.plan.chunks)), partial, reading.progress)
    return ranked_part(part, stats, ranking=ranking, keep=keep, min_layer=min_layer)


def ranked_part(
    part: Part, stats: NeuronStats | None, *, ranking: Ranking, keep: int, min_layer: int | None = None
) -> Identified:
    """`ranked`, of a job that was read as a whole; ``stats`` if its statistics were recorded before.

    Raises:
        RuleError: too few neurons, or the job read no gradients for a ranking by them.
        TraceError: a class has no traces.
    """
    own = part.stats if stats is None else stats
    if own is None:
        raise RuleError("parts: hold no statistics of activations; expected those of identify without --stats")
    found = ranked(own, part.attribution, ranking=ranking, keep=keep, min_layer=min_layer)
    return replace(found, skipped=int(part.key.get("skipped", 0)))


def ranked(
    stats: NeuronStats,
    attribution: AttributionStats | None,
    *,
    ranking: Ranking,
    keep: int,
    min_layer: int | None = None,
) -> Identified:
    """The ``keep`` best neurons by a ranking, and how well two halves of the questions agree on them.

    Raises:
        RuleError: too few neurons, or a ranking by attribution without it.
        TraceError: a class has no traces.
    """
    lowest = stats.base.layers // 2 if min_layer is None else min_layer
    if ranking == "attribution" and attribution is None:
        raise RuleError("ranking: attribution needs gradients, which were not read; run identify --ranking attribution")
    by_gradient = attribution if ranking == "attribution" else None
    best = _rank(stats, by_gradient, keep, lowest)
    cosine = None if by_gradient is None else by_gradient.split_half_cosine()
    return Identified(best, stats, cosine, _split_half_overlap(stats, by_gradient, keep, lowest))


def _rank(stats: NeuronStats, attribution: AttributionStats | None, keep: int, lowest: int) -> NeuronSet:
    if attribution is None:
        return rank_by_difference(stats, keep, lowest)
    return rank_by_attribution(stats, attribution, keep, lowest)


def _split_half_overlap(
    stats: NeuronStats, attribution: AttributionStats | None, keep: int, lowest: int
) -> float | None:
    """Share of the ``keep`` best of one half of the questions that are among those of the other half."""
    halves = stats.halves()
    if not all(half.correct_count and half.incorrect_count for half in halves):
        return None
    gradients = (None, None) if attribution is None else _gradient_halves(attribution)
    if any(half is not None and not half.questions for half in gradients):
        return None
    one, two = (_rank(half, gradient, keep, lowest) for half, gradient in zip(halves, gradients, strict=True))
    places = [{*zip(best.layer.tolist(), best.index.tolist(), strict=True)} for best in (one, two)]
    return len(places[0] & places[1]) / keep


def _gradient_halves(attribution: AttributionStats) -> tuple[AttributionStats, AttributionStats]:
    """The mean attribution of either half of the questions, and nothing else of them."""
    first = attribution.first_half_sum
    odd, even = (tuple(q for q in attribution.questions if is_first_half(q) is label) for label in (True, False))
    empty = AttributionStats.empty(attribution.base)
    return (
        replace(empty, questions=odd, gradient_sum=first),
        replace(empty, questions=even, gradient_sum=attribution.gradient_sum - first),
    )


def require_of(stats: NeuronStats, traces: Sequence[Trace], base: BaseModel, reading: Reading) -> None:
    """Refuse recorded statistics of another model, of other questions than these traces, or of other tokens.

    Raises:
        RuleError: of another model.
        TraceError: of other questions or tokens.
    """
    stats.base.require_same(base)
    if stats.tokens != reading.tokens:
        raise TraceError(
            f"statistics: are over {stats.tokens} tokens of a trace; expected {reading.tokens}; read the traces instead"
        )
    _require_questions(stats, traces)


def _require_questions(stats: NeuronStats, traces: Sequence[Trace]) -> None:
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


def require_room(base: BaseModel, keep: int, min_layer: int | None) -> None:
    """Refuse a number of neurons that the layers do not have; None: the upper half of them.

    Raises:
        RuleError: they have not.
    """
    lowest = base.layers // 2 if min_layer is None else min_layer
    available = (base.layers - lowest) * base.mlp_size
    if not 0 <= lowest < base.layers or not 1 <= keep <= available:
        raise RuleError(
            f"neurons: {keep} wanted from layer {lowest} on; {base.id} has {base.layers} layers of {base.mlp_size}"
        )


def _best(base: BaseModel, keys: Sequence[Array], keep: int, min_layer: int) -> tuple[Array, Array]:
    """Layer and index of the ``keep`` largest entries by several (L, M) keys, the first counting most."""
    require_room(base, keep, min_layer)
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
