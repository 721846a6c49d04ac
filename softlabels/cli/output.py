"""What every command prints with: JSON or a table on stdout, progress on stderr."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from softlabels.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress

_NO_LIMIT = 1_000_000
"""Characters of a line that is not for a terminal."""


def print_json(value: Any) -> None:
    """`value` as one JSON document on stdout."""
    print(json.dumps(value, indent=2, default=str))


def print_table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> None:
    """`rows` as an aligned table on stdout; the first row's keys are the columns."""
    from rich.console import Console
    from rich.table import Table

    # Values are shown as they are: "[/x]" in a class name is no markup. A terminal folds what is
    # too wide; elsewhere a line is as long as it must be, for what is cut cannot be looked up.
    width = None if sys.stdout.isatty() else _NO_LIMIT
    console = Console(width=width, markup=False, emoji=False)
    if not rows:
        console.print("(no rows)")
        return
    if title is not None:
        console.print(
            printable(title), style="italic", highlight=False
        )  # not folded to the table's width
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, value in rows[0].items():
        justify: Literal["left", "right"] = "right" if isinstance(value, int | float) else "left"
        table.add_column(printable(name), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(printable(_cell(value)) for value in row.values()))
    console.print(table, highlight=False)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """`rows` as a Markdown table; the first row's keys are the columns."""
    columns = list(rows[0])
    right = [isinstance(rows[0][name], int | float) for name in columns]
    lines = [columns, ["---:" if number else "---" for number in right]]
    lines += [[_cell(row[name]).replace("|", "\\|") for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def progress(*columns: Any, in_bytes: bool = False) -> "Progress":
    """A rich progress display on stderr; `columns` stand after bar and count, or bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if in_bytes else MofNCompleteColumn(),
        *columns,
        TimeLeft(),
        console=Console(stderr=True),
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return str(value)
