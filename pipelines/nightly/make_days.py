"""Makes three days' partitions of real images for the nightly job to label.

    python -m pipelines.nightly.make_days

Cuts data/fashion/test.parquet into out/nightly/images/day=2024-02-28 and so on. A twentieth of a
day's images came on the day before already, as it happens with crawled data.
"""

import functools
from datetime import date, timedelta
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import typer

SOURCE = Path("data/fashion/test.parquet")
OUT = Path("out/nightly/images")
FIRST = date(2024, 2, 28)
DAYS = 3
MARKER = "_SUCCESS"


def main(
    rows: Annotated[int, typer.Option(min=1, max=3_000, help="Images a day.")] = 1_000,
    out: Annotated[Path, typer.Option(help="Folder to write into.")] = OUT,
) -> None:
    """Writes the partitions and prints them."""
    for number in range(DAYS):
        folder = write_day(out, number, rows)
        print(f"{folder}: {rows} rows")


def write_day(out: Path, number: int, rows: int, files: int = 2) -> Path:
    """Writes the partition of day `number` from 0, and its marker last; returns its folder."""
    day = (FIRST + timedelta(days=number)).isoformat()
    images = _images()
    again = rows // 20 if number else 0
    part = images.slice(number * rows - again, rows)
    part = part.append_column("day", pa.array([day] * part.num_rows))
    folder = out / f"day={day}"
    folder.mkdir(parents=True, exist_ok=True)
    step = -(-rows // files)
    for file in range(files):
        pq.write_table(part.slice(file * step, step), folder / f"part-{file}.parquet")
    (folder / MARKER).touch()
    return folder


@functools.cache
def _images() -> pa.Table:
    return pq.read_table(SOURCE, columns=["example_id", "image", "label"])


if __name__ == "__main__":
    typer.run(main)
