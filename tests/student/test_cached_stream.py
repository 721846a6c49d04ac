"""Streams over the local cache: the same batches, from wherever their rows come."""

import gc
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest

from softlabels.errors import IntegrityError
from softlabels.plan import Plan
from softlabels.rules import PositionRules
from softlabels.storage import Root
from softlabels.store.table import Table
from softlabels.student.decode import Decoder
from softlabels.student.rows import Rows
from softlabels.student.stream import Batch, Stream
from tests.plans import make_ensemble_plan, make_plan
from tests.sequences import make_long, make_uneven
from tests.servers import S3
from tests.student.parts import assert_same
from tests.student.test_reader import HARD, LIGHT, ruled
from tests.tables import make_table


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOFTLABELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def classification(folder: Path) -> Plan:
    table = make_table(
        folder,
        rows=120,
        k=5,
        draws=3,
        temperatures=[2.0],
        shard_rows=60,
        row_group_rows=20,
        carried={"number": pa.array(range(120)), "text": pa.array([f"t{i}" for i in range(120)])},
    )
    return make_plan(table, keep=lambda entry, rows: None if entry % 2 else range(0, rows, 3))


def sequences(folder: Path) -> Plan:
    return make_plan(make_long(folder, rows=24, positions=64))


def uneven(folder: Path) -> Plan:
    # Of uneven length, and long enough to be laid out row by row.
    return make_plan(make_uneven(folder, rows=40, length=90, k=12, draws=6))


def by_rules(folder: Path) -> Plan:
    return ruled(make_uneven(folder, rows=40), PositionRules(where=(HARD,), weights=(LIGHT,)))


def two_widths(folder: Path) -> Plan:
    tables = [make_table(folder / "a", rows=40, k=5), make_table(folder / "b", rows=40, k=3)]
    return make_plan(tables)


def ensemble(folder: Path) -> Plan:
    tables = {
        "a": make_table(folder / "a", rows=60),
        "b": make_table(folder / "b", rows=60, seed=1, order=[*range(59, -1, -1)]),
    }
    return make_ensemble_plan(tables)


PLANS = [classification, sequences, uneven, by_rules, two_widths, ensemble]
COLUMNS = {"classification": ("number", "text"), "sequences": ("input_ids",)}


def read(plan: Plan, epochs: int = 2, **options: Any) -> list[Batch]:
    stream = Stream(plan, batch_size=7, epochs=epochs, seed=5, shuffle_rows=30, **options)
    return list(stream)


def rows_of(batch: Batch) -> Rows:
    return Rows(
        batch.targets,
        batch.example_ids,
        batch.columns,
        batch.position_weights,
        others=tuple(other.targets for other in batch.others),
        member_weights=batch.member_weights,
    )


def assert_equal(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert_same(rows_of(one), rows_of(other))
        assert (one.epoch, one.position) == (other.epoch, other.position)
        assert one.loss_weights.tolist() == other.loss_weights.tolist()


class Decoded:
    """Counts what is decoded, by place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.places: list[tuple[str, str, int]] = []
        decode = Decoder.decode

        def counted(own: Decoder, *place: Any) -> Rows:
            self.places.append(place[:3])
            return decode(own, *place)

        monkeypatch.setattr(Decoder, "decode", counted)


@pytest.mark.parametrize("make", PLANS)
def test_batches_are_the_same_with_and_without(
    make: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make(tmp_path / "t")
    options: dict[str, Any] = {"columns": COLUMNS.get(make.__name__, ())}
    if make is classification:
        options["temperatures"] = [2.0]
    with monkeypatch.context() as patch:
        patch.setenv("SOFTLABELS_CACHE_BYTES", "0")
        expected = read(plan, **options)
    assert not cache.exists()
    decoded = Decoded(monkeypatch)
    assert_equal(read(plan, cache_bytes=0, **options), expected)
    groups = len(set(decoded.places))
    assert groups
    assert len(decoded.places) == groups, "decoded once, for two epochs"
    # A later run decodes nothing; neither does another plan of these files, or another rank.
    assert_equal(read(plan, cache_bytes=0, **options), expected)
    read(plan, 1, cache_bytes=0, rank=1, world_size=2, **options)
    assert len(decoded.places) == groups
    for batch in read(plan, 1, cache_bytes=0, **options):
        assert batch.targets.ids.flags.writeable, "batches are their owner's"


def test_what_fits_into_memory_is_not_written(tmp_path: Path, cache: Path) -> None:
    plan = sequences(tmp_path / "t")
    read(plan)
    assert not cache.exists()
    read(plan, 1, cache_bytes=0)
    assert not list((cache / "shards").iterdir()), "one epoch of local files fills none"


def test_a_cache_that_is_emptied_meanwhile_costs_no_row(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for make in (sequences, classification):
        plan = make(tmp_path / make.__name__)
        expected = read(plan, 3)
        stream = Stream(plan, batch_size=7, epochs=3, seed=5, shuffle_rows=30, cache_bytes=0)
        found = []
        for number, batch in enumerate(stream):
            if number % 3 == 1:
                shutil.rmtree(cache / "shards", ignore_errors=True)
                (cache / "shards").mkdir(exist_ok=True)
            found.append(batch)
        assert_equal(found, expected)


def test_damage_in_the_cache_is_found_before_it_is_trained_on(tmp_path: Path, cache: Path) -> None:
    plan = sequences(tmp_path / "t")
    expected = read(plan, cache_bytes=0)
    files = sorted(p for p in (cache / "shards").rglob("*") if p.is_file())
    for number, path in enumerate(files):
        data = bytearray(path.read_bytes())
        data[(number + 1) * len(data) // (len(files) + 2)] ^= 1 << number % 8
        path.write_bytes(data)
    assert_equal(read(plan, cache_bytes=0), expected)


def test_a_plan_that_names_other_bytes_gets_none_of_these(tmp_path: Path, cache: Path) -> None:
    plan = classification(tmp_path / "t")
    read(plan, cache_bytes=0)
    table = plan.tables["a"]
    lying = table.model_copy(
        update={
            "files": tuple(
                file.model_copy(update={"sha256": f"{number:064x}"})
                for number, file in enumerate(table.files)
            )
        }
    )
    with pytest.raises(IntegrityError, match="sha256"):
        read(replace(plan, tables={"a": lying}), cache_bytes=0)


def test_rows_of_the_cache_are_those_of_the_bytes_whatever_the_path_says(
    tmp_path: Path, cache: Path
) -> None:
    plan = classification(tmp_path / "t")
    expected = read(plan, cache_bytes=0)
    shutil.rmtree(tmp_path / "t" / "data")  # storage that is away
    roots = {"a": str(tmp_path / "t")}
    assert_equal(read(plan, cache_bytes=0, roots=roots), expected)


def test_two_processes_decode_each_row_group_once(tmp_path: Path, cache: Path) -> None:
    plan = sequences(tmp_path / "t")
    plan.write(tmp_path / "plan.parquet")
    code = f"""
import sys
sys.path.insert(0, {str(Path.cwd())!r})
from softlabels.plan import Plan
from softlabels.student.decode import Decoder
from softlabels.student.stream import Stream
count, decode = [0], Decoder.decode
def counted(*arguments):
    count[0] += 1
    return decode(*arguments)
Decoder.decode = counted
stream = Stream(Plan.read({str(tmp_path / "plan.parquet")!r}), batch_size=4, epochs=2, seed=1,
    shuffle_rows=20, cache_bytes=0, rank=int(sys.argv[1]), world_size=2)
sys.stdin.readline()
rows = sum(len(batch) for batch in stream)
print(count[0], rows)
"""
    environment = os.environ | {"SOFTLABELS_CACHE": str(cache)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [tuple(map(int, process.communicate(timeout=120)[0].split())) for process in both]
    assert sum(rows for _, rows in found) == 2 * 24
    assert sum(count for count, _ in found) == plan.entries.num_rows


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[tuple[Plan, str, Any]]:
    """A plan, a copy of its table on a filesystem that is not this machine's, and that."""
    table = make_long(tmp_path / "t", rows=320, positions=128)
    uri = f"memory://{uuid.uuid4().hex}"
    fs, path = fsspec.url_to_fs(uri)
    for file in table.files:
        fs.pipe_file(f"{path}/{file.path}", table.root.read(file.path))
    yield make_plan(table), uri, fs
    fs.rm(path, recursive=True)


def fetchers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "softlabels-fetch" and t.is_alive()]


def wait_until(what: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_first_batch_needs_no_whole_file(
    remote: tuple[Plan, str, Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, uri, fs = remote
    monkeypatch.setenv("SOFTLABELS_CACHE_BYTES", "0")
    size = sum(file.size for file in plan.tables["a"].files)
    fetched = [0]
    whole = type(fs).cat_file

    def counted(own: Any, path: str, start: Any = None, end: Any = None, **more: Any) -> bytes:
        part: bytes = whole(own, path, start=start, end=end, **more)
        fetched[0] += len(part)
        return part

    monkeypatch.setattr(type(fs), "cat_file", counted)
    options: dict[str, Any] = {"epochs": 1, "shuffle_rows": 10, "roots": {"a": uri}}
    batches = iter(Stream(plan, batch_size=4, **options))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    # Of eight row groups three or four: of two windows, and of one that is read ahead.
    assert 0 < fetched[0] < 0.6 * size


def test_remote_files_are_compared_whole_while_the_cache_fills(
    remote: tuple[Plan, str, Any], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, uri, fs = remote
    expected = read(plan)
    decoded = Decoded(monkeypatch)
    stream = Stream(
        plan, batch_size=7, epochs=2, seed=5, shuffle_rows=30, roots={"a": uri}, cache_bytes=0
    )
    assert_equal(list(stream), expected)
    groups = plan.entries.num_rows
    wait_until(lambda: len([p for p in (cache / "shards").rglob("*-*") if p.is_file()]) == groups)
    assert len(decoded.places) >= groups
    del stream
    gc.collect()
    wait_until(lambda: not fetchers())
    assert not [p for p in cache.iterdir() if p.name not in ("shards", "streams", "lock")]
    # Now storage may be away altogether.
    fs.rm(fsspec.url_to_fs(uri)[1], recursive=True)
    assert_equal(read(plan, roots={"a": uri}, cache_bytes=0), expected)
    fs.pipe_file(f"{fsspec.url_to_fs(uri)[1]}/x", b"")  # for the fixture to remove


def test_a_remote_file_with_other_bytes_where_nobody_looks_is_refused(
    remote: tuple[Plan, str, Any], cache: Path
) -> None:
    plan, uri, fs = remote
    path = f"{fsspec.url_to_fs(uri)[1]}/{plan.tables['a'].files[0].path}"
    data = bytearray(fs.cat_file(path))
    data[2] ^= 1  # of the mark at its start: no page, no footer
    fs.pipe_file(path, bytes(data))
    stream = Stream(plan, batch_size=4, seed=5, shuffle_rows=30, roots={"a": uri}, cache_bytes=0)

    def train() -> None:
        for _ in stream:
            time.sleep(0.005)

    with pytest.raises(IntegrityError, match="has sha256"):
        train()
    assert not [p for p in (cache / "shards").rglob("*-*") if p.is_file()]


def test_of_a_file_that_is_hardly_read_page_checksums_have_to_do(
    remote: tuple[Plan, str, Any], cache: Path
) -> None:
    plan, uri, _ = remote
    few = replace(plan, entries=plan.entries.slice(0, 2))
    expected, before = read(few), fetchers()
    stream = Stream(
        few, batch_size=7, epochs=2, seed=5, shuffle_rows=30, roots={"a": uri}, cache_bytes=0
    )
    assert_equal(list(stream), expected)
    (thread,) = set(fetchers()) - set(before)
    assert stream._reader._source._fetcher is not None
    assert set(stream._reader._source._fetcher._fills.values()) == {False}
    assert thread.is_alive()
    assert len([p for p in (cache / "shards").rglob("*-*") if p.is_file()]) == 2


def test_the_same_from_an_object_store(s3: S3, tmp_path: Path, cache: Path) -> None:
    make_long(tmp_path / "t", rows=32, positions=64)
    local = Table.open(str(tmp_path / "t"))
    for file in local.files:
        fs, path = fsspec.url_to_fs(s3.url("t"), client_kwargs={"endpoint_url": s3.endpoint})
        fs.pipe_file(f"{path}/{file.path}", local.root.read(file.path))
    plan = make_plan(local)
    expected = read(plan)
    for _ in range(2):
        assert_equal(read(plan, roots={"a": s3.url("t")}, cache_bytes=0), expected)


def test_the_first_batch_from_an_object_store_needs_ranges_of_files_only(
    s3: S3, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_long(tmp_path / "t", rows=320, positions=128)
    local = Table.open(str(tmp_path / "t"))
    fs, path = fsspec.url_to_fs(s3.url("t"), client_kwargs={"endpoint_url": s3.endpoint})
    for file in local.files:
        fs.pipe_file(f"{path}/{file.path}", local.root.read(file.path))
    plan = make_plan(local)
    monkeypatch.setenv("SOFTLABELS_CACHE_BYTES", "0")
    fetched, ranges = [], Root.ranges

    def counted(own: Root, path: str, starts: Any, ends: Any) -> Any:
        found = ranges(own, path, starts, ends)
        fetched.append(sum(map(len, found)))
        return found

    def refused(*arguments: Any) -> Any:
        raise AssertionError("a whole file was read")

    monkeypatch.setattr(Root, "ranges", counted)
    for name in ("read", "buffer"):
        monkeypatch.setattr(Root, name, refused)
    roots = {"a": s3.url("t")}
    batches = iter(Stream(plan, batch_size=4, epochs=1, shuffle_rows=10, roots=roots))
    assert len(next(batches)) == 4
    batches.close()  # type: ignore[attr-defined]
    assert 0 < sum(fetched) < 0.6 * sum(file.size for file in local.files)
