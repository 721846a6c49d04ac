"""Ensembles: which rows, which weights, and entries that read what they say."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from softlabels.errors import BadInputError, MismatchError
from softlabels.plan import ENSEMBLE, Plan, join_entries
from softlabels.query.ensemble import Aligned, Part, advice, align, ensemble_entries
from softlabels.query.members import Member
from softlabels.query.selection import row_groups
from softlabels.specs import validate
from softlabels.store import shards
from softlabels.store.table import Table
from softlabels.targets import SoftTargets
from tests.plans import plan_table
from tests.query.tables import reordered
from tests.sequences import make_uneven
from tests.tables import dense_logprobs, make_table

ROWS, CLASSES = 60, 10


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Table]:
    """All classes stored: a in order, b in another, c of 45 rows in a third one."""
    folder = tmp_path_factory.mktemp("ensembles")
    rng = np.random.default_rng(0)
    plain = [
        make_table(folder / f"p{seed}", ROWS, k=CLASSES, seed=seed, temperatures=[2.0])
        for seed in (1, 2)
    ]
    return {
        "a": make_table(folder / "a", ROWS, k=CLASSES, shard_rows=25, row_group_rows=10),
        "b": reordered(plain[0], folder / "b", rng.permutation(ROWS), shard_rows=20),
        "c": reordered(plain[1], folder / "c", rng.permutation(ROWS)[:45], shard_rows=20),
    }


SEEDS = {"a": 0, "b": 1, "c": 2}
LABELS = np.arange(ROWS) % CLASSES


def members(**settings: object) -> dict[str, Member]:
    """Members by name, each with what a recipe may say of it."""
    given = {name: {} if value == {} else value for name, value in settings.items()}
    return {
        name: validate(Member, {"table": name, **dict(value)}, name)  # type: ignore[call-overload]
        for name, value in given.items()
    }


def some(tables: Mapping[str, Table], names: str) -> dict[str, Table]:
    return {name: tables[name] for name in names}


def make_plan(tables: Mapping[str, Table], aligned: Aligned, parts: Sequence[Part]) -> Plan:
    groups = {name: row_groups(table, table.files) for name, table in tables.items()}
    entries = ensemble_entries(aligned, parts, groups, {name: name.upper() for name in tables})
    named = {name.upper(): plan_table(name.upper(), table) for name, table in tables.items()}
    return Plan(named, join_entries([entries]), {}, (), (ENSEMBLE,))


def mixtures(plan: Plan) -> dict[str, np.ndarray]:
    """Sum of w p over an example's members, float64 [V], as a reader of the plan sees it."""
    found: dict[str, np.ndarray] = {}
    read: dict[tuple[str, str, int], tuple[list[str], np.ndarray]] = {}
    for slot in range(plan.num_members):
        entries, weights = plan.member(slot), plan.member_weights(slot).to_pylist()
        assert entries is not None
        for entry, own in zip(entries.to_pylist(), weights, strict=True):
            key = (entry["table"], entry["file"], entry["row_group"])
            if key not in read:
                read[key] = decode(plan.tables[key[0]].uri, *key[1:])
            names, probs = read[key]
            rows = range(len(names)) if entry["rows"] is None else entry["rows"]
            assert len(rows) == entry["num_rows"]
            for row, weight in zip(rows, own, strict=True):
                found[names[row]] = found.get(names[row], 0) + weight * probs[row]
    return found


def decode(uri: str, path: str, group: int) -> tuple[list[str], np.ndarray]:
    opened = shards.open_shard((Path(uri) / path).read_bytes(), path)
    batch = shards.read_row_groups(opened, path, [group])
    targets = SoftTargets.from_columns({n: batch[n] for n in batch.schema.names}, CLASSES)
    probs = np.zeros((len(targets.ids), CLASSES))
    np.put_along_axis(probs, targets.ids, np.exp(targets.logprobs.astype(np.float64)), 1)
    return batch["example_id"].to_pylist(), probs


def dense_mixture(weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """Float64 [ROWS, V] of the live teachers, by weights [ROWS] of each."""
    total = np.zeros(ROWS)
    for weight in weights.values():
        total = total + weight
    return np.asarray(
        sum(
            (weight / total)[:, None] * np.exp(dense_logprobs(ROWS, CLASSES, SEEDS[name]))
            for name, weight in weights.items()
        )
    )


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"a": {}, "b": {}}, {"a": np.ones(ROWS), "b": np.ones(ROWS)}),
        ({"b": {"weight": 2}, "a": {}}, {"b": np.full(ROWS, 2), "a": np.ones(ROWS)}),
        (
            {"a": {"weight": 1.7e308}, "b": {"weight": 1.7e308}},
            {"a": np.ones(ROWS), "b": np.ones(ROWS)},
        ),
        (
            {"a": {"weight": 3}, "b": {"weight": "label + 1"}, "c": {"weight": 0.5}},
            {"a": np.full(ROWS, 3), "b": LABELS + 1, "c": np.full(ROWS, 0.5)},
        ),
        (
            {
                "a": {"weight": "1 + view", "by_class": {"class3": 4, 5: 0.0}},
                "b": {"weight": 1e300},
                "c": {"by_class": {"7": 1e300}, "weight": 0},
            },
            {
                "a": np.where(LABELS == 3, 4, np.where(LABELS == 5, 0, 1)) * 1e-300,
                "b": np.ones(ROWS),
                "c": np.where(LABELS == 7, 1, 0),
            },
        ),
    ],
)
def test_a_plan_mixes_as_the_live_teachers_would(
    tables: dict[str, Table],
    tmp_path: Path,
    settings: Mapping[str, object],
    weights: Mapping[str, np.ndarray],
) -> None:
    chosen = some(tables, "".join(settings))
    aligned = align(chosen, members(**settings))
    assert aligned.dropped == {f"not in {n}": 15 if n == "c" else 0 for n in list(settings)[1:]}
    np.testing.assert_allclose(aligned.weights.astype(np.float64).sum(0), 1, atol=2e-7)
    plan = make_plan(chosen, aligned, [Part(aligned.first, 1)])
    plan.write(tmp_path / "p")
    found = mixtures(Plan.read(tmp_path / "p"))
    assert len(found) == (45 if "c" in settings else ROWS)
    expected = dense_mixture(weights)
    for name, probs in found.items():
        # The profile keeps float16's precision of a log-probability.
        np.testing.assert_allclose(probs, expected[int(name[1:])], rtol=5e-3, atol=1e-6)


def test_entries_lie_in_one_row_group_of_each_and_rows_rise(tables: dict[str, Table]) -> None:
    aligned = align(tables, members(a={}, b={}, c={}))
    plan = make_plan(tables, aligned, [Part(aligned.first, 1)])
    entries = plan.entries.to_pylist()
    assert plan.num_rows == 45
    first = [(e["file"], e["row_group"]) for e in entries]
    assert first == sorted(first)
    combinations = [tuple((m["file"], m["row_group"]) for m in e["members"]) for e in entries]
    assert len(set(combinations)) == len(combinations)
    for entry in entries:
        rows = entry["rows"]
        assert rows is None or rows == sorted(rows)
        assert [m["table"] for m in entry["members"]] == ["A", "B", "C"]


def test_tables_of_one_order_are_read_by_whole_row_groups(
    tables: dict[str, Table], tmp_path: Path
) -> None:
    same = {
        "a": tables["a"],
        "d": make_table(tmp_path / "d", ROWS, k=4, seed=3, shard_rows=25, row_group_rows=10),
    }
    aligned = align(same, members(a={}, d={}))
    plan = make_plan(same, aligned, [Part(aligned.first, 1)])
    assert plan.entries["num_rows"].to_pylist() == [10, 10, 5, 10, 10, 5, 10]
    for slot in (0, 1):
        entries = plan.member(slot)
        assert entries is not None
        assert entries["rows"].to_pylist() == [None] * 7
    assert advice(plan.entries) is None
    # Rows 10 to 19 turned round: the same row group, not in order.
    turned = np.concatenate([np.arange(10), np.arange(19, 9, -1), np.arange(20, 30)])
    other = reordered(same["d"], tmp_path / "e", turned, shard_rows=30)
    aligned = align({"d": same["d"], "e": other}, members(d={}, e={}))
    entries = make_plan({"d": same["d"], "e": other}, aligned, [Part(aligned.first, 1)]).member(1)
    assert entries is not None
    assert entries["rows"].to_pylist()[:2] == [None, list(range(9, -1, -1))]


def test_parts_come_in_the_order_of_row_groups(tables: dict[str, Table]) -> None:
    chosen = some(tables, "ab")
    aligned = align(chosen, members(a={}, b={}), np.array([0, 3, 11, 12, 40]))
    parts = [Part(aligned.first, 2), Part(np.array([3, 12]), 1), Part(np.zeros(0, np.int64), 5)]
    groups = {name: row_groups(table, table.files) for name, table in chosen.items()}
    entries = ensemble_entries(
        aligned, parts, groups, {"a": "x", "b": "y"}, stage=3, loss_weight=0.5
    )
    plan = Plan({}, join_entries([entries]), {})
    assert plan.num_rows == 2 * 5 + 2
    rows = [(e["file"], e["row_group"], -e["repeats"]) for e in plan.entries.to_pylist()]
    assert rows == sorted(rows)
    assert set(plan.entries["stage"].to_pylist()) == {3}
    assert set(plan.entries["loss_weight"].to_pylist()) == {0.5}
    none = ensemble_entries(aligned, parts[2:], groups, {"a": "x", "b": "y"})
    assert (none.num_rows, none.schema) == (0, entries.schema)


def test_rows_without_weight_are_dropped_and_counted(tables: dict[str, Table]) -> None:
    aligned = align(
        some(tables, "ac"),
        members(a={"by_class": {"class1": 0}}, c={"weight": 1, "by_class": {1: 0, 2: 0}}),
        np.arange(30),
    )
    kept = aligned.first
    assert aligned.dropped["no weight"] == 3 - sum(LABELS[kept] == 1) - aligned_lost(tables, 1)
    assert not (LABELS[kept] == 1).any()
    assert aligned.weights[:, LABELS[kept] == 2].tolist()[1] == [0.0] * int(
        (LABELS[kept] == 2).sum()
    )


def aligned_lost(tables: dict[str, Table], label: int) -> int:
    """Of the first 30 rows with this label, those that c has not."""
    theirs = {x for batch in tables["c"].batches(["example_id"]) for x in batch[0].to_pylist()}
    return sum(f"x{row:05d}" not in theirs for row in range(30) if LABELS[row] == label)


def test_rows_without_a_label_have_the_plain_weight(tmp_path: Path) -> None:
    first = make_table(tmp_path / "a", 20)

    def unlabel(batch: pa.RecordBatch) -> pa.RecordBatch:
        place = batch.schema.get_field_index("label")
        labels = [None if i < 5 else i % 10 for i in range(20)]
        return batch.set_column(place, batch.schema.field(place), pa.array(labels, pa.int32()))

    some_labels = reordered(first, tmp_path / "b", np.arange(20), change=unlabel)
    other = make_table(tmp_path / "c", 20, seed=1)
    settings = members(b={"by_class": {3: 9}}, c={})
    aligned = align({"b": some_labels, "c": other}, settings)
    assert aligned.weights[0, :5].tolist() == [0.5] * 5  # row 3 has no label any more
    assert aligned.weights[0, 13] == pytest.approx(0.9)


def test_entries_below_64_rows_are_advised_against_where_orders_differ(tmp_path: Path) -> None:
    first = make_table(tmp_path / "a", 600, shard_rows=300, row_group_rows=300)
    rng = np.random.default_rng(0)
    other = make_table(tmp_path / "p", 600, seed=1)
    shuffled = reordered(other, tmp_path / "b", rng.permutation(600), shard_rows=100)
    both = {"a": first, "b": shuffled}
    aligned = align(both, members(a={}, b={}))
    plan = make_plan(both, aligned, [Part(aligned.first, 1)])
    assert 8 < 600 / plan.entries.num_rows < 64
    assert f"600 rows are {plan.entries.num_rows} entries" in (advice(plan.entries) or "")
    # Of small row groups in one order nothing is to be said.
    small = make_table(tmp_path / "s", 600, row_group_rows=5)
    alike = {"a": small, "b": make_table(tmp_path / "t", 600, seed=1, row_group_rows=5)}
    aligned = align(alike, members(a={}, b={}))
    plan = make_plan(alike, aligned, [Part(aligned.first, 1)])
    assert plan.entries.num_rows == 120
    assert advice(plan.entries) is None


def test_small_entries_are_advised_against(tables: dict[str, Table]) -> None:
    aligned = align(tables, members(a={}, b={}, c={}))
    plan = make_plan(tables, aligned, [Part(aligned.first, 1)])
    mean = plan.num_rows / plan.entries.num_rows
    said = advice(plan.entries)
    assert said is not None
    assert f"the ensemble's 45 rows are {plan.entries.num_rows} entries of {mean:.1f}" in said
    assert "in the same order" in said
    assert advice(plan.entries.slice(0, 0)) is None
    plain = join_entries([plan.entries.drop_columns(["members"])])
    assert advice(plain) is None
    assert advice(join_entries([plan.entries, plain])) == said


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"a": {}}, BadInputError, "at least 2 members"),
        ({"a": {"temperature": 2.0}, "b": {}}, MismatchError, r"2.0 is asked, 'a' stores \[1.0\]"),
        ({"a": {}, "b": {"temperature": 3}}, MismatchError, r"'b' stores \[1.0, 2.0\]; another"),
        (
            {"a": {"weight": "margn"}, "b": {}},
            BadInputError,
            "member 'a': weight 'margn': .*margin",
        ),
        ({"a": {"weight": "example_id"}, "b": {}}, BadInputError, "is VARCHAR: expected a number"),
        ({"a": {"weight": "max(margin)"}, "b": {}}, BadInputError, "member 'a': weight 'max.*'"),
        (
            {"a": {}, "b": {"weight": "INTERVAL 1 DAY"}},
            BadInputError,
            "member 'b': weight 'INTERVAL 1 DAY' is INTERVAL: expected a number",
        ),
        (
            {"a": {}, "b": {"weight": "label - 3"}},
            BadInputError,
            r"weight 'label - 3' is -3.0 for example 'x00000' \(and wrong for 18 in all\)",
        ),
        (
            {"a": {"weight": "nullif(label, 2)"}, "b": {}},
            BadInputError,
            "is NULL or NaN for example 'x00002'",
        ),
        ({"a": {"weight": "1 / view"}, "b": {}}, BadInputError, "for example 'x00000'"),
        ({"a": {"by_class": {"clas3": 1}}, "b": {}}, BadInputError, "did you mean 'class3'"),
        ({"a": {"by_class": {10: 1}}, "b": {}}, BadInputError, "by_class 10 is no class of 10"),
        ({"a": {"by_class": {-1: 1}}, "b": {}}, BadInputError, "by_class -1 is no class of 10"),
        ({"a": {"by_class": {3: 1, "class3": 2}}, "b": {}}, BadInputError, "class 3 twice"),
    ],
)
def test_ensembles_that_cannot_be_meant_are_refused(
    tables: dict[str, Table],
    settings: Mapping[str, object],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message) as caught:
        align(some(tables, "".join(settings)), members(**settings))
    assert "\n" not in str(caught.value)


def test_one_version_at_two_temperatures_is_two_members(tables: dict[str, Table]) -> None:
    twice = {"cold": tables["b"], "hot": tables["b"]}
    aligned = align(twice, members(cold={}, hot={"temperature": 2}))
    assert aligned.rows["cold"].tolist() == aligned.rows["hot"].tolist()
    with pytest.raises(BadInputError, match="'cold' and 'hot' are the same labels"):
        align(twice, members(cold={"weight": 2}, hot={}))


def test_other_label_spaces_are_refused_with_both_values(
    tables: dict[str, Table], tmp_path: Path
) -> None:
    wide = make_table(tmp_path / "w", 20, classes=11)
    with pytest.raises(MismatchError, match=r"num_classes differs: member 'a' has 10, .* has 11"):
        align({"a": tables["a"], "w": wide}, members(a={}, w={}))


@pytest.mark.parametrize(
    "value",
    [
        {"weight": -1},
        {"weight": float("inf")},
        {"weight": "1; SELECT 2"},
        {"by_class": {"x": -1}},
        {"by_class": {False: 1}},  # a class called "no", to YAML
        {"temperature": 0},
        {"wait": 1},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(value: dict[str, object]) -> None:
    with pytest.raises(BadInputError, match=r"^a: "):
        members(a=value)


def test_a_reference_alone_is_a_member() -> None:
    assert validate(Member, "out/a@v1", "x") == Member(table="out/a@v1")
    settings = Member(table="t", weight="margin", by_class={"b": 1, 3: 2}, temperature=2)
    assert settings.normalised() == {
        "weight": "margin",
        "by_class": {"b": 1.0, "3": 2.0},
        "temperature": 2.0,
    }
    assert Member(table="t").normalised() == {}


def test_sequences_must_be_the_same_row_by_row(tmp_path: Path) -> None:
    first = make_uneven(tmp_path / "a", rows=12)
    other = reordered(
        make_uneven(tmp_path / "p", rows=12, k=6), tmp_path / "b", np.arange(11, 1, -1)
    )
    aligned = align({"a": first, "b": other}, members(a={}, b={"weight": "1 - top1_prob"}))
    assert aligned.dropped == {"not in b": 2}
    assert aligned.first.tolist() == list(range(2, 12))
    with pytest.raises(MismatchError, match=r"example 's0.*: num_positions differs: 'a' has"):
        align({"a": first, "c": make_uneven(tmp_path / "c", rows=12, seed=1)}, members(a={}, c={}))
    with pytest.raises(BadInputError, match=r"by_class .* sequences have a label a position"):
        align({"a": first, "b": other}, members(a={"by_class": {3: 1}}, b={}))
