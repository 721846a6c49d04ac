"""Augmented views: the student's pixels are the teacher's, bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from softlabels.errors import BadInputError, DataError, MismatchError
from softlabels.plan import Plan
from softlabels.student.fit import require_fit
from softlabels.student.inputs import input_columns, replaying
from softlabels.student.spec import InputSpec, RunSpec, StudentSpec
from softlabels.student.stream import Stream
from softlabels.student.trainer import train
from tests.student.pictures import (
    HERE,
    SEEN,
    decode,
    labelled,
    picture,
    shift_and_flip,
    write_pictures,
)

VIEWS = {"augment": f"{HERE}:shift_and_flip", "views": 3}


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, torch.Tensor]:
    """A plan of three views of 50 pictures, and what the teacher saw, in the table's order."""
    folder = tmp_path_factory.mktemp("views")
    write_pictures(folder / "source" / "a.parquet", 0, 50)
    plan = Plan.read(labelled(folder, source=VIEWS, carry=["image"]))
    return plan, torch.cat(SEEN)[-150:]


def run_spec(folder: Path, plan: Path | str, **inputs: Any) -> RunSpec:
    return RunSpec(
        plan=str(plan),
        out=str(folder / "run"),
        student=StudentSpec(module=f"{HERE}:Picture"),
        inputs=InputSpec(**({"decode": f"{HERE}:decode", "columns": ("image",)} | inputs)),
        epochs=1,
        batch_size=16,
        threads=1,
    )


def test_the_student_sees_the_teachers_pixels_in_batches_of_its_own(
    views: tuple[Plan, torch.Tensor],
) -> None:
    plan, seen = views
    columns = input_columns(["image"], augment=True)
    order = Stream(plan, batch_size=150, epochs=1, shuffle=False, columns=columns)
    (every,) = order
    place = {
        pair: row
        for row, pair in enumerate(
            zip(every.example_ids.to_pylist(), every.columns["view"].to_pylist(), strict=True)
        )
    }
    assert sorted({view for _, view in place}) == [1, 2, 3]
    assert len(place) == 150
    replay = replaying(decode, shift_and_flip, ["image"])
    stream = Stream(plan, batch_size=7, epochs=1, seed=3, columns=columns)
    found = 0
    for batch in stream:
        ids, view = batch.example_ids.to_pylist(), batch.columns["view"].to_pylist()
        rows = [place[pair] for pair in zip(ids, view, strict=True)]
        assert torch.equal(replay(batch.columns), seen[rows])
        found += len(batch)
    assert found == 150
    assert not torch.equal(replay(every.columns), decode(every.columns))


def test_plain_rows_of_a_batch_stay_as_they_are() -> None:
    plain = torch.from_numpy(np.stack([picture(i) for i in range(4)]))
    columns = {
        "image": pa.nulls(4),
        "view": pa.array([0, 1, 0, 2], pa.int32()),
        "view_params": pa.array([None, "5", None, "8"]),
    }
    found = replaying(lambda _: {"x": plain}, _by_name, ["image"])(columns)["x"]
    assert torch.equal(found[[0, 2]], plain[[0, 2]])
    assert torch.equal(found[[1, 3]], shift_and_flip(plain[[1, 3]], np.array([5, 8])))
    assert torch.equal(plain, torch.from_numpy(np.stack([picture(i) for i in range(4)])))


def _by_name(inputs: dict[str, torch.Tensor], seeds: Any) -> dict[str, torch.Tensor]:
    return {"x": shift_and_flip(inputs["x"], seeds)}


@pytest.mark.parametrize("params", [None, "", "1.5", "{}"])
def test_a_view_without_its_seed_is_refused(params: str | None) -> None:
    columns = {
        "image": pa.nulls(1),
        "view": pa.array([1], pa.int32()),
        "view_params": pa.array([params], pa.string()),
    }
    replay = replaying(lambda _: torch.zeros(1, 2), lambda inputs, _: inputs, ["image"])
    with pytest.raises(DataError, match="expected the seed that replays it"):
        replay(columns)


def test_a_cropped_view_does_not_go_into_a_batch_of_plain_rows() -> None:
    columns = {
        "image": pa.nulls(2),
        "view": pa.array([0, 1], pa.int32()),
        "view_params": pa.array([None, "1"]),
    }
    replay = replaying(lambda _: torch.zeros(2, 4), lambda inputs, _: inputs[:, :2], ["image"])
    with pytest.raises(MismatchError, match="the batch holds plain rows, too"):
        replay(columns)


def test_views_train_a_student_when_the_spec_replays_them_and_are_refused_else(
    tmp_path: Path, views: tuple[Plan, torch.Tensor]
) -> None:
    path = tmp_path / "plan.parquet"
    views[0].write(path)
    with pytest.raises(BadInputError, match="expected the import path of that function"):
        train(run_spec(tmp_path, path))
    with pytest.raises(MismatchError, match="they would be replayed as something else"):
        require_fit(run_spec(tmp_path, path, augment=f"{HERE}:decode"))
    (tmp_path / "mine.py").write_text("def shift_and_flip(inputs, seeds):\n    return inputs\n")
    with pytest.raises(MismatchError, match="they would be replayed as something else"):
        require_fit(run_spec(tmp_path, path, augment=f"{tmp_path}/mine.py:shift_and_flip"))
    trained = train(run_spec(tmp_path, path, augment=f"{HERE}:shift_and_flip"))
    assert trained.record["steps"] == 10
    assert trained.record["code"]["augment_sha256"]
