"""Does steering help a small public model? One task and one draw of its questions, every rule beside its controls.

    python benchmarks/evidence.py chain_sum --seed 1 --work evidence/chain_sum-1
    python benchmarks/evidence.py mulw --seed 2 --work evidence/mulw-2 --transfer evidence/chain_sum-1

Settings stand below, fixed before any test question is answered, or with `--settings tuned` are the best of a grid on
validation questions. The test questions are answered once. Killed, it goes on where it was. Writes SETTINGS.json, and
tables for docs/evidence.md to standard output.
"""

import json
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
import numpy as np

from adaras_export import BaseModel, NeuronStats, SteeringRule
from adaras_export.core.intervals import difference, holm, rank_p_value
from adaras_export.core.neuron_stats import AttributionStats, Tokens
from adaras_export.core.trace_files import read_questions, read_traces, write_questions
from adaras_export.core.traces import Question, Trace, by_question
from adaras_export.data.checkers import last_number
from adaras_export.data.collect import CollectOptions, collect
from adaras_export.data.sampling_plan import Goal
from adaras_export.demo import smollm2
from adaras_export.discovery.gate_report import GateReport
from adaras_export.discovery.gate_training import train_gate
from adaras_export.discovery.identify import read_attribution, read_stats
from adaras_export.discovery.rankings import Refinement, rank
from adaras_export.errors import TraceError
from adaras_export.evaluation.answer_cache import AnswerCache
from adaras_export.evaluation.answers_by_arm import is_steered_by
from adaras_export.evaluation.arms import compare, is_random
from adaras_export.evaluation.controls import random_control
from adaras_export.evaluation.task import Condition, EvaluationTask, StaticCondition
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.activations import Reading
from adaras_export.modeling.generation import Sampling
from adaras_export.modeling.loading import load_model

SIZES = {"identify": 400, "validation": 300, "test": 500}
NEURONS = 50
ATTEMPTS = 4
PLAIN = Refinement()
SHOTS = 4
BENCHMARKS = Path(__file__).resolve().parents[2] / "shared/data/questions"


@dataclass(frozen=True)
class Setting:
    """A rule: neurons of a ranking, at a strength in units of its deltas; a start "everywhere" steers every token."""

    name: str
    ranking: str
    strength: float
    upper: bool = False
    refinement: Refinement = PLAIN
    gradients: str = "plain"
    count: int = NEURONS
    tokens: Tokens = "completion"
    start: str = "last_prompt_token"


# Deviations are those over answer tokens, about twice those over all tokens behind the shared examples, in which an
# earlier trial had 0.3.
FIXED = (
    Setting("attribution, 50 at 0.15", "attribution", 0.15),
    Setting("sign flipped", "attribution", -0.15),
    Setting("attribution, upper half, 50 at 0.2", "attribution", 0.2, upper=True),
    Setting("paper, 50 at 0.3", "paper", 0.3),
    Setting("paper, 50 at 3", "paper", 3.0),
)
REFINEMENTS = (
    Setting("attribution as it is", "attribution", 0.15),
    Setting("shrunk", "attribution", 0.15, refinement=Refinement(shrink=True)),
    Setting("agreeing", "attribution", 0.15, refinement=Refinement(agree=True)),
    Setting("5 of a layer", "attribution", 0.15, refinement=Refinement(per_layer=5)),
    Setting("margin per token", "attribution", 0.15, gradients="per token"),
    Setting("half of the attempts right", "attribution", 0.15, gradients="informative"),
    Setting("gradients on the way", "attribution", 0.15, gradients="integrated"),
    Setting("half the strength", "attribution", 0.075),
    Setting("twice the strength", "attribution", 0.3),
    Setting("20 neurons", "attribution", 0.15, count=20),
    Setting("20 neurons, twice the strength", "attribution", 0.3, count=20),
    Setting("100 neurons", "attribution", 0.15, count=100),
    Setting("100 neurons, half the strength", "attribution", 0.075, count=100),
    Setting("deviations over all tokens", "attribution", 0.3, tokens="all"),
    Setting("from the first generated token on", "attribution", 0.15, start="first_generated_token"),
    Setting("every token", "attribution", 0.15, start="everywhere"),
    Setting("absolute, 0.3", "absolute", 0.3),
    Setting("Cohen's d, 0.3", "cohen_d", 0.3),
    Setting("paper, 3", "paper", 3.0),
    Setting("paper, -3", "paper", -3.0),
    Setting("paper, 10", "paper", 10.0),
    Setting("paper, -10", "paper", -10.0),
    Setting("paper, all tokens, 3", "paper", 3.0, tokens="all"),
    Setting("paper, all tokens, 10", "paper", 10.0, tokens="all"),
)


def grid(ranking: str, counts: Sequence[int], strengths: Sequence[float]) -> list[Setting]:
    return [
        Setting(f"{ranking}, {count} at {strength:g}", ranking, strength, count=count)
        for count in counts
        for strength in strengths
    ]


GRIDS = {
    "attribution": grid("attribution", (50, 100, 200, 400), (0.15, 0.3, 0.6, 1.2)),
    "paper": grid("paper", (50, 200), (-30, -10, -3, 3, 10, 30)),
}


SUMS = {"min_digits": 1, "max_digits": 2}
TASKS: dict[str, tuple[str, dict[str, Any]]] = {  # of reasoning-gym, and its settings
    "chain_sum": ("chain_sum", {"min_terms": 2, "max_terms": 2, **SUMS}),
    "chain_sum_3": ("chain_sum", {"min_terms": 3, "max_terms": 3, **SUMS}),
    "lcm": ("lcm", {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 50}),
    "gcd": ("gcd", {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 60}),
    "letter_counting": ("letter_counting", {"min_words": 3, "max_words": 5}),
}
TOKENS = {"mulw": 12, "gcd": 6, "letter_counting": 6}  # of an answer; of the other tasks 8


def first_line(completion: str, answer: str) -> bool:
    """Whether the first line is the answer."""
    return completion.strip().split("\n")[0].strip().lower() == answer.strip().lower()


def questions_of(task: str, seed: int) -> dict[str, list[Question]]:
    """Disjoint parts; fewer where a task has not so many distinct questions."""
    if task == "mulw":
        return smollm2.splits(SIZES, seed=100 + seed)
    if task == "gsm8k":
        return benchmark(task, seed)
    import reasoning_gym

    name, settings = TASKS[task]
    drawn = reasoning_gym.create_dataset(name, size=SHOTS, seed=12345, **settings)
    shots = shown((one["question"], one["answer"]) for one in drawn)
    total = sum(SIZES.values())
    # Entry i of a seed is entry i - 1 of the next seed: seeds are far apart.
    made = reasoning_gym.create_dataset(name, size=6 * total, seed=1001 + 1_000_000 * (seed - 1), **settings)
    distinct: dict[str, Question] = {}
    for number, one in enumerate(made):
        prompt = shots + asked(one["question"])
        distinct.setdefault(prompt, Question(f"{task}-{seed}-{number}", prompt, str(one["answer"])))
    found = list(distinct.values())[:total]
    ends = np.cumsum([int(size * len(found) / total) for size in SIZES.values()])
    return {
        name: found[end - int(SIZES[name] * len(found) / total) : end] for name, end in zip(SIZES, ends, strict=True)
    }


def benchmark(task: str, seed: int) -> dict[str, list[Question]]:
    """Of the files of a benchmark: no question that finds neurons is of its test set."""
    files = {"identify": "train", "validation": "validation", "test": "test"}
    rows = {
        part: [json.loads(line) for line in (BENCHMARKS / f"{task}_{name}.jsonl").read_text("utf-8").splitlines()]
        for part, name in files.items()
    }
    shots = shown((one["question"], one["answer"]) for one in rows["validation"][:SHOTS])
    del rows["validation"][:SHOTS]
    draw = np.random.default_rng(seed)
    return {
        part: [
            Question(f"{task}-{part}-{one['id']}", shots + asked(one["question"]), one["answer"])
            for one in (rows[part][place] for place in draw.permutation(len(rows[part]))[:size])
        ]
        for part, size in SIZES.items()
    }


def shown(pairs: Iterable[tuple[str, Any]]) -> str:
    """Worked examples."""
    return "".join(f"{asked(question)} {answer}\n\n" for question, answer in pairs)


def asked(question: str) -> str:
    return f"Question: {question.strip()}\nAnswer:"


class Trial:
    """Everything of one task and seed, in a folder."""

    def __init__(self, arguments: Namespace, model: Any, tokenizer: Any, base: BaseModel) -> None:
        self.model, self.tokenizer, self.base, self.work = model, tokenizer, base, arguments.work
        tokens = TOKENS.get(arguments.task, 8)
        self.check = first_line if arguments.task in TASKS else last_number
        self.greedy, self.sampled = Sampling(tokens, stop="\n"), Sampling(tokens, temperature=1.0, stop="\n")
        self.work.mkdir(parents=True, exist_ok=True)
        for name, questions in questions_of(arguments.task, arguments.seed).items():
            write_questions(self.work / f"{name}.jsonl", questions)

    def traces(self) -> dict[str, Any]:
        """Sampled, unless they have been read already: attempts that gave no text would be tried again."""
        if (self.work / "stats_completion.safetensors").is_file():
            return {}
        questions, out = read_questions(self.work / "identify.jsonl"), self.work / "traces.jsonl"
        how = {"goal": Goal(ATTEMPTS), "sampling": self.sampled, "options": CollectOptions(self.check, 128)}
        return vars(collect(self.model, self.tokenizer, questions, out, **how))

    def read(self, tokens: Tokens = "completion") -> tuple[NeuronStats, AttributionStats]:
        """Sums over the traces, read once."""
        path = self.work / f"stats_{tokens}.safetensors"
        if not path.is_file():
            traces, how = read_traces(self.work / "traces.jsonl"), Reading(8192, tokens=tokens)
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
        rule, point = self.rule(REFINEMENTS[0], read), np.zeros((self.base.layers, self.base.mlp_size))
        point[rule.neurons.layer, rule.neurons.index] = rule.strength * rule.neurons.delta
        ways = [self.gradients(f"attribution-at-{part:g}", at=part * point) for part in (0.5, 1.0)]
        total = sum(one.gradient_sum for one in (read[1], *ways)) / 3
        return replace(read[1], gradient_sum=total, rests={})

    def rule(self, setting: Setting, read: tuple[NeuronStats, AttributionStats]) -> SteeringRule:
        """The setting's neurons at its strength."""
        if setting.tokens != "completion":
            read = self.read(setting.tokens)
        if setting.gradients != "plain":
            read = read[0], self.refined(setting.gradients, read)
        lowest = self.base.layers // 2 if setting.upper else 0
        how = {"ranking": setting.ranking, "min_layer": lowest, "refinement": setting.refinement}
        start = "last_prompt_token" if setting.start == "everywhere" else setting.start
        return SteeringRule(rank(*read, keep=setting.count, **how), setting.strength, self.base, start=start)

    def way(self, setting: Setting, read: tuple[NeuronStats, AttributionStats]) -> Condition:
        rule = self.rule(setting, read)
        return StaticCondition(rule) if setting.start == "everywhere" else rule

    def gate(self) -> GateReport:
        """Trained on the questions of the traces; reads the lower half of the layers."""
        traces = read_traces(self.work / "traces.jsonl")
        return train_gate(self.model, self.tokenizer, traces, self.base, out=self.work / "gate.safetensors")

    def task(self, part: str) -> EvaluationTask:
        questions = read_questions(self.work / f"{part}.jsonl")
        return EvaluationTask(questions, self.check, self.greedy, max_rows=128, token_budget=40000)

    def cache(self, part: str) -> AnswerCache:
        return AnswerCache(self.model, self.tokenizer, self.task(part), self.work / f"answers-{part}.jsonl")

    def tuned(self, read: tuple[NeuronStats, AttributionStats]) -> tuple[Setting, ...]:
        """Of each ranking the setting that is best on validation questions; of equal ones the weaker."""
        told, best = {}, {}
        cache = self.cache("validation")
        for ranking, settings in GRIDS.items():
            found = verdicts(cache, {"off": None, **{setting.name: self.way(setting, read) for setting in settings}})
            best[ranking] = best_of(settings, found)
            told |= found
        print(f"On {len(told['off'])} validation questions:\n\n{report(told)[0]}\n")
        ours = best["attribution"]
        flipped = replace(ours, name="sign flipped", strength=-ours.strength)
        return ours, flipped, replace(ours, name=f"upper half, {ours.name}", upper=True), best["paper"]


def best_of(settings: Sequence[Setting], told: dict[str, Array]) -> Setting:
    """With the most right answers; of equal ones that which adds least."""
    return max(settings, key=lambda one: (told[one.name].mean(), -abs(one.strength) * one.count))


def verdicts(cache: AnswerCache, ways: dict[str, Condition]) -> dict[str, Array]:
    """Under each way, (N,) bool."""
    cache.ask([*ways.values()])
    return {name: cache.answers(way).correct[:, 0] for name, way in ways.items()}


def main() -> None:
    parser = common.options(__doc__ or "", repeats=1)
    parser.add_argument("task", choices=("mulw", *TASKS, "gsm8k"))
    parser.add_argument("--seed", type=int, default=1, help="of the questions")
    parser.add_argument("--work", type=Path, required=True, help="folder of everything that is made")
    parser.add_argument(
        "--transfer", type=Path, action="append", default=[], help="folder of another run, whose rule is tried"
    )
    parser.add_argument("--draws", type=int, default=20, help="random controls of the first rule (default: 20)")
    parser.add_argument(
        "--settings",
        choices=("fixed", "tuned", "refinements"),
        default="fixed",
        help="tuned: chosen on validation questions; refinements: compared there, no test (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model")
    arguments = parser.parse_args()
    folder = common.prepare(arguments)
    trial = Trial(arguments, *load_model(folder, dtype=arguments.dtype), BaseModel.of(folder))
    collected, read = trial.traces(), trial.read()
    about: dict[str, Any] = {"collected": collected, "split_half_cosine": read[1].split_half_cosine()}
    print(f"{arguments.task}, seed {arguments.seed}: {json.dumps(about, default=str)}\n")
    if arguments.settings == "refinements":
        ways = {"off": None, **{setting.name: trial.way(setting, read) for setting in REFINEMENTS}}
        told = verdicts(trial.cache("validation"), ways)
    else:
        settings = FIXED if arguments.settings == "fixed" else trial.tuned(read)
        told, own = tested(trial, read, settings, arguments)
        about |= own
    text, figures = report(told)
    print(f"On {len(told['off'])} questions:\n\n{text}")
    (arguments.work / f"{arguments.settings}.json").write_text(json.dumps({**figures, **about}, indent=1, default=str))


def tested(
    trial: Trial, read: tuple[NeuronStats, AttributionStats], settings: Sequence[Setting], arguments: Namespace
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Verdicts on the test questions, and what is known of the gate. The first setting has the random controls."""
    rules = {setting.name: trial.rule(setting, read) for setting in settings}
    first, upper = settings[0], next(setting.name for setting in settings if setting.upper)
    for other in arguments.transfer:
        parts = (
            NeuronStats.load(other / "stats_completion.safetensors"),
            AttributionStats.load(other / "attribution.safetensors"),
        )
        rules[f"{first.name}, of {other.name}"] = trial.rule(first, parts)
    for seed in range(arguments.draws):
        rules[f"random {seed}"] = random_control(trial.model, rules[first.name], seed)
    cache = trial.cache("test")
    told = verdicts(cache, {"off": None, **rules})
    try:
        gate = trial.gate()
    except TraceError as error:  # too few questions of either label
        print(f"No gate: {error}\n")
        return told, {}
    is_steered = is_steered_by(trial.model, trial.tokenizer, gate.gate, trial.task("test"), cache)
    told[f"{upper}, gated"] = np.where(is_steered, told[upper], told["off"])
    print(f"Gate: {gate.line()}. It steers {is_steered.mean():.0%} of the test questions.\n")
    return told, {"gate": gate.as_record(), "steered": float(is_steered.mean())}


def report(told: dict[str, Array]) -> tuple[str, dict[str, Any]]:
    """A Markdown table, and its figures. Holm's correction is over all rules but random ones."""
    names = [name for name in told if name != "off" and not is_random(name)]
    arms = {name: compare(name, values, told["off"]) for name, values in told.items()}
    adjusted = dict(zip(names, holm([arms[name].p_value for name in names]), strict=True))
    random = [arms[name].accuracy for name in arms if is_random(name)]
    rank_p = rank_p_value(arms[names[0]].accuracy, random) if random else None
    lines = [
        "| rule | accuracy | against off, 95 % interval | fixed / broken | p | Holm |",
        "|---|---|---|---|---|---|",
    ]
    lines.append(f"| off | {arms['off'].accuracy:.1%} | | | | |")
    for name in names:
        arm, gap = arms[name], difference(told[name], told["off"])
        lines.append(
            f"| {name} | {arm.accuracy:.1%} | {100 * gap.value:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f}) | "
            f"{arm.fixed} / {arm.broken} | {arm.p_value:.2g} | {adjusted[name]:.2g} |"
        )
    if random:
        lines.append(
            f"| {len(random)} random draws | {min(random):.1%} to {max(random):.1%} | | | rank {rank_p:.2g} | |"
        )
    return "\n".join(lines), {"arms": [vars(arm) for arm in arms.values()], "holm": adjusted, "rank_p": rank_p}


if __name__ == "__main__":
    main()
