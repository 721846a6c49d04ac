"""Labels alone, zipped with the rows of the source that the teacher labelled."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from softlabels.errors import BadInputError, DataError, IntegrityError, MismatchError
from softlabels.plan import Plan
from softlabels.query.mix import mix
from softlabels.query.recipe import Recipe
from softlabels.store.compact import compact
from softlabels.store.table import Table
from softlabels.student import zipped
from softlabels.student.checkpoint import read_weights
from softlabels.student.evaluate import evaluate
from softlabels.student.saved import evaluate_saved
from softlabels.student.spec import EvaluateSpec, InputSpec, RunSpec, StudentSpec
from softlabels.student.stream import Stream, window_rows
from softlabels.student.trainer import train
from softlabels.student.zipped import SourceFiles
from tests.student.pictures import HERE, Picture, decode, labelled, picture, write_pictures

ROWS = 130


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source/{a,b,c}.parquet and the plan of a table of labels alone."""
    folder = tmp_path_factory.mktemp("labels")
    for name, start, stop in (("a", 0, 50), ("b", 50, 90), ("c", 90, ROWS)):
        write_pictures(folder / "source" / f"{name}.parquet", start, stop)
    labelled(folder, carry_position=True)
    return folder


def source_of(folder: Path) -> str:
    return str(folder / "source" / "*.parquet")


def run_spec(folder: Path, out: Path, **changes: Any) -> RunSpec:
    inputs = {"decode": f"{HERE}:decode", "columns": ("image",), "source": source_of(folder)}
    values: dict[str, Any] = {
        "plan": str(folder / "plan.parquet"),
        "out": str(out),
        "student": StudentSpec(module=f"{HERE}:Picture"),
        "inputs": InputSpec(**(inputs | changes.pop("inputs", {}))),
        "epochs": 1,
        "batch_size": 16,
        "threads": 1,
    }
    return RunSpec.model_validate(values | changes)


def require_pictures(stream: Stream, epochs: int = 1) -> None:
    """Every row once an epoch, each with its own picture."""
    names: list[str] = []
    for batch in stream:
        ids = batch.example_ids.to_pylist()
        expected = np.stack([picture(int(name[1:])) for name in ids])
        assert np.array_equal(decode(batch.columns).numpy(), expected)
        names += ids
    assert sorted(names) == sorted(f"p{i:04d}" for i in range(ROWS) for _ in range(epochs))


@pytest.mark.parametrize("cache_bytes", [0, 1 << 27])
def test_every_row_comes_with_its_own_source_row(
    folder: Path, cache_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTLABELS_CACHE", str(tmp_path))
    plan, source = Plan.read(folder / "plan.parquet"), SourceFiles(source_of(folder))
    for seed in range(2):
        stream = Stream(
            plan,
            batch_size=9,
            seed=seed,
            epochs=2,
            columns=["image"],
            source=source,
            shuffle_rows=50,
            cache_bytes=cache_bytes,
        )
        require_pictures(stream, epochs=2)
    assert bool(list(tmp_path.rglob("shards/*/*"))) == (cache_bytes == 0)


def test_the_cache_keeps_other_columns_apart(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTLABELS_CACHE", str(tmp_path))
    plan, source = Plan.read(folder / "plan.parquet"), SourceFiles(source_of(folder))
    for columns in (["id"], ["image"], ["id", "image"]):
        options: dict[str, Any] = {
            "batch_size": 50,
            "epochs": 2,
            "cache_bytes": 0,
            "source": source,
        }
        for batch in Stream(plan, columns=columns, **options):
            assert list(batch.columns) == columns
            if "id" in columns:
                assert batch.columns["id"].equals(batch.example_ids)


def test_rows_are_found_when_files_were_renamed_and_the_table_compacted(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    source = tmp_path / "copy" / "source"
    (source / "a.parquet").rename(source / "z.parquet")
    table = Table.open(str(tmp_path / "copy" / "table"))
    assert len(table.files) > 1
    compact(table)
    recipe = {"sources": {"t": {"table": table.root.uri, "where": "example_id != ''"}}}
    plan = mix(Recipe.model_validate(recipe))
    require_pictures(
        Stream(
            plan,
            batch_size=16,
            epochs=1,
            columns=["image"],
            source=SourceFiles([source_of(tmp_path / "copy")]),
        )
    )


@pytest.mark.parametrize("shift", [1, -1])
def test_a_source_shifted_by_one_row_is_refused_before_training(
    folder: Path, tmp_path: Path, shift: int
) -> None:
    shutil.copytree(folder / "source", tmp_path / "source")
    write_pictures(tmp_path / "source" / "b.parquet", 50, 90, shift=shift)
    spec = run_spec(folder, tmp_path / "run", inputs={"source": source_of(tmp_path)})
    with pytest.raises(MismatchError, match="give the files that the teacher labelled") as refused:
        train(spec)
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_missing_or_broken_source_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "source", tmp_path / "source")
    (tmp_path / "source" / "c.parquet").unlink()
    with pytest.raises(MismatchError, match="table 'pictures' has rows of a source file"):
        train(run_spec(folder, tmp_path / "run", inputs={"source": source_of(tmp_path)}))
    with pytest.raises(BadInputError, match="no file matches"):
        train(run_spec(folder, tmp_path / "run", inputs={"source": f"{tmp_path}/none/*.parquet"}))
    (tmp_path / "source" / "c.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="is not a whole Parquet file"):
        SourceFiles(source_of(tmp_path))


def test_what_neither_table_nor_source_has_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"a\.parquet has no column 'sound'"):
        train(run_spec(folder, tmp_path / "run", inputs={"columns": ("sound",)}))
    write_pictures(tmp_path / "source" / "a.parquet", 0, 20)
    labelled(tmp_path)
    with pytest.raises(BadInputError, match="capture with carry_position: true"):
        train(run_spec(tmp_path, tmp_path / "run"))


def test_rows_that_the_file_has_not_are_refused(folder: Path) -> None:
    source = SourceFiles(source_of(folder))
    (sha256,) = [s for s, f in source._files.items() if f.where.endswith("a.parquet")]
    for row in (-1, 50):
        with pytest.raises(IntegrityError, match="which has 50 rows"):
            source.take(pa.array([sha256]), pa.array([row]), ["image"], "t")
    with pytest.raises(IntegrityError, match="with 1 nulls"):
        source.take(pa.array([None], pa.string()), pa.array([0]), ["image"], "t")


@pytest.mark.parametrize("kept", [0, 3_000, 1 << 20])
def test_rows_come_in_the_order_asked_whatever_is_kept(
    folder: Path, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipped, "KEPT_BYTES", kept)
    monkeypatch.setattr(zipped, "READ_ROWS", 7)
    source = SourceFiles(source_of(folder))
    names = {file.where[-9]: sha256 for sha256, file in source._files.items()}
    rng = np.random.default_rng(kept)
    for _ in range(3):
        numbers = rng.integers(0, ROWS, 40)
        places = [
            ("a", n) if n < 50 else ("b", n - 50) if n < 90 else ("c", n - 90) for n in numbers
        ]
        files = pa.array([names[name] for name, _ in places])
        rows = pa.array([int(row) for _, row in places], pa.int64())
        found = source.take(files, rows, ["image"], "t")
        expected = np.stack([picture(int(n)) for n in numbers])
        assert np.array_equal(decode(found).numpy(), expected)
        assert sum(batch.nbytes for batch in source._kept.values()) <= kept


def test_a_window_counts_the_bytes_of_the_source(folder: Path) -> None:
    plan, source = Plan.read(folder / "plan.parquet"), SourceFiles(source_of(folder))
    bytes_a_row = source.row_bytes(["image"])
    assert bytes_a_row > SIZE_OF_PICTURE
    assert window_rows(plan, 1 << 16) < 512 < window_rows(plan)


SIZE_OF_PICTURE = 8 * 8 * 3


def test_labels_alone_train_as_labels_that_carry_their_pictures(tmp_path: Path) -> None:
    found = []
    for name, options in (("carry", {"carry": ["image"]}), ("zip", {"carry_position": True})):
        here = tmp_path / name
        write_pictures(here / "source" / "a.parquet", 0, 60)
        labelled(here, **options)
        inputs = {} if name == "zip" else {"source": ()}
        # Whole epochs: the two plans have orders of their own.
        spec = run_spec(here, here / "run", inputs=inputs, steps=6, epochs=None, batch_size=60)
        spec = spec.model_copy(update={"evaluate": EvaluateSpec(plan=spec.plan)})
        trained = train(spec)
        kl = trained.record["evaluation"]["kl_to_teacher"]
        assert evaluate_saved(spec, Plan.read(spec.plan)).as_dict()["kl_to_teacher"] == kl
        size = sum(file.size for file in Table.open(str(here / "table")).files)
        found.append((kl, read_weights(trained.student), size))
    (kl, weights, size), (other, others, smaller) = found
    assert other == pytest.approx(kl, rel=1e-4)
    for name, values in weights.items():
        torch.testing.assert_close(values, others[name], rtol=1e-3, atol=1e-5)
    assert size - smaller > 10_000  # the pictures


def test_the_evaluation_plans_source_is_asked_for_before_training(
    folder: Path, tmp_path: Path
) -> None:
    write_pictures(tmp_path / "source" / "other.parquet", 500, 520)
    other = labelled(tmp_path, carry_position=True)
    spec = run_spec(folder, tmp_path / "run", evaluate=EvaluateSpec(plan=str(other)))
    with pytest.raises(MismatchError, match="table 'pictures' has rows of a source file"):
        train(spec)
    both = (source_of(folder), source_of(tmp_path))
    spec = run_spec(
        folder, tmp_path / "run", inputs={"source": both}, evaluate=EvaluateSpec(plan=str(other))
    )
    assert train(spec).record["evaluation"]["rows"] == 20


def test_a_plan_is_evaluated_with_its_source(folder: Path) -> None:
    found = evaluate(
        Picture(),
        Plan.read(folder / "plan.parquet"),
        decode,
        ["image"],
        source=SourceFiles(source_of(folder)),
    )
    assert found.rows == ROWS


def test_dictionaries_of_files_are_joined(tmp_path: Path) -> None:
    for name, value in (("a", "x"), ("b", "y")):
        kind = pa.dictionary(pa.int32(), pa.string())
        pq.write_table(
            pa.table({"word": pa.array([value] * 4, kind)}), tmp_path / f"{name}.parquet"
        )
    source = SourceFiles(f"{tmp_path}/*.parquet")
    files = pa.array([sha256 for sha256 in source._files for _ in range(2)])
    found = source.take(files, pa.array([0, 1, 2, 3], pa.int64()), ["word"], "t")
    assert found["word"].to_pylist() == ["x", "x", "y", "y"]


def test_source_files_of_another_machine_are_fetched_and_checked(
    folder: Path, tmp_path: Path
) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(folder / "source") + "/", f"memory://{tmp_path.name}/source/", recursive=True)
    plan = Plan.read(folder / "plan.parquet")
    source = SourceFiles(f"memory://{tmp_path.name}/source/*.parquet")
    require_pictures(Stream(plan, batch_size=16, epochs=1, columns=["image"], source=source))
    write_pictures(tmp_path / "c.parquet", 90, ROWS, shift=1)
    store.put(str(tmp_path / "c.parquet"), f"memory://{tmp_path.name}/source/c.parquet")
    source = SourceFiles(f"memory://{tmp_path.name}/source/*.parquet")
    with pytest.raises(MismatchError, match="give the files that the teacher labelled"):
        Stream(plan, batch_size=16, epochs=1, columns=["image"], source=source)


def test_source_files_go_to_worker_processes(folder: Path) -> None:
    sent = pickle.loads(pickle.dumps(SourceFiles(source_of(folder))))  # noqa: S301 - our own
    plan = Plan.read(folder / "plan.parquet")
    require_pictures(Stream(plan, batch_size=16, epochs=1, columns=["image"], source=sent))
