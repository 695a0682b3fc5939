"""Checks: figures with their limits, and lists of them. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adaras_export.errors import printable


@dataclass(frozen=True)
class Check:
    """One comparison: ``figure`` must not exceed ``limit``; with the limit None it is only reported."""

    name: str
    figure: float
    limit: float | None
    detail: str = ""

    @classmethod
    def empty(cls, name: str, found: Sequence[str]) -> "Check":
        """A check that passes if ``found`` is empty; else it counts and lists the items."""
        return cls(name, len(found), 0, " ".join(found))

    @property
    def ok(self) -> bool:
        """Whether the figure is within the limit; NaN is not."""
        return self.limit is None or self.figure <= self.limit

    def line(self) -> str:
        """One line of text for the terminal."""
        verdict = "    " if self.limit is None else "ok  " if self.ok else "FAIL"
        limit = "" if self.limit is None else f"  (limit {self.limit:.3g})"
        detail = "  " + self.detail if self.detail else ""
        return printable(
            f"{verdict} {self.name}: {self.figure:.3g}{limit}{detail}"
        )  # the detail may contain untrusted file names


@dataclass(frozen=True)
class Inspection:
    """Checks of an artifact's files against the expected ones, without running any of them.

    Attributes:
        code: whether all code in it is this library's.
        settings: whether its settings are the expected ones; settings can name code and files.
        tensors: whether its tensors and other files are the expected ones.
    """

    code: Check
    settings: Check
    tensors: tuple[Check, ...]

    @property
    def harmless(self) -> bool:
        """Whether the artifact is safe to run: its code and settings are the expected ones."""
        return self.code.ok and self.settings.ok

    @property
    def checks(self) -> tuple[Check, ...]:
        """All checks, in the order in which they are shown."""
        return (self.code, self.settings, *self.tensors)


@dataclass(frozen=True)
class ParityReport:
    """All checks of one artifact."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    def failed(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if not check.ok]

    def verdict(self) -> str:
        """One line for a person, and below it each check that failed."""
        if failed := self.failed():
            return "\n".join([f"FAIL {len(failed)} of {len(self.checks)} checks", *(check.line() for check in failed)])
        shares = [(check.figure / check.limit, check) for check in self.checks if check.limit]
        text = f"PASS {len(self.checks)} checks"
        if not shares:
            return text
        share, nearest = max(shares, key=lambda pair: pair[0])
        name, figure, limit = printable(nearest.name), nearest.figure, nearest.limit
        return f"{text}; nearest to its limit: {name}: {figure:.3g} of {limit:.3g} ({share:.0%})"

    def as_record(self) -> list[dict[str, Any]]:
        """The checks as JSON values."""
        return [
            {"check": c.name, "figure": c.figure, "limit": c.limit, "ok": c.ok, "detail": c.detail} for c in self.checks
        ]

    @classmethod
    def from_record(cls, record: Any) -> "ParityReport":  # noqa: ANN401 - comes from a file
        """The checks that `as_record` described.

        Raises:
            KeyError, TypeError: the record has another form.
        """
        return cls(tuple(_check(entry) for entry in record))


def _check(record: Any) -> Check:  # noqa: ANN401 - comes from a file
    found = Check(record["check"], record["figure"], record["limit"], record["detail"])
    numbers = [found.figure] if found.limit is None else [found.figure, found.limit]
    if not all(type(number) in (int, float) for number in numbers):
        raise TypeError(f"check {found.name!r} has no numbers")
    if not isinstance(found.name, str) or not isinstance(found.detail, str):
        raise TypeError(f"check {found.name!r} has no texts")
    return found
