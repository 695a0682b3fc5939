"""Does the rule help? Paired arms on fresh questions, and what they allow to claim."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaras_export.core.rule import SteeringRule
from adaras_export.evaluation.answers_by_arm import EvaluationOptions, answer_all, evaluation_from_answers
from adaras_export.evaluation.compare import compare_arms
from adaras_export.evaluation.record import Evaluation
from adaras_export.evaluation.task import EvaluationTask

_DEFAULT = EvaluationOptions()


def evaluate(  # noqa: PLR0913 - what the job is made of
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rule: SteeringRule,
    task: EvaluationTask,
    options: EvaluationOptions = _DEFAULT,
    *,
    arms: Sequence[str] = (),
    out: str | Path | None = None,
) -> Evaluation:
    """Compare off, always, gated, sign-flipped and norm-matched random neurons on the same questions.

    With a gate, the controls are gated like the rule, so that they differ from it in nothing but the neurons.

    Args:
        model: the base model, in float32 if answers are to be reproducible.
        tokenizer: its tokenizer.
        rule: the rule to evaluate.
        task: fresh questions, and how they are answered and checked.
        options: controls, artifacts and what is known of the questions; default: 20 random-neuron arms.
        arms: ways to run the rule, of "gated", "always" and "everywhere", to compare with each other as well, in
            answers and in next-token divergences (nats); default: those that the rule has, with no divergences.
        out: JSON file to write the record to. Answers are kept beside it until then, so that a killed run goes on.

    Returns:
        what every arm answered, (N, n) for n answers to each of N questions; accuracies with 95 % intervals, exact
        paired tests, and the claim that these allow.

    Raises:
        TraceError: a question was used to make the rule, or the file beside ``out`` is of another run.
        RuleError: there is no such arm, or the rule has no gate for it.
        ArtifactError: an artifact cannot be opened.
        MissingExtraError: SciPy is not installed.

    Source: the paper (arXiv 2601.19847); the flipped and random controls are this library's.

    Example:
        questions = read_questions("test.jsonl")
        task = EvaluationTask(questions, checker_for(questions), Sampling(512))
        print(evaluate(model, tokenizer, SteeringRule.load("rule.safetensors"), task).conclusion)
    """
    journal = None if out is None else Path(out).with_name(f"{Path(out).name}.partial.jsonl")
    options = options if journal is None else replace(options, journal=journal)
    if arms:
        evaluation = compare_arms(model, tokenizer, rule, task, arms, options)
    else:
        names = ("always",) if rule.gate is None else ("gated", "always")
        with answer_all(model, tokenizer, rule, task, names, options) as answers:
            evaluation = evaluation_from_answers(rule, task, answers)
    if out is not None and journal is not None:
        evaluation.save(out)
        journal.unlink(missing_ok=True)
    return evaluation
