"""What a static artifact loses: one rule run in several ways, on the same questions.

The ways are: with its gate; without it; and with every token of every sequence steered, prompts too, which is what
formats compute that know neither gate nor start. Answers are generated freely; divergences are measured along one text
that all arms share, the base's own greedy completion. Knows no export format.

N questions, B rows of a batch, S tokens of a text, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaras_export.core import families
from adaras_export.core.intervals import Estimate, changed, difference, mean_interval, paired_difference
from adaras_export.core.rule import SteeringRule
from adaras_export.evaluation.answer_cache import AnswerCache
from adaras_export.evaluation.answers_by_arm import EvaluationOptions, answer_all, evaluation_from_answers
from adaras_export.evaluation.claims import arms_of
from adaras_export.evaluation.record import Comparison, Evaluation, Gap
from adaras_export.evaluation.task import Condition, EvaluationTask, StaticCondition, under_condition
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.divergence import forced_logits, next_token_divergence
from adaras_export.modeling.generation import Prefilled, Sampling, continue_ids, encode_prompt, pad_id, prefill

TOKENS = 64
"""Divergences are means over at most this many tokens of a question."""

_LOGITS = 2**24  # of one arm, (B, S, V): 64 MB in float32


def compare_arms(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rule: SteeringRule,
    task: EvaluationTask,
    arms: Sequence[str],
    options: EvaluationOptions | None = None,
) -> Evaluation:
    """Compare ways to run one rule with no steering and with each other, on the same questions.

    Args:
        model: the base model, in float32 if verdicts are to be reproducible.
        tokenizer: its tokenizer.
        rule: what to run.
        task: fresh questions.
        arms: names of `RULE_ARMS`, in any order. The others are compared with the one that comes first in `RULE_ARMS`,
            and the controls are steered like it.
        options: controls, artifacts and the journal of a run that may be killed.

    Raises:
        RuleError: there is no such arm, or the rule has no gate for it.
        TraceError: a question was used to make the rule.
        MissingExtraError: SciPy is not installed.
    """
    names = arms_of(rule, arms)
    sampling = replace(task.sampling, max_new_tokens=min(TOKENS, task.sampling.max_new_tokens), temperature=0.0)
    with answer_all(model, tokenizer, rule, task, names, options or EvaluationOptions()) as answers:
        evaluation = evaluation_from_answers(rule, task, answers)
        reader = _DivergenceReader(model, tokenizer, rule, names, sampling)
        divergences = reader.read_all(task, answers.is_steered_N, answers.cache)
    comparison = _comparison(names, evaluation.verdicts, divergences, sampling.max_new_tokens)
    conclusion = f"{comparison.reference}: {evaluation.conclusion} {comparison.sentence()}".rstrip()
    return replace(evaluation, conclusion=conclusion, comparison=comparison)


@dataclass(frozen=True)
class _Divergences:
    """How many tokens of each question were read, and the divergences of each arm.

    The four rows are KL(reference || arm), mean over the tokens and of the first one, and the same from no steering.
    """

    tokens_N: Array
    nats_4N: Mapping[str, Array]


def _comparison(
    names: Sequence[str], verdicts: Mapping[str, Array], divergences: _Divergences, tokens: int
) -> Comparison:
    reference, gaps = names[0], []
    for name in names:
        arm_Nn, reference_Nn = verdicts[name], verdicts[reference]
        change = Estimate(0.0, 0.0, 0.0) if name == reference else _difference(arm_Nn, reference_Nn)
        intervals = [mean_interval(values_N) for values_N in divergences.nats_4N[name]]
        gaps.append(Gap(name, change, *changed(arm_Nn, reference_Nn), *intervals))
    return Comparison(reference, tokens, float(divergences.tokens_N.mean()), tuple(gaps))


def _difference(arm_Nn: Array, other_Nn: Array) -> Estimate:
    """Tango's interval for one answer to a question, however many changed."""
    if arm_Nn.shape[1] == 1:
        return paired_difference(arm_Nn[:, 0], other_Nn[:, 0])
    return difference(arm_Nn, other_Nn)


@dataclass(frozen=True)
class _DivergenceReader:
    """Reads the base's own completion of every prompt under every arm, with the logits of one batch in memory."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rule: SteeringRule
    names: tuple[str, ...]
    sampling: Sampling

    def read_all(self, task: EvaluationTask, is_steered_N: Array, cache: AnswerCache) -> _Divergences:
        """Batch by batch, each kept in ``cache``; ``is_steered_N`` are the questions that the gate steers."""
        rows = [encode_prompt(self.tokenizer, question.prompt) for question in task.questions]

        def read(indices: Sequence[int]) -> Array:
            figures = self._read([rows[index] for index in indices], is_steered_N[list(indices)])
            return np.array([[tokens, *(nat for name in self.names for nat in nats[name])] for tokens, nats in figures])

        most = max(1, _LOGITS // (self.sampling.max_new_tokens * int(families.text_config(self.model).vocab_size)))
        key = f"divergences of {'/'.join(self.names)} {self.sampling.max_new_tokens} {self.rule.fingerprint}"
        figures_NF = cache.figures(key, read, most)
        nats = {name: figures_NF[:, 1 + 4 * at : 5 + 4 * at].T for at, name in enumerate(self.names)}
        return _Divergences(figures_NF[:, 0], nats)

    def _read(self, batch: Sequence[list[int]], is_steered_B: Array) -> Iterator[tuple[int, dict[str, list[float]]]]:
        prompts = prefill(self.model, batch, pad_id(self.tokenizer))
        counts, texts = self._texts(prompts)
        logits = {
            name: self._logits(condition, batch, prompts, texts) for name, condition in self._conditions().items()
        }
        for row, count in enumerate(counts):
            own = {name: logits_BSV[row, :count] for name, logits_BSV in logits.items()}
            own["gated"] = own["always"] if is_steered_B[row] and "always" in own else own["off"]
            yield count, {name: _nats(own[self.names[0]], own["off"], own[name]) for name in self.names}

    def _conditions(self) -> dict[str, Condition]:
        """What must be run for the arms; gated is always or off, question by question."""
        conditions: dict[str, Condition] = {"off": None}
        if self.names != ("everywhere",):
            conditions["always"] = self.rule
        if "everywhere" in self.names:
            conditions["everywhere"] = StaticCondition(self.rule)
        return conditions

    def _texts(self, prompts: Prefilled) -> tuple[list[int], list[list[int]]]:
        """How many tokens the base chose, the one that ends a text too; and all of these but the last."""
        own = prompts.repeated(range(len(prompts.ids)))
        texts = continue_ids(self.model, self.tokenizer, own, self.sampling, [""] * len(own.ids))
        counts = [min(len(text) + 1, self.sampling.max_new_tokens) for text in texts]
        return counts, [text[: count - 1] for text, count in zip(texts, counts, strict=True)]

    def _logits(
        self, condition: Condition, batch: Sequence[list[int]], prompts: Prefilled, texts: Sequence[list[int]]
    ) -> Tensor:
        with under_condition(self.model, condition):
            is_static = isinstance(condition, StaticCondition)
            own = prefill(self.model, batch, pad_id(self.tokenizer)) if is_static else prompts
            return forced_logits(self.model, own, texts)


def _nats(reference_SV: Tensor, off_SV: Tensor, arm_SV: Tensor) -> list[float]:
    nats_2S = [next_token_divergence(other_SV, arm_SV) for other_SV in (reference_SV, off_SV)]
    return [float(nats) for nats_S in nats_2S for nats in (nats_S.mean(), nats_S[0])]
