"""Streams of soft labels beside other loaders, each written as its own documentation advises.

    python -m pipelines.streaming.bench --peers .venv/peers/bin/python

Every contender stores the same made-up labels (`make_data`), and hands out the same shuffled
batches of tensors, which is checked by sums over all rows. Contenders take turns, each turn in a
process of its own; figures are medians over turns. They are kept in figures.json, from which the
README's table is made; `--table` only makes the table.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from pipelines.readme import put, require_place
from pipelines.streaming.cases import CASES, EXAMPLE_ID, SMALL, Case, load_source
from pipelines.streaming.contenders import CONTENDERS
from pipelines.streaming.make_data import make
from pipelines.streaming.table import as_markdown
from pipelines.streaming.turn import WARM_ROWS, rows_of, source_name

NAME = "bench-stream"
FOLDER = Path("out/bench-stream")
FIGURES = Path(__file__).with_name("figures.json")
TURNS = 5
TURN_SECONDS = 600
PEERS = (
    "mosaicml-streaming",
    "litdata",
    "datasets",
    "webdataset",
    "pylance",
    "torch",
    "pyarrow",
)


def main() -> None:
    """Makes the data, measures, keeps the figures and puts the table into README.md."""
    asked = _arguments()
    if asked.table:
        put(NAME, as_markdown(json.loads(FIGURES.read_text())))
        return
    if not asked.print:
        require_place(NAME)
    asked.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(asked.folder, asked.peers, asked.only)
    cases = [CASES[name] for name in asked.cases]
    if asked.small:
        cases = [case._replace(rows=SMALL[case.name]) for case in cases]
    figures = {
        "turns": asked.turns,
        "cpus": os.cpu_count(),
        "versions": bench.versions(),
        "cases": {case.name: bench.measure(case, asked.turns) for case in cases},
    }
    table = as_markdown(figures)
    print(table, end="")
    if not asked.print:
        FIGURES.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
        put(NAME, table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", default=".venv/peers/bin/python", help="python of the others")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--small", action="store_true", help="few rows: to try things out")
    parser.add_argument("--print", action="store_true", help="leave files and README.md alone")
    parser.add_argument("--table", action="store_true", help="only make the table anew")
    return parser.parse_args()


class Bench:
    """Runs contenders in processes of their own."""

    def __init__(self, folder: Path, peers: str, only: Sequence[str]) -> None:
        self._folder, self._peers, self._only = folder, peers, only

    def measure(self, case: Case, turns: int) -> dict[str, Any]:
        """Figures of all contenders on one case, by name; why one could not run, in its place."""
        found: dict[str, Any] = {}
        for size in (WARM_ROWS, case.rows):
            make(self._folder / source_name(case._replace(rows=size)), case._replace(rows=size))
        for name in track(self._only, f"{case.name}: files", console=Console(stderr=True)):
            found[name] = self._prepare(name, case)
        running = [name for name in self._only if "failed" not in found[name]]
        for turn in track(range(turns), f"{case.name}: turns", console=Console(stderr=True)):
            # Whoever came first in a turn is last in the next.
            start = turn % max(1, len(running))
            for name in running[start:] + running[:start]:
                figures = self._run("read", name, case)
                found[name].setdefault("turns", []).append(figures)
            self._keep(case, found)
        for name in running:
            if CONTENDERS[name].resumes and case.name == "labels":
                found[name]["resume"] = self._run("resume", name, case)
        self._keep(case, found)
        return {"case": case._asdict(), "contenders": found}

    def _keep(self, case: Case, found: dict[str, Any]) -> None:
        """Writes what is known so far: a run that is cut short leaves its turns."""
        path = self._folder / f"{source_name(case)}-figures.json"
        path.write_text(json.dumps({"case": case._asdict(), "contenders": found}, indent=1))

    def versions(self) -> dict[str, str]:
        """The versions of the other libraries."""
        code = "import importlib.metadata as m, json, sys\n"
        code += "print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
        command = [self._peers, "-c", code, *PEERS]
        text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        return {name: value.partition("+")[0] for name, value in json.loads(text).items()}

    def _prepare(self, name: str, case: Case) -> dict[str, Any]:
        """Has the contender write its files, and checks what it hands out."""
        checked = self._run("prepare", name, case)
        if "failed" in checked:
            return checked
        rows = rows_of(CONTENDERS[name], case)
        expected = _sums(self._folder / source_name(case) / "source", case, rows)
        return {
            "bytes": checked["bytes"],
            "rows": rows,
            "handed_out": checked["rows"],
            "distinct": checked["distinct"],
            "same": all(
                np.isclose(checked["sums"][field], value, rtol=1e-9, atol=0)
                for field, value in expected.items()
            ),
        }

    def _run(self, what: str, name: str, case: Case) -> dict[str, Any]:
        """What a turn prints; `failed` with the last line that it wrote where it did not end."""
        python = self._peers if CONTENDERS[name].peer else sys.executable
        command = [python, "-m", "pipelines.streaming.turn", what, name, case.name]
        command += [str(self._folder), str(case.rows)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TURN_SECONDS, env=_environment()
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"{what}: not done after {TURN_SECONDS} s"}
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
            print(f"{name}, {case.name}, {what}: {lines[-1]}", file=sys.stderr)
            return {"failed": f"{what}: {lines[-1]}"}
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found


def _environment() -> dict[str, str]:
    """One thread for arithmetic, no progress bars, nothing asked of the network."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "DO_NOT_TRACK": "1",
        "LITDATA_DISABLE_VERSION_CHECK": "1",
    }


def _sums(folder: Path, case: Case, rows: int) -> dict[str, float]:
    source = load_source(folder, case, rows)
    return {
        name: float(values.sum(dtype=np.float64))
        for name, values in source.items()
        if name != EXAMPLE_ID
    }


if __name__ == "__main__":
    main()
