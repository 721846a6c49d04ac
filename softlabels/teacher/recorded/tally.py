"""What an import leaves out: how often for each reason, and where first."""

from dataclasses import dataclass, field

from softlabels.errors import DataError


@dataclass
class Tally:
    """What could not be kept: how often for each reason, and where first.

    Attributes:
        records: that were seen.
        reasons: how often, by reason; a reason says whether it counts records or positions.
        first: the place and detail of the first one.
    """

    records: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    first: str = ""

    def add(self, reason: str, place: str, detail: str = "", count: int = 1) -> None:
        """Counts what is left out."""
        self.reasons[reason] = self.reasons.get(reason, 0) + count
        self.first = self.first or f"{place}: {reason}{': ' if detail else ''}{detail}"

    def require_none(self) -> None:
        """Raises DataError when anything was left out."""
        if self.reasons:
            counts = ", ".join(f"{n} x {reason}" for reason, n in sorted(self.reasons.items()))
            raise DataError(
                f"expected {self.records} records that can be kept exactly; the first that cannot "
                f"is {self.first}; in all: {counts}; mend them, or say on_bad: skip to leave them "
                "out and count them"
            )

    def require_some(self, found: bool, files: str) -> None:
        """Raises DataError unless a sequence was found that can be kept."""
        if not found:
            counts = ", ".join(f"{n} x {reason}" for reason, n in sorted(self.reasons.items()))
            raise DataError(
                f"{files!r}: none of {self.records} records can be kept: "
                f"{counts or 'there are none'}"
            )
