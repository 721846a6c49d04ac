"""Streams of ensemble plans: every row with what each of its teachers says of it, and no other."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from softlabels.errors import BadInputError, IntegrityError, MismatchError
from softlabels.plan import ENSEMBLE, POSITIONS, Plan, entries_table
from softlabels.rules import Condition, PositionRules
from softlabels.store.table import Table
from softlabels.student.batch import tails_known, targets_at, targets_of, to_torch
from softlabels.student.losses import Targets, distillation_loss
from softlabels.student.sequences import row_slices
from softlabels.student.servable import require_servable
from softlabels.student.spec import LossSpec
from softlabels.student.stream import Batch, Stream
from softlabels.targets import SoftTargets
from tests.plans import make_ensemble_plan, make_plan
from tests.sequences import make_uneven
from tests.tables import dense_logprobs, make_table

ROWS, CLASSES = 90, 10
Tables = Mapping[str, Table]


def share_of_b(example: str) -> float:
    return int(example[1:]) % 7 + 0.5


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """a: 90 rows; b: the same in another order; c: the first 55, alone with draws."""
    folder = tmp_path_factory.mktemp("members")
    backwards = [*range(ROWS - 1, ROWS - 41, -1), *range(ROWS - 40)]
    number = {"number": pa.array(np.arange(ROWS), pa.int64())}
    shared: dict[str, Any] = {"classes": CLASSES, "shard_rows": 40}
    return {
        "a": make_table(folder / "a", ROWS, 4, seed=1, row_group_rows=20, carried=number, **shared),
        "b": make_table(
            folder / "b", ROWS, 6, seed=2, row_group_rows=15, order=backwards, **shared
        ),
        "c": make_table(folder / "c", 55, 3, seed=3, draws=2, row_group_rows=10, **shared),
    }


@pytest.fixture(scope="module")
def plan(tables: Tables) -> Plan:
    return make_ensemble_plan(tables, weights={"a": 2, "b": share_of_b, "c": 1}, partial=True)


def stored(table: Table, **options: Any) -> dict[str, SoftTargets]:
    """Each example's own targets, read from a plan of that table alone."""
    found: dict[str, SoftTargets] = {}
    stream = Stream(make_plan(table), batch_size=64, epochs=1, shuffle=False, **options)
    for batch in stream:
        for row, example in enumerate(batch.example_ids.to_pylist()):
            found[example] = batch.targets.slice(row, row + 1)
    return found


def teachers_of(batch: Batch) -> Iterator[SoftTargets]:
    yield batch.targets
    for other in batch.others:
        yield other.targets


def same(one: SoftTargets, other: SoftTargets, k: int) -> bool:
    """Whether ids, logprobs and tail are equal, `one` padded beyond k."""
    assert (one.ids[:, k:] == -1).all()
    assert other.tail is not None
    assert one.tail is not None
    return (
        np.array_equal(one.ids[:, :k], other.ids)
        and np.array_equal(one.logprobs[:, :k], other.logprobs)
        and np.array_equal(one.tail, other.tail)
    )


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_row_comes_with_its_own_teachers(tables: Tables, plan: Plan, world_size: int) -> None:
    entries = plan.entries.to_pylist()
    assert any(min(np.diff(m["rows"]), default=1) < 0 for e in entries for m in e["members"])
    own = {name: stored(table) for name, table in tables.items()}
    seen: list[str] = []
    for rank in range(world_size):
        options: dict[str, Any] = {"rank": rank, "world_size": world_size, "shuffle_rows": 40}
        stream = Stream(plan, batch_size=16, epochs=2, seed=3, columns=["number"], **options)
        for batch in stream:
            assert batch.member_weights is not None
            assert batch.member_weights.dtype == np.float32
            assert batch.member_weights.shape == (len(batch), 3)
            assert len(batch.others) == 2
            for row, example in enumerate(batch.example_ids.to_pylist()):
                asked = {"a": 2, "b": share_of_b(example), "c": 1}
                there = [name for name in asked if example in own[name]]
                total = sum(asked[name] for name in there)
                weights = [asked[name] / total if name in there else 0 for name in asked]
                np.testing.assert_allclose(batch.member_weights[row], weights, rtol=1e-6)
                for name, soft in zip(asked, teachers_of(batch), strict=True):
                    found = soft.slice(row, row + 1)
                    if name in there:
                        assert same(found, own[name][example], tables[name].contents.k)
                    else:
                        assert (found.ids == -1).all()
                        assert found.tail is not None
                        assert (found.tail == 0).all()
                assert batch.columns["number"][row].as_py() == int(example[1:])
            seen += batch.example_ids.to_pylist()
    assert sorted(seen) == sorted([f"x{i:05d}" for i in range(ROWS)] * 2)


def test_the_first_teacher_is_that_of_a_plain_plan(plan: Plan) -> None:
    """Its width too: k of the others pads nothing."""
    tables = {"a": plan.tables["a"]}
    alone = replace(plan, entries=plan.member(0), tables=tables, features=())
    assert alone.num_members == 1
    streams = [Stream(one, batch_size=20, epochs=1, shuffle=False) for one in (plan, alone)]
    assert [stream.k for stream in streams] == [4, 4]
    assert [stream.draws for stream in streams] == [0, 0]
    for batch, plain in zip(*streams, strict=True):
        assert batch.example_ids.equals(plain.example_ids)
        assert same(batch.targets, plain.targets, 4)
        assert plain.others == ()
        assert plain.member_weights is None
        assert [other.targets.k for other in batch.others] == [6, 3]
        assert [other.targets.num_draws for other in batch.others] == [0, 2]


def test_it_resumes_in_the_middle(plan: Plan) -> None:
    whole = list(Stream(plan, batch_size=16, epochs=2, seed=1, shuffle_rows=40))
    stream = Stream(plan, batch_size=16, epochs=2, seed=1, shuffle_rows=40)
    list(islice(iter(stream), 4))
    other = Stream(plan, batch_size=16, epochs=2, seed=1, shuffle_rows=40)
    other.load_state_dict(stream.state_dict())
    for batch, expected in zip(other, whole[4:], strict=True):
        assert batch.example_ids.equals(expected.example_ids)
        assert np.array_equal(batch.member_weights, expected.member_weights)  # type: ignore[arg-type]
        for mine, theirs in zip(teachers_of(batch), teachers_of(expected), strict=True):
            assert np.array_equal(mine.ids, theirs.ids)


def test_plain_rows_of_an_ensemble_plan_have_one_target(tables: Tables) -> None:
    plan = make_ensemble_plan({"a": tables["a"], "c": tables["c"]}, partial=True)
    entries = [entry for entry in plan.entries.to_pylist() if entry["members"] is None]
    assert entries
    kinds = set()
    for batch in Stream(plan, batch_size=5, epochs=1, shuffle=False):
        assert batch.member_weights is not None
        alone = bool((batch.member_weights[:, 0] == 1).all())
        kinds.add(alone)
        assert isinstance(targets_of(batch), Targets) == alone
    assert kinds == {True, False}
    # One that speaks of no row of a batch costs nothing there.
    plan = make_ensemble_plan(tables, partial=True)
    last = list(Stream(plan, batch_size=5, epochs=1, shuffle=False))[-1]
    assert len(last.others) == 2
    assert len(targets_of(last)) == 2


def test_a_hand_written_loop_gets_the_sum_of_each_teachers_loss(tables: Tables, plan: Plan) -> None:
    batch = next(iter(Stream(plan, batch_size=64, shuffle=False)))
    logits = torch.from_numpy(dense_logprobs(64, CLASSES, 9)).requires_grad_()
    inputs = to_torch(batch)
    got = distillation_loss(
        logits, inputs.targets, weights=inputs.weights, normalizer=batch.global_weight
    )
    assert batch.member_weights is not None
    own = {name: stored(table) for name, table in tables.items()}
    for row, example in enumerate(batch.example_ids.to_pylist()):
        expected = 0.0
        for slot, name in enumerate(tables):
            if example in own[name]:
                alone = distillation_loss(logits[row : row + 1], targets_at(own[name][example]))
                expected += float(batch.member_weights[row, slot]) * float(alone.kl)
        assert float(got.kl[row]) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_the_example_of_a_hand_written_loop_nears_the_mixture(tables: Tables) -> None:
    """README's, on a student that is a table of logits."""
    both = {name: tables[name] for name in ("a", "b")}
    plan = make_ensemble_plan(both, weights={"a": 2, "b": 1})
    table = torch.zeros((ROWS, CLASSES), requires_grad=True)
    optimizer = torch.optim.SGD([table], lr=40.0)
    before = after = 0.0
    for batch in Stream(plan, batch_size=30, epochs=40, columns=["number"]):
        inputs = to_torch(batch)  # the targets of every teacher, with their weights
        logits = table[batch.columns["number"].to_pylist()]
        found = distillation_loss(
            logits, inputs.targets, weights=inputs.weights, normalizer=batch.global_weight
        )
        optimizer.zero_grad()
        torch.autograd.backward(found.loss)
        optimizer.step()
        before, after = before or float(found.kl.mean()), float(found.kl.mean())
    p, r = (np.exp(dense_logprobs(ROWS, CLASSES, seed)) for seed in (1, 2))
    mixture = (2 * p + r) / 3
    learnt = table.detach().softmax(1).numpy()
    apart = np.abs(learnt - mixture).sum(1).mean()
    assert apart < 0.1 < 0.5 < np.abs(1 / CLASSES - mixture).sum(1).mean()
    assert 0.1 < after < before


def test_micro_batches_take_their_rows_of_every_teacher(plan: Plan) -> None:
    batch = next(iter(Stream(plan, batch_size=50, shuffle=False)))
    parts = [part for part, _ in row_slices(batch, 12)]
    assert [len(part) for part in parts] == [12, 12, 12, 12, 2]
    weights = [part.member_weights for part in parts if part.member_weights is not None]
    assert np.array_equal(np.concatenate(weights), batch.member_weights)  # type: ignore[arg-type]
    for slot, other in enumerate(batch.others):
        ids = [part.others[slot].targets.ids for part in parts]
        assert np.array_equal(np.concatenate(ids), other.targets.ids)


# Sequences: position rules are the first teacher's.


KNOWN = PositionRules(where=(Condition(column="entropy", operator=">", constant=3.0),))


def ruled(first: Table, other: Table, rules: PositionRules) -> Plan:
    """Rows of which the first teacher's rules leave a position."""
    plan = make_ensemble_plan({"a": first, "b": other})
    own = stored(first)
    passing = {example for example, soft in own.items() if bool(rules.keep(soft).any())}
    assert 0 < len(passing) < len(own)
    entries, names, place = [], list(own), 0
    for entry in plan.entries.to_pylist():
        mine = names[place : place + entry["num_rows"]]
        place += entry["num_rows"]
        kept = [i for i, example in enumerate(mine) if example in passing]
        if not kept:
            continue
        entry |= {"rows": [entry["rows"][i] for i in kept], "num_rows": len(kept)}
        for member in entry["members"]:
            member |= {name: [member[name][i] for i in kept] for name in ("rows", "weights")}
        entries.append(entry)
    # Rules of the other, as where it is a first teacher elsewhere in the plan, do not count here.
    never = PositionRules(where=(Condition(column="entropy", operator=">", constant=99.0),))
    tables = {
        name: table.model_copy(update={"positions": rules if name == "a" else never})
        for name, table in plan.tables.items()
    }
    features = (ENSEMBLE, POSITIONS)
    return replace(plan, tables=tables, entries=entries_table(entries), features=features)


def test_positions_are_those_that_the_first_teachers_rules_keep(tmp_path: Path) -> None:
    one = make_uneven(tmp_path / "a", row_group_positions=60)
    two = make_uneven(tmp_path / "b", k=7, draws=5, row_group_positions=90, files=1)
    plan = ruled(one, two, KNOWN)
    mine, theirs = stored(one), stored(two)
    seen = 0
    for batch in Stream(plan, batch_size=7, epochs=1, seed=2, shuffle_rows=20):
        (other,) = batch.others
        assert np.array_equal(other.targets.num_positions, batch.targets.num_positions)
        for row, example in enumerate(batch.example_ids.to_pylist()):
            keep = KNOWN.keep(mine[example])
            count = np.array([keep.sum()], np.int32)
            for soft, own, k in ((batch.targets, mine, 4), (other.targets, theirs, 7)):
                found = soft.slice(row, row + 1)
                assert same(found, own[example].map_positions(keep, count), k)
            seen += 1
    assert seen == plan.num_rows


# Members that are not the first's rows.


def test_other_examples_or_positions_are_refused(tables: Tables, tmp_path: Path) -> None:
    plan = make_ensemble_plan({"a": tables["a"], "b": tables["b"]})
    entries = plan.entries.to_pylist()
    rows = entries[2]["members"][1]["rows"]
    rows[0], rows[1] = rows[1], rows[0]
    swapped = replace(plan, entries=entries_table(entries))
    with pytest.raises(IntegrityError) as caught:
        list(Stream(swapped, batch_size=8, epochs=1, shuffle=False))
    message = str(caught.value)
    assert message.startswith("entry 2 of the plan pairs example 'x000")
    assert "in table 'a' with example 'x000" in message
    assert "of 1 positions in table 'b'" in message
    longer = make_uneven(tmp_path / "a")
    shorter = make_uneven(tmp_path / "b", seed=5)
    uneven = make_ensemble_plan({"a": longer, "b": shorter})
    with pytest.raises(IntegrityError, match=r"pairs example '(s\d+)' of \d+ .* '\1' of \d+ pos"):
        list(Stream(uneven, batch_size=8, epochs=1, shuffle=False))


def test_label_spaces_and_roots_are_looked_at_before_anything_is_read(
    tables: Tables, tmp_path: Path
) -> None:
    other = make_table(tmp_path / "o", rows=ROWS, k=4, classes=12)
    with pytest.raises(MismatchError, match=r"num_classes differs: table 'a' has 10.*'o' has 12"):
        Stream(make_ensemble_plan({"a": tables["a"], "o": other}), batch_size=8)
    plan = make_ensemble_plan({"a": tables["a"], "b": tables["b"]})
    with pytest.raises(BadInputError, match=r"roots: the plan reads no table 'z'"):
        Stream(plan, batch_size=8, roots={"z": "/nowhere"})
    there = {name: tables[name].root.uri for name in "ab"}
    assert len(next(iter(Stream(plan, batch_size=8, roots=there)))) == 8


# A table's own temperature.


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Table:
    folder = tmp_path_factory.mktemp("warm")
    return make_table(folder / "w", rows=30, k=4, temperatures=(0.5, 1.1, 2.0, 3.3), seed=4)


def at_temperature(temperature: float, k: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the top k and log tail of the warm table's teacher, float64."""
    dense = dense_logprobs(30, CLASSES, 4)
    scaled = dense / temperature
    scaled -= np.log(np.exp(scaled).sum(1, keepdims=True))
    order = np.argsort(-dense, axis=1, kind="stable")
    head = np.take_along_axis(scaled, order[:, :k], 1)
    return head, np.log(np.exp(np.take_along_axis(scaled, order[:, k:], 1)).sum(1))


@pytest.mark.parametrize(("own", "asked"), [(1.1, 1.0), (1.1, 3.0), (2.0, 0.5), (0.5, 1.0)])
def test_a_tables_own_temperature_multiplies_the_losss(
    warm: Table, own: float, asked: float
) -> None:
    """1.1 times 3 is not the float 3.3; 2 times one half is what is stored at 1."""
    plan = make_ensemble_plan({"w": warm}, temperatures={"w": own})
    require_servable(plan, LossSpec(temperature=asked), [])
    batch = next(iter(Stream(plan, batch_size=30, shuffle=False, temperatures=[asked])))
    found = targets_at(batch.targets, asked)
    head, tail = at_temperature(own * asked)
    # float16's precision in the table, then rescaled.
    np.testing.assert_allclose(found.logprobs.numpy(), head, atol=5e-3)
    np.testing.assert_allclose(found.tail_logprob.numpy(), tail, atol=5e-3)
    base, base_tail = at_temperature(own)
    np.testing.assert_allclose(batch.targets.logprobs, base, atol=5e-3)
    assert batch.targets.tail is not None
    np.testing.assert_allclose(batch.targets.tail, base_tail, atol=5e-3)
    assert batch.targets.entropy is None
    labels, ids = batch.targets.label_ids, batch.targets.ids
    assert labels is not None
    assert batch.targets.label_logprobs is not None
    rows, places = np.nonzero(ids == labels[:, None])
    stated = batch.targets.label_logprobs[rows]
    np.testing.assert_allclose(stated, batch.targets.logprobs[rows, places], atol=5e-3)


def test_rules_compare_values_at_temperature_one(warm: Table) -> None:
    above = Condition(column="top1_logprob", operator=">", constant=-0.7)
    own = make_ensemble_plan({"w": warm}, temperatures={"w": 2.0})
    ruled = own.tables["w"].model_copy(update={"positions": PositionRules(where=(above,))})
    kept = [e for e, soft in stored(warm).items() if soft.logprobs[0, 0] > np.float32(-0.7)]
    ids = list(stored(warm))
    entries = []
    for number, entry in enumerate(own.entries.to_pylist()):
        rows = [row for row in range(entry["num_rows"]) if ids[25 * number + row] in kept]
        entries.append(entry | {"rows": rows, "num_rows": len(rows)})
    plan = replace(own, tables={"w": ruled}, entries=entries_table(entries))
    (batch,) = Stream(plan, batch_size=64, epochs=1, shuffle=False)
    assert batch.example_ids.to_pylist() == kept
    assert (batch.targets.logprobs[:, 0] < -0.7).any()  # at temperature 2 they pass no more


def test_tables_of_several_temperatures_stream_together(warm: Table) -> None:
    other = make_table(Path(warm.root.uri).parent / "v", rows=30, k=8, temperatures=(2.0,), seed=5)
    plan = make_ensemble_plan({"w": warm, "v": other}, temperatures={"v": 2.0})
    (batch,) = Stream(plan, batch_size=30, epochs=1, shuffle=False)
    mixture = 0.5 * np.exp(dense_logprobs(30, CLASSES, 4))
    warmer = dense_logprobs(30, CLASSES, 5) / 2
    mixture += 0.5 * np.exp(warmer) / np.exp(warmer).sum(1, keepdims=True)
    got = targets_of(batch)
    logits = torch.zeros((30, CLASSES), dtype=torch.float64, requires_grad=True)
    loss = distillation_loss(logits, got, normalizer=1.0).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    top = batch.targets.ids[:, 0], batch.others[0].targets.ids
    both = [row for row in range(30) if top[0][row] in top[1][row]]
    assert len(both) > 10
    rows = np.array(both)
    expected = 1 / CLASSES - mixture[rows, top[0][rows]]
    np.testing.assert_allclose(gradient.numpy()[rows, top[0][rows]], expected, atol=2e-3)


def test_what_is_not_stored_is_refused_before_the_run(warm: Table, tables: Tables) -> None:
    plan = make_ensemble_plan({"w": warm}, temperatures={"w": 2.0})
    message = r"temperature 3\.0 \(the loss's 1\.5 times the table's own 2\.0\) is not stored"
    with pytest.raises(MismatchError, match=message):
        require_servable(plan, LossSpec(temperature=1.5), [])
    with pytest.raises(MismatchError, match=message):
        Stream(plan, batch_size=8, temperatures=[1.5])
    alone = make_ensemble_plan({"a": tables["a"]}, temperatures={"a": 2.0})
    with pytest.raises(MismatchError, match=r"temperature 2\.0 \(.*\) .* table 'a' has \[1\.0\]"):
        require_servable(alone, LossSpec(), [])
    sampled = LossSpec(tail="sampled")
    with pytest.raises(MismatchError, match=r"needs stored draws, table 'a' has draws 0"):
        require_servable(make_ensemble_plan(tables), sampled, [])
    require_servable(make_ensemble_plan(tables), LossSpec(), ["number"])
    other_way = {name: tables[name] for name in ("b", "a")}
    with pytest.raises(BadInputError, match="table 'b' has no column 'number'"):
        require_servable(make_ensemble_plan(other_way), LossSpec(), ["number"])
    with pytest.raises(BadInputError, match=r"'reverse': expected one teacher a row.* up to 3"):
        require_servable(make_ensemble_plan(tables), LossSpec(divergence="reverse"), [])


def test_draws_must_be_of_the_tables_temperature_times_the_losss(tmp_path: Path) -> None:
    drawn = make_table(tmp_path / "d", rows=30, k=3, draws=2, temperatures=(2.0,))
    few = make_table(tmp_path / "f", rows=30, k=3, draws=5)
    sampled = LossSpec(tail="sampled")
    # Teachers of a row may have unequally many; tables of one teacher's rows may not.
    require_servable(make_ensemble_plan({"d": drawn, "f": few}), sampled, [])
    with pytest.raises(MismatchError, match="equally many draws"):
        require_servable(make_plan({"d": drawn, "f": few}), sampled, [])
    warm = make_ensemble_plan({"d": drawn, "f": few}, temperatures={"d": 2.0})
    with pytest.raises(MismatchError, match=r"at temperature 2\.0 needs draws made there.*at 1\.0"):
        require_servable(warm, sampled, [])
    # Rows of one teacher whose draws are of unlike temperatures, relative to the table's own.
    plain = make_plan({"d": drawn, "e": make_table(tmp_path / "e", rows=30, k=3, draws=2)})
    assert Stream(plain, batch_size=30).draws == 2
    own = plain.tables["d"].model_copy(update={"temperature": 2.0})
    assert Stream(replace(plain, tables={**plain.tables, "d": own}), batch_size=30).draws == 0
    batch = next(iter(Stream(make_ensemble_plan({"d": drawn, "f": few}), batch_size=30)))
    pairs = targets_of(batch, draws=True)
    assert not isinstance(pairs, Targets)
    assert [None if t.draws is None else t.draws.shape[1] for t, _ in pairs] == [2, 5]


def test_unknown_tails_of_any_teacher_are_seen(plan: Plan) -> None:
    batch = next(iter(Stream(plan, batch_size=20, shuffle=False)))
    assert tails_known(batch)
    other = batch.others[1]
    tail = np.full_like(other.targets.tail, np.nan)
    spoilt = replace(other, targets=replace(other.targets, tail=tail))
    assert not tails_known(replace(batch, others=(batch.others[0], spoilt)))
