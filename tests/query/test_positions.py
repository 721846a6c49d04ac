"""Position rules of recipes: their words, thresholds over selected rows, what a plan holds."""

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from softlabels.errors import BadInputError
from softlabels.plan import Plan, SourceReport
from softlabels.query import judging
from softlabels.query.mix import mix, pin
from softlabels.query.positions import Positions, parse
from softlabels.query.recipe import Recipe
from softlabels.query.view import query
from softlabels.rules import LARGEST, PositionRules
from softlabels.specs import validate
from softlabels.store import shards, tags
from softlabels.store.table import Table
from softlabels.student.stream import Stream
from softlabels.targets import SoftTargets
from tests.query.sequences import far
from tests.sequences import make_uneven
from tests.tables import make_table

BY = {
    "entropy": "entropy",
    "tail_logprob": "tail_logprob",
    "label_logprob": "label_logprob",
    "label_rank": "label_rank",
    "top1_prob": "first",
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Of 120 uneven sequences; for tests that leave it as it is."""
    return make_uneven(tmp_path_factory.mktemp("positions") / "t", rows=120)


def make(recipe: dict[str, Any]) -> Plan:
    return mix(validate(Recipe, recipe, "recipe"))


def one(table: Table, positions: Any, **source: Any) -> Plan:
    return make({"sources": {"a": {"table": table.root.uri, "positions": positions, **source}}})


def rules(plan: Plan, name: str = "a") -> PositionRules:
    found = plan.tables[name].positions
    assert found is not None
    return found


def report(plan: Plan) -> SourceReport:
    return plan.report[0]


def kept(plan: Plan) -> dict[str, list[int]]:
    """The places of a student's positions by example, as a stream hands them out."""
    found: dict[str, list[int]] = {}
    for batch in Stream(plan, batch_size=16, epochs=1, columns=["position_index"]):
        index = batch.columns["position_index"].to_pylist()
        found |= dict(zip(batch.example_ids.to_pylist(), index, strict=True))
    return found


def stored(table: Table, where: str = "true") -> list[dict[str, Any]]:
    """Every position as SQL shows it, with its place and the first stored logprob."""
    sql = f"""
        SELECT example_id, unnest(position_index) AS place, unnest(position_entropy) AS entropy,
            unnest(tail_logprob) AS tail_logprob, unnest(label_ranks) AS label_rank,
            unnest(label_logprobs) AS label_logprob, unnest(topk_logprobs[1:-:{table.contents.k}])
            AS first FROM labels WHERE {where}
    """
    return list(query(table, sql).to_pylist())


def expected(table: Table, passes: Any, where: str = "true") -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for position in stored(table, where):
        if passes(position):
            found.setdefault(position["example_id"], []).append(position["place"])
    return found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("entropy > 0.5", "entropy > 0.5"),
        (" Entropy>=.5 AND label_rank<>0 ", "entropy >= 0.5 and label_rank <> 0"),
        ("tail_logprob < -1e-1", "tail_logprob < -0.1"),
        ("label_logprob <= +2.", "label_logprob <= 2"),
        ("top1_prob = 1", "top1_logprob = 0"),
        ("label_rank = 16777217", "label_rank = 16777217"),
    ],
)
def test_comparisons_are_taken_as_they_are_meant(text: str, words: str) -> None:
    assert " and ".join(map(str, parse(text))) == words


def test_constants_are_what_the_stored_values_are_compared_with() -> None:
    (tenth,) = parse("entropy > 0.1")
    assert tenth.constant == float(np.float32(0.1)) != 0.1
    (half,) = parse("top1_prob > 0.5")
    assert half.constant == float(np.float32(math.log(0.5)))
    assert parse("top1_prob > 0")[0].constant == -LARGEST
    assert parse("label_rank < 0.1")[0].constant == 0.1


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ("entropi > 1", r"positions.where: .*no column 'entropi'.*did you mean 'entropy'\?"),
        ("input_ids > 1", "no column 'input_ids', they have entropy, tail_logprob"),
        ("entropy > 1 or label_rank > 0", "joined by 'and'"),
        ("entropy > label_rank", "'entropy > label_rank' is none"),
        ("1 < entropy", "'1 < entropy' is none"),
        ("entropy > 1 and", "'' is none"),
        ("entropy > nan", "'entropy > nan' is none"),
        ("entropy > 1; drop table x", "is none"),
        ("entropy > 1e39", "'1e39' is larger than a float32 holds"),
        ("top1_prob > 1.01", "'1.01' is not in 0 to 1"),
        ("top1_prob > -0.1", "'-0.1' is not in 0 to 1"),
        ("", "'' is none"),
        ({}, "positions says nothing"),
        (7, "positions: .*found 7"),
        ({"top": 0.5}, "give both"),
        ({"by": "entropy"}, "give both"),
        ({"top": 0, "by": "entropy"}, "positions.top: .*greater than 0"),
        ({"top": 1.1, "by": "entropy"}, "positions.top: .*less than or equal to 1"),
        ({"top": 0.5, "by": "margin"}, "positions.by: .*no column 'margin'"),
        ({"top": 0.5, "by": "--entropy"}, "positions.by: .*no column '-entropy'"),
        ({"wher": "entropy > 1"}, "unknown key 'sources.a.positions.wher'; did you mean 'where'"),
        ({"weights": []}, "positions.weights: "),
        ({"weights": [{"where": "entropy > 1", "weight": 0}]}, "weight: .*greater than 0"),
        ({"weights": [{"where": "entropy > x", "weight": 1}]}, "'entropy > x' is none"),
        ({"weights": [{"weight": 1}]}, "key 'sources.a.positions.weights.0.where' is missing"),
    ],
)
def test_what_cannot_be_meant_is_one_line(positions: Any, message: str) -> None:
    with pytest.raises(BadInputError, match=message) as caught:
        validate(Recipe, {"sources": {"a": {"table": "t", "positions": positions}}}, "r.yaml")
    assert "\n" not in str(caught.value)


def test_rules_keep_exactly_the_positions_they_name(table: Table) -> None:
    plan = one(table, "entropy > 1.5 and label_rank > 0")
    wanted = expected(table, lambda p: p["entropy"] > 1.5 and p["label_rank"] > 0)
    assert 0 < len(wanted) < 120
    assert kept(plan) == wanted
    found, total = report(plan), len(stored(table))
    assert (found.kept, found.dropped) == (len(wanted), {"positions": 120 - len(wanted)})
    assert found.positions == total
    assert found.positions_kept == sum(map(len, wanted.values()))
    assert found.positions_unknown == sum(p["label_rank"] < 0 for p in stored(table)) > 0
    assert plan.features == ("positions",)


def test_the_positions_relation_counts_the_same(table: Table) -> None:
    plan = one(table, "label_logprob < -2 and tail_logprob <= -0.5 and label_rank <> 3")
    sql = (
        "SELECT count(*) AS n FROM positions "
        "WHERE label_logprob < -2 AND tail_logprob <= -0.5 AND label_rank <> 3"
    )
    assert report(plan).positions_kept == query(table, sql).to_pylist()[0]["n"] > 0


def test_top1_prob_is_of_the_stored_logprob(table: Table) -> None:
    plan = one(table, "top1_prob >= 0.25 and top1_prob < 0.5")
    wanted = expected(table, lambda p: 0.25 <= math.exp(p["first"]) < 0.5)
    assert kept(plan) == wanted
    assert 0 < len(wanted) < 120


@pytest.mark.parametrize("by", [*BY, *(f"-{name}" for name in BY)])
@pytest.mark.parametrize("top", [0.001, 0.77])
def test_top_keeps_the_share_of_all_positions_and_its_ties(
    table: Table, by: str, top: float
) -> None:
    where = "example_id < 's00080'"
    plan = one(table, {"top": top, "by": by}, where=where)
    positions, name = stored(table, where), BY[by.removeprefix("-")]
    sign = -1 if by.startswith("-") else 1

    def is_known(p: dict[str, Any]) -> bool:
        return not math.isnan(p[name]) and (p[name] >= 0 or "rank" not in by)

    known = list(filter(is_known, positions))
    wanted = math.ceil(Fraction(str(top)) * len(positions))
    border = sorted((sign * p[name] for p in known), reverse=True)[min(wanted, len(known)) - 1]
    within = expected(table, lambda p: is_known(p) and sign * p[name] >= border, where)
    assert kept(plan) == within
    count = sum(map(len, within.values()))
    assert report(plan).positions == len(positions)
    assert report(plan).positions_kept == count >= min(wanted, len(known))
    assert sum(sign * p[name] > border for p in known) < wanted


def test_a_threshold_is_of_the_selected_rows_alone(table: Table) -> None:
    top = {"top": 0.2, "by": "entropy"}
    found = [
        rules(one(table, top, **source)).where[0].constant
        for source in ({}, {"where": "entropy < 2.3"}, {"where": "entropy > 2.6"}, {"limit": 7})
    ]
    assert len(set(found)) == 4
    assert found[1] < found[0] < found[2]
    assert all(value == float(np.float32(value)) for value in found)


def test_top_and_where_must_both_hold(table: Table) -> None:
    plan = one(table, {"where": "label_rank > 0", "top": 0.5, "by": "entropy"})
    border = rules(plan).where[1].constant
    assert border == rules(one(table, {"top": 0.5, "by": "entropy"})).where[0].constant
    wanted = expected(table, lambda p: p["label_rank"] > 0 and p["entropy"] >= border)
    assert kept(plan) == wanted


def test_shares_over_several_batches_of_values_are_the_same(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = one(table, {"top": 0.3, "by": "entropy"})
    monkeypatch.setattr(judging, "_PENDING", 50)
    assert one(table, {"top": 0.3, "by": "entropy"}).fingerprint == whole.fingerprint


@pytest.mark.parametrize("by", ["tail_logprob", "-tail_logprob"])
def test_a_border_without_mass_is_a_tie_like_any_other(tmp_path: Path, by: str) -> None:
    # All classes are stored: every tail is -inf.
    whole = make_table(tmp_path / "t", rows=50, k=10, classes=10)
    plan = one(whole, {"top": 0.2, "by": by})
    assert report(plan).positions_kept == report(plan).kept == 50
    assert sum(len(batch) for batch in Stream(plan, batch_size=9, epochs=1)) == 50


def test_the_first_weight_that_holds_counts(table: Table) -> None:
    weights = [
        {"where": "entropy < 2", "weight": 0.1},
        {"where": "entropy < 2.5 and label_rank = 0", "weight": 2},
    ]
    plan = one(table, {"weights": weights})
    assert report(plan).positions_kept == report(plan).positions == len(stored(table))
    by_place = {(p["example_id"], p["place"]): p for p in stored(table)}
    seen = set()
    for batch in Stream(plan, batch_size=16, epochs=1, columns=["position_index"]):
        assert batch.position_weights is not None
        assert batch.position_weights.dtype == np.float32
        places = batch.columns["position_index"].to_pylist()
        named = zip(batch.example_ids.to_pylist(), places, strict=True)
        keys = [(name, place) for name, found in named for place in found]
        for key, weight in zip(keys, batch.position_weights.tolist(), strict=True):
            p = by_place[key]
            second = 2.0 if p["entropy"] < 2.5 and p["label_rank"] == 0 else 1.0
            assert weight == (float(np.float32(0.1)) if p["entropy"] < 2 else second)
            seen.add(weight)
    assert len(seen) == 3


def test_on_one_position_a_row_rules_are_like_where(tmp_path: Path) -> None:
    classes = make_table(tmp_path / "t", temperatures=[2.0], draws=2)
    ruled, chosen = one(classes, "label_rank > 1"), one(classes, None, where="label_ranks[1] > 1")
    assert report(ruled).dropped == {"positions": report(chosen).dropped["where"]}
    for mine, theirs in zip(
        Stream(ruled, batch_size=9, shuffle=False, epochs=1, temperatures=[2.0]),
        Stream(chosen, batch_size=9, shuffle=False, epochs=1, temperatures=[2.0]),
        strict=True,
    ):
        assert mine.example_ids.equals(theirs.example_ids)
        np.testing.assert_array_equal(mine.targets.draws, theirs.targets.draws)
        np.testing.assert_array_equal(mine.targets.temper[2.0].tail, theirs.targets.temper[2].tail)


def test_values_that_nobody_knows_are_said(tmp_path: Path) -> None:
    recorded = make_uneven(tmp_path / "t", rows=20, known_entropy=False)
    total = query(recorded, "SELECT sum(num_positions) AS n FROM labels").to_pylist()[0]["n"]
    with pytest.raises(BadInputError, match=r"left without rows.* positions drops 20; .*lack a"):
        one(recorded, "entropy > 0.5")
    with pytest.raises(BadInputError, match=f"none of {total} positions"):
        one(recorded, {"top": 0.5, "by": "entropy"})
    assert report(one(recorded, {"top": 0.5, "by": "tail_logprob"})).positions_unknown == 0


def test_rules_that_leave_nothing_are_said(table: Table) -> None:
    with pytest.raises(BadInputError, match=r"source 'a' is left without rows: .* drops 120$"):
        one(table, "entropy > 100")


def test_rows_come_after_limits_and_shares_of_an_epoch_after_rows(table: Table) -> None:
    limited = one(table, "entropy > 2.7", limit=60, repeats=0.5)
    found = report(limited)
    assert found.dropped["limit"] == 60
    assert found.dropped["positions"] > 0
    left = 60 - found.dropped["positions"]
    assert found.dropped["repeats"] == left - found.kept
    assert found.reads == found.kept == len(kept(limited)) == (left + 1) // 2
    assert sum(found.dropped.values()) + found.kept == 120


def test_sources_of_other_rules_are_other_tables_of_one_version(table: Table) -> None:
    def source(positions: Any, where: str) -> dict[str, Any]:
        return {"table": table.root.uri, "positions": positions, "where": where}

    plan = make(
        {
            "sources": {
                "hard": source("entropy > 2", "example_id < 's00040'"),
                "all": source(None, "example_id >= 's00080'"),
                "also": source(
                    {"where": "entropy > 2.0"}, "example_id BETWEEN 's0004' AND 's0006'"
                ),
                "easy": source("entropy < 2", "example_id BETWEEN 's00060' AND 's00079'"),
            }
        }
    )
    assert list(plan.tables) == ["hard", "all", "easy"]
    assert [r.table for r in plan.report] == ["hard", "all", "hard", "easy"]
    assert plan.tables["all"].positions is None
    assert plan.report[1].positions is None
    assert len({t.snapshot_digest for t in plan.tables.values()}) == 1
    # One version is pinned once.
    name = f"plan-{plan.fingerprint[:16]}"
    assert pin(plan) == [f"{table.root.uri}@{name}"]
    assert tags.read_tag(table.root, name).version == table.version
    for place, name in enumerate(["hard", "also"]):
        alone = make({"sources": {name: plan_source(plan, table, place * 2)}})
        within = kept(alone)
        assert {key: kept(plan)[key] for key in within} == within


def plan_source(plan: Plan, table: Table, place: int) -> dict[str, Any]:
    """A source of a plan's recipe, with its table."""
    source = dict(plan.recipe["sources"][place])
    source.pop("name")
    return source | {"table": table.root.uri}


def test_the_fingerprint_covers_the_rules(table: Table) -> None:
    text, mapping = one(table, "entropy > 1"), one(table, {"where": "entropy > 1"})
    assert text.fingerprint == mapping.fingerprint
    others = [
        one(table, "entropy > 1.001"),
        one(table, "entropy >= 1"),
        one(table, "label_rank >= 0"),
        one(table, {"where": "entropy > 1", "weights": [{"where": "entropy > 2", "weight": 2}]}),
        one(table, {"where": "entropy > 1", "weights": [{"where": "entropy > 2", "weight": 3}]}),
        one(table, None),
    ]
    assert len({plan.fingerprint for plan in [text, *others]}) == 7


def test_a_plan_with_rules_comes_back_as_it_was(table: Table, tmp_path: Path) -> None:
    weights = [{"where": "entropy < 1 and top1_prob > 0.2", "weight": 0.1}]
    positions = {"where": "label_rank > 0", "top": 0.3, "by": "entropy", "weights": weights}
    plan = one(table, positions)
    plan.write(tmp_path / "p")
    read = Plan.read(tmp_path / "p")
    assert read.fingerprint == plan.fingerprint
    assert (read.tables, read.report, read.recipe) == (plan.tables, plan.report, plan.recipe)
    json.dumps(plan.recipe)


def test_far_tables_give_the_same_plan(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = {"where": "label_rank > 0", "top": 0.3, "by": "-label_logprob"}
    near = one(table, positions, where="entropy > 2")
    monkeypatch.setattr(Table, "open", classmethod(lambda cls, reference: far(table)))
    assert one(table, positions, where="entropy > 2").fingerprint == near.fingerprint


def test_only_row_groups_with_selected_rows_are_read(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    original = shards.read_row_groups

    def counted(*arguments: Any) -> pa.RecordBatch:
        read.append(arguments[2:])
        return original(*arguments)

    monkeypatch.setattr(shards, "read_row_groups", counted)
    plan = one(table, "entropy > 1", where="example_id = 's00003'")
    assert plan.num_rows == 1
    assert read == [([0], ["num_positions", "position_entropy"])]


@pytest.mark.parametrize(
    ("top", "by", "passing"),
    [
        (0.2, "-tail_logprob", [True, False, False]),
        (0.6, "-tail_logprob", [True, True, False]),
        (0.9, "tail_logprob", [True, True, True]),
        (0.4, "tail_logprob", [False, True, True]),
    ],
)
def test_tails_without_mass_are_the_lowest(top: float, by: str, passing: list[bool]) -> None:
    tails = np.array([-np.inf, -3, -1])
    positions = Positions(top=top, by=by)
    border = positions.threshold(tails, np.array([5, 3, 2]), 10)
    empty = np.zeros((3, 0), np.int32), np.zeros((3, 0), np.float32)
    targets = SoftTargets(np.ones(3, np.int32), *empty, tail=tails.astype(np.float32))
    assert border.holds(targets).tolist() == passing
