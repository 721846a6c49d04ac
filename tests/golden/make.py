"""Makes the golden files: bytes of format version 1 that every later release must read.

Run it from the repository's root as `python -m tests.golden.make` when the format changes, and
only then: a diff of these files is a change of the format and belongs in the changelog.

    precise.parquet, compact.parquet   a shard of each profile, 8 rows in 2 row groups
    lineage.json                       contents and run lineage
    plan.parquet                       a plan over both shards
    tag.json                           a tag
    made_by.json                       the pyarrow that wrote the Parquet files
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from softlabels.fingerprint import sha256_bytes
from softlabels.lineage import Contents, RunLineage, TeacherLineage
from softlabels.plan import Plan, PlanFile, PlanTable, SourceReport, entries_table
from softlabels.schema import table_schema
from softlabels.store import shards
from softlabels.store.tags import Tag
from softlabels.targets import SoftTargets, Temper

FOLDER = Path(__file__).parent
CLASSES = ("cat", "dog", "bird", "fish")
PROFILES: tuple[shards.Profile, ...] = ("compact", "precise")
PROBABILITIES = ((0.5, 0.25), (0.75, 0.125), (0.375, 0.3125), (1.0, 0.0))
"""Largest two of four classes, one line a position; written out, not computed by exp and log."""


def targets() -> SoftTargets:
    """Four kinds of position, twice: plain, confident, flat, and one class with all the mass."""
    head = np.array(PROBABILITIES * 2, np.float64)
    with np.errstate(divide="ignore"):
        logprobs = np.log(head).astype(np.float32)
        tail = np.log(1 - head.sum(1)).astype(np.float32)
    certain = head[:, 0] == 1
    ids = np.array([[i % 4, (i + 1) % 4] for i in range(8)], np.int32)
    ids[certain, 1] = -1
    draws = np.array([[(i + 2) % 4, (i + 3) % 4] for i in range(8)], np.int32)
    draws[certain] = -1
    return SoftTargets(
        num_positions=np.ones(8, np.int32),
        ids=ids,
        logprobs=logprobs,
        tail=tail,
        draws=draws,
        entropy=np.linspace(0, 1, 8, dtype=np.float32),
        label_ids=np.array([0, 1, 2, 3, -1, -1, 2, 3], np.int32),
        label_logprobs=np.where(np.arange(8) % 4 == 0, np.nan, -0.5).astype(np.float32),
        label_ranks=np.array([0, 0, 0, 0, -1, -1, 0, 0], np.int32),
        temper={2.0: Temper(np.linspace(-1, 0, 8, dtype=np.float32), tail / 2)},
    )


def contents(profile: shards.Profile) -> Contents:
    """What the golden tables say of themselves."""
    teacher = TeacherLineage(
        name="golden",
        revision="r1",
        kind="torch",
        code="teacher.py:make",
        code_sha256="1" * 64,
        arguments={"width": 3, "names": ["a", "é"]},
        weights_sha256="2" * 64,
        decode="teacher.py:decode",
        decode_sha256="3" * 64,
    )
    return Contents(
        teacher=teacher,
        num_classes=4,
        classes=CLASSES,
        k=2,
        draws=2,
        temperatures=(2.0,),
        profile=profile,
        carried=("domain",),
        seed=7,
    )


def shard(profile: shards.Profile) -> shards.Shard:
    """The golden shard of a profile."""
    schema = table_schema((2.0,), [pa.field("domain", pa.string())])
    columns = shards.round_to_profile(targets(), profile).columns() | {
        "example_id": pa.array([f"é{i}" for i in range(8)]),
        "view": pa.array([0, 0, 0, 0, 1, 1, 1, 1], pa.int32()),
        "view_params": pa.array([None] * 4 + ['{"flip":true}'] * 4),
        "domain": pa.array(["x", None] * 4),
    }
    arrays = [columns[f.name] if f.name in columns else pa.nulls(8, f.type) for f in schema]
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    writer = shards.ShardWriter(schema, profile, {"softlabels.unit": "golden"}, 4)
    writer.write(batch.slice(0, 4))
    writer.write(batch.slice(4))
    return writer.close()


def lineage() -> RunLineage:
    """The golden run."""
    return RunLineage(
        run_id="4" * 64,
        units=("4444444444444444-000000",),
        num_rows=8,
        spec={"k": 2, "table": "labels"},
        spec_sha256="5" * 64,
        source={"uri": "images/*.parquet", "fingerprint": "6" * 64, "num_files": 1, "num_rows": 8},
        packages={"softlabels": "0.1.0"},
        code_revision="7" * 40,
        device="cpu",
        started_at="2026-01-01T00:00:00+00:00",
        seconds=1.5,
    )


def plan(data: dict[shards.Profile, bytes]) -> Plan:
    """A plan over shards of these bytes: one table a profile."""
    tables: dict[str, PlanTable] = {}
    rows = []
    for number, profile in enumerate(PROFILES):
        file = PlanFile(
            path=f"data/{profile}.parquet",
            size=len(data[profile]),
            sha256=sha256_bytes(data[profile]),
            footer_sha256=sha256_bytes(shards.footer(data[profile])),
            num_rows=8,
        )
        tables[profile] = PlanTable(
            name=profile,
            uri=f"s3://bucket/{profile}",
            version=number,
            snapshot_digest=str(8 + number) * 64,
            contents=contents(profile),
            files=(file,),
        )
        for group, kept in enumerate((None, [0, 2, 3])):
            rows.append(
                {
                    "stage": number,
                    "table": profile,
                    "file": file.path,
                    "row_group": group,
                    "num_rows": 4 if kept is None else len(kept),
                    "rows": kept,
                    "repeats": 1 + group,
                    "loss_weight": 0.5 + number,
                }
            )
    report = SourceReport(
        source="a",
        table="compact",
        rows=8,
        dropped={"where": 1},
        kept=7,
        reads=10,
        share_asked=0.5,
        share=0.5,
        loss_weight=0.5,
    )
    recipe = {"sources": {"a": {"where": "margin > 0.1"}}, "seed": 3}
    return Plan(tables, entries_table(rows), recipe, (report,))


def tag() -> Tag:
    """The golden tag."""
    return Tag(
        name="v1.0", version=12, snapshot_digest="9" * 64, made_at="2026-01-01T00:00:00+00:00"
    )


def write_all(folder: Path) -> None:
    """Writes every golden file into `folder`."""
    made = {profile: bytes(shard(profile).data) for profile in PROFILES}
    for profile, data in made.items():
        (folder / f"{profile}.parquet").write_bytes(data)
    records = {
        "contents": {p: contents(p).model_dump(mode="json") for p in PROFILES},
        "run": lineage().model_dump(mode="json"),
    }
    (folder / "lineage.json").write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")
    plan(made).write(folder / "plan.parquet")
    (folder / "tag.json").write_text(tag().model_dump_json() + "\n")
    (folder / "made_by.json").write_text(json.dumps({"pyarrow": pa.__version__}) + "\n")


if __name__ == "__main__":
    write_all(FOLDER)
