"""A bank: many rules of one base in one engine, of which every request names one. Knows no engine."""

from collections.abc import Sequence
from dataclasses import dataclass

from adaras_export.core.rule import SteeringRule
from adaras_export.errors import RuleError


@dataclass(frozen=True, eq=False)
class BankRule:
    """A rule and its name in a bank.

    Attributes:
        name: what requests call it.
        rule: its neurons; and its strength, start and gate, where a request does not set them.
        everywhere: every token of every sequence is steered, prompts too; the rule's start is not used.
    """

    name: str
    rule: SteeringRule
    everywhere: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            raise RuleError("bank: a rule has no name; expected one, which requests choose it by")
        if self.everywhere and self.rule.gate is not None:
            raise RuleError(f"bank: {self.name} steers every token, and has a gate; expected no gate")


@dataclass(frozen=True)
class Request:
    """One prompt for a bank.

    Attributes:
        prompt: token ids.
        rule: name of a rule of the bank.
        strength: factor on its vectors; 0 gives the base model's output.
        key: the random numbers come from it and the seed.
    """

    prompt: Sequence[int]
    rule: str
    strength: float
    key: str
