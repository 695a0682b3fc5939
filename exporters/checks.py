"""A figure held against its limit, and a list of them. Knows nothing of what is checked, and imports nothing heavy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adaras_export.errors import printable


@dataclass(frozen=True)
class Check:
    """One comparison: ``figure`` must not exceed ``limit``; a None limit only reports."""

    name: str
    figure: float
    limit: float | None
    detail: str = ""

    @classmethod
    def empty(cls, name: str, found: Sequence[str]) -> "Check":
        """Passes where nothing was found; else it counts and names what was."""
        return cls(name, len(found), 0, " ".join(found))

    @property
    def ok(self) -> bool:
        """Whether the figure is within the limit; NaN never is."""
        return self.limit is None or self.figure <= self.limit

    def line(self) -> str:
        """One line for a person."""
        verdict = "    " if self.limit is None else "ok  " if self.ok else "FAIL"
        limit = "" if self.limit is None else f"  (limit {self.limit:.3g})"
        detail = "  " + self.detail if self.detail else ""
        return printable(f"{verdict} {self.name}: {self.figure:.3g}{limit}{detail}")  # it names foreign files


@dataclass(frozen=True)
class Inspection:
    """What an artifact stores, compared with what it should store; nothing of it has run.

    Attributes:
        code: whether all that could run is this library's own.
        settings: whether its settings are; they name code and files.
        tensors: whether its tensors are, and whatever else is in the folder.
    """

    code: Check
    settings: Check
    tensors: tuple[Check, ...]

    @property
    def harmless(self) -> bool:
        """Whether the artifact may be run: neither its code nor its settings are foreign."""
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
            KeyError, TypeError: the record is not of that form.
        """
        return cls(tuple(_check(one) for one in record))


def _check(record: Any) -> Check:  # noqa: ANN401 - comes from a file
    found = Check(record["check"], record["figure"], record["limit"], record["detail"])
    numbers = [found.figure] if found.limit is None else [found.figure, found.limit]
    if not all(type(number) in (int, float) for number in numbers):
        raise TypeError(f"check {found.name!r} has no numbers")
    if not isinstance(found.name, str) or not isinstance(found.detail, str):
        raise TypeError(f"check {found.name!r} has no texts")
    return found
