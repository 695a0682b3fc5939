"""What a static artifact loses: one rule run in several ways, on the same questions.

With its gate; without; and with every token of every sequence steered, prompts too, which is what formats compute
that know neither gate nor start. Verdicts come from free answers; divergences are read along one text that all arms
share, the base's own greedy completion. Knows no export format.

N questions, B rows of a batch, S tokens of a text, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaras_export.core.intervals import Estimate, changed, difference, mean_interval, paired_difference
from adaras_export.core.rule import SteeringRule
from adaras_export.evaluation.answer_cache import AnswerBook
from adaras_export.evaluation.arms import Comparison, Gap
from adaras_export.evaluation.claims import arms_of
from adaras_export.evaluation.evaluate import Conduct, Evaluation, answered, reported
from adaras_export.evaluation.task import Everywhere, Exam, Way, in_effect
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.divergence import forced_logits, next_token_divergence
from adaras_export.modeling.generation import Prefilled, Sampling, continue_ids, encode_prompt, pad_id, prefill

TOKENS = 64
"""Divergences are means over at most so many tokens of a question."""

_LOGITS = 2**24  # of one arm, (B, S, V): 64 MB in float32


def compare_arms(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rule: SteeringRule,
    exam: Exam,
    arms: Sequence[str],
    conduct: Conduct | None = None,
) -> Evaluation:
    """Compare ways to run one rule with no steering and with each other, on the same questions.

    Args:
        model: the base model, in float32 if verdicts are to be reproducible.
        tokenizer: its tokenizer.
        rule: what to run.
        exam: fresh questions.
        arms: of `RULE_ARMS`, in any order. The first of them in that order is what the others are held against, and
            the controls are steered as it is.
        conduct: controls, artifacts and how to go on after a crash.

    Raises:
        RuleError: there is no such arm, or the rule has no gate for it.
        TraceError: a question was used to make the rule.
        MissingExtraError: SciPy is not installed.
    """
    names = arms_of(rule, arms)
    sampling = replace(exam.sampling, max_new_tokens=min(TOKENS, exam.sampling.max_new_tokens), temperature=0.0)
    with answered(model, tokenizer, rule, exam, names, conduct or Conduct()) as sheet:
        evaluation = reported(rule, exam, sheet)
        found = _Reader(model, tokenizer, rule, names, sampling).read_all(exam, sheet.fires, sheet.book)
    comparison = _compared(names, evaluation.verdicts, found, sampling.max_new_tokens)
    verdict = f"{comparison.reference}: {evaluation.verdict} {comparison.sentence()}".rstrip()
    return replace(evaluation, verdict=verdict, comparison=comparison)


@dataclass(frozen=True)
class _Found:
    """How many tokens were read of each question, and the divergences of each arm.

    The four rows: KL(reference || arm), mean over the tokens and of the first one; the same from no steering.
    """

    tokens_N: Array
    nats_4N: Mapping[str, Array]


def _compared(names: Sequence[str], verdicts: Mapping[str, Array], found: _Found, tokens: int) -> Comparison:
    reference, gaps = names[0], []
    for name in names:
        own, other = verdicts[name], verdicts[reference]
        change = Estimate(0.0, 0.0, 0.0) if name == reference else _difference(own, other)
        figures = [mean_interval(values_N) for values_N in found.nats_4N[name]]
        gaps.append(Gap(name, change, *changed(own, other), *figures))
    return Comparison(reference, tokens, float(found.tokens_N.mean()), tuple(gaps))


def _difference(own: Array, other: Array) -> Estimate:
    return paired_difference(own, other) if own.ndim == 1 else difference(own, other)


@dataclass(frozen=True)
class _Reader:
    """Reads the base's own completion of every prompt under every arm; holds the logits of one batch, never more."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rule: SteeringRule
    names: tuple[str, ...]
    sampling: Sampling

    def read_all(self, exam: Exam, fires_N: Array, book: AnswerBook) -> _Found:
        """Batch by batch, each kept in ``book``. The gate steers the questions that ``fires_N`` says."""
        rows = [encode_prompt(self.tokenizer, question.prompt) for question in exam.questions]

        def read(indices: Sequence[int]) -> Array:
            figures = self._read([rows[index] for index in indices], fires_N[list(indices)])
            return np.array([[tokens, *(nat for name in self.names for nat in nats[name])] for tokens, nats in figures])

        most = max(1, _LOGITS // (self.sampling.max_new_tokens * int(self.model.config.vocab_size)))
        key = f"divergences of {'/'.join(self.names)} {self.sampling.max_new_tokens} {self.rule.fingerprint}"
        found_NF = book.figures(key, read, most)
        nats = {name: found_NF[:, 1 + 4 * at : 5 + 4 * at].T for at, name in enumerate(self.names)}
        return _Found(found_NF[:, 0], nats)

    def _read(self, batch: Sequence[list[int]], fires_B: Array) -> Iterator[tuple[int, dict[str, list[float]]]]:
        prompts = prefill(self.model, batch, pad_id(self.tokenizer))
        counts, texts = self._texts(prompts)
        logits = {name: self._logits(way, batch, prompts, texts) for name, way in self._ways().items()}
        for row, count in enumerate(counts):
            own = {name: logits_BSV[row, :count] for name, logits_BSV in logits.items()}
            own["gated"] = own["always"] if fires_B[row] and "always" in own else own["off"]
            yield count, {name: _nats(own[self.names[0]], own["off"], own[name]) for name in self.names}

    def _ways(self) -> dict[str, Way]:
        """What must be run for the arms; gated is one of always and off, question by question."""
        ways: dict[str, Way] = {"off": None}
        if self.names != ("everywhere",):
            ways["always"] = self.rule
        if "everywhere" in self.names:
            ways["everywhere"] = Everywhere(self.rule)
        return ways

    def _texts(self, prompts: Prefilled) -> tuple[list[int], list[list[int]]]:
        """What the base says, but for the last token; and how many tokens it chose, the one that ends a text too."""
        own = prompts.repeated(range(len(prompts.ids)))
        texts = continue_ids(self.model, self.tokenizer, own, self.sampling, [""] * len(own.ids))
        counts = [min(len(text) + 1, self.sampling.max_new_tokens) for text in texts]
        return counts, [text[: count - 1] for text, count in zip(texts, counts, strict=True)]

    def _logits(self, way: Way, batch: Sequence[list[int]], prompts: Prefilled, texts: Sequence[list[int]]) -> Tensor:
        with in_effect(self.model, way):
            own = prefill(self.model, batch, pad_id(self.tokenizer)) if isinstance(way, Everywhere) else prompts
            return forced_logits(self.model, own, texts)


def _nats(reference_SV: Tensor, off_SV: Tensor, arm_SV: Tensor) -> list[float]:
    from_S = (next_token_divergence(one_SV, arm_SV) for one_SV in (reference_SV, off_SV))
    return [float(figure) for nats_S in from_S for figure in (nats_S.mean(), nats_S[0])]
