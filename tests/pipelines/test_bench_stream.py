"""The benchmark of streams on few rows: what it makes, what contenders hand out, what it writes."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.streaming import bench, make_data
from pipelines.streaming.cases import CASES, EXAMPLE_ID, Case, load_source
from pipelines.streaming.contenders import CONTENDERS
from pipelines.streaming.table import as_markdown
from pipelines.streaming.turn import check, read, rows_of, source_name, write
from softlabels.store.inspect import verify
from softlabels.store.table import Table

OWN = [name for name, contender in CONTENDERS.items() if not contender.peer]
SMALL = [
    CASES["lm"]._replace(rows=24, positions=32, vocabulary=2_000),
    CASES["labels"]._replace(rows=600, batch=64),
    CASES["payload"]._replace(rows=300, batch=64, payload=100),
]


@pytest.fixture(scope="module", params=SMALL, ids=lambda case: case.name)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Case]:
    folder = tmp_path_factory.mktemp("streaming")
    case: Case = request.param
    make_data.make(folder / source_name(case), case)
    return folder, case


def test_the_made_up_table_is_sound(made: tuple[Path, Case]) -> None:
    folder, case = made
    table = Table.open(str(folder / source_name(case) / "table"))
    assert verify(table)["problems"] == []
    assert table.num_rows == case.rows
    source = load_source(folder / source_name(case) / "source", case)
    head = np.exp(source["logprobs"].astype(np.float64)).sum(-1)
    mass = head + np.exp(source["tail"].astype(np.float64))
    # Rounding to the value profile moves each probability by an eighth at most, in the far tail.
    assert np.abs(mass - 1).max() < 0.05
    assert len(np.unique(source[EXAMPLE_ID])) == case.rows
    assert 0.05 < (source["label_ranks"] == 0).mean() < 0.95


@pytest.mark.parametrize("name", OWN)
def test_our_side_hands_out_what_was_made(
    made: tuple[Path, Case], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, case = made
    monkeypatch.delenv("SOFTLABELS_CACHE", raising=False)
    monkeypatch.setenv("SOFTLABELS_CACHE_BYTES", "0")
    contender = CONTENDERS[name]
    module = importlib.import_module(f"pipelines.streaming.{contender.module}")
    data = folder / source_name(case)
    written = write(module, contender, tmp_path / "files", data, case)
    assert written["bytes"] > 0
    loader = getattr(module, contender.loader)
    found = check(loader(tmp_path / "files", case, tmp_path / "scratch", **contender.reading))
    assert found["rows"] == found["distinct"] == case.rows
    expected = bench._sums(data / "source", case, case.rows)
    assert found["sums"] == pytest.approx(expected, rel=1e-9)
    shape = (case.batch, *case.fields["ids"][1])
    assert found["shapes"]["ids"] == f"torch.int32 {shape}"
    figures = read(
        lambda: loader(tmp_path / "files", case, tmp_path / "again", **contender.reading),
        contender,
        case,
    )
    assert {epoch["rows"] for epoch in figures["epochs"]} == {case.rows}


def test_rows_come_in_another_order(made: tuple[Path, Case], tmp_path: Path) -> None:
    folder, case = made
    arrays = importlib.import_module("pipelines.streaming.arrays")
    source = load_source(folder / source_name(case) / "source", case)
    arrays.write(dict(source), tmp_path, case, folder)
    loader = arrays.Loader(tmp_path, case, tmp_path)
    first, second = (
        np.concatenate([batch[EXAMPLE_ID] for batch in loader.epoch(number)]) for number in (0, 1)
    )
    assert sorted(first) == sorted(second) == sorted(source[EXAMPLE_ID])
    assert (first != second).any()
    assert (first != source[EXAMPLE_ID]).any()


def test_a_contender_that_cannot_run_is_said_to_with_the_reason(tmp_path: Path) -> None:
    case = SMALL[1]
    found = bench.Bench(tmp_path, sys.executable, ["tar"]).measure(case, 1)
    assert "webdataset" in found["contenders"]["tar"]["failed"]
    text = as_markdown({"turns": 1, "cpus": 2, "versions": {}, "cases": {"labels": found}})
    assert "WebDataset could not run here: " in text


def test_the_table_has_medians_and_says_who_lost_rows() -> None:
    case = SMALL[0]
    turns = [
        {"epochs": [_epoch(first), _epoch(first / 10)], "memory": 10_000_000}
        for first in (100, 900, 300)
    ]
    kept = {"bytes": 4_321.0, "rows": 24, "handed_out": 24, "distinct": 24, "same": True}
    lost = kept | {"handed_out": 24, "distinct": 23}
    contenders = {"ours": kept | {"turns": turns}, "hf": lost | {"turns": turns}}
    found = {"case": case._asdict(), "contenders": contenders}
    text = as_markdown({"turns": 3, "cpus": 2, "versions": {"x": "1"}, "cases": {"lm": found}})
    assert "| softlabels | 4,321 | 300 (100–900) | 30 (10–90) | 60 (20–180) | 10 |" in text
    assert "HF datasets, by row handed out 24 rows, 23 of 24 distinct ones." in text
    assert "softlabels handed out" not in text


def test_only_the_case_of_a_million_rows_is_cut() -> None:
    assert rows_of(CONTENDERS["mosaic"], CASES["labels"]) == 100_000
    assert rows_of(CONTENDERS["mosaic"], CASES["payload"]) == CASES["payload"].rows
    assert rows_of(CONTENDERS["ours"], CASES["labels"]) == CASES["labels"].rows


def _epoch(micro: float) -> dict[str, float]:
    return {"rows": 24, "cpu": micro * 24e-6, "wall": 2 * micro * 24e-6}
