"""Bytes written by format version 1: read for ever, and written the same by this release."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from softlabels.lineage import Contents, RunLineage
from softlabels.plan import Plan
from softlabels.schema import FORMAT_VERSION
from softlabels.storage import open_root
from softlabels.store import shards, tags
from softlabels.targets import SoftTargets
from tests.golden import make

FOLDER = make.FOLDER
MADE_BY = json.loads((FOLDER / "made_by.json").read_text())["pyarrow"]
PINNED = {
    "compact": {
        "sha256": "f429fac974856d749eddf547c3a3d01bb67298a7a06af3b3151232560dc8e3eb",
        "topk_logprobs": [
            [-0.6871614456176758, -1.379141926765442],
            [-0.29014307260513306, -2.0901150703430176],
            [-0.9864411354064941, -1.1639143228530884],
            [0.0, -np.inf],
        ],
    },
    "precise": {
        "sha256": "391a05fcfc71003bf28489957ea689550eade47e77ca81b9f3acee151a6399ce",
        "topk_logprobs": [
            [-0.693359375, -1.38671875],
            [-0.28759765625, -2.080078125],
            [-0.98095703125, -1.1630859375],
            [0.0, -np.inf],
        ],
    },
}
PLAN_FINGERPRINT = "f71b9609f095688b03c2ed385dedd81bba02cb36c0abef4a029067e23e9652e9"


def golden(profile: shards.Profile) -> pa.RecordBatch:
    data = (FOLDER / f"{profile}.parquet").read_bytes()
    opened = shards.open_shard(data, profile)
    return shards.read_row_groups(opened, profile, range(opened.num_row_groups))


@pytest.mark.parametrize("profile", make.PROFILES)
def test_a_shard_reads_as_the_pinned_values(profile: shards.Profile) -> None:
    batch = golden(profile)
    columns = {name: batch[name] for name in batch.schema.names}
    targets = SoftTargets.from_columns(columns, k=2, draws=2, temperatures=(2.0,))
    targets.check(columns["example_id"].to_pylist(), 4, shards.MASS_TOLERANCE[profile])
    pinned = np.array(PINNED[profile]["topk_logprobs"] * 2, np.float32)  # type: ignore[operator]
    assert np.array_equal(targets.logprobs, pinned)
    assert targets.ids[:4].tolist() == [[0, 1], [1, 2], [2, 3], [3, -1]]
    assert targets.draws is not None
    assert targets.draws[:4].tolist() == [[2, 3], [3, 0], [0, 1], [-1, -1]]
    assert targets.tail is not None
    assert targets.tail[:4].tolist() == [-1.38671875, -2.080078125, -1.1630859375, -np.inf]
    assert targets.temper[2.0].shift[:2].tolist() == [-1.0, -0.85693359375]
    assert targets.temper[2.0].tail[:2].tolist() == [-0.693359375, -1.0400390625]
    assert columns["example_id"].to_pylist() == [f"é{i}" for i in range(8)]
    assert columns["view"].to_pylist() == [0] * 4 + [1] * 4
    assert columns["view_params"].to_pylist()[3:5] == [None, '{"flip":true}']
    assert columns["domain"].to_pylist() == ["x", None] * 4
    assert columns["label"].to_pylist() == [0, 1, 2, 3, None, None, 2, 3]
    assert columns["top1_id"].to_pylist() == [0, 1, 2, 3] * 2
    assert columns["input_ids"].null_count == 8


@pytest.mark.parametrize("profile", make.PROFILES)
def test_a_shard_is_written_with_the_same_bytes(profile: shards.Profile) -> None:
    made = shards.open_shard(make.shard(profile).data, profile)
    again = shards.read_row_groups(made, profile, [0, 1])
    # By text: a NaN is not equal to itself.
    assert repr(again.to_pydict()) == repr(golden(profile).to_pydict())
    assert again.schema.equals(golden(profile).schema)
    if pa.__version__ == MADE_BY:
        assert bytes(make.shard(profile).data) == (FOLDER / f"{profile}.parquet").read_bytes()


def test_lineage_reads_as_what_was_recorded() -> None:
    records = json.loads((FOLDER / "lineage.json").read_text())
    for profile in make.PROFILES:
        contents = Contents.model_validate(records["contents"][profile])
        assert contents == make.contents(profile)
        assert contents.digest() == PINNED[profile]["sha256"]
        assert contents.teacher.fingerprint() == (
            "9f07fcacd380e29ac1f27311745b009b5c3792b2033af1ca3afc02ce64ee9f1b"
        )
    assert RunLineage.model_validate(records["run"]) == make.lineage()


def test_a_plan_reads_with_its_pinned_fingerprint() -> None:
    plan = Plan.read(FOLDER / "plan.parquet")
    assert (plan.fingerprint, plan.num_rows) == (PLAN_FINGERPRINT, 20)
    data = {p: (FOLDER / f"{p}.parquet").read_bytes() for p in make.PROFILES}
    wanted = make.plan(data)
    assert plan.entries.equals(wanted.entries)
    assert (plan.tables, plan.recipe, plan.report) == (wanted.tables, wanted.recipe, wanted.report)


def test_a_tag_reads_as_what_was_tagged(tmp_path: Path) -> None:
    root = open_root(tmp_path)
    root.write(f"{tags.FOLDER}/v1.0.json", (FOLDER / "tag.json").read_bytes())
    assert tags.read_tag(root, "v1.0") == make.tag()


def test_this_release_writes_every_golden_file_again(tmp_path: Path) -> None:
    make.write_all(tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    same_writer = pa.__version__ == MADE_BY
    for name in names:
        if same_writer or name in ("lineage.json", "tag.json"):
            assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name
    assert len(names) == 6


def test_golden_files_are_of_this_format() -> None:
    # A newer format keeps these files and adds its own.
    assert FORMAT_VERSION == 1
