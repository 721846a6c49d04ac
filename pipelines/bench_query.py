"""What SQL over labels costs beside DuckDB on the same files by hand, and what a mix costs.

    python -m pipelines.bench_query

Three made-up tables (`make_large`) are queried through `query`, from opening the log to the Arrow
table, and through plain `read_parquet` over the version's files. The two take turns; a ratio is
the median over turns, so a machine that slows down slows both. The mix of the three runs in a
process of its own, whose peak memory is its own. The table goes into README.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import duckdb
import pyarrow as pa
from rich.console import Console
from rich.progress import track

from pipelines.make_large import make_all
from pipelines.readme import put, require_place
from softlabels.query.mix import Recipe, mix
from softlabels.query.pushdown import needed_files
from softlabels.query.sql import check_query
from softlabels.query.view import query
from softlabels.store.table import Table

ROWS, TURNS = 10_000_000, 5
FOLDER = Path("out/bench-query")
NAME = "bench-query"


class Question(NamedTuple):
    """What is asked: in SQL of `query`, and by hand, where {a} and {b} are `read_parquet`s."""

    name: str
    ours: str
    by_hand: str


QUESTIONS = (
    Question(
        "filtered aggregate",
        "SELECT count(*) AS n, avg(margin) AS m, avg(top1_prob) AS p FROM a.labels "
        "WHERE entropy > 3",
        "SELECT count(*) AS n, avg(margin) AS m, avg(top1_prob) AS p FROM {a} WHERE entropy > 3",
    ),
    Question(
        "the same of one class of 1,000",
        "SELECT count(*) AS n, avg(margin) AS m, avg(top1_prob) AS p FROM a.labels "
        "WHERE label = 123",
        "SELECT count(*) AS n, avg(margin) AS m, avg(top1_prob) AS p FROM {a} WHERE label = 123",
    ),
    Question(
        "top-1 confusion of two teachers",
        "SELECT a.top1_id AS x, b.top1_id AS y, count(*) AS n FROM a.labels a "
        'JOIN b.labels b USING (example_id, "view") WHERE NOT agree(a, b) '
        "GROUP BY ALL ORDER BY n DESC, x, y LIMIT 100",
        "SELECT a.top1_id AS x, b.top1_id AS y, count(*) AS n FROM {a} a "
        'JOIN {b} b USING (example_id, "view") WHERE a.top1_id <> b.top1_id '
        "GROUP BY ALL ORDER BY n DESC, x, y LIMIT 100",
    ),
    Question(
        "entropy of each class",
        "SELECT label, count(*) AS n, avg(entropy) AS e, stddev(entropy) AS s FROM a.labels "
        "GROUP BY label ORDER BY label",
        "SELECT label, count(*) AS n, avg(entropy) AS e, stddev(entropy) AS s FROM {a} "
        "GROUP BY label ORDER BY label",
    ),
    Question(
        "a column of `positions`",
        "SELECT avg(entropy) AS e FROM a.positions",
        "SELECT avg(e) AS e FROM (SELECT unnest(position_entropy) AS e FROM {a})",
    ),
    Question(
        "`prob_of` the label",
        "SELECT avg(prob_of(l, label)) AS p FROM a.labels l",
        "SELECT avg(CASE WHEN list_contains(topk_ids, label) THEN "
        "exp(topk_logprobs[list_position(topk_ids, label)]::DOUBLE) * (1 - exp(tail_logprob[1]"
        "::DOUBLE)) / list_sum(list_transform(topk_logprobs, lambda x: exp(x::DOUBLE))) "
        "ELSE exp(label_logprobs[1]::DOUBLE) END) AS p FROM {a}",
    ),
)

RECIPE = {
    "sources": {
        "a": {"table": "{a}", "where": "entropy > 1", "weight": 2},
        "b": {"table": "{b}", "where": "top1_id = label", "weight": 1},
        "c": {"table": "{c}", "weight": 1},
    }
}


class Line(NamedTuple):
    """Seconds of each turn of one question, and files that ours touched of those there are."""

    question: str
    ours: list[float]
    by_hand: list[float]
    files: int
    of: int


class Mixed(NamedTuple):
    """A mix of three tables: wall seconds, bytes of memory at the peak, rows and fingerprint."""

    seconds: float
    peak: int
    rows: int
    fingerprint: str


def main() -> None:
    """Makes the tables, measures, prints the table and puts it into README.md; or one mix."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--print", action="store_true", help="leave README.md alone")
    parser.add_argument("--mix", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.mix:
        print(json.dumps(mix_here(asked.mix)._asdict()))
        return
    if not asked.print:
        require_place(NAME)
    folder = FOLDER / str(asked.rows)
    tables = make_all(folder, asked.rows)
    mixed = mix_elsewhere(folder)
    table = as_markdown(measure(tables, asked.turns), mixed, asked.rows, asked.turns)
    print(table, end="")
    if not asked.print:
        put(NAME, table)


def measure(tables: Mapping[str, Table], turns: int) -> list[Line]:
    """Every question in turns, after one that does not count and compares the answers."""
    uris = {name: table.root.uri for name, table in tables.items()}
    lines = []
    for question in track(QUESTIONS, "queries", console=Console(stderr=True)):
        sql = question.by_hand.format(**{name: _parquet(table) for name, table in tables.items()})
        ways: tuple[Callable[[], pa.Table], ...] = (
            lambda asked=question.ours: query(uris, asked),  # type: ignore[misc]
            lambda asked=sql: by_hand(asked),  # type: ignore[misc]
        )
        _require_same(question.name, *(way() for way in ways))
        seconds: list[list[float]] = [[], []]
        for turn in range(turns):
            for place in (0, 1) if turn % 2 else (1, 0):
                start = time.perf_counter()
                ways[place]()
                seconds[place].append(time.perf_counter() - start)
        relations = [f"{name}.{kind}" for name in tables for kind in ("labels", "positions")]
        needed = needed_files(check_query(question.ours, relations), tables)
        used = [name for name in tables if f"{name}." in question.ours]
        files, of = (sum(len(found[name]) for name in used) for found in (needed, _files(tables)))
        lines.append(Line(question.name, seconds[0], seconds[1], files, of))
    return lines


def by_hand(sql: str) -> pa.Table:
    """The answer of DuckDB as it is."""
    with duckdb.connect(":memory:") as con:
        return con.sql(sql).to_arrow_table()


def mix_elsewhere(folder: Path) -> Mixed:
    """`mix_here` in a process of its own."""
    command = [sys.executable, "-m", "pipelines.bench_query", "--mix", str(folder)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return Mixed(**json.loads(found))


def mix_here(folder: Path) -> Mixed:
    """The plan of the three tables, once; its process's peak memory, libraries included. Linux."""
    text = json.dumps(RECIPE)
    for name in ("a", "b", "c"):
        text = text.replace(f"{{{name}}}", str(folder / name))
    recipe = Recipe.model_validate(json.loads(text))
    # getrusage would not do: a process inherits the peak of the one that started it.
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    plan = mix(recipe)
    fingerprint = plan.fingerprint
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return Mixed(seconds, peak, plan.num_rows, fingerprint)


def as_markdown(lines: list[Line], mixed: Mixed, rows: int, turns: int) -> str:
    """The table: ratios of wall time with least and greatest, seconds, files; then the mix."""
    text = (
        "| query | time / `read_parquet` by hand | seconds | files touched |\n|---|---|---|---|\n"
    )
    for line in lines:
        ratios = [ours / theirs for ours, theirs in zip(line.ours, line.by_hand, strict=True)]
        text += (
            f"| {line.question} | {statistics.median(ratios):.2f} ({min(ratios):.2f}–"
            f"{max(ratios):.2f}) | {statistics.median(line.ours):.2f} | "
            f"{line.files} of {line.of} |\n"
        )
    threads = by_hand("SELECT current_setting('threads') AS n")["n"][0].as_py()
    return text + (
        f"\n{rows:,} rows a table, V = 1,000, k = 10; medians (range) of {turns} turns, wall "
        f"clock from opening the log to the Arrow table, page cache warm, {threads} threads, "
        f"DuckDB {duckdb.__version__}. "
        f"Mixing three such tables into a plan of {mixed.rows:,} rows an epoch took "
        f"{mixed.seconds:.0f} s and {mixed.peak / 1e9:.1f} GB at the peak.\n"
    )


def _files(tables: Mapping[str, Table]) -> dict[str, tuple[object, ...]]:
    return {name: table.files for name, table in tables.items()}


def _parquet(table: Table) -> str:
    paths = ", ".join(f"'{table.root.full(file.path)}'" for file in table.files)
    return f"read_parquet([{paths}])"


def _require_same(name: str, ours: pa.Table, theirs: pa.Table) -> None:
    """Answers are the same but for the order in which floats were added."""
    if ours.num_rows != theirs.num_rows or ours.column_names != theirs.column_names:
        raise SystemExit(f"{name}: the two answers differ in shape")
    for one, other in zip(ours.to_pylist(), theirs.to_pylist(), strict=True):
        for here, there in zip(one.values(), other.values(), strict=True):
            if abs(here - there) > 1e-9 * abs(there):
                raise SystemExit(f"{name}: {one} is not {other}")


if __name__ == "__main__":
    main()
