"""What a request may set, and what its tokens get from it. Knows neither vLLM nor tensors.

A request names its dials in `SamplingParams.extra_args`, over HTTP in `vllm_xargs`. P is the number of prompt tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

STRENGTH, THRESHOLD, START, RULE = "steering_strength", "steering_threshold", "steering_start", "steering_rule"
EVERYWHERE = "everywhere"
"""The start of a rule of a bank that steers prompts, too."""

RESULT = "steering"
"""The key of a verdict in `RequestOutput.kv_transfer_params`, which vLLM hands to clients as it is."""

_LARGEST = 1e6


@dataclass(frozen=True)
class Rule:
    """The settings of one rule of a model.

    Attributes:
        name: what a request calls it; "" for the only rule of an export.
        strength: factor on its vectors.
        threshold: sequences with p(correct) below it are steered.
        start: the first steered token: "last_prompt_token" or "first_generated_token"; in a bank "everywhere", too.
        gate: the 0-based index of its gate among the model's; None: every sequence is steered.
    """

    name: str
    strength: float
    threshold: float
    start: str
    gate: int | None


@dataclass(frozen=True)
class Dials:
    """What holds for one request.

    Attributes:
        rule: 0-based index of its rule.
        strength: factor on the vectors; 0 gives the base model's output.
        threshold: the request is steered if p(correct) is below it.
        prompt_length: the number of tokens that the gate reads: those in front of the answer.
        first: 0-based position of the first steered token.
    """

    rule: int
    strength: float
    threshold: float
    prompt_length: int
    first: int

    def key(self) -> tuple[Any, ...]:
        """What KV pages at and behind the first steered token depend on besides the tokens."""
        return ("adaras", self.rule, self.strength, self.threshold, self.prompt_length)


def rules_of(settings: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules of the entry "adaras" of a config: the only one of an export, or those of a bank."""
    if "rules" in settings:
        return tuple(Rule(**rule) for rule in settings["rules"])
    gate = None if settings["gate"] is None else 0
    return (Rule("", settings["strength"], settings["threshold"], settings["start"], gate),)


def gates_of(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The gates of the entry "adaras" of a config: {"layers", "features", "hidden_size"} of each."""
    if "rules" in settings:
        return list(settings["gates"])
    return [] if settings["gate"] is None else [settings["gate"]]


def dials_of(rules: tuple[Rule, ...], extra: Mapping[str, Any] | None, prompt_tokens: int) -> Dials:
    """The dials of a request with ``prompt_tokens`` tokens, from its extra arguments and its rule's settings.

    Raises:
        ValueError: a name that looks like a dial's but is none, a value out of range, or a rule that is not there.
    """
    given = dict(extra or {})
    known = (STRENGTH, THRESHOLD, START, *((RULE,) if rules[0].name else ()))
    for name in given.keys() - {*known}:
        if name.startswith("steer") or get_close_matches(name, known, cutoff=0.75):
            raise ValueError(f"{name}: not a dial of this model; expected one of: {', '.join(known)}")
    names = [rule.name for rule in rules]
    name = given.get(RULE, names[0])
    if name not in names:
        raise ValueError(f"{RULE}: {name!r} is not a rule of this model; expected one of: {', '.join(names)}")
    rule = rules[names.index(name)]
    start = _number(START, given.get(START, prompt_tokens))
    if start != int(start) or not 1 <= start <= prompt_tokens:
        raise ValueError(f"{START}: {start:g}; expected a whole number from 1 to the prompt's {prompt_tokens} tokens")
    return Dials(
        names.index(name),
        _number(STRENGTH, given.get(STRENGTH, rule.strength)),
        _number(THRESHOLD, given.get(THRESHOLD, rule.threshold)),
        int(start),
        0 if rule.start == EVERYWHERE else int(start) - (rule.start == "last_prompt_token"),
    )


def _number(name: str, value: Any) -> float:
    """A finite number that float32 can hold.

    Raises:
        ValueError: the value is no number, not finite or too large.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and abs(value) < _LARGEST):  # false for NaN, too
        raise ValueError(f"{name}: {value!r}; expected a number between {-_LARGEST:g} and {_LARGEST:g}")
    return float(value)
