"""Complete attempts with a stock model in this process, and sum up the activations that this produces anyway.

Knows no answers: whether a text is right is the caller's to say.
"""

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaras_export.core.neuron_stats import NeuronStats, with_question
from adaras_export.core.traces import Question, Settings, Trace, by_question
from adaras_export.data.sampling_plan import Attempt, Completion
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.activations import Reading, Recorder, recording, trace_means
from adaras_export.modeling.generation import (
    Sampling,
    continue_ids,
    decode,
    encode_prompt,
    end_ids,
    pad_id,
    prefill,
    sampled_by,
    template_digest,
)

_SORTED_BATCHES = 16
"""Questions are put in order of length within so many batches: all at once, the first ones would be the short ones."""


@dataclass
class LocalBackend:
    """Batches as the plan has them, left-padded, a prompt prefilled once; the same batch gives the same texts.

    With ``means`` the activation means of each attempt go into it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    rows: int
    means: dict[str, Array] | None = None
    streams: bool = field(default=False, init=False)
    _prompts: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False)

    @property
    def settings(self) -> Settings:
        """The sampling, the precision and the chat template."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return sampled_by("transformers", self.sampling, dtype=dtype, template=template_digest(self.tokenizer))

    def arranged(self, questions: Sequence[Question]) -> Sequence[Question]:
        """Prompts of similar length beside each other; the order stays where all have one length.

        Raises:
            TraceError: a prompt that the tokenizer has no form for.
        """
        self._prompts = {one.id: tuple(encode_prompt(self.tokenizer, one.prompt)) for one in questions}
        stretch = _SORTED_BATCHES * self.rows
        return [
            question
            for start in range(0, len(questions), stretch)
            for question in sorted(questions[start : start + stretch], key=lambda one: len(self._prompts[one.id]))
        ]

    def complete(
        self, batch: Sequence[Attempt], missing: Collection[str]
    ) -> Generator[Mapping[str, Completion], None, None]:
        """One piece. The whole batch is run where a part is known, too: another batch shape rounds differently."""
        keys = [attempt.id for attempt in batch]
        ends = end_ids(self.model, self.tokenizer, self.sampling.stop)
        with nullcontext() if self.means is None else recording(self.model, ends) as recorder:
            found = self._continued(batch, keys, recorder)
        if self.means is not None and recorder is not None:
            self.means.update(zip(keys, recorder.means().numpy(), strict=True))
        yield {
            key: Completion(decode(self.tokenizer, ids), cut=len(ids) == self.sampling.max_new_tokens)
            for key, ids in zip(keys, found, strict=True)
            if key in missing
        }

    def _continued(self, batch: Sequence[Attempt], keys: Sequence[str], recorder: Recorder | None) -> list[list[int]]:
        """The new ids. A prompt is prefilled once, however many attempts at it the batch holds."""
        prompts = list({self._prompts[attempt.question.id]: None for attempt in batch})
        rows = [prompts.index(self._prompts[attempt.question.id]) for attempt in batch]
        prefilled = prefill(self.model, prompts, pad_id(self.tokenizer)).repeated(rows)
        if recorder is not None:
            recorder.repeat(rows)
        return continue_ids(self.model, self.tokenizer, prefilled, self.sampling, keys)


@dataclass
class Ledger:
    """The statistics of finished questions; ``means`` are those of attempts at unfinished ones."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stats: NeuronStats
    means: dict[str, Array]
    closed: set[str] = field(default_factory=set)

    def close(self, questions: Collection[str], traces: Mapping[str, Trace]) -> None:
        """Count questions of which no more traces will come, and forget their means."""
        wanted = {*questions} - self.closed
        if not wanted:
            return
        groups = by_question([trace for trace in traces.values() if trace.question_id in wanted])
        for group in groups.values():
            if len({trace.correct for trace in group}) == 2:
                absent = [trace for trace in group if trace.id not in self.means]
                read = trace_means(self.model, self.tokenizer, absent, Reading()) if absent else {}
                self.stats = with_question(self.stats, group, {**self.means, **read})
        self.closed |= wanted
        for key in [key for key in self.means if key.rpartition("#")[0] in self.closed]:
            del self.means[key]
