"""Conditions as requests for an engine that holds a bank of rules. Knows no engine by name."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Protocol, TypeGuard

from adaras_export.core.bank import BankRule, Request
from adaras_export.core.rule import SteeringRule
from adaras_export.evaluation.task import ArtifactCondition, Condition, StaticCondition, condition_key
from adaras_export.modeling.generation import Sampling


class Engine(Protocol):
    """Answers many requests at once, each under its own rule of a bank."""

    def complete(
        self, requests: Sequence[Request], sampling: Sampling, ends: Sequence[int]
    ) -> Iterator[tuple[int, list[int]]]:
        """The 0-based number of each request and its new ids before the first one of ``ends``, as they are finished."""


@dataclass(frozen=True)
class Backend:
    """What answers instead of the model in memory, which only judges prompts and weighs neurons then.

    Attributes:
        name: as records and journals have it.
        open: an engine with a bank, for prompts with their answers of at most so many tokens.
    """

    name: str
    open: Callable[[Sequence[BankRule], int], AbstractContextManager[Engine]]


def bank_rule(condition: SteeringRule | StaticCondition) -> BankRule:
    """What a bank has for a condition: the strength is the request's, so conditions that differ in it share a rule."""
    is_static = isinstance(condition, StaticCondition)
    rule = condition.rule if isinstance(condition, StaticCondition) else condition
    plain = replace(rule, strength=1.0, gate=None, questions=())
    return BankRule(f"{plain.fingerprint[:16]}{' everywhere' if is_static else ''}", plain, is_static)


class Bank:
    """The rules of some conditions, in an engine that starts with the first request."""

    def __init__(self, backend: Backend, conditions: Sequence[Condition]) -> None:
        """``conditions``: those that will be asked for, at any strength."""
        self.name = backend.name
        self._open = backend.open
        self._rules = {one.name: one for one in map(bank_rule, filter(_is_steered, conditions))}
        self._names: dict[str, str] = {}
        self._engine: Engine | None = None
        self._closing = ExitStack()

    def request(self, condition: Condition, prompt: Sequence[int], key: str) -> Request:
        """A prompt under a condition; no steering is any rule at strength 0."""
        assert not isinstance(condition, ArtifactCondition)
        if condition is None:
            return Request(prompt, next(iter(self._rules)), 0.0, key)
        known = condition_key(condition)
        name = self._names.get(known) or self._names.setdefault(known, bank_rule(condition).name)
        assert name in self._rules
        rule = condition.rule if isinstance(condition, StaticCondition) else condition
        return Request(prompt, name, rule.strength, key)

    def complete(
        self, requests: Sequence[Request], sampling: Sampling, ends: Sequence[int], longest: int
    ) -> Iterator[tuple[int, list[int]]]:
        """As `Engine.complete`; ``longest``: tokens of the longest prompt that will ever be asked."""
        if self._engine is None:
            opening = self._open([*self._rules.values()], longest + sampling.max_new_tokens)
            self._engine = self._closing.enter_context(opening)
        return self._engine.complete(requests, sampling, ends)

    def close(self) -> None:
        """End the engine."""
        self._engine = None
        self._closing.close()


def _is_steered(condition: Condition) -> TypeGuard[SteeringRule | StaticCondition]:
    return isinstance(condition, SteeringRule | StaticCondition)
