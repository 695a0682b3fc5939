"""A figure held against its limit, and a list of them. Knows nothing of what is checked, and imports nothing heavy."""

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
        checks = tuple(Check(one["check"], one["figure"], one["limit"], one["detail"]) for one in record)
        for check in checks:
            numbers = [check.figure] if check.limit is None else [check.figure, check.limit]
            texts = [check.name, check.detail]
            if not all(type(one) in (int, float) for one in numbers) or not all(isinstance(one, str) for one in texts):
                raise TypeError("a check has a figure or a text of another type")
        return cls(checks)
