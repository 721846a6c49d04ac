"""The user's own files in a query: what they become, and what is refused."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from softlabels.errors import BadInputError
from softlabels.query.view import Session, query
from softlabels.store.table import Table
from tests.query.sequences import far
from tests.tables import make_table

ROWS = [{"example_id": f"{i:05d}", "source": "ab"[i % 2], "weight": i / 4} for i in range(30)]
JOIN = (
    "SELECT source, count(*) AS n, sum(weight) AS w FROM labels JOIN meta USING (example_id) "
    "GROUP BY source ORDER BY source"
)
WANTED = [{"source": "a", "n": 15, "w": 52.5}, {"source": "b", "n": 15, "w": 56.25}]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Rows 00000 to 00039: ids that look like numbers."""
    return make_table(tmp_path_factory.mktemp("t") / "t", rows=40, prefix="")


def write(path: Path) -> Path:
    rows = pa.Table.from_pylist(ROWS)
    kind = path.suffixes[0]
    if kind == ".parquet":
        pq.write_table(rows, path)
        return path
    lines = [json.dumps(row) for row in ROWS]
    mark = "\t" if kind == ".tsv" else ","
    text = {
        ".json": "[" + ",".join(lines) + "]",
        ".jsonl": "\n".join(lines),
        ".ndjson": "\n".join(lines),
    }.get(kind) or "\n".join(
        [mark.join(ROWS[0]), *(mark.join(map(str, row.values())) for row in ROWS)]
    )
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize(
    "name",
    ["m.csv", "m.tsv", "m.json", "m.jsonl", "m.ndjson", "m.parquet", "m.csv.gz", "M.CSV"],
)
def test_a_named_file_is_a_relation_whose_ids_are_text(
    table: Table, tmp_path: Path, name: str
) -> None:
    path = write(tmp_path / name.lower()).rename(tmp_path / name)
    assert query(table, JOIN, {"meta": path}).to_pylist() == WANTED
    assert query(far(table), JOIN, {"meta": str(path)}).to_pylist() == WANTED
    kinds = query(table, "SELECT DISTINCT typeof(example_id) AS kind FROM meta", {"meta": path})
    assert kinds.to_pylist() == [{"kind": "VARCHAR"}]


def test_ids_that_are_numbers_in_the_file_are_text_too(table: Table, tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"Example_ID": pa.array([12, 13]), "w": [1, 2]}), path)
    found = query(table, "SELECT example_id, w FROM meta ORDER BY 1", {"meta": path})
    assert found.to_pylist() == [{"Example_ID": "12", "w": 1}, {"Example_ID": "13", "w": 2}]
    lines = tmp_path / "m.jsonl"
    lines.write_text('{"example_id": 12, "w": {"x": 1}}\n{"example_id": 13, "w": {"x": 2}}\n')
    found = query(table, "SELECT example_id, m.w.x FROM m ORDER BY 1", {"m": lines})
    assert found.to_pylist() == [{"example_id": "12", "x": 1}, {"example_id": "13", "x": 2}]


def test_a_relative_path_and_several_files_with_several_tables(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m.csv")
    write(tmp_path / "n.parquet")
    monkeypatch.chdir(tmp_path)
    found = query(
        {"": table, "old": table},
        "SELECT count(*) AS n FROM labels l JOIN old.labels o USING (example_id) "
        "JOIN m USING (example_id) JOIN n USING (example_id) WHERE l.label = 3 AND n.weight > 2",
        {"m": "m.csv", "n": "./n.parquet"},
    )
    assert found.to_pylist() == [{"n": 2}]


@pytest.mark.parametrize("name", ["a*.csv", "a[1].csv", "a?.csv", "{a,b}.csv", "it's.csv", '".csv'])
def test_a_path_is_one_file_and_no_pattern(table: Table, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "x=1"
    folder.mkdir()
    (folder / name).write_text("v\nmine\n")
    for other in ("a1.csv", "ab.csv", "a.csv", "b.csv"):
        (folder / other).write_text("v\nhush\n")
    found = query(table, "SELECT * FROM m", {"m": folder / name})
    assert found.to_pylist() == [{"v": "mine"}]


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [
        ("m", "{folder}/none.csv", "there is no file '.*none.csv'"),
        ("m", "{folder}/*.csv", "there is no file"),
        ("m", "{folder}", "ends with none of .parquet"),
        ("m", "{folder}/folder.csv", "there is no file"),
        ("m", "https://example.org/m.csv", "there is no file"),
        ("m", "s3://bucket/m.parquet", "there is no file"),
        ("m", "{folder}/m.txt", "ends with none of"),
        ("m", "{folder}/m.parquet.gz", "ends with none of"),
        ("m", "/dev/null", "ends with none of"),
        ("m", "{folder}/bad.parquet", "'.*bad.parquet' cannot be read"),
        ("m", "{folder}/bad.json", "'.*bad.json' cannot be read"),
        ("labels", "{folder}/m.csv", "'labels' is taken"),
        ("Entries", "{folder}/m.csv", "'Entries' is taken"),
        ("OLD", "{folder}/m.csv", "'OLD' is taken"),
        ("main", "{folder}/m.csv", "'main' is taken"),
        ("pg_settings", "{folder}/m.csv", "'pg_settings' is taken"),
        ("a.labels", "{folder}/m.csv", "must be a word without dots"),
        ("", "{folder}/m.csv", "must be a word without dots"),
    ],
)
def test_what_is_no_named_file_is_refused(
    table: Table, tmp_path: Path, name: str, path: str, words: str
) -> None:
    (tmp_path / "folder.csv").mkdir()
    for bad in ("bad.parquet", "bad.json", "m.txt", "m.parquet.gz"):
        (tmp_path / bad).write_text("{{{")
    (tmp_path / "m.csv").write_text("a\n1\n")
    with pytest.raises(BadInputError, match=words) as caught:
        query({"": table, "old": table}, "SELECT 1", {name: path.format(folder=tmp_path)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.csv", "example_id,v\nx1,2\nx2,3,9\nx3,4\n", "as many as in line 1"),
        ("m.csv", "example_id,v\nx1,2\nx2\nx3,4\n", "as many as in line 1"),
        ("m.csv", "A title\nexample_id,v\nx1,2\nx2,3\n", "as many as in line 1"),
        ("m.csv", "example_id;v\nx1;2\n", "one column, 'example_id;v': expected .* by ','"),
        ("m.tsv", "example_id,v\nx1,2\n", "one column, 'example_id,v'"),
        ("m.csv", "", "line 1 must name the columns, found \\[\\]"),
        ("m.csv", "\nexample_id,v\nx1,2\n", "line 1 must name the columns"),
    ],
)
def test_rows_that_are_not_as_line_1_says_are_refused(
    table: Table, tmp_path: Path, name: str, text: str, words: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInputError, match=f"file 'm': .*{words}") as caught:
        query(table, "SELECT count(*) FROM m", {"m": tmp_path / name})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("example_id,v\n# x,1\n# y,2\nz,3\n", [("# x", 1), ("# y", 2), ("z", 3)]),
        ('example_id,v\n"a,""b""\nc",1\n', [('a,"b"\nc', 1)]),
        ("\ufeffexample_id, v\r\nx,1\r\n", [("x", 1)]),
        ("example_id,v\nx;y|z,1\n", [("x;y|z", 1)]),
        ("example_id,v\n1,2\n3,4\n", [("1", 2), ("3", 4)]),
        ("example_id,v,v,\na,1,2,3\n", [("a", 1, 2, 3)]),
        ("v,example_id\n", []),
    ],
)
def test_every_line_after_the_first_is_a_row(
    table: Table, tmp_path: Path, text: str, rows: list[tuple[object, ...]]
) -> None:
    (tmp_path / "m.csv").write_text(text, encoding="utf-8", newline="")
    found = query(table, "SELECT * FROM m", {"m": tmp_path / "m.csv"})
    assert [tuple(row.values()) for row in found.to_pylist()] == rows


def test_a_row_far_down_is_not_lost(table: Table, tmp_path: Path) -> None:
    lines = [f"x{i},{i}" for i in range(30_000)]
    (tmp_path / "m.csv").write_text("\n".join(["example_id,v", *lines, "y,1,2"]) + "\n")
    with pytest.raises(BadInputError, match="Expected Number of Columns: 2 Found: 3"):
        query(table, "SELECT sum(v) FROM m", {"m": tmp_path / "m.csv"})


def test_names_are_quoted(table: Table, tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv")
    name = 'x" AS SELECT 1; DROP VIEW labels; --'
    found = query(
        table, 'SELECT count(*) AS n FROM "x"" AS SELECT 1; DROP VIEW labels; --"', {name: path}
    )
    assert found.to_pylist() == [{"n": 30}]


def test_only_files_that_are_named_can_be_read(table: Table, tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv")
    (tmp_path / "secret.csv").write_text("a\nhush\n")
    for sql in (
        f"SELECT * FROM '{tmp_path}/secret.csv'",
        f"SELECT * FROM read_csv('{path}')",
        f"SELECT * FROM '{path}'",
        f"COPY (SELECT 1) TO '{path}'",
        "SELECT * FROM secret",
        "SELECT * FROM other",
    ):
        with pytest.raises(BadInputError):
            query(table, sql, {"meta": path})
    with pytest.raises(BadInputError, match=r"no relation 'mata'.*did you mean 'meta'\?"):
        query(table, "SELECT * FROM mata", {"meta": path})
    assert len(path.read_text().splitlines()) == 31


def test_a_locked_session_reads_named_files_alone(table: Table, tmp_path: Path) -> None:
    from softlabels.query.attached import open_files

    path = write(tmp_path / "m.csv")
    (tmp_path / "secret.csv").write_text("a\nhush\n")
    with Session({"": table}, attached=open_files({"m": path}, {}, [])) as session:
        assert session.run("SELECT * FROM m").num_rows == 30
        with pytest.raises(BadInputError):
            session.run(f"SELECT * FROM read_csv('{tmp_path}/secret.csv')")
        with pytest.raises(BadInputError):
            session.run(f"COPY (SELECT 1) TO '{tmp_path}/out.csv'")


def test_an_unknown_column_of_a_file_suggests_the_nearest(table: Table, tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv")
    with pytest.raises(BadInputError, match=r'"wieght" not found.*"weight"'):
        query(table, "SELECT wieght FROM meta", {"meta": path})


def test_a_bad_line_is_said_and_is_no_damage_of_the_table(table: Table, tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("a,b\n1,2\n" + "3,4\n" * 30_000 + "x,5\n")
    with pytest.raises(BadInputError, match=r"Line: 30003 .*'BIGINT'.*, file .*m.csv$") as caught:
        query(table, "SELECT sum(a) AS n FROM m", {"m": path})
    assert "\n" not in str(caught.value)
