"""What a finding is, how sure a rule must be, and how figures are written in sentences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
Facts = dict[str, Any]

SURE = 5.0
"""Standard errors: one false alarm in two million tries, as there are many rules and tables."""

LIKELIER = 20.0
"""Twice the log-likelihood that one more parameter must win: chi-squared with one degree of
freedom is above it by chance once in 130,000 (4.5 standard errors)."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or worth knowing.

    Attributes:
        id: of the rule, stable.
        severity: "error": do not train on this; "warning": it costs accuracy; "note": know it.
        sentence: what was found, with its figures.
        advice: what to do.
        part: the table it is about; empty when about the run.
    """

    id: str
    severity: Severity
    sentence: str
    advice: str
    part: str = ""


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """Worst first."""
    rank: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}
    return sorted(findings, key=lambda finding: rank[finding.severity])


def percent(share: float, digits: int = 1) -> str:
    """A share as "12.3 %"."""
    return f"{100 * share:.{digits}f} %"


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
