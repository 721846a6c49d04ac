"""Calibration: a planted temperature is found, and the new version is exactly the labels at it."""

import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from softlabels.errors import BadInputError, DataError, MismatchError, TryAgainError
from softlabels.query import calibrate as module
from softlabels.query.calibrate import Calibrated, calibrate
from softlabels.query.fitting import LabelledRows, best_temperature, measure
from softlabels.query.mix import mix
from softlabels.query.recipe import Recipe, Source
from softlabels.query.rewrite import Rewriting, require_exact
from softlabels.query.selection import select
from softlabels.query.tempering import Exact
from softlabels.store import tags
from softlabels.store.inspect import describe, verify
from softlabels.store.table import Table
from softlabels.student.batch import targets_of
from softlabels.student.stream import Stream
from softlabels.student.temper import Targets
from softlabels.targets import SoftTargets
from softlabels.teacher.capture import capture
from tests.query.planted import log_softmax, make_planted
from tests.sequences import make_uneven
from tests.tables import make_table
from tests.teacher.jobs import make_spec, write_source


def read(table: Table) -> SoftTargets:
    """All soft targets of a version."""
    contents = table.contents
    parts = []
    for batch in table.batches():
        columns = {name: batch[name] for name in batch.schema.names}
        parts.append(
            SoftTargets.from_columns(columns, contents.k, contents.draws, contents.temperatures)
        )
    return SoftTargets.concat(parts)


def ranks_of(targets: SoftTargets) -> np.ndarray:
    assert targets.label_ranks is not None
    return targets.label_ranks


def column(table: Table, name: str) -> list[object]:
    return [value for batch in table.batches([name]) for value in batch[name].to_pylist()]


def dense(targets: SoftTargets, classes: int) -> np.ndarray:
    """Log-probabilities by class, float64 [N, V]; NaN where not stored."""
    found = np.full((len(targets.ids), classes), np.nan)
    np.put_along_axis(found, targets.ids.astype(np.int64), targets.logprobs, 1)
    return found


@pytest.mark.parametrize("heat", [1.7, 0.6])
def test_a_known_temperature_is_found_within_two_per_cent(tmp_path: Path, heat: float) -> None:
    planted = make_planted(tmp_path / "t", rows=24_000, classes=6, heat=heat)
    report = calibrate(planted.table.root.uri)
    assert report.temperature == pytest.approx(heat, rel=0.02)
    assert report.temperature_se is not None
    assert abs(report.temperature - heat) < 3 * report.temperature_se < 0.05 * heat
    table = Table.open(planted.table.root.uri)
    assert table.version == report.version == 2
    assert verify(table)["problems"] == []
    said = table.contents.calibration
    assert said is not None
    assert said == report.calibration
    assert said.fitted
    assert said.snapshot_digest == planted.table.snapshot_digest
    assert said.rows + said.held_out == 24_000
    assert said.nll_after is not None
    assert said.nll_before is not None
    assert said.ece_after is not None
    assert said.ece_before is not None
    assert said.nll_after < said.nll_before - 0.05
    assert said.ece_after < 0.02 < 0.1 < said.ece_before
    # Its halves are those of a recipe's split, and its NLL that of the stored bytes.
    side = {"take": "holdout", "holdout": 0.5}
    source = Source.model_validate({"table": table.root.uri, "split": side})
    rows = select(table, source, 0, with_keys=False).rows
    assert len(rows) == said.held_out
    logprobs = read(table).label_logprobs
    assert logprobs is not None
    assert -np.mean(logprobs[rows]) == pytest.approx(said.nll_after, abs=1e-3)


def test_every_column_is_of_the_new_distribution(tmp_path: Path) -> None:
    planted = make_planted(
        tmp_path / "t", rows=2500, classes=6, heat=1.5, temperatures=(2.0,), draws=2
    )
    report = calibrate(planted.table.root.uri, temperature=1.5)
    table = Table.open(planted.table.root.uri)
    before, after = read(planted.table), read(table)
    wanted = log_softmax(dense(before, 6) / 1.5)
    assert np.abs(dense(after, 6) - wanted).max() < 5e-3
    assert (after.ids == before.ids).all()
    assert after.tail is not None
    assert np.isneginf(after.tail).all()
    probs = np.exp(wanted)
    assert after.entropy == pytest.approx(-(probs * wanted).sum(1), abs=2e-3)
    assert after.label_logprobs == pytest.approx(wanted[np.arange(2500), planted.labels], abs=8e-3)
    assert np.array_equal(ranks_of(after), ranks_of(before))
    ordered = -np.sort(-probs, 1)
    assert column(table, "top1_prob") == pytest.approx(ordered[:, 0], abs=1e-3)
    assert column(table, "margin") == pytest.approx(ordered[:, 0] - ordered[:, 1], abs=2e-3)
    assert column(table, "label") == planted.labels.tolist()
    assert column(table, "top1_id") == before.ids[:, 0].tolist()
    assert column(table, "number") == list(range(2500))
    assert column(table, "example_id") == column(planted.table, "example_id")
    # What was stored for temperature 2 is of the new distribution too.
    hot = log_softmax(wanted / 2)
    made = np.take_along_axis(wanted, after.ids.astype(np.int64), 1) / 2
    made = made + after.temper[2.0].shift[:, None]
    assert np.abs(made - np.take_along_axis(hot, after.ids.astype(np.int64), 1)).max() < 5e-3
    assert np.isneginf(after.temper[2.0].tail).all()
    # Whole targets have no tail: there was nothing to draw from.
    assert table.contents.draws == 0
    assert report.left_out == ["2 draws a position: they were drawn from the tail at temperature 1"]


@pytest.mark.parametrize("profile", ["precise", "compact"])
def test_of_a_top_k_the_best_stored_temperature_is_taken(tmp_path: Path, profile: str) -> None:
    planted = make_planted(
        tmp_path / "t",
        rows=3000,
        classes=9,
        k=4,
        heat=2.0,
        temperatures=(1.5, 2.0, 4.0),
        draws=2,
        profile=profile,  # type: ignore[arg-type]
    )
    report = calibrate(planted.table.root.uri)
    assert report.temperature == 2.0
    assert sorted(report.fits) == [1.0, 1.5, 2.0, 4.0]
    table = Table.open(planted.table.root.uri)
    assert verify(table)["problems"] == []
    before, after = read(planted.table), read(table)
    step = 5e-3 if profile == "precise" else 0.13  # half a level of the deepest ids
    wanted = planted.truth  # softmax(z * 2) at temperature 2
    head = np.take_along_axis(wanted, after.ids.astype(np.int64), 1)
    assert np.abs(after.logprobs - head).max() < 2 * step
    rest = np.log(1 - np.exp(head).sum(1))
    assert after.tail == pytest.approx(rest, abs=0.05)
    labels = wanted[np.arange(3000), planted.labels]
    assert after.label_logprobs == pytest.approx(labels, abs=0.02)
    assert np.array_equal(ranks_of(after), ranks_of(before))
    assert after.entropy is None
    assert table.contents.draws == 0
    assert after.draws is None
    # 1, 1.5 and 4 are temperatures of the new labels too, and stay exact.
    assert table.contents.temperatures == (0.5, 0.75, 2.0)
    for relative in (0.5, 0.75, 2.0):
        hot = log_softmax(wanted / relative)
        made = after.logprobs / relative + after.temper[relative].shift[:, None]
        exact = np.take_along_axis(hot, after.ids.astype(np.int64), 1)
        assert np.abs(made - exact).max() < 2 * step / relative + 0.02
        rest = np.log(1 - np.exp(exact).sum(1))
        assert after.temper[relative].tail == pytest.approx(rest, abs=0.05)
    assert [line.split(":")[0] for line in report.left_out] == ["2 draws a position", "entropy"]


def test_draws_made_at_that_temperature_are_kept(tmp_path: Path) -> None:
    planted = make_planted(tmp_path / "t", rows=500, k=3, heat=2.0, temperatures=(2.0,), draws=2)
    contents = planted.table.contents.model_copy(update={"draws_temperature": 2.0})
    planted.table.contents = contents
    exact = Exact.of(contents)
    report = Calibrated("", None, 1, 2.0, None)
    job = module._Job(planted.table, exact, report, None)
    job.say()
    assert (job.contents().draws, job.contents().draws_temperature) == (2, 1.0)
    assert not any("draws" in line for line in report.left_out)
    shard = job._rewriting.shard(planted.table.files[0], "0" * 16 + "-000000")
    assert shard.num_rows == 500


def test_sequences_are_calibrated_too(tmp_path: Path) -> None:
    table = make_uneven(tmp_path / "t", rows=60, vocabulary=12, k=12, draws=0, known_entropy=False)
    report = calibrate(table.root.uri, temperature=1.25, output=str(tmp_path / "u"))
    made = Table.open(str(tmp_path / "u"))
    assert (report.version, Table.open(table.root.uri).version) == (made.version, table.version)
    assert verify(made)["problems"] == []
    before, after = read(table), read(made)
    assert (after.num_positions == before.num_positions).all()
    assert np.abs(dense(after, 12) - log_softmax(dense(before, 12) / 1.25)).max() < 0.03
    for name in ("input_ids", "position_index", "label_ids", "label", "top1_id"):
        assert column(made, name) == column(table, name)
    assert made.contents.alignment == "next"
    # The same command again finds it done.
    again = calibrate(table.root.uri, temperature=1.25, output=str(tmp_path / "u"))
    assert again.version == made.version
    with pytest.raises(MismatchError, match="calibration differs"):
        calibrate(table.root.uri, temperature=1.5, output=str(tmp_path / "u"))


def test_old_versions_and_tags_stay_readable(tmp_path: Path) -> None:
    planted = make_planted(tmp_path / "t", heat=2.0)
    uri = planted.table.root.uri
    tags.make_tag(planted.table.root, "v1", 1, planted.table.snapshot_digest)
    calibrate(uri)
    old = Table.open(f"{uri}@v1")
    assert old.contents == planted.table.contents
    assert old.files == planted.table.files
    assert verify(old)["problems"] == []
    new = Table.open(uri)
    assert new.snapshot_digest != old.snapshot_digest
    assert not {file.path for file in new.files} & {file.path for file in old.files}
    assert "calibration" not in describe(old)
    assert describe(new)["calibration"]["temperature"] == pytest.approx(2, rel=0.1)
    commit = new.history()[0]
    assert commit["run"].source["parent"]["version"] == 1
    assert commit["run"].num_rows == new.num_rows == 4000
    # What is stored of other tables is the bytes that it was.
    assert "calibration" not in old.contents.model_dump_json()


def test_twice_is_refused_unless_it_is_meant(tmp_path: Path) -> None:
    planted = make_planted(tmp_path / "t", rows=1000, heat=2.0)
    uri = planted.table.root.uri
    calibrate(uri, temperature=1.5)
    with pytest.raises(BadInputError, match=r"calibrated already, by temperature 1\.5"):
        calibrate(uri)
    calibrate(uri, temperature=1.25, again=True)
    both = read(Table.open(uri))
    wanted = log_softmax(dense(read(planted.table), 8) / (1.5 * 1.25))
    assert np.abs(dense(both, 8) - wanted).max() < 0.01


def test_a_version_that_is_not_the_newest_is_not_put_in_its_place(tmp_path: Path) -> None:
    planted = make_planted(tmp_path / "t", rows=1000, heat=2.0)
    uri = planted.table.root.uri
    done = calibrate(f"{uri}@1", temperature=1.5)
    # The very same again is done; another temperature would throw the newest away.
    assert calibrate(f"{uri}@1", temperature=1.5).version == done.version
    with pytest.raises(MismatchError, match=r"version 1 of .* is not its newest, 2"):
        calibrate(f"{uri}@1", temperature=1.75)
    assert Table.open(uri).version == 2


def test_a_row_that_comes_meanwhile_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = make_planted(tmp_path / "t", rows=1000, heat=2.0)
    uri = planted.table.root.uri
    store = Table.store_shard

    other = make_planted(tmp_path / "u", rows=1000, heat=2.0, seed=1).table
    unit = "e" * 16 + "-000000"

    def and_someone_commits(self: Table, *args: object) -> object:
        monkeypatch.undo()
        rows = Rewriting(other, 1.0, True, {}).shard(other.files[0], unit)
        late = planted.table.store_shard(f"x/{unit}", unit, rows)
        planted.table.commit([late], other.history()[0]["run"])
        return store(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Table, "store_shard", and_someone_commits)
    with pytest.raises(MismatchError, match="was at version 1 with 1000 rows and is at 2 with 20"):
        calibrate(uri, temperature=1.5)
    newest = Table.open(uri)
    assert (newest.version, newest.num_rows, newest.contents.calibration) == (2, 2000, None)


def test_capturing_into_calibrated_labels_is_refused_with_both_values(tmp_path: Path) -> None:
    write_source(tmp_path / "src" / "a.parquet", 0, 60)
    spec = make_spec(tmp_path, k=6)
    capture(spec)
    running = Table.open(spec.table)
    calibrate(spec.table, temperature=2.0)
    with pytest.raises(MismatchError, match=r"calibration differs: .* None, .*temperature=2.0"):
        capture(spec)
    # And one that had begun before does not get in either.
    file = running.files[0]
    unit = "f" * 16 + "-000000"
    shard = Rewriting(running, 1.0, True, {}).shard(file, unit)
    stored = running.store_shard(f"x/{unit}", unit, shard)
    with pytest.raises(MismatchError, match="calibration differs"):
        running.commit([stored], running.history()[0]["run"])


def test_a_student_reads_the_calibrated_labels(tmp_path: Path) -> None:
    planted = make_planted(tmp_path / "t", rows=1000, k=4, heat=2.0, temperatures=(2.0, 4.0))
    uri = planted.table.root.uri
    calibrate(uri)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"sources": {"a": {"table": uri}}}))
    plan = mix(Recipe.read(recipe))
    assert next(iter(plan.tables.values())).contents.calibration is not None
    batch = next(iter(Stream(plan, batch_size=32, temperatures=(2.0,))))
    targets = targets_of(batch, 2.0)
    assert isinstance(targets, Targets)
    number = np.array([int(name[1:]) for name in batch.example_ids.to_pylist()])
    ids = targets.ids.numpy().astype(np.int64)
    wanted = np.take_along_axis(np.exp(log_softmax(planted.truth / 2))[number], ids, 1)
    assert np.abs(np.exp(targets.logprobs.numpy()) - wanted).max() < 5e-3
    assert targets.entropy is None


def test_what_is_not_exact_is_refused_with_the_advice(tmp_path: Path) -> None:
    table = make_planted(tmp_path / "t", rows=500, k=4, temperatures=(2.0,)).table
    with pytest.raises(MismatchError, match=r"1\.3 is asked.*\[1\.0, 2\.0\].*temperatures: \[1"):
        calibrate(table.root.uri, temperature=1.3)
    assert Table.open(table.root.uri).version == 1
    other = make_planted(tmp_path / "u", rows=500, k=4).table
    with pytest.raises(MismatchError, match=r"4 of 8 classes and no temperature but 1.*k = 8"):
        calibrate(other.root.uri)


def test_a_table_of_all_classes_with_incomplete_rows_is_refused(tmp_path: Path) -> None:
    table = make_planted(tmp_path / "t", rows=500, classes=5, k=3).table
    # A handle that says of it what is not so.
    table.contents = table.contents.model_copy(update={"num_classes": 3})
    require_exact(table, Exact.of(table.contents))
    table.contents = table.contents.model_copy(update={"num_classes": 4})
    with pytest.raises(
        MismatchError, match="example 'x00000' has fewer than 4 classes and mass outside"
    ):
        require_exact(table, Exact(True, (1.0,)))


def test_nothing_is_made_where_no_temperature_helps(tmp_path: Path) -> None:
    table = make_planted(tmp_path / "t", rows=3000, k=4, temperatures=(2.0,)).table
    report = calibrate(table.root.uri)
    assert (report.temperature, report.calibration, report.version) == (1.0, None, None)
    assert "of the stored temperatures [1.0, 2.0], 1 fits best" in report.notes[0]
    assert Table.open(table.root.uri).version == 1


def test_a_fit_that_does_not_hold_for_the_other_half_is_not_stored(tmp_path: Path) -> None:
    table = make_planted(tmp_path / "t").table
    report = calibrate(table.root.uri)
    assert report.temperature == pytest.approx(1, abs=0.1)
    assert report.temperature != 1
    assert (report.calibration, report.version) == (None, None)
    assert "does not lower the NLL of the examples held out" in report.notes[0]
    assert Table.open(table.root.uri).version == 1


def test_the_edge_of_the_stored_temperatures_is_said(tmp_path: Path) -> None:
    table = make_planted(tmp_path / "t", rows=2000, k=4, heat=3.0, temperatures=(1.5, 2.0)).table
    report = calibrate(table.root.uri, dry_run=True)
    assert report.temperature == 2.0
    assert "edge of the stored temperatures" in report.notes[0]
    assert Table.open(table.root.uri).version == 1


def test_labels_that_no_temperature_fits_are_refused(tmp_path: Path) -> None:
    # Row i is labelled i % classes, whatever the teacher says.
    table = make_table(tmp_path / "t", rows=2000, k=10)
    with pytest.raises(DataError, match="as likely as chance"):
        calibrate(table.root.uri)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 1.0}, "that is not 1"),
        ({"temperature": float("nan")}, "expected a number from"),
        ({"temperature": -2.0}, "expected a number from"),
        ({"where": "nothing > 1"}, "nothing"),
        ({"where": "number < 60"}, "positions that fulfil 'number < 60'"),
        ({"output": "elsewhere@v1", "temperature": 2.0}, "not one version of it"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    table = make_planted(tmp_path / "t", rows=500).table
    before = sorted(os.listdir(tmp_path / "t" / "data"))
    with pytest.raises(BadInputError, match=message):
        calibrate(table.root.uri, **options)  # type: ignore[arg-type]
    assert sorted(os.listdir(tmp_path / "t" / "data")) == before


def test_where_chooses_the_rows_of_the_fit_and_all_are_calibrated(tmp_path: Path) -> None:
    table = make_planted(tmp_path / "t", heat=2.0).table
    report = calibrate(table.root.uri, where="number < 3000")
    found = report.calibration
    assert found is not None
    assert found.rows + found.held_out == 3000
    assert found.where == "number < 3000"
    assert report.rows == Table.open(table.root.uri).num_rows == 4000


def test_a_stop_leaves_the_table_and_what_is_written_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_planted(tmp_path / "t", heat=2.0).table
    uri = table.root.uri
    asked = iter([False, False, True])

    class Stopping:
        def __enter__(self) -> object:
            return lambda: next(asked)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(module, "stop_on_signal", Stopping)
    with pytest.raises(TryAgainError, match="2 of 4 files are written"):
        calibrate(uri, temperature=1.5)
    assert Table.open(uri).snapshot_digest == table.snapshot_digest
    monkeypatch.undo()
    # One of the two was damaged since: it is written again.
    new = sorted(set(os.listdir(tmp_path / "t/data")) - {f.path[5:] for f in table.files})
    with open(tmp_path / "t/data" / new[0], "ab") as file:
        file.write(b"x")
    report = calibrate(uri, temperature=1.5)
    assert (report.found, report.units) == (1, 4)
    made = Table.open(uri)
    assert verify(made)["problems"] == []
    assert made.num_rows == 4000


def test_rows_that_are_read_again_give_what_held_ones_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_planted(tmp_path / "t", rows=1500, heat=1.5).table
    rows = np.arange(1500)
    held = LabelledRows(table, rows)
    wanted = best_temperature(held), measure(held, (1.0, 2.0), True)
    monkeypatch.setattr("softlabels.query.fitting.HELD_NUMBERS", 1000)
    again = LabelledRows(table, rows)
    found = best_temperature(again), measure(again, (1.0, 2.0), True)
    assert again._held is None
    assert held._held
    assert found == wanted


def test_figures_are_those_of_a_dense_computation(tmp_path: Path) -> None:
    planted = make_planted(tmp_path / "t", rows=1200, classes=5)
    targets = read(planted.table)
    (found,) = measure(LabelledRows(planted.table, np.arange(1200)), (2.0,), True)
    logs = log_softmax(dense(targets, 5) / 2)
    assert found.nll == pytest.approx(-logs[np.arange(1200), planted.labels].mean(), abs=1e-3)
    confidence, right = np.exp(logs.max(1)), logs.argmax(1) == planted.labels
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            gap = confidence[inside].mean() - right[inside].mean()
            error += abs(gap) * inside.sum() / 1200
    assert found.ece == pytest.approx(error, abs=2e-3)


def test_unlabelled_positions_are_counted_and_left_out(tmp_path: Path) -> None:
    table = make_uneven(tmp_path / "t", rows=60, vocabulary=12, k=12, draws=0)
    rows = LabelledRows(table, np.arange(60))
    positions = sum(len(part.ids) for part in rows)
    labels = read(table).label_ids
    assert labels is not None
    assert positions == rows.positions == int((labels >= 0).sum())
    assert rows.unlabelled == int((labels < 0).sum()) > 0
    assert rows.unknown == 0
