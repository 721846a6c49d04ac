"""What every command prints with: JSON or a table on stdout, progress on stderr."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress


def print_json(value: Any) -> None:
    """`value` as one JSON document on stdout."""
    print(json.dumps(value, indent=2, default=str))


def print_table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> None:
    """`rows` as an aligned table on stdout; the first row's keys are the columns."""
    from rich.console import Console
    from rich.table import Table

    # Values are shown as they are: "[/x]" in a class name is no markup.
    width = None if sys.stdout.isatty() else 160
    console = Console(width=width, markup=False, emoji=False)
    if not rows:
        console.print("(no rows)")
        return
    table = Table(title=title, box=None, pad_edge=False, header_style="bold", title_justify="left")
    for name, value in rows[0].items():
        table.add_column(name, justify="right" if isinstance(value, int | float) else "left")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table, highlight=False)


def progress(*columns: Any) -> "Progress":
    """A rich progress display on stderr; `columns` stand after bar and count."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *columns,
        TimeLeft(),
        console=Console(stderr=True),
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return str(value)
