"""What became of the rows of a source, step by step. Loads no database."""

from collections.abc import Iterator, Mapping
from typing import Any

from softlabels.plan import SourceReport

STEPS = (
    "where",
    "exclude",
    "split",
    "once",
    "fraction",
    "limit: null",
    "limit",
    "balance: null",
    "sample_by: 0",
    "positions",
    "not in",
    "no weight",
    "balance",
    "sample_by",
    "weight",
    "repeats",
)
"""Reasons for which a source drops rows, in the order in which it does; "not in" a teacher's table
is one for each teacher."""


def in_order(dropped: Mapping[str, int]) -> dict[str, int]:
    """Rows dropped, by reason in the order of the steps: what a file holds goes by the alphabet."""

    def place(reason: str) -> tuple[int, str]:
        known = "not in" if reason.startswith("not in ") else reason
        return (STEPS.index(known) if known in STEPS else len(STEPS)), reason

    return {reason: dropped[reason] for reason in sorted(dropped, key=place)}


def funnel(source: SourceReport) -> list[dict[str, Any]]:
    """The rows of the version, then what each step dropped and left, then the reads an epoch."""
    return list(_steps(source))


def _steps(source: SourceReport) -> Iterator[dict[str, Any]]:
    left = source.rows
    yield {"step": "rows of the version", "dropped": None, "left": left}
    for reason, count in in_order(source.dropped).items():
        left -= count
        yield {"step": reason, "dropped": count, "left": left}
    yield {"step": "reads an epoch", "dropped": None, "left": source.reads}


def values(source: SourceReport) -> list[dict[str, Any]]:
    """Rows, reads and share of the reads of the values that `balance` goes by."""
    return [
        {
            "value": f"({count.others} others)" if count.value is None else count.value,
            "rows": count.rows,
            "reads": count.reads,
            "share": count.reads / source.reads,
        }
        for count in source.values or ()
    ]
