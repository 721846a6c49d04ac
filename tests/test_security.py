"""What strangers can put into tables, plans, runs and SQL: nothing outside is read or run."""

import ast
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save

import softlabels
from softlabels.errors import BadInputError, IntegrityError, SoftLabelsError
from softlabels.fingerprint import sha256_bytes
from softlabels.plan import Plan, entries_table
from softlabels.plan_checks import check_place, is_folder_name
from softlabels.query.lazy import scan
from softlabels.query.mix import mix
from softlabels.query.recipe import Recipe
from softlabels.query.sql import check_expression
from softlabels.query.view import query
from softlabels.specs import validate
from softlabels.storage import open_root
from softlabels.store.files import UnitShard
from softlabels.store.inspect import verify
from softlabels.store.stats import measure
from softlabels.store.table import Table
from softlabels.store.tags import read_tag
from softlabels.student import checkpoint
from softlabels.student.saved import read_result
from softlabels.student.stream import Stream
from softlabels.teacher.models import load_weights
from tests.cli.test_table import in_process
from tests.plans import make_plan, plan_table
from tests.tables import make_lineage, make_table

PACKAGE = Path(softlabels.__file__).parent

# Paths


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A whole shard of somebody else's, in a folder of its own."""
    other = make_table(tmp_path / "other", rows=20, shard_rows=20, prefix="hush")
    place = tmp_path / "outside" / Path(other.files[0].path).name
    place.parent.mkdir()
    shutil.copy(Path(other.root.path) / other.files[0].path, place)
    return place


HOSTILE_PATHS = [
    "../outside/{name}",
    "data/../../outside/{name}",
    "data/{inside}/../../../outside/{name}",
    "{outside}",
    "/{outside}",
    "file://{outside}",
    "file:{outside}",
    "memory://{name}",
    "s3://bucket/{name}",
    "http://127.0.0.1:9/{name}",
    "simplecache::file://{outside}",
    "~/{name}",
    "//host/share/{name}",
    "data/%2e%2e/%2e%2e/outside/{name}",
    "%2e%2e/outside/{name}",
    "..%2foutside%2f{name}",
    "data\\..\\..\\outside\\{name}",
    "\\\\host\\share\\{name}",
    "C:\\outside\\{name}",
    "data/a\0/../../../outside/{name}",
]


def spelled(path: str, outside: Path, table: Table) -> str:
    inside = Path(table.files[0].path).name
    return path.format(name=outside.name, outside=outside, inside=inside)


def everything(folder: Path) -> set[tuple[str, int]]:
    return {(str(p), p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


def holds(folder: Path, word: bytes) -> bool:
    """Whether a file of a folder holds a word, or a Parquet file of it a name with the word."""
    for path in folder.rglob("*.parquet"):
        names = pq.read_table(path)
        ids = names["example_id"].to_pylist() if "example_id" in names.schema.names else []
        if any(word.decode() in str(name) for name in ids):
            return True
    return any(word in path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", HOSTILE_PATHS)
def test_a_log_that_names_a_file_outside_of_its_table(
    tmp_path: Path, outside: Path, path: str
) -> None:
    """The log is consistent in itself: whoever can write a table can write its checksums too."""
    table = make_table(tmp_path / "t", rows=20, shard_rows=20)
    other = Table.open(str(tmp_path / "other")).files[0]
    named = spelled(path, outside, table)
    unit = UnitShard("a" * 64 + "/u", named, other.size, other.num_rows, other.statistics)
    try:
        table.commit([unit], make_lineage("a" * 64, ["u"], other.num_rows))
        opened = Table.open(str(tmp_path / "t"))
    except SoftLabelsError:
        return  # delta-rs spells it in another way than was recorded
    uri = str(tmp_path / "t")
    recipe = {"sources": {"a": {"table": uri, "where": "entropy > 0"}}}
    uses: dict[str, Callable[[], Any]] = {
        "batches": lambda: list(opened.batches()),
        "query": lambda: query(opened, "SELECT example_id FROM labels"),
        "scan": lambda: scan(opened).collect(),
        "mix": lambda: mix(Recipe.model_validate(recipe)),
        "stats": lambda: measure(opened),
    }
    for what, use in uses.items():
        with pytest.raises(SoftLabelsError):
            print(what, use())
    assert verify(opened)["problems"]


@pytest.mark.parametrize("path", ["../outside/{name}", "{outside}", "data/../../outside/{name}"])
def test_no_command_reads_writes_or_removes_a_file_outside_of_its_table(
    tmp_path: Path, outside: Path, path: str
) -> None:
    table = make_table(tmp_path / "t", rows=20, shard_rows=20)
    other = Table.open(str(tmp_path / "other")).files[0]
    unit = UnitShard(
        "a" * 64 + "/u", spelled(path, outside, table), other.size, 20, other.statistics
    )
    table.commit([unit], make_lineage("a" * 64, ["u"], 20))
    shutil.rmtree(tmp_path / "other")
    before = everything(outside.parent)
    for arguments, codes in (
        (["show", "t"], (1,)),
        (["stats", "t"], (1,)),
        (["verify", "t"], (1,)),
        (["query", "t", "SELECT example_id FROM labels"], (1,)),
        (["diff", "t@1", "t@2"], (1,)),
        (["compact", "t"], (1,)),
        (["delete", "t", "--where", "entropy >= 0", "--yes"], (1,)),
        (["publish", "t", "copy"], (1,)),
        (["report", "t"], (1,)),
        # The version that names it goes, and with it whatever only that version holds.
        (["rollback", "t@1"], (0, 1)),
        (["vacuum", "t", "--retention", "0d", "--grace", "0d", "--yes"], (0, 1)),
    ):
        done = in_process(*arguments, cwd=tmp_path)
        assert done.returncode in codes, (arguments, done)
        assert "Traceback" not in done.stderr
        assert "hush" not in done.stdout + done.stderr, arguments
        assert everything(outside.parent) == before, arguments
    shutil.rmtree(outside.parent)
    assert not holds(tmp_path, b"hush")


def planned(folder: Path, path: str, **changes: Any) -> Path:
    """A plan of "t" that reads a file at `path`, true in all else."""
    table = Table.open(str(folder / "t"))
    made = make_plan({"a": table})
    listed = plan_table("a", table)
    file = listed.files[0].model_copy(update={"path": path})
    at = made.entries.schema.get_field_index("file")
    names = pa.array([path] * made.entries.num_rows)
    entries = made.entries.set_column(at, made.entries.schema.field(at), names)
    tables = {"a": listed.model_copy(update={"files": (file,), **changes})}
    plan = Plan(tables, entries, {"tables": ["a"]})
    plan.write(folder / "p.plan.parquet")
    return folder / "p.plan.parquet"


@pytest.mark.parametrize("path", HOSTILE_PATHS)
def test_a_plan_that_names_a_file_outside_of_its_roots(
    tmp_path: Path, outside: Path, path: str
) -> None:
    """The file outside is the very one that the plan is made for: its checksums are right."""
    table = make_table(tmp_path / "t", rows=20, shard_rows=20)
    shutil.copy(Path(table.root.path) / table.files[0].path, outside)
    place = planned(tmp_path, spelled(path, outside, table))
    with pytest.raises(SoftLabelsError):
        list(Stream(Plan.read(place), batch_size=8, epochs=1))


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:9/t",
        "https://example.com/t",
        "file:///tmp/t",
        "memory://t",
        "simplecache::s3://bucket/t",
        "s3://bucket/t::file:///etc",
        "zip://x::/tmp/t.zip",
        "reference://x",
        "ssh://host/t",
        "sftp://host/t",
        "github://org:repo@main/t",
        "data:text/plain,x",
        "\\\\host\\share\\t",
        "C:\\t",
        "t",
        "../t",
        "~/t",
        "",
    ],
)
def test_a_plan_opens_no_other_kind_of_place_by_itself(tmp_path: Path, uri: str) -> None:
    table = make_table(tmp_path / "t", rows=20, shard_rows=20)
    place = planned(tmp_path, table.files[0].path, uri=uri)
    plan = Plan.read(place)
    with pytest.raises(IntegrityError, match="--root a=URI"):
        Stream(plan, batch_size=8)
    # Whoever reads it may say where the table is.
    roots = {"a": str(tmp_path / "t")}
    assert sum(map(len, Stream(plan, batch_size=8, epochs=1, roots=roots))) == 20


def test_a_plan_may_name_folders_and_object_stores() -> None:
    for uri in ("/data/t", "s3://bucket/t", "gs://b/t", "az://c/t", "abfss://c/t", "hf://a/t"):
        check_place("a", uri)


@pytest.mark.parametrize("name", ["", "..", "../x", "/x", "a/b", "~", ".hidden", "a:b", "a\0b"])
def test_a_folder_beside_a_plan_is_beside_it(name: str) -> None:
    assert not is_folder_name(name)


def test_a_tables_name_does_not_lead_away_from_the_plan(tmp_path: Path, outside: Path) -> None:
    """A plan looks beside itself for a folder that is called like its table."""
    table = make_table(tmp_path / "t", rows=20, shard_rows=20)
    made = make_plan({"../outside": table})
    entry = {"../outside": made.tables["../outside"].model_copy(update={"uri": "/gone/t"})}
    (tmp_path / "here").mkdir()
    place = tmp_path / "here/p.plan.parquet"
    Plan(entry, made.entries, made.recipe).write(place)
    data = outside.parent / "data"
    data.mkdir()
    shutil.copy(Path(table.root.path) / table.files[0].path, data)
    with pytest.raises(BadInputError, match="nor beside the plan"):
        Stream(Plan.read(place), batch_size=8)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_symbolic_links_do_not_lead_out_of_a_table(
    tmp_path: Path, outside: Path, what: str
) -> None:
    table = make_table(tmp_path / "t", rows=20, shard_rows=20)
    plan = make_plan({"a": table})
    inside = Path(table.root.path) / table.files[0].path
    shutil.copy(inside, outside.parent / inside.name)
    if what == "file":
        inside.unlink()
        inside.symlink_to(outside.parent / inside.name)
    else:
        shutil.rmtree(inside.parent)
        inside.parent.symlink_to(outside.parent)
    with pytest.raises(IntegrityError, match="by a link"):
        list(Stream(plan, batch_size=8, epochs=1))
    with pytest.raises(IntegrityError, match="by a link"):
        query(table, "SELECT * FROM labels")
    with pytest.raises(IntegrityError, match="by a link"):
        scan(table).collect()
    assert verify(table)["problems"]


def test_a_link_that_comes_between_two_epochs_is_not_followed(
    tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was verified is what is read on: the file's new content is never looked at."""
    monkeypatch.setenv("SOFTLABELS_CACHE_BYTES", "0")
    table = make_table(tmp_path / "t", rows=20, shard_rows=20)
    stream = Stream(make_plan({"a": table}), batch_size=20, epochs=3, cache_bytes=0, read_ahead=1)
    batches = iter(stream)
    first = next(batches)
    inside = Path(table.root.path) / table.files[0].path
    inside.unlink()
    inside.symlink_to(outside)
    for batch in batches:
        assert sorted(batch.example_ids.to_pylist()) == sorted(first.example_ids.to_pylist())
    with pytest.raises(IntegrityError, match="by a link"):
        next(iter(Stream(make_plan_of(stream, table), batch_size=20)))


def make_plan_of(stream: Stream, table: Table) -> Plan:
    """The plan again, without opening the file."""
    assert stream.rows_per_epoch == 20
    listed = plan_table("a", table)
    entries = [
        {
            "stage": 0,
            "table": "a",
            "file": table.files[0].path,
            "row_group": 0,
            "num_rows": 20,
            "rows": None,
            "repeats": 1,
            "loss_weight": 1.0,
        }
    ]
    return Plan({"a": listed}, entries_table(entries), {"tables": ["a"]})


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/b", "..", ".x", "a\0", "%2e%2e", "a\\b", "a:b"]
)
def test_tags_name_no_file_elsewhere(tmp_path: Path, name: str) -> None:
    table = make_table(tmp_path / "t", rows=10, shard_rows=10)
    with pytest.raises(BadInputError):
        read_tag(table.root, name)
    with pytest.raises(SoftLabelsError):
        Table.open(f"{table.root.uri}@{name}")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/config.json", "x.py"])
def test_a_finished_run_names_no_file_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("hush")
    out = tmp_path / "run"
    out.mkdir()
    data = save({"x": torch.zeros(1)})
    (out / "student.safetensors").write_bytes(data)
    record = {
        "student_sha256": sha256_bytes(data),
        "files_sha256": {name: "0" * 64},
    }
    record["sha256"] = checkpoint.record_sha256(record)
    (out / "student.json").write_text(json.dumps(record))
    with pytest.raises(IntegrityError, match="files_sha256 names"):
        read_result(out)


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname"])
def test_a_checkpoint_reads_its_own_files_alone(tmp_path: Path, name: str) -> None:
    path = checkpoint.save(tmp_path, 1, {"x": torch.zeros(1)}, {}, {"step": 1}, keep=1)
    state = json.loads((path / "state.json").read_text())
    state["sha256"][name] = "0" * 64
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(IntegrityError, match="damaged"):
        checkpoint.load(path)


def test_a_folder_that_is_no_root_is_not_opened() -> None:
    for uri in ("s3://key:secret@bucket/t", "http://user@host/t", "/tmp/a\0b", "/tmp/\ud800"):
        with pytest.raises(BadInputError) as caught:
            open_root(uri)
        assert "secret" not in str(caught.value)


# SQL


ATTACKS = [
    "SELECT * FROM read_text('{secret}')",
    "SELECT * FROM read_text(['{secret}'])",
    "SELECT * FROM read_blob('{folder}/*')",
    "SELECT * FROM read_csv_auto('{secret}')",
    "SELECT * FROM read_json('{secret}')",
    "SELECT * FROM read_json_objects('{secret}')",
    "SELECT * FROM read_ndjson_objects('{secret}')",
    "SELECT * FROM read_xlsx('{secret}')",
    "SELECT * FROM parquet_scan('{folder}/*')",
    "SELECT * FROM parquet_schema('{secret}')",
    "SELECT * FROM parquet_file_metadata('{secret}')",
    "SELECT * FROM parquet_kv_metadata('{secret}')",
    "SELECT * FROM parquet_bloom_probe('{secret}', 'a', 1)",
    "SELECT * FROM sniff_csv('{secret}')",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM sqlite_scan('{secret}', 'a')",
    "SELECT * FROM postgres_scan('', '', '')",
    "SELECT * FROM delta_scan('{folder}')",
    "SELECT * FROM iceberg_scan('{folder}')",
    "SELECT * FROM st_read('{secret}')",
    "SELECT * FROM pandas_scan(1)",
    "SELECT * FROM python_map_function(1)",
    "SELECT * FROM seq_scan('labels')",
    "SELECT * FROM arrow_scan_dumb(1, 2, 3)",
    "SELECT * FROM duckdb_logs()",
    "SELECT * FROM duckdb_log_contexts()",
    "SELECT * FROM duckdb_temporary_files()",
    "SELECT * FROM duckdb_external_file_cache()",
    "SELECT * FROM duckdb_extensions()",
    "SELECT * FROM duckdb_functions()",
    "SELECT * FROM duckdb_memory()",
    "SELECT * FROM duckdb_databases()",
    "SELECT * FROM which_secret('s3://a', 's3')",
    "SELECT * FROM pragma_database_size()",
    "SELECT * FROM pragma_table_info('labels')",
    "SELECT * FROM pragma_storage_info('labels')",
    "SELECT * FROM pragma_user_agent()",
    "SELECT * FROM sql_auto_complete('SEL')",
    "SELECT * FROM repeat_row(1, num_rows = 9)",
    "SELECT * FROM test_all_types()",
    "SELECT * FROM checkpoint()",
    "SELECT * FROM force_checkpoint()",
    "SELECT * FROM enable_logging()",
    "SELECT * FROM enable_profiling()",
    "SELECT * FROM query('COPY (SELECT 1) TO ''{out}''')",
    "SELECT * FROM query_table(['labels', 'duckdb_settings'])",
    "SELECT * FROM json_execute_serialized_sql('{{}}')",
    "SELECT * FROM from_substrait('x')",
    "SELECT getenv('PATH')",
    "SELECT \"getenv\"('PATH')",
    "SELECT 'PATH'.getenv()",
    "SELECT main.getenv('PATH')",
    "SELECT system.main.getenv('PATH')",
    "SELECT list_transform(['PATH'], lambda x: getenv(x))",
    "SELECT count(*) FILTER (getenv('PATH') <> '') FROM labels",
    "SELECT 1 FROM labels GROUP BY getenv('PATH')",
    "SELECT 1 FROM labels ORDER BY getenv('PATH')",
    "SELECT 1 LIMIT (SELECT length(getenv('PATH')))",
    "SELECT current_setting('home_directory')",
    "SELECT getvariable('x')",
    "SELECT write_log('hush')",
    "SELECT sleep_ms(10000)",
    "SELECT pg_sleep(10)",
    "SELECT * FROM labels WHERE EXISTS (FROM read_text('{secret}'))",
    "SELECT * FROM labels JOIN read_text('{secret}') ON true",
    "SELECT (FROM read_text('{secret}') SELECT content)",
    "SELECT * FROM (SUMMARIZE FROM read_csv('{secret}'))",
    "SELECT * FROM (DESCRIBE FROM '{secret}')",
    "SELECT * FROM (PIVOT '{secret}' ON a USING count(*))",
    "SELECT * FROM (SHOW DATABASES)",
    "FROM '{secret}'",
    "TABLE '{secret}'",
    "FROM 'http://127.0.0.1:9/x.csv'",
    "FROM 's3://bucket/x.parquet'",
    "DESCRIBE '{secret}'",
    "SUMMARIZE '{secret}'",
    "SHOW TABLES",
    "EXPLAIN SELECT 1",
    "COPY labels FROM '{secret}'",
    "COPY FROM DATABASE memory TO other",
    "COPY (FROM labels) TO '{out}' (FORMAT parquet, PARTITION_BY (label))",
    "EXPORT DATABASE '{folder}/export'",
    "IMPORT DATABASE '{folder}'",
    "ATTACH ':memory:' AS other",
    "ATTACH 'ducklake:{out}' AS other",
    "DETACH memory",
    "USE memory",
    "CREATE VIEW v AS FROM read_text('{secret}')",
    "CREATE MACRO m() AS TABLE FROM read_text('{secret}')",
    "CREATE SECRET s (TYPE s3, KEY_ID 'a', SECRET 'b')",
    "CREATE PERSISTENT SECRET s (TYPE s3)",
    "CREATE TEMP TABLE t AS SELECT 1",
    "CREATE OR REPLACE VIEW labels AS SELECT 1",
    "DROP SECRET s",
    "ALTER TABLE labels ADD COLUMN x INT",
    "UPDATE labels SET label = 1",
    "DELETE FROM labels",
    "TRUNCATE labels",
    "MERGE INTO labels USING labels AS l ON true WHEN MATCHED THEN DELETE",
    "INSERT OR REPLACE INTO labels FROM labels",
    "WITH x AS (INSERT INTO labels VALUES (1) RETURNING *) FROM x",
    "WITH x AS (UPDATE labels SET label = 1 RETURNING *) FROM x",
    "SET threads = 1000",
    "SET GLOBAL allowed_paths = ['/']",
    "SET VARIABLE x = 1",
    "RESET allowed_paths",
    "LOAD '{folder}/evil.duckdb_extension'",
    "FORCE INSTALL httpfs",
    "INSTALL evil FROM community",
    "UPDATE EXTENSIONS",
    "PRAGMA enable_profiling",
    "PRAGMA version",
    "CALL enable_logging()",
    "CHECKPOINT",
    "VACUUM",
    "ANALYZE",
    "BEGIN TRANSACTION",
    "EXECUTE p",
    "DEALLOCATE p",
    ".read {secret}",
    ".shell touch {out}",
    "SELECT 1; SELECT 2",
]


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Table:
    folder = tmp_path_factory.mktemp("attacked")
    (folder / "secret.csv").write_text("a,b\nhush,1\n")
    return make_table(folder / "t", rows=20, shard_rows=20)


def test_there_are_many_attacks() -> None:
    assert len(set(ATTACKS)) == len(ATTACKS) > 100


@pytest.mark.parametrize("sql", ATTACKS)
def test_sql_that_does_anything_but_read_the_table_is_refused(attacked: Table, sql: str) -> None:
    folder = Path(attacked.root.path).parent
    before = everything(folder)
    out = folder / "out"
    text = sql.format(secret=folder / "secret.csv", folder=folder, out=out)
    with pytest.raises(BadInputError) as caught:
        query(attacked, text)
    assert "hush" not in str(caught.value)
    assert os.environ["PATH"] not in str(caught.value)
    assert everything(folder) == before


EXPRESSIONS = [
    "(FROM read_text('{secret}') SELECT content) = 'x'",
    "label IN (FROM read_csv('{secret}'))",
    "getenv('PATH') = 'x'",
    "'PATH'.getenv() = 'x'",
    "list_transform(['PATH'], lambda x: getenv(x))[1] = 'x'",
    "current_setting('threads') > 0",
    "getvariable('x') = 1",
    "write_log('x') IS NULL",
    "sleep_ms(1000) IS NULL",
    "nextval('s') > 0",
    "random() > 0.5",
    "uuid() <> ''",
    "txid_current() > 0",
    "1) OR (1",
    "1; COPY labels TO '{out}'",
    "1 UNION FROM read_text('{secret}')",
    "true) TO '{out}' --",
    "true /* ",
    "? = 1",
    "* = 1",
    "COLUMNS('.*') IS NULL",
    "count(*) OVER () > 1 AND EXISTS (SELECT 1)",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_that_see_more_than_a_row_are_refused(attacked: Table, expression: str) -> None:
    folder = Path(attacked.root.path).parent
    text = expression.format(secret=folder / "secret.csv", out=folder / "out")
    before = everything(folder)
    with pytest.raises(BadInputError):
        check_expression(text)
    for where in ({"where": text}, {"sample_by": text}, {"limit": {"rows": 1, "by": text}}):
        recipe = {"sources": {"a": {"table": attacked.root.uri, **where}}}
        with pytest.raises(SoftLabelsError):
            mix(validate(Recipe, recipe, "recipe"))
    done = in_process("delete", "t", "--where", text, cwd=folder)
    assert done.returncode == 2, done
    done = in_process("calibrate", "t", "--out", "c", "--where", text, cwd=folder)
    assert done.returncode in (1, 2), done
    assert everything(folder) == before


# Pickles


class Planted:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


REFUSED_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
}
REFUSED_CALLS = {"eval", "exec", "compile", "__import__"}


def dangers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of whatever may run what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.split(".")[0] in REFUSED_MODULES:
                    yield node.lineno, f"imports {name}"
        if isinstance(node, ast.keyword):
            given = node.value.value if isinstance(node.value, ast.Constant) else True
            if node.arg in ("trust_remote_code", "allow_pickle", "shell") and given is not False:
                yield node.value.lineno, f"{node.arg}={given!r}"
            if node.arg == "weights_only" and given is not True:
                yield node.value.lineno, f"weights_only={given!r}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg for keyword in node.keywords}
        if called in REFUSED_CALLS:
            yield node.lineno, f"calls {called}"
        if called in ("torch.hub.load", "torch.jit.load"):
            yield node.lineno, f"calls {called}"
        if called == "torch.load" and "weights_only" not in keywords:
            yield node.lineno, f"calls {called} without weights_only=True"
        if called in ("np.load", "numpy.load") and "allow_pickle" not in keywords:
            yield node.lineno, f"calls {called} without allow_pickle=False"
        if called.startswith("yaml.") and called.split(".")[1] in ("load", "load_all"):
            loaders = [k.value for k in node.keywords if k.arg == "Loader"] + node.args[1:]
            given_loaders = {ast.unparse(loader) for loader in loaders}
            if given_loaders not in ({"_StrictLoader"}, {"yaml.SafeLoader"}):
                yield node.lineno, f"calls {called} with {sorted(given_loaders)}"
        if called in ("yaml.unsafe_load", "yaml.full_load", "os.system", "pd.read_pickle"):
            yield node.lineno, f"calls {called}"


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: f.stem)
def test_nothing_that_is_read_can_be_run(file: Path) -> None:
    assert not list(dangers(ast.parse(file.read_text())))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text, yaml.UnsafeLoader)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=flag)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_what_can_be_run_would_be_found(code: str) -> None:
    assert list(dangers(ast.parse(code)))


def pickles(folder: Path, mark: Path) -> list[Path]:
    """Files that run code where they are unpickled, under all names that weights have."""
    data = pickle.dumps(Planted(mark))
    made = []
    for name in ("w.pt", "w.bin", "w.pth", "w.pkl", "w.safetensors", "w.ckpt"):
        (folder / name).write_bytes(data)
        made.append(folder / name)
    torch.save({"x": Planted(mark)}, folder / "torch.pt")
    array = np.array([Planted(mark)], dtype=object)
    np.save(folder / "w.npy", array, allow_pickle=True)
    np.savez(folder / "w.npz", x=array)
    with zipfile.ZipFile(folder / "zipped.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", data)
    others = ("torch.pt", "w.npy", "w.npz", "zipped.safetensors")
    return [*made, *(folder / name for name in others)]


def test_pickles_in_the_place_of_weights_are_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    folder = tmp_path / "pickles"
    folder.mkdir()
    for path in pickles(folder, mark):
        with pytest.raises(SoftLabelsError):
            checkpoint.read_weights(path)
        with pytest.raises(SoftLabelsError):
            load_weights(torch.nn.Linear(2, 2), str(path))
    assert not mark.exists()
    pickle.loads((folder / "w.pkl").read_bytes())  # noqa: S301 - it is ours
    assert mark.exists()  # it would have shown


def test_a_pickle_in_the_place_of_any_file_of_a_run_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    data = pickle.dumps(Planted(mark))
    state = {"step": 1}
    for name in ("student.safetensors", "optimizer.safetensors", "state.json"):
        path = checkpoint.save(tmp_path, 1, {"x": torch.zeros(1)}, {}, state, keep=1)
        (path / name).write_bytes(data)
        with pytest.raises(IntegrityError):
            checkpoint.load_newest(tmp_path)
        shutil.rmtree(path)
    (tmp_path / "student.safetensors").write_bytes(data)
    (tmp_path / "student.json").write_bytes(data)
    with pytest.raises(IntegrityError):
        read_result(tmp_path)
    assert not mark.exists()


def test_a_pickle_in_the_place_of_a_plan_a_tag_or_a_shard_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    data = pickle.dumps(Planted(mark))
    (tmp_path / "p.plan.parquet").write_bytes(data)
    with pytest.raises(IntegrityError):
        Plan.read(tmp_path / "p.plan.parquet")
    table = make_table(tmp_path / "t", rows=10, shard_rows=10)
    plan = make_plan({"a": table})
    file = Path(table.root.path) / table.files[0].path
    size = file.stat().st_size
    file.write_bytes(data + bytes(max(0, size - len(data))))
    with pytest.raises(IntegrityError):
        list(Stream(plan, batch_size=8, epochs=1))
    with pytest.raises(SoftLabelsError):
        query(table, "SELECT * FROM labels")
    tags = tmp_path / "t/_softlabels/tags"
    tags.mkdir(parents=True)
    (tags / "v1.json").write_bytes(data)
    with pytest.raises(IntegrityError):
        read_tag(table.root, "v1")
    assert not mark.exists()
