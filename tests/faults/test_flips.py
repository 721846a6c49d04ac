"""Single bytes changed in every kind of file: each is noticed before its use, or changes nothing.

What a student learns from is compared bit for bit: the batches, and the weights after training.
The log and its checkpoints are flipped in tests of the table.
"""

import contextlib
import hashlib
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from softlabels.errors import MismatchError, SoftLabelsError, TryAgainError
from softlabels.plan import Plan
from softlabels.query.mix import mix
from softlabels.query.recipe import Recipe
from softlabels.store.inspect import verify
from softlabels.store.table import Table
from softlabels.store.tags import make_tag
from softlabels.student.checkpoint import read_weights
from softlabels.student.saved import evaluate_saved, read_run
from softlabels.student.stream import Batch, Stream
from softlabels.student.trainer import Progress, train
from softlabels.targets import SoftTargets
from softlabels.teacher.capture import capture
from softlabels.teacher.sequences import open_sequences
from softlabels.teacher.tokenizer import tokenizer_of
from tests.faults.record import record, scaled
from tests.student.problem import make_problem, run_spec
from tests.tables import make_table
from tests.teacher.jobs import make_spec, write_source
from tests.teacher.texts import SENTENCES, text_spec, tiny_tokenizer, write_lines
from tests.teacher.toys import Linear

SEED = 20

DROPPED = {"module": "tests.student.problem:Dropped"}


@contextlib.contextmanager
def flipped(path: Path, rng: random.Random) -> Iterator[None]:
    """The file with one byte changed, for as long as the block runs; then as it was."""
    data = path.read_bytes()
    at = rng.randrange(len(data))
    changed = bytes([data[at] ^ rng.randrange(1, 256)])
    # Another inode: nothing that was mapped before may hold the new bytes.
    _replace(path, data[:at] + changed + data[at + 1 :])
    try:
        yield
    finally:
        _replace(path, data)


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.fresh")
    fresh.write_bytes(data)
    fresh.replace(path)


def outcomes(
    what: str, paths: Sequence[Path], use: Callable[[], Any], full: int, short: int = 6
) -> Counter[str]:
    """Flips a byte of one of `paths`, uses it, and again; each use gives the same or an error."""
    rng = random.Random(f"{SEED} {what}")
    expected = use()
    found: Counter[str] = Counter()
    for _ in range(scaled(short, full)):
        path = rng.choice(paths)
        with flipped(path, rng):
            try:
                got = use()
            except SoftLabelsError:
                found["noticed"] += 1
                continue
        assert got == expected, f"{what}: a flip in {path.name} went unnoticed"
        found["harmless"] += 1
    assert use() == expected
    record(f"bytes flipped: {what}", {"flips": sum(found.values()), **found, "unnoticed": 0})
    return found


def digest(batches: Iterator[Batch]) -> str:
    """Of every number and text of the batches."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, np.ndarray):
            found.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        elif isinstance(value, SoftTargets):
            for field in fields(value):
                add(getattr(value, field.name))
        elif isinstance(value, dict):
            for key in sorted(value):
                found.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, pa.Array):
            found.update(repr(value.to_pylist()).encode())
        else:
            found.update(repr(value).encode())

    for batch in batches:
        for field in fields(batch):
            add(getattr(batch, field.name))
    return found.hexdigest()


def learnt(plan: Path, **options: Any) -> Callable[[], str]:
    """What two epochs of the plan hold, in a stream of its own each time."""

    def use() -> str:
        read = Plan.read(plan)
        stream = Stream(read, batch_size=32, epochs=2, columns=["features"], **options)
        return digest(iter(stream))

    return use


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table "train" and a plan of it."""
    folder = tmp_path_factory.mktemp("flips")
    make_problem(folder, draws=2, temperatures=(2.0,), k=4)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOFTLABELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_of_data_files_that_are_trained_on(problem: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTLABELS_CACHE_BYTES", "0")
    shards = sorted((problem / "train/data").glob("*.parquet"))
    found = outcomes("data files", shards, learnt(problem / "train.plan.parquet"), 200)
    assert not found["harmless"]  # the sha256 is of all bytes


def test_of_data_files_read_by_ranges(problem: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store gives other bytes than were put there; no whole file is fetched to be hashed."""
    monkeypatch.setenv("SOFTLABELS_CACHE_BYTES", "0")
    store = fsspec.filesystem("memory")
    root = f"/flips-{problem.name}"
    names = [str(p.relative_to(problem)) for p in sorted(problem.glob("train/data/*.parquet"))]
    for name in names:
        store.pipe_file(f"{root}/{name}", (problem / name).read_bytes())
    use = learnt(problem / "train.plan.parquet", roots={"train": f"memory:/{root}/train"})
    expected, rng = use(), random.Random(SEED)
    found: Counter[str] = Counter()
    for _ in range(scaled(6, 150)):
        name = rng.choice(names)
        data = bytearray((problem / name).read_bytes())
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        store.pipe_file(f"{root}/{name}", bytes(data))
        try:
            # Bytes between pages, and of columns that are not read, are not looked at.
            assert use() == expected
            found["harmless"] += 1
        except SoftLabelsError:
            found["noticed"] += 1
        store.pipe_file(f"{root}/{name}", (problem / name).read_bytes())
    assert found["noticed"] > found["harmless"]
    counts = {"flips": sum(found.values()), **found, "unnoticed": 0}
    record("bytes flipped: data files read by ranges", counts)


def test_of_data_files_that_are_verified(problem: Path) -> None:
    def use() -> int:
        found = verify(Table.open(str(problem / "train")))
        if found["problems"]:
            raise MismatchError(found["problems"][0])
        return int(found["rows"])

    shards = sorted((problem / "train/data").glob("*.parquet"))
    assert not outcomes("data files, verify", shards, use, 50)["harmless"]


def test_of_data_files_that_a_recipe_chooses_from(
    problem: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DuckDB checks no page: a plan made from other values is refused by whoever reads the rows."""
    monkeypatch.setenv("SOFTLABELS_CACHE_BYTES", "0")
    source = {"table": str(problem / "train"), "where": "entropy > 0.5 AND margin < 0.9"}
    recipe = Recipe.model_validate({"sources": {"train": source}})

    def use() -> str:
        stream = Stream(mix(recipe), batch_size=32, epochs=1, columns=["features"])
        return digest(iter(stream))

    shards = sorted((problem / "train/data").glob("*.parquet"))
    outcomes("data files, mix and train", shards, use, 50, short=4)


def test_of_plans(problem: Path) -> None:
    plan = problem / "train.plan.parquet"
    outcomes("plans", [plan], learnt(plan), 150, short=15)


def test_of_the_students_cache(problem: Path, cache: Path) -> None:
    use = learnt(problem / "train.plan.parquet", cache_bytes=0)
    use()
    # Beside them are marks of streams, which go with their streams and hold no rows.
    files = [p for p in (cache / "shards").rglob("*") if p.is_file() and p.stat().st_size]
    assert files
    outcomes("the student's cache", files, use, 150, short=10)


def test_of_the_cache_of_tokenised_text(tmp_path: Path, cache: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in SENTENCES])
    spec = text_spec(tmp_path, tiny_tokenizer(tmp_path / "tokenizer"), files=str(path))

    def use() -> list[Any]:
        source = open_sequences(spec, tokenizer_of(spec), None)
        return [b.to_pydict() for b in source.batches(0, source.num_rows, source.schema.names)]

    use()
    # A damaged file is removed, and one of another name takes its place.
    rng, expected, count = random.Random(SEED), use(), scaled(6, 50)
    for _ in range(count):
        (file,) = (cache / "sequences").glob("*.parquet")
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        file.write_bytes(bytes(data))
        assert use() == expected
    counts = {"flips": count, "harmless": count, "unnoticed": 0}
    record("bytes flipped: cache of tokenised text", counts)


def test_of_checkpoints_that_training_goes_on_from(problem: Path, tmp_path: Path) -> None:
    spec = run_spec(
        tmp_path,
        problem / "train.plan.parquet",
        student=DROPPED,
        steps=4,
        checkpoint={"every": 2},
        log_every=1,
    )

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise TryAgainError("enough")

    with pytest.raises(TryAgainError):
        train(spec, report=stop)
    stopped = tmp_path / "stopped"
    shutil.move(spec.out, stopped)

    def use() -> bytes:
        shutil.rmtree(spec.out, ignore_errors=True)
        shutil.copytree(stopped, spec.out)
        return train(spec).student.read_bytes()

    files = [p for p in stopped.rglob("*") if p.is_file() and p.stat().st_size]
    assert {p.name for p in files} >= {"student.safetensors", "optimizer.safetensors", "state.json"}
    outcomes("a student's checkpoint", files, use, 150, short=8)


def test_of_finished_students(problem: Path, tmp_path: Path) -> None:
    plan = problem / "train.plan.parquet"
    out = train(run_spec(tmp_path, plan, steps=2)).student.parent
    read = Plan.read(plan)

    def use() -> Any:
        found = evaluate_saved(read_run(out), read).as_dict()
        found.pop("examples_per_s")
        tensors = read_weights(out / "student.safetensors")
        return repr(found), {name: t.tolist() for name, t in tensors.items()}

    files = [out / "student.safetensors", out / "student.json"]
    outcomes("a finished student", files, use, 100)


def test_of_tags(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=20, shard_rows=10)
    make_tag(table.root, "v1", table.version, table.snapshot_digest)
    tag = tmp_path / "t/_softlabels/tags/v1.json"

    def use() -> tuple[int, str]:
        found = Table.open(f"{tmp_path / 't'}@v1")
        return found.version, found.snapshot_digest

    outcomes("tags", [tag], use, 100, short=10)


def test_of_a_teachers_weights(tmp_path: Path) -> None:
    """Other weights are another teacher: the table that the first one made does not take it."""
    write_source(tmp_path / "src/a.parquet", 0, 40)
    torch.manual_seed(1)
    weights = tmp_path / "w.safetensors"
    save_file(Linear().state_dict(), weights)

    def use() -> str:
        capture(make_spec(tmp_path, teacher={"weights": str(weights)}))
        return Table.open(str(tmp_path / "table")).snapshot_digest

    assert not outcomes("a teacher's weights", [weights], use, 50, short=4)["harmless"]
