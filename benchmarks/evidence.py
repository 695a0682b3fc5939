"""Does steering help a small public model? One task and one draw of its questions, every rule beside its controls.

    python benchmarks/evidence.py chain_sum --seed 1 --work evidence/chain_sum-1
    python benchmarks/evidence.py mulw --seed 2 --work evidence/mulw-2 --transfer evidence/chain_sum-1

Settings stand below, fixed before any test question is answered, and the test questions are answered once. Killed, it
goes on where it was. Writes results.json, and a table for docs/evidence.md to standard output.
"""

import json
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
import numpy as np

from adaras_export import BaseModel, NeuronStats, SteeringRule
from adaras_export.answer_book import AnswerBook
from adaras_export.checkers import last_number
from adaras_export.collect import collect
from adaras_export.conclusions import holm, rank_p_value
from adaras_export.demo import smollm2
from adaras_export.estimators import compared, difference
from adaras_export.evaluate import random_control
from adaras_export.exam import Exam
from adaras_export.generation import Sampling, load_model
from adaras_export.neurons import Reading, read_attribution, read_stats
from adaras_export.rankings import Refinement, rank
from adaras_export.statistics import AttributionStats
from adaras_export.traces import Question, Trace, by_question, read_questions, read_traces, write_questions

SIZES = {"identify": 400, "validation": 300, "test": 500}
NEURONS = 50
ATTEMPTS = 4
PLAIN = Refinement()
_SHOTS = 4


@dataclass(frozen=True)
class Setting:
    """A rule: 50 neurons of a ranking, at a strength in units of its deltas."""

    name: str
    ranking: str
    strength: float
    min_layer: int = 0
    refinement: Refinement = PLAIN
    part: str = "test"
    gradients: str = "plain"


# Deviations are those over answer tokens, about twice those over all tokens behind the shared examples, in which an
# earlier trial had 0.3.
SETTINGS = (
    Setting("attribution, all layers, 0.15", "attribution", 0.15),
    Setting("sign flipped", "attribution", -0.15),
    Setting("attribution, upper half, 0.2", "attribution", 0.2, min_layer=15),
    Setting("paper, all layers, 0.3", "paper", 0.3),
    Setting("paper, all layers, 3", "paper", 3.0),
)
REFINEMENTS = (
    Setting("attribution as it is", "attribution", 0.15, part="validation"),
    Setting("shrunk", "attribution", 0.15, refinement=Refinement(shrink=True), part="validation"),
    Setting("agreeing", "attribution", 0.15, refinement=Refinement(agree=True), part="validation"),
    Setting("5 of a layer", "attribution", 0.15, refinement=Refinement(per_layer=5), part="validation"),
    Setting("margin per token", "attribution", 0.15, part="validation", gradients="per token"),
    Setting("half of the attempts right", "attribution", 0.15, part="validation", gradients="informative"),
    Setting("gradients on the way", "attribution", 0.15, part="validation", gradients="integrated"),
    Setting("half the strength", "attribution", 0.075, part="validation"),
    Setting("twice the strength", "attribution", 0.3, part="validation"),
    Setting("absolute, 0.3", "absolute", 0.3, part="validation"),
    Setting("Cohen's d, 0.3", "cohen_d", 0.3, part="validation"),
)

GYM: dict[str, tuple[dict[str, Any], int]] = {  # settings of the task, and tokens of an answer
    "chain_sum": ({"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}, 8),
    "lcm": ({"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 50}, 8),
    "gcd": ({"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 60}, 6),
    "letter_counting": ({"min_words": 3, "max_words": 5}, 6),
}


def first_line(completion: str, answer: str) -> bool:
    """Whether the first line is the answer."""
    return completion.strip().split("\n")[0].strip().lower() == answer.strip().lower()


def questions_of(task: str, seed: int) -> dict[str, list[Question]]:
    """Disjoint parts; fewer where a task has not so many distinct questions."""
    if task == "mulw":
        return smollm2.splits(SIZES, seed=100 + seed)
    import reasoning_gym

    settings, _ = GYM[task]
    shown = reasoning_gym.create_dataset(task, size=_SHOTS, seed=12345, **settings)
    shots = "".join(f"Question: {one['question'].strip()}\nAnswer: {one['answer']}\n\n" for one in shown)
    total = sum(SIZES.values())
    made = reasoning_gym.create_dataset(task, size=6 * total, seed=1000 + seed, **settings)
    distinct: dict[str, Question] = {}
    for number, one in enumerate(made):
        prompt = f"{shots}Question: {one['question'].strip()}\nAnswer:"
        distinct.setdefault(prompt, Question(f"{task}-{seed}-{number}", prompt, str(one["answer"])))
    found = list(distinct.values())[:total]
    ends = np.cumsum([int(size * len(found) / total) for size in SIZES.values()])
    return {
        name: found[end - int(SIZES[name] * len(found) / total) : end] for name, end in zip(SIZES, ends, strict=True)
    }


class Trial:
    """Everything of one task and seed, in a folder."""

    def __init__(self, arguments: Namespace, model: Any, tokenizer: Any, base: BaseModel) -> None:
        self.model, self.tokenizer, self.base, self.work = model, tokenizer, base, arguments.work
        tokens = 12 if arguments.task == "mulw" else GYM[arguments.task][1]
        self.check = last_number if arguments.task == "mulw" else first_line
        self.greedy, self.sampled = Sampling(tokens, stop="\n"), Sampling(tokens, temperature=1.0, stop="\n")
        self.work.mkdir(parents=True, exist_ok=True)
        for name, questions in questions_of(arguments.task, arguments.seed).items():
            write_questions(self.work / f"{name}.jsonl", questions)

    def traces(self) -> dict[str, Any]:
        """Sampled, unless they have been read already: attempts that gave no text would be tried again."""
        if (self.work / "stats_completion.safetensors").is_file():
            return {}
        how = {"attempts": ATTEMPTS, "sampling": self.sampled, "check": self.check, "batch_size": 128}
        asked = read_questions(self.work / "identify.jsonl")
        return vars(collect(self.model, self.tokenizer, asked, self.work / "traces.jsonl", **how))

    def read(self) -> tuple[NeuronStats, AttributionStats]:
        """Sums over the traces, read once."""
        path = self.work / "stats_completion.safetensors"
        if not path.is_file():
            traces, how = read_traces(self.work / "traces.jsonl"), Reading(8192, tokens="completion")
            read_stats(self.model, self.tokenizer, traces, self.base, reading=how).save(path)
        return NeuronStats.load(path), self.gradients("attribution")

    def gradients(self, name: str, chosen: list[Trace] | None = None, **how: Any) -> AttributionStats:
        """Of all traces, or of the chosen ones; kept under that name."""
        path = self.work / f"{name}.safetensors"
        if not path.is_file():
            traces = read_traces(self.work / "traces.jsonl") if chosen is None else chosen
            read_attribution(self.model, self.tokenizer, traces, self.base, reading=Reading(8192), **how).save(path)
        return AttributionStats.load(path)

    def refined(self, kind: str, read: tuple[NeuronStats, AttributionStats]) -> AttributionStats:
        """Gradients of log p per token; of questions of which half the attempts are right; or averaged on the way."""
        if kind == "per token":
            return self.gradients("attribution-per-token", margin="mean")
        if kind == "informative":
            groups = by_question(read_traces(self.work / "traces.jsonl")).values()
            half = [one for one in groups if 2 * sum(trace.correct for trace in one) == len(one)]
            return self.gradients("attribution-informative", [trace for group in half for trace in group])
        rule, point = self.rule(SETTINGS[0], read), np.zeros((self.base.layers, self.base.mlp_size))
        point[rule.neurons.layer, rule.neurons.index] = rule.strength * rule.neurons.delta
        ways = [self.gradients(f"attribution-at-{part:g}", at=part * point) for part in (0.5, 1.0)]
        total = sum(one.gradient_sum for one in (read[1], *ways)) / 3
        return replace(read[1], gradient_sum=total, rests={})

    def rule(self, setting: Setting, read: tuple[NeuronStats, AttributionStats]) -> SteeringRule:
        """The setting's neurons at its strength."""
        if setting.gradients != "plain":
            read = read[0], self.refined(setting.gradients, read)
        how = {"ranking": setting.ranking, "min_layer": setting.min_layer, "refinement": setting.refinement}
        return SteeringRule(rank(*read, keep=NEURONS, **how), setting.strength, self.base)

    def book(self, part: str) -> AnswerBook:
        exam = Exam(
            read_questions(self.work / f"{part}.jsonl"), self.check, self.greedy, max_rows=128, token_budget=40000
        )
        return AnswerBook(self.model, self.tokenizer, exam, self.work / f"answers-{part}.jsonl")


def main() -> None:
    parser = common.options(__doc__ or "", repeats=1)
    parser.add_argument("task", choices=("mulw", *GYM))
    parser.add_argument("--seed", type=int, default=1, help="of the questions")
    parser.add_argument("--work", type=Path, required=True, help="folder of everything that is made")
    parser.add_argument(
        "--transfer", type=Path, action="append", default=[], help="folder of another run, whose rule is tried"
    )
    parser.add_argument("--draws", type=int, default=20, help="random controls of the first rule (default: 20)")
    parser.add_argument("--refinements", action="store_true", help="compare refinements, on validation questions")
    arguments = parser.parse_args()
    folder = common.prepare(arguments)
    trial = Trial(arguments, *load_model(folder), BaseModel.of(folder))
    collected, read = trial.traces(), trial.read()
    settings = REFINEMENTS if arguments.refinements else SETTINGS
    rules = {setting.name: trial.rule(setting, read) for setting in settings}
    for other in () if arguments.refinements else arguments.transfer:
        parts = (
            NeuronStats.load(other / "stats_completion.safetensors"),
            AttributionStats.load(other / "attribution.safetensors"),
        )
        rules[f"{settings[0].name}, of {other.name}"] = trial.rule(settings[0], parts)
    main_rule = rules[settings[0].name]
    draws = {
        f"random {seed}": random_control(trial.model, main_rule, seed)
        for seed in range(0 if arguments.refinements else arguments.draws)
    }
    book = trial.book(settings[0].part)
    book.ask([None, *rules.values(), *draws.values()])
    told = {name: book.answers(rule).correct[:, 0] for name, rule in {"off": None, **rules, **draws}.items()}
    report(arguments, told, list(rules), {"collected": collected, "split_half_cosine": read[1].split_half_cosine()})


def report(arguments: Namespace, told: dict[str, Any], tested: list[str], about: dict[str, Any]) -> None:
    """A Markdown table, and the same with every figure as JSON."""
    arms = {name: compared(name, values, told["off"]) for name, values in told.items()}
    adjusted = dict(zip(tested, holm([arms[name].p_value for name in tested]), strict=True))
    random = [arms[name].accuracy for name in arms if name.startswith("random ")]
    rank_p = rank_p_value(arms[tested[0]].accuracy, random) if random else None
    print(f"{arguments.task}, seed {arguments.seed}: {len(told['off'])} questions; {json.dumps(about, default=str)}\n")
    print(
        "| 50 neurons | accuracy | against off, 95 % interval | fixed / broken | p | Holm |\n|---|---|---|---|---|---|"
    )
    print(f"| off | {arms['off'].accuracy:.1%} | | | | |")
    for name in tested:
        arm, gap = arms[name], difference(told[name], told["off"])
        print(
            f"| {name} | {arm.accuracy:.1%} | {100 * gap.value:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f}) | "
            f"{arm.fixed} / {arm.broken} | {arm.p_value:.2g} | {adjusted[name]:.2g} |"
        )
    if random:
        print(f"| {len(random)} random draws | {min(random):.1%} to {max(random):.1%} | | | rank {rank_p:.2g} | |")
    figures = {"arms": [vars(arm) for arm in arms.values()], "holm": adjusted, "rank_p": rank_p, **about}
    name = "refinements.json" if arguments.refinements else "results.json"
    (arguments.work / name).write_text(json.dumps(figures, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
