"""Invariants of soft targets, each refused when broken, and the way to columns and back."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabels.errors import DataError, IntegrityError
from softlabels.targets import SoftTargets, Temper, position_name
from tests.tables import dense_logprobs, make_targets

FLOAT16 = 2.0**-11
"""Relative rounding error of summaries."""
HALF = np.log(0.5)


def random_targets(
    counts: list[int], k: int = 3, classes: int = 8, draws: int = 2, seed: int = 0
) -> SoftTargets:
    """Targets with everything known, over rows of `counts` positions."""
    total = sum(counts)
    labels = np.arange(total) % classes
    flat = make_targets(
        dense_logprobs(total, classes, seed), k, labels, draws, temperatures=(0.5, 2.0), seed=seed
    )
    return replace(flat, num_positions=np.array(counts, np.int32))


def same(left: SoftTargets, right: SoftTargets) -> None:
    for f in fields(SoftTargets):
        one, two = getattr(left, f.name), getattr(right, f.name)
        if f.name == "temper":
            assert one.keys() == two.keys()
            for t in one:
                assert np.array_equal(one[t].shift, two[t].shift)
                assert np.array_equal(one[t].tail, two[t].tail)
        elif one is None or two is None:
            assert one is two, f.name
        else:
            assert one.dtype == two.dtype, f.name
            assert np.array_equal(one, two, equal_nan=one.dtype.kind == "f"), f.name


def back(targets: SoftTargets, columns: dict[str, pa.Array]) -> SoftTargets:
    return SoftTargets.from_columns(
        columns, targets.k, targets.num_draws, tuple(sorted(targets.temper))
    )


def names(targets: SoftTargets) -> list[str]:
    return [f"e{i}" for i in range(len(targets.num_positions))]


def edit(field: str, at: Any, value: Any) -> Callable[[SoftTargets], SoftTargets]:
    def change(targets: SoftTargets) -> SoftTargets:
        array = getattr(targets, field).copy()
        array[at] = value
        return replace(targets, **{field: array})

    return change


BROKEN = {
    "an id twice": (edit("ids", (3, 1), None), "an id twice in its top k"),
    "rising": (edit("logprobs", (3, 2), -0.001), "rise"),
    "padding first": (edit("ids", (3, 1), -1), "an id after padding"),
    "padding with mass": (edit("ids", (3, 2), -1), "padding with a probability"),
    "NaN": (edit("logprobs", (3, 0), np.nan), "NaN"),
    "above 0": (edit("logprobs", (3, 0), 0.25), "above 0"),
    "infinite": (edit("logprobs", (3, 0), np.inf), "above 0"),
    "id too large": (edit("ids", (3, 0), 8), "an id not below 8"),
    "id below -1": (edit("ids", (3, 0), -7), "below -1"),
    "draw too large": (edit("draws", (3, 0), 8), "an id not below 8"),
    "draw below -1": (edit("draws", (3, 0), -2), "below -1"),
    "label too large": (edit("label_ids", 3, 8), "an id not below 8"),
    "label below -1": (edit("label_ids", 3, -2), "below -1"),
    "lost mass": (edit("tail", 3, -np.inf), "sum to 1"),
    "tail above 0": (edit("tail", 3, 0.5), "sum to 1"),
    "tail NaN": (edit("tail", 3, np.nan), "sum to 1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_invariant_is_refused_and_names_the_example(case: str) -> None:
    change, expected = BROKEN[case]
    targets = random_targets([2, 1, 3])
    targets.check(names(targets), 8)
    if case == "an id twice":
        change = edit("ids", (3, 1), targets.ids[3, 0])
    with pytest.raises(DataError, match=expected) as caught:
        change(targets).check(names(targets), 8)
    assert "example 'e2' position 0 has" in str(caught.value), "the first of the third row"


def test_positions_are_named_only_where_a_row_has_several() -> None:
    counts = np.array([2, 0, 1, 3], np.int32)
    found = [position_name(["a", "b", "c", "d"], counts, at) for at in range(6)]
    assert found == [
        "example 'a' position 0",
        "example 'a' position 1",
        "example 'c'",
        "example 'd' position 0",
        "example 'd' position 1",
        "example 'd' position 2",
    ]


def test_a_draw_from_the_head_is_refused() -> None:
    targets = random_targets([1, 1])
    with pytest.raises(DataError, match="example 'e1' has a draw that is in its own top k"):
        edit("draws", (1, 1), targets.ids[1, 2])(targets).check(["e0", "e1"], 8)


def test_a_head_above_mass_one_is_refused_without_a_tail_too() -> None:
    targets = replace(random_targets([1, 1]), tail=None)
    targets.check(["a", "b"], 8)
    with pytest.raises(DataError, match="'b' has a head mass above 1"):
        edit("logprobs", 1, [-0.1, -0.2, -0.3])(targets).check(["a", "b"], 8)


@pytest.mark.parametrize(
    "field", ["ids", "logprobs", "tail", "draws", "entropy", "label_ids", "label_ranks"]
)
def test_lengths_that_differ_are_refused(field: str) -> None:
    targets = random_targets([1, 2])
    with pytest.raises(DataError, match="positions"):
        replace(targets, **{field: getattr(targets, field)[:-1]}).check(names(targets), 8)


def test_other_shapes_that_differ_are_refused() -> None:
    targets = random_targets([1, 2])
    with pytest.raises(DataError, match="3 example ids for 2 rows"):
        targets.check(["a", "b", "c"], 8)
    with pytest.raises(DataError, match="logprobs"):
        replace(targets, logprobs=targets.logprobs[:, :2]).check(names(targets), 8)
    short = Temper(targets.temper[2.0].shift[:-1], targets.temper[2.0].tail)
    with pytest.raises(DataError, match=r"temperature 2\.0"):
        replace(targets, temper={2.0: short}).check(names(targets), 8)


def test_padding_and_a_tail_without_mass_are_allowed() -> None:
    targets = SoftTargets(
        num_positions=np.ones(2, np.int32),
        ids=np.array([[3, -1, -1], [0, 1, -1]], np.int32),
        logprobs=np.array([[0, -np.inf, -np.inf], [HALF, HALF, -np.inf]], np.float32),
        tail=np.full(2, -np.inf, np.float32),
        draws=np.full((2, 2), -1, np.int32),
    )
    targets.check(["a", "b"], 4)
    same(back(targets, targets.columns()), targets)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 4), max_size=6),
    k=st.integers(0, 8),
    draws=st.integers(0, 3),
    known=st.sets(st.sampled_from(["tail", "entropy", "labels"])),
    cut=st.tuples(st.integers(0, 6), st.integers(0, 6)),
)
def test_columns_give_the_targets_back_sliced_or_not(
    counts: list[int], k: int, draws: int, known: set[str], cut: tuple[int, int]
) -> None:
    targets = random_targets(counts, k=k, draws=draws)
    unknown: dict[str, Any] = {} if "tail" in known else {"tail": None}
    if "entropy" not in known:
        unknown["entropy"] = None
    if "labels" not in known:
        unknown |= dict.fromkeys(("label_ids", "label_logprobs", "label_ranks"))
    targets = replace(targets, **unknown)
    targets.check(names(targets), 8)
    columns = targets.columns()
    for column in columns.values():
        column.validate(full=True)
        assert len(column) == len(counts)
    start, stop = min(cut), max(cut)
    got = back(targets, {name: c.slice(start, stop - start) for name, c in columns.items()})
    wanted = targets.slice(start, stop)
    if not len(wanted.num_positions):
        assert got.ids.shape == (0, k)
        return
    same(got, wanted)


def test_no_rows_at_all_keep_their_width() -> None:
    targets = random_targets([2, 1])
    columns = {name: c.slice(0, 0) for name, c in targets.columns().items()}
    got = back(targets, columns)
    assert (got.ids.shape, got.logprobs.shape) == ((0, 3), (0, 3))
    got.check([], 8)


@pytest.mark.parametrize("name", ["topk_ids", "topk_logprobs", "tail_logprob", "sampled_ids"])
def test_a_list_of_the_wrong_length_is_refused(name: str) -> None:
    targets = random_targets([2, 1])
    columns = targets.columns()
    lists = columns[name].to_pylist()
    for broken in ([lists[0][:-1], lists[1]], [lists[1], lists[0]], [lists[0], None]):
        changed = columns | {name: pa.array(broken, columns[name].type)}
        with pytest.raises(IntegrityError, match=f"column '{name}'"):
            back(targets, changed)


@pytest.mark.parametrize("name", ["topk_ids", "topk_logprobs"])
def test_a_head_that_is_missing_or_null_is_refused(name: str) -> None:
    targets = random_targets([2, 1])
    columns = targets.columns()
    with pytest.raises(IntegrityError, match=f"column '{name}'"):
        back(targets, {key: value for key, value in columns.items() if key != name})
    with pytest.raises(IntegrityError, match=f"column '{name}'"):
        back(targets, columns | {name: pa.nulls(2, columns[name].type)})


@pytest.mark.parametrize(
    "name", ["topk_ids", "tail_logprob", "sampled_ids", "position_entropy", "label_ids"]
)
def test_a_column_that_only_some_rows_have_is_refused(name: str) -> None:
    targets = random_targets([1, 1, 1])
    columns = targets.columns()
    lists = columns[name].to_pylist()
    mixed = columns | {name: pa.array([lists[0], None, None], columns[name].type)}
    with pytest.raises(IntegrityError, match=f"column '{name}' is null in 2 of 3 rows"):
        back(targets, mixed)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    data=st.data(),
)
def test_take_is_what_lists_would_give(counts: list[int], data: Any) -> None:
    targets = random_targets(counts)
    rows = data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=8))
    taken = targets.take(np.array(rows, np.int64))
    wanted = {n: c.take(pa.array(rows, pa.int64())) for n, c in targets.columns().items()}
    for name in ("topk_ids", "topk_logprobs", "sampled_ids", "tail_logprob", "num_positions"):
        assert taken.columns()[name].to_pylist() == wanted[name].to_pylist(), name


def test_parts_join_to_the_whole_and_fill_what_only_some_know() -> None:
    targets = random_targets([2, 0, 1, 3])
    same(SoftTargets.concat([targets.slice(0, 1), targets.slice(1, 4)]), targets)
    bare = replace(targets.slice(0, 1), entropy=None, label_ids=None, label_ranks=None)
    joined = SoftTargets.concat([bare, targets.slice(1, 4)])
    assert joined.entropy is not None and joined.label_ids is not None  # noqa: PT018
    assert np.isnan(joined.entropy[:2]).all() and not np.isnan(joined.entropy[2:]).any()  # noqa: PT018
    assert joined.label_ids[:2].tolist() == [-1, -1]
    with pytest.raises(DataError, match=r"expected one \(k, draws, temperatures\)"):
        SoftTargets.concat([targets, random_targets([1], k=2)])
    with pytest.raises(DataError, match="no part"):
        SoftTargets.concat([])


def test_summaries_are_means_over_positions() -> None:
    targets = random_targets([2, 1])
    columns = targets.columns()
    assert targets.entropy is not None
    top = np.exp(targets.logprobs)
    assert columns["entropy"].to_pylist() == pytest.approx(
        [targets.entropy[:2].mean(), targets.entropy[2]], rel=FLOAT16
    )
    assert columns["top1_prob"].to_pylist() == pytest.approx(
        [top[:2, 0].mean(), top[2, 0]], rel=FLOAT16
    )
    margin = top[:, 0] - top[:, 1]
    assert columns["margin"].to_pylist() == pytest.approx(
        [margin[:2].mean(), margin[2]], rel=FLOAT16
    )
    assert columns["label"].null_count == 2, "rows of many positions have no one label"
    single = random_targets([1, 1]).columns()
    assert single["label"].to_pylist() == [0, 1]
    sequences = random_targets([1, 1]).columns(sequences=True)
    assert sequences["label"].null_count == sequences["top1_id"].null_count == 2
    assert sequences["entropy"].null_count == 0
    none = random_targets([1, 0], k=1).columns()
    assert none["margin"].null_count == 2
    assert none["entropy"].null_count == 1
