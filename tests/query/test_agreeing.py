"""Teachers of one example whose tables have other hard labels of it do not come together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from softlabels.errors import MismatchError, RecipeMismatchError
from softlabels.query.materialise import EnsembleSpec, materialise
from softlabels.query.mix import Recipe, mix
from softlabels.specs import validate
from softlabels.store.table import Table
from tests.query.tables import reordered
from tests.sequences import make_uneven
from tests.tables import make_table

Change = Callable[[list[Any]], list[Any]]


def changed(table: Table, folder: Path, column: str, change: Change) -> Table:
    """The same rows, the other way round, with another column."""

    def replaced(batch: pa.RecordBatch) -> pa.RecordBatch:
        place = batch.schema.get_field_index(column)
        field = batch.schema.field(place)
        return batch.set_column(
            place, field, pa.array(change(batch[column].to_pylist()), field.type)
        )

    return reordered(table, folder, np.arange(table.num_rows)[::-1], 8, change=replaced)


def ensemble(*tables: Table) -> Any:
    members = {f"t{place}": table.root.uri for place, table in enumerate(tables)}
    return mix(Recipe.model_validate({"sources": {"e": {"ensemble": members}}}))


def choose(*tables: Table) -> Any:
    members = {f"t{place}": table.root.uri for place, table in enumerate(tables)}
    source = {"choose": {"from": members, "by": "entropy"}}
    return mix(Recipe.model_validate({"sources": {"c": source}}))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Table, Table]:
    folder = tmp_path_factory.mktemp("agreeing")
    return (
        make_table(folder / "a", rows=30, k=10),
        make_table(folder / "b", rows=30, k=10, seed=1),
    )


@pytest.mark.parametrize("together", [ensemble, choose])
def test_other_labels_are_refused_with_both(
    pair: tuple[Table, Table], tmp_path: Path, together: Callable[..., Any]
) -> None:
    first, second = pair
    other = changed(second, tmp_path / "o", "label", lambda v: [(x + 1) % 10 for x in v])
    said = "example 'x00000': label differs: 't0' has 0, 't1' has 1"
    with pytest.raises(RecipeMismatchError, match=said):
        together(first, other)
    # What has no label says nothing.
    some = changed(second, tmp_path / "n", "label", lambda v: [x if x > 4 else None for x in v])
    assert together(first, some).num_rows == 30


def test_other_labels_make_no_table(pair: tuple[Table, Table], tmp_path: Path) -> None:
    first, second = pair
    other = changed(second, tmp_path / "o", "label", lambda v: [*v[:9], 3, *v[10:]])
    members = {"a": first.root.uri, "b": other.root.uri}
    spec = validate(EnsembleSpec, {"ensemble": members}, "spec")
    with pytest.raises(
        MismatchError, match="example 'x00020': label differs: 'a' has 0, 'b' has 3"
    ):
        materialise(spec, str(tmp_path / "made"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("together", [ensemble, choose])
def test_other_views_are_refused(
    pair: tuple[Table, Table], tmp_path: Path, together: Callable[..., Any]
) -> None:
    first, second = (
        changed(table, tmp_path / name, "view_params", lambda v: ['{"crop": 1}'] * len(v))
        for name, table in zip("ab", pair, strict=True)
    )
    assert together(first, second).num_rows == together(first, pair[1]).num_rows == 30
    other = changed(second, tmp_path / "o", "view_params", lambda v: [*v[:-1], '{"crop": 2}'])
    with pytest.raises(RecipeMismatchError, match=r"view_params differs: .*1\}', 't1' has .*2\}'"):
        together(first, other)


def test_labels_of_positions_may_be_missing_but_not_others(tmp_path: Path) -> None:
    first = make_uneven(tmp_path / "a", rows=12)
    same = make_uneven(tmp_path / "b", rows=12, k=6)

    def without(values: list[Any]) -> list[Any]:
        return [[-1 if place % 2 else x for place, x in enumerate(row)] for row in values]

    def other(values: list[Any]) -> list[Any]:
        values[5] = [*values[5][:-1], values[5][-1] + 1]
        return values

    masked = changed(same, tmp_path / "m", "label_ids", without)
    wrong = changed(same, tmp_path / "w", "label_ids", other)
    for together in (ensemble, choose):
        assert together(first, same).num_rows == together(first, masked).num_rows == 12
        with pytest.raises(RecipeMismatchError, match=r"label_ids differs: 't0' has .* from place"):
            together(first, wrong)


def test_other_documents_in_a_sequence_are_refused(tmp_path: Path) -> None:
    plain = make_uneven(tmp_path / "p", rows=12)
    tokens = [row for batch in plain.batches(["input_ids"]) for row in batch["input_ids"]]
    zeros, ones = ([[number] * len(row) for row in tokens[::-1]] for number in (0, 1))
    first = changed(plain, tmp_path / "a", "segment_ids", lambda _: zeros)
    other = changed(plain, tmp_path / "b", "segment_ids", lambda _: ones)
    assert ensemble(first, make_uneven(tmp_path / "q", rows=12, k=6)).num_rows == 12
    with pytest.raises(RecipeMismatchError, match="segment_ids differs: 't0' has"):
        ensemble(first, other)
