"""Which neurons: read labelled traces with a model, rank its neurons, return the best.

How they are ranked is in rankings.py. The paper's ranking and its relatives ask which activations differ between
correct and incorrect traces; the attribution ranking asks what changing an activation does to the margin between them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaras_export.core.base_model import BaseModel
from adaras_export.core.neuron_stats import AttributionStats, Contrast, NeuronStats, is_first_half, with_question
from adaras_export.core.neurons import NeuronSet, Ranking
from adaras_export.core.question_identity import identity
from adaras_export.core.rule import Start
from adaras_export.core.traces import Trace, by_question, digest
from adaras_export.discovery import process_group
from adaras_export.discovery.attribution import WeightedCompletion, margin_gradients
from adaras_export.discovery.rankings import Refinement, rank, require_room
from adaras_export.discovery.reading_job import Job, Part, Question, digest_of, merged, mixed, plan
from adaras_export.discovery.shared_reading import read_together
from adaras_export.errors import RuleError, TraceError
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.activations import MAX_ROWS, Reading, trace_means
from adaras_export.modeling.generation import batches, encode_prompt, encode_trace, pad_id, prefill

Margin = Literal["sum", "mean"]
_PLAIN = Refinement()


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
    job = job_of(model, tokenizer, traces, base, IdentifyOptions(contrast=contrast), reading)
    stats = job.read(range(len(job.plan.chunks)), progress=reading.progress).stats
    assert stats is not None  # asked for
    stats.means()  # refuses a class without traces
    return stats


def read_attribution(  # noqa: PLR0913 - one decision of the researcher each
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    base: BaseModel,
    *,
    start: Start = "last_prompt_token",
    margin: Margin = "sum",
    at: Array | None = None,
    reading: Reading | None = None,
) -> AttributionStats:
    """The gradient of every mixed question's margin, summed up; ``at`` as in `attribution.margin_gradients`.

    Averages over several points on the way to a rule's own constants are integrated gradients.

    Raises:
        TraceError: no question has both outcomes, or a gradient is not finite.
    """
    reading = reading or Reading()
    questions = mixed(list(by_question(traces).values()))
    stats = AttributionStats.empty(base)
    for chunk in _chunks(questions, reading):
        prompts = prefill(model, [encode_prompt(tokenizer, one[0].prompt) for one in chunk], pad_id(tokenizer))
        completions = [
            _weighted(tokenizer, row, trace, question, margin)
            for row, question in enumerate(chunk)
            for trace in question
        ]
        gradients = np.zeros((len(chunk), base.layers, base.widest))
        lengths = [len(completion.ids) + 1 for completion in completions]
        for indices in batches(lengths, reading.token_budget // 4, MAX_ROWS):
            batch = [completions[index] for index in indices]
            parts = margin_gradients(model, prompts, batch, start, longest=reading.chunk_tokens, at=at).numpy()
            np.add.at(gradients, [completion.prompt_row for completion in batch], parts)
        for question, gradient in zip(chunk, gradients, strict=True):
            stats = stats.update(identity(question[0].prompt), gradient)
    return stats


@dataclass(frozen=True)
class IdentifyOptions:
    """How neurons are ranked, and which of them are kept.

    Attributes:
        ranking: one of `rankings.RANKINGS`. "attribution" ranks by gradients, the others by differences of means.
        keep: number of neurons.
        min_layer: the lowest layer (from 0) to choose from; None: half of the layers, so that a causal gate fits below.
        refinement: of the ranking.
        contrast: "within_question", or "unpaired" (paper only), which mistakes difficulty for reasoning.
        start: the first token that the rule will steer (attribution only).
        margin: log p of a completion counts as the "sum" over its tokens, or as their "mean", which does not weigh
            long completions more (attribution only).

    Raises:
        RuleError: the refinement is another ranking's.
    """

    ranking: Ranking = "paper"
    keep: int = 200
    min_layer: int | None = None
    refinement: Refinement = _PLAIN
    contrast: Contrast = "within_question"
    start: Start = "last_prompt_token"
    margin: Margin = "sum"

    def __post_init__(self) -> None:
        self.refinement.require_of(self.ranking)


_DEFAULT = IdentifyOptions()


def job_of(  # noqa: PLR0913 - what is read, by whom and how
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    base: BaseModel,
    options: IdentifyOptions,
    reading: Reading,
    *,
    has_stats: bool = False,
) -> Job:
    """The work of `identify`, in chunks that any number of processes can share.

    With ``has_stats`` the statistics were recorded while the traces were sampled, so that only gradients are read.

    Raises:
        TraceError: the traces do not allow the contrast, or exceed the model's context.
        RuleError: gradients are wanted of a model whose weights are not all in memory.
    """
    by_gradient = options.ranking == "attribution"
    if by_gradient and (offloaded := sum(one.is_meta for one in model.parameters())):
        raise RuleError(
            f"attribution: {offloaded} tensors of {base.id} are offloaded; expected all in memory, as gradients need "
            "them; use --ranking paper, or a device map without offloading"
        )
    is_needed = by_gradient or not has_stats
    planned = plan(model, tokenizer, traces if is_needed else (), options.contrast, reading)
    labels: dict[str, str] = {"contrast": options.contrast, "tokens": reading.tokens}
    empty = None if has_stats else NeuronStats.empty(base, **labels)

    def read_chunk(chunk: Sequence[Question]) -> tuple[NeuronStats | None, AttributionStats | None]:
        stats, attribution = empty, AttributionStats.empty(base) if by_gradient else None
        if stats is not None:
            means = trace_means(model, tokenizer, [trace for question in chunk for trace in question], reading)
            for question in chunk:
                stats = with_question(stats, question, means)
        own = [trace for question in chunk if len({one.correct for one in question}) == 2 for trace in question]
        if by_gradient and own:
            silent = replace(reading, progress=None)
            start, margin = options.start, options.margin
            attribution = read_attribution(model, tokenizer, own, base, start=start, margin=margin, reading=silent)
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
        "statistics": not has_stats,
        "attribution": options.start if by_gradient else None,
        "margin": options.margin if by_gradient else None,
    }
    first = Part(key, (), len(planned.chunks), empty, AttributionStats.empty(base) if by_gradient else None)
    return Job(planned, first, read_chunk)


_HOW = {
    "absolute": "absolute difference of means",
    "cohen_d": "Cohen's d",
    "t": "paired t",
    "attribution": "attribution",
}


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
        return f"{text}, by {_HOW.get(self.neurons.ranking, 'difference of means')}" + (
            f" ({'; '.join(found)})" if found else ""
        )

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


def identify(  # noqa: PLR0913 - what the job is made of
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    base: BaseModel,
    options: IdentifyOptions = _DEFAULT,
    *,
    stats: NeuronStats | None = None,
    reading: Reading | None = None,
    out: str | Path | None = None,
) -> Identified:
    """The best neurons by a ranking, from labelled traces with both outcomes per question.

    Processes of one group (`process_group.joined`) share the reading; each returns the same.

    Args:
        model: the model to steer; it reads the traces, whoever wrote them.
        tokenizer: its tokenizer.
        traces: labelled traces; ids are unique.
        base: the model's identity.
        options: the ranking, how many neurons, and from which layer on; default: the paper's, the best 200 of the
            upper half of the layers.
        stats: statistics of the same traces, if they were recorded while the traces were sampled.
        reading: tokens of a batch, which tokens count, what becomes of long traces, and progress.
        out: file to write the neurons to. What was read is kept beside it until then, so that a killed run goes on.

    Returns:
        neurons, best first, as (K,) arrays of layer and index (both from 0) and delta (in activation units); the
        statistics that they were ranked by; how well two halves of the questions agree.

    Raises:
        TraceError: no question has both outcomes, traces exceed the model's context, the statistics are of other
            questions, or a file beside ``out`` is of another run.
        RuleError: the layers have fewer neurons than are to be kept, or the statistics are of another model.
        MissingExtraError: SciPy is not installed (ranking "t").

    Source: section 3 of the paper (arXiv 2601.19847); "attribution" is this library's.

    Example:
        traces, base = read_traces("traces.jsonl"), BaseModel.of("Qwen/Qwen3-1.7B")
        found = identify(model, tokenizer, traces, base, IdentifyOptions("attribution", keep=100))
        found.neurons.save("neurons.safetensors")
    """
    reading = reading or Reading()
    require_room(base, options.keep, options.min_layer, options.refinement.per_layer)  # before the work, not after it
    if options.contrast == "unpaired" and process_group.current().rank == 0:
        reading.warn(_UNPAIRED)
    if stats is not None:
        require_of(stats, traces, base, reading)
    place = None if out is None else Path(out)
    job = job_of(model, tokenizer, traces, base, options, reading, has_stats=stats is not None)
    with read_together(job, reading, place) as part:
        found = ranked_part(part, stats, options)
        if place is not None and process_group.current().rank == 0:
            found.neurons.save(place)
    return found


_UNPAIRED = "unpaired contrast finds what tells easy questions from hard ones; within questions is the method's"


def read_shard(  # noqa: PLR0913 - what is read, and which share of it
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    base: BaseModel,
    options: IdentifyOptions,
    shard: tuple[int, int],
    *,
    reading: Reading | None = None,
    out: str | Path,
) -> Part:
    """The i-th (from 0) of n shares of what `identify` reads, written to ``out`` for `merge_shards`.

    Raises:
        TraceError: see `identify`.
    """
    reading = reading or Reading()
    if options.contrast == "unpaired":
        reading.warn(_UNPAIRED)
    with read_together(job_of(model, tokenizer, traces, base, options, reading), reading, Path(out), shard) as part:
        part.save(out)
    return part


def merge_shards(
    paths: Sequence[Path], options: IdentifyOptions = _DEFAULT, *, out: str | Path | None = None
) -> Identified:
    """What `identify` would have found, from the files that `read_shard` wrote; ``out``: file to write the neurons to.

    Raises:
        TraceError: a file is given twice, is of another reading, or a share is missing.
        RuleError: the layers have fewer neurons than are to be kept, or no gradients were read for the ranking.
    """
    if len({*paths}) < len(paths):
        raise TraceError(f"{max(paths, key=paths.count)}: is given twice; expected each part once")
    found = ranked_part(merged({str(path): Part.load(path) for path in paths}), None, options)
    if out is not None:
        found.neurons.save(out)
    return found


def ranked_part(part: Part, stats: NeuronStats | None, options: IdentifyOptions = _DEFAULT) -> Identified:
    """`ranked`, of a job that was read as a whole; ``stats`` if its statistics were recorded before.

    Raises:
        RuleError: too few neurons, or the job read no gradients for a ranking by them.
        TraceError: a class has no traces.
    """
    own = part.stats if stats is None else stats
    if own is None:
        raise RuleError("parts: hold no statistics of activations; expected those of identify without --stats")
    return replace(ranked(own, part.attribution, options), skipped=int(part.key.get("skipped", 0)))


def ranked(stats: NeuronStats, attribution: AttributionStats | None, options: IdentifyOptions = _DEFAULT) -> Identified:
    """The best neurons by a ranking, and how well two halves of the questions agree on them.

    Raises:
        RuleError: too few neurons, or a ranking by attribution without it.
        TraceError: a class has no traces.
    """
    by_gradient = attribution if options.ranking == "attribution" else None
    best = _best(stats, by_gradient, options, options.keep)
    cosine = None if by_gradient is None else by_gradient.split_half_cosine()
    return Identified(best, stats, cosine, _split_half_overlap(stats, by_gradient, len(best), options))


def _best(stats: NeuronStats, attribution: AttributionStats | None, options: IdentifyOptions, keep: int) -> NeuronSet:
    lowest = stats.base.layers // 2 if options.min_layer is None else options.min_layer
    refinement = options.refinement
    return rank(stats, attribution, ranking=options.ranking, keep=keep, min_layer=lowest, refinement=refinement)


def _split_half_overlap(
    stats: NeuronStats, attribution: AttributionStats | None, keep: int, options: IdentifyOptions
) -> float | None:
    """Share of the ``keep`` best of one half of the questions that are among those of the other half."""
    halves = stats.halves()
    if not all(half.correct_count and half.incorrect_count for half in halves):
        return None
    gradients = (None, None) if attribution is None else _gradient_halves(attribution)
    if any(half is not None and not half.questions for half in gradients):
        return None
    if options.ranking == "t" and min(half.correct_count for half in halves) < 2:
        return None
    # On a half of the questions fewer neurons pass a test, which is not what the overlap is about.
    lenient = replace(options, refinement=replace(options.refinement, fdr=1.0))
    one, two = (_best(half, gradient, lenient, keep) for half, gradient in zip(halves, gradients, strict=True))
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
    found = {one.partition(".")[0] for one in stats.questions}  # earlier versions wrote the prompt's digest alone
    if stats.contrast == "within_question" and expected != found:
        raise TraceError(
            f"statistics: {len(expected ^ found)} questions are in the statistics or the traces only; "
            "expected the file that collect --record wrote with these traces"
        )


def _weighted(
    tokenizer: PreTrainedTokenizerBase, row: int, trace: Trace, question: Sequence[Trace], margin: Margin
) -> WeightedCompletion:
    same = sum(other.correct is trace.correct for other in question)
    ids = encode_trace(tokenizer, trace)[1]
    length = len(ids) if margin == "mean" else 1
    return WeightedCompletion(row, ids, (1 if trace.correct else -1) / (same * length))


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
