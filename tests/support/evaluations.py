"""Records of evaluations for tests: verdicts drawn from seeds, figures that follow from them."""

import numpy as np

from adaras_export.evaluation.arms import compare

RULE = "6f9900fb124b12899cfbedc41fc94df8bb7d9f75cca956342388b64ac9c5871c"
OTHER = "0b" * 32


def verdicts(shares, questions=200, answers=1, seed=0):
    """Of every arm (N, n). Questions that are hard are hard for all arms, but for a little chance of each arm's own."""
    draw = np.random.default_rng(seed)
    hard = draw.random((questions, answers)) * 0.4 + draw.random((questions, 1)) * 0.6
    return {name: hard + draw.normal(0, 0.02, hard.shape) < share for name, share in shares.items()}


def shares(rule=0.62, off=0.5, flipped=0.45, draws=20, lead="gated"):
    """What the arms of `verdicts` are to reach; random draws lie around no steering."""
    random = {f"random {seed}": off + 0.004 * (seed * 7 % 11 - 5) for seed in range(draws)}
    return {"off": off, lead: rule, "flipped": flipped, **random}


def record(arms, prefix="q", figures=None, **more):
    """A file of `eval` with these verdicts, (N, n) by arm; ``figures`` are those of the arms, by default theirs."""
    questions, answers = arms["off"].shape
    tokens = np.arange(questions * answers).reshape(questions, answers) % 50 + 10
    figures = figures or [vars(compare(name, values, arms["off"])) for name, values in arms.items()]
    return {
        "version": 2,
        "rule": RULE,
        "model": {"name": "somebody/tiny", "revision": "c0ffee", "fingerprint": None, "dtype": "float32"},
        "checker": "last_number",
        "sampling": {"max_new_tokens": 60, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": None},
        "question_set": None,
        "trained_on": None,
        "questions": questions,
        "samples": answers,
        "steered_share": 0.47,
        "seen": 0,
        "dataset": None,
        "task": None,
        "example": None,
        "verdict": "believe me",
        "arms": figures,
        "differences": {
            arm["name"]: {"value": 0.0, "low": -0.1, "high": 0.1} for arm in figures if arm["name"] != "off"
        },
        "verdicts": {"id": [f"{prefix}{place}" for place in range(questions)], **columns(arms)},
        "tokens": columns({name: tokens + shift for shift, name in enumerate(arms)}),
        "cut": columns(dict.fromkeys(arms, tokens > 57)),
        "seconds": {name: 12.5 + shift for shift, name in enumerate(arms)},
        **more,
    }


def columns(arms):
    """One number for each question, or a list of n."""
    return {name: (table[:, 0] if table.shape[1] == 1 else table).astype(int).tolist() for name, table in arms.items()}


GAIN = record(verdicts(shares()))
NULL = record(verdicts(shares(rule=0.51)), dataset="somebody/sums", task="two_digits")
HARM = record(verdicts(shares(rule=0.38)))
FEW = record(verdicts(shares(draws=5)))
BARE = record(verdicts({"off": 0.5, "always": 0.6}))
SEEN = {**GAIN, "seen": 3}
SAMPLED = record(
    verdicts(shares(lead="always"), questions=60, answers=8),
    steered_share=1.0,
    question_set="sums",
    trained_on="sums",
    sampling={"max_new_tokens": 60, "temperature": 0.7, "top_p": 0.95, "seed": 1, "stop": None},
)

# Names that would be markup, or hide, wherever they are not escaped.
NASTY = '\u202e\x1b<script>alert(1)</script>|`]("& \u202e ![x](http://x)'
HOSTILE = record(
    {**verdicts(shares(draws=2)), f"random {NASTY}": verdicts({"a": 0.5})["a"], NASTY: verdicts({"a": 0.9})["a"]},
    prefix=NASTY,
    question_set=NASTY,
    rule=NASTY,
    model={NASTY: NASTY},
    checker=NASTY,
    sampling={NASTY: NASTY, "temperature": 0},
)
TUNED = {
    "rule": RULE,
    "count": 50,
    "strength": 2.0,
    "beats_off": True,
    "arms": [
        {"name": name, "questions": 300, "accuracy": accuracy}
        for name, accuracy in (("off", 0.7), ("50 neurons at 1", 0.77), (NASTY, 0.83))
    ],
}
GATE = {"auc": 0.8, "auc_low": 0.73, "auc_high": 0.868, "threshold": 0.57, "validation_questions": 160}

# Those with golden files; of the others, the sentence alone differs.
GOLDEN = ("gain", "null", "no-controls", "hostile", "transfer")

# Name of a report -> the files that it is made of.
CASES = {
    "gain": {"gain.json": GAIN},
    "null": {"null.json": NULL},
    "harm": {"harm.json": HARM},
    "few-draws": {"few.json": FEW},
    "no-controls": {"bare.json": BARE},
    "seen": {"seen.json": SEEN},
    "sampled": {"sampled.json": SAMPLED},
    "hostile": {"hostile.json": HOSTILE, "tuned.json": TUNED},
    "transfer": {
        "sums-a.json": {**SAMPLED, "verdicts": {**SAMPLED["verdicts"]}},
        "sums-b.json": {**GAIN, "rule": OTHER},
        "words-b.json": record(verdicts(shares(rule=0.3, draws=3), seed=3), prefix="w", rule=OTHER, dataset="a/words"),
        "tuned.json": TUNED,
        "gate.json": GATE,
    },
}
