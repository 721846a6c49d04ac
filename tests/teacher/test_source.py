"""Parquet sources: which files, which rows, and what is refused."""

import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabels.errors import BadInputError, DataError, SoftLabelsError
from softlabels.teacher.source import Source, open_source
from tests.teacher.jobs import rows_table, write_source


def ids(source: Source, start: int, stop: int) -> list[str]:
    """Ids of rows start to stop, as batches give them."""
    batches = list(source.batches(start, stop, ["id"]))
    return [name for batch in batches for name in batch["id"].to_pylist()]


def expected(start: int, stop: int) -> list[str]:
    """Ids of rows start to stop, by their numbers."""
    return [f"row{i:05d}" for i in range(start, stop)]


def test_rows_run_through_files_and_odd_row_groups(tmp_path: Path) -> None:
    write_source(tmp_path / "a.parquet", 0, 50, row_group_size=7)
    write_source(tmp_path / "b.parquet", 50, 51, row_group_size=1)
    write_source(tmp_path / "c.parquet", 51, 120, row_group_size=13)
    source = open_source(str(tmp_path / "*.parquet"), ["id"])
    assert [file.num_rows for file in source.files] == [50, 1, 69]
    assert source.num_rows == 120
    for start in range(0, 120, 5):
        for stop in (start, start + 1, start + 6, start + 49, 120):
            assert ids(source, start, min(stop, 120)) == expected(start, min(stop, 120))


def test_batches_have_only_the_columns_asked_for_in_that_order(tmp_path: Path) -> None:
    write_source(tmp_path / "a.parquet", 0, 10)
    source = open_source(str(tmp_path / "a.parquet"), [])
    (batch,) = source.batches(0, 10, ["label", "id"])
    assert batch.schema.names == ["label", "id"]


def test_rows_longer_than_a_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "a.parquet", 0, 100, row_group_size=33)
    monkeypatch.setattr("softlabels.teacher.source.READ_ROWS", 8)
    source = open_source(str(tmp_path / "a.parquet"), [])
    batches = list(source.batches(5, 95, ["id"]))
    assert max(batch.num_rows for batch in batches) <= 8
    assert ids(source, 5, 95) == expected(5, 95)


def test_locate_names_file_and_row(tmp_path: Path) -> None:
    write_source(tmp_path / "a.parquet", 0, 5)
    write_source(tmp_path / "b.parquet", 5, 9)
    source = open_source(str(tmp_path / "*.parquet"), [])
    assert source.locate(4) == "row 4 of 'a.parquet'"
    assert source.locate(5) == "row 0 of 'b.parquet'"
    with pytest.raises(IndexError):
        source.locate(9)


def test_fingerprint_is_of_the_contents_in_order(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_source(tmp_path / folder / "a.parquet", 0, 5)
        write_source(tmp_path / folder / "b.parquet", 5, 9)
    one, two = (open_source(str(tmp_path / f / "*.parquet"), []) for f in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    (tmp_path / "two" / "a.parquet").rename(tmp_path / "two" / "c.parquet")
    assert open_source(str(tmp_path / "two" / "*.parquet"), []).fingerprint != one.fingerprint


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_urls(tmp_path: Path, scheme: str) -> None:
    write_source(tmp_path / "a.parquet", 0, 5)
    write_source(tmp_path / "b.parquet", 5, 9)
    url = f"file://{tmp_path}"
    if scheme == "memory":
        fs = fsspec.filesystem("memory")
        url = f"memory://source{tmp_path}"
        for name in ("a.parquet", "b.parquet"):
            fs.pipe_file(f"/source{tmp_path}/{name}", (tmp_path / name).read_bytes())
    source = open_source(f"{url}/*.parquet", ["id"])
    assert ids(source, 3, 8) == expected(3, 8)
    assert ids(open_source(f"{url}/b.parquet", ["id"]), 0, 4) == expected(5, 9)


def test_empty_files_hold_no_rows(tmp_path: Path) -> None:
    pq.write_table(rows_table(0, 0), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "*.parquet"), ["id"])
    assert source.num_rows == 0
    assert list(source.batches(0, 0, ["id"])) == []
    write_source(tmp_path / "b.parquet", 0, 5)
    pq.write_table(rows_table(0, 0), tmp_path / "c.parquet")
    write_source(tmp_path / "d.parquet", 5, 8)
    assert ids(open_source(str(tmp_path / "*.parquet"), ["id"]), 0, 8) == expected(0, 8)


def refused(kind: type[SoftLabelsError], pattern: Path | str, columns: list[str]) -> str:
    """The one line with which a source is refused."""
    with pytest.raises(kind) as caught:
        open_source(str(pattern), columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_refused(tmp_path: Path) -> None:
    assert "no file matches" in refused(BadInputError, tmp_path / "*.parquet", [])
    path = write_source(tmp_path / "a.parquet", 0, 50)
    text = refused(BadInputError, path, ["image"])
    assert "'image'" in text
    assert "columns: id, x, label, name, note" in text
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole[: len(whole) // 2], b"", b"PAR1"):
        path.write_bytes(damaged)
        assert "'a.parquet' is not a whole Parquet file" in refused(DataError, path, ["id"])
    assert "is not a whole Parquet file" not in refused(SoftLabelsError, tmp_path, ["id"])


def test_files_that_differ_in_schema(tmp_path: Path) -> None:
    write_source(tmp_path / "a.parquet", 0, 5)
    other = rows_table(5, 9)
    pq.write_table(other.drop_columns(["x"]), tmp_path / "b.parquet")
    text = refused(BadInputError, tmp_path / "*.parquet", ["id", "x"])
    assert "'b.parquet' has no column 'x'" in text
    pq.write_table(
        other.set_column(2, "label", other["label"].cast(pa.int32())), tmp_path / "b.parquet"
    )
    text = refused(BadInputError, tmp_path / "*.parquet", ["label"])
    assert "int32 in 'b.parquet', int64 in 'a.parquet'" in text
    # Columns that nobody asked for may differ.
    open_source(str(tmp_path / "*.parquet"), ["id", "x"])


def test_damage_inside_a_page_is_found_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(rows_table(0, 500), path, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle : middle + 40] = bytes(40)
    path.write_bytes(data)
    source = open_source(str(path), ["id"])
    with pytest.raises(DataError, match=r"'a\.parquet' is damaged") as caught:
        ids(source, 0, 500)
    assert "\n" not in str(caught.value)


def test_a_file_replaced_under_way_is_noticed(tmp_path: Path) -> None:
    path = write_source(tmp_path / "a.parquet", 0, 20)
    source = open_source(str(path), ["id"])
    write_source(path, 20, 40)
    with pytest.raises(DataError, match=r"'a\.parquet' was replaced"):
        ids(source, 0, 20)


MEASURE = """
import sys
from pathlib import Path
from softlabels.teacher.capture import capture
from tests.teacher.jobs import TOYS, make_spec
def peak():
    # MiB; ru_maxrss would count what the parent had before exec.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024
def spec(folder):
    source = {"columns": ["blob"], "decode": TOYS + ":decode_blob", "label": None}
    return make_spec(Path(folder), source=source, shard_rows=1000)
capture(spec(sys.argv[1]))  # what libraries take, whatever the source
before = peak()
report = capture(spec(sys.argv[2]))
print(report.rows, report.repeated, peak() - before)
"""


def write_blobs(folder: Path, rows: int, row_bytes: int) -> None:
    """A source of large rows that compress to little, in row groups of 50."""
    (folder / "src").mkdir(parents=True)
    schema = pa.schema([("id", pa.string()), ("blob", pa.binary())])
    with pq.ParquetWriter(
        folder / "src" / "a.parquet", schema, compression="zstd", use_dictionary=False
    ) as writer:
        for start in range(0, rows, 50):
            numbers = range(start, min(start + 50, rows))
            names = [f"row{i}" for i in numbers]
            blobs = [f"{i:08d}".encode() + bytes(row_bytes) for i in numbers]
            writer.write_table(pa.table({"id": names, "blob": blobs}, schema))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    write_blobs(tmp_path / "small", 20, 1_000)
    write_blobs(tmp_path / "large", 1_200, 250_000)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    found, repeated, growth = (int(word) for word in done.stdout.split())
    assert (found, repeated) == (1_200, 0)
    assert growth < 150  # MiB, of a source of 300
