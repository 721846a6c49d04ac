"""The nightly job as a command: three days of real images, in order, twice, damaged, stopped."""

import json
import os
import signal
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from pipelines.nightly import night as nightly
from pipelines.nightly import run
from pipelines.nightly.make_days import write_day
from pipelines.nightly.night import DamagedError, run_night, version_of
from softlabels.cli.main import app as softlabels
from softlabels.errors import (
    BadInputError,
    DataError,
    MismatchError,
    TryAgainError,
)
from softlabels.plan import Plan
from softlabels.query.takedown import Request, take_down
from softlabels.storage import open_root
from softlabels.store import tags
from softlabels.store.inspect import verify
from softlabels.store.rollback import rollback
from softlabels.store.table import Table
from softlabels.store.vacuum import Keep, vacuum
from softlabels.teacher.capture import capture
from tests.pipelines.nights import AGAIN, DAYS, ROWS, Place, make_place
from tests.servers import S3

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(ROOT)
    return make_place(tmp_path / "nightly")


def days(place: Place, capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    """The lines that a call of the command prints."""
    capsys.readouterr()
    try:
        run.app([place.spec, *argv], standalone_mode=False)
    finally:
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return lines


def state(place: Place) -> dict[str, object]:
    """All that a night makes: versions, tags with their bytes, plans' bytes."""
    table = Table.open(place.table)
    kept = sorted((place.folder / "labels" / "_softlabels" / "tags").iterdir())
    return {
        "version": table.version,
        "files": table.files,
        "tags": {tag.name: tag.read_bytes() for tag in kept},
        "plans": {p.name: p.read_bytes() for p in (place.folder / "plans").iterdir()},
    }


def test_a_range_is_labelled_day_by_day(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    lines = days(place, capsys, "--from", DAYS[0], "--to", DAYS[2])
    assert [line["day"] for line in lines] == list(DAYS)
    assert [line["rows"] for line in lines] == [ROWS, ROWS - AGAIN, ROWS]
    totals = [ROWS, 2 * ROWS - AGAIN, 3 * ROWS - AGAIN]
    assert [line["table_rows"] for line in lines] == totals
    assert all(0 < line["entropy"] < 2.4 for line in lines)
    for line, total in zip(lines, totals, strict=True):
        table = Table.open(f"{place.table}@{line['day']}")
        assert (table.version, table.num_rows) == (line["version"], total)
        plan = Plan.read(place.plan(line["day"]))
        assert {t.version for t in plan.tables.values()} == {line["version"]}
        assert plan.num_rows == line["plan_rows"] == total + line["rows"]
        assert f"plan-{plan.fingerprint[:16]}" in tags.tag_names(table.root)


def test_the_same_day_twice_changes_nothing(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    first = days(place, capsys, "--date", DAYS[0])
    before = state(place)
    again = days(place, capsys, "--date", DAYS[0])
    assert state(place) == before
    assert (first[0]["made"], again[0]["made"]) == (True, False)
    for line in (*first, *again):
        del line["made"], line["seconds"]
    assert first == again
    # A range leaves the days that are done alone, and a day is the same after later ones.
    lines = days(place, capsys, "--from", DAYS[0], "--to", DAYS[2])
    assert [line["made"] for line in lines] == [False, True, True]
    after = state(place)
    assert days(place, capsys, "--date", DAYS[0])[0]["version"] == first[0]["version"]
    assert state(place) == after


def test_a_range_stops_at_a_day_that_is_not_whole_yet(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = place.partition(DAYS[1]) / "_SUCCESS"
    marker.unlink()
    with pytest.raises(TryAgainError, match=f"partition of {DAYS[1]} is not whole yet.*_SUCCESS"):
        days(place, capsys, "--from", DAYS[0], "--to", DAYS[2])
    assert tags.tag_names(Table.open(place.table).root)[0] == DAYS[0]
    assert DAYS[2] not in tags.tag_names(Table.open(place.table).root)
    marker.touch()
    lines = days(place, capsys, "--from", DAYS[0], "--to", DAYS[2])
    assert [line["made"] for line in lines] == [False, True, True]


def test_the_last_line_tells_of_the_failure(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TryAgainError):
        run.app([place.spec, "--date", "2024-03-05"], standalone_mode=False)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["day"], line["exit"]) == ("2024-03-05", 75)
    assert "not whole yet" in line["error"]


def test_without_a_marker_the_files_themselves_are_waited_for(place: Place) -> None:
    place.change("nightly.yaml", "marker: _SUCCESS", "marker: null")
    with pytest.raises(TryAgainError, match="not there yet: no file matches"):
        run_night(place.night("2024-03-05"))
    (place.partition(DAYS[0]) / "_SUCCESS").unlink()
    assert run_night(place.night(DAYS[0])).rows == ROWS


def test_a_flipped_byte_blocks_the_tag(place: Place) -> None:
    night = place.night(DAYS[0])
    capture(night.capture)
    file = place.folder / "labels" / Table.open(place.table).files[0].path
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(DamagedError, match=f"no tag '{DAYS[0]}', verify found 1 problem:") as found:
        run_night(night)
    assert found.value.exit_code == 1
    assert "sha256" in found.value.report["problems"][0]
    assert tags.tag_names(Table.open(place.table).root) == []
    assert not place.plan(DAYS[0]).exists()
    file.write_bytes(whole)
    assert run_night(night).tag == DAYS[0]


def test_damage_of_an_earlier_day_blocks_the_next(place: Place) -> None:
    run_night(place.night(DAYS[0]))
    file = place.folder / "labels" / Table.open(place.table).files[0].path
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1  # in the images, which no capture of another day reads
    file.write_bytes(damaged)
    with pytest.raises(DamagedError):
        run_night(place.night(DAYS[1]))
    assert DAYS[1] not in tags.tag_names(Table.open(place.table).root)


def test_a_signal_between_steps_ends_with_75_and_the_next_call_goes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def signalled(*arguments: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return verify(*arguments)

    monkeypatch.setattr(nightly, "verify", signalled)
    with pytest.raises(TryAgainError, match="stopped by a signal"):
        days(place, capsys, "--date", DAYS[0])
    assert tags.tag_names(Table.open(place.table).root) == []
    monkeypatch.setattr(nightly, "verify", verify)
    assert days(place, capsys, "--date", DAYS[0])[0]["version"] == 2


def test_a_signal_in_capture_ends_the_whole_range(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = Table.commit

    def signalled(self: Table, *arguments: Any, **settings: Any) -> Table:
        os.kill(os.getpid(), signal.SIGTERM)
        return commit(self, *arguments, **settings)

    monkeypatch.setattr(Table, "commit", signalled)
    with pytest.raises(TryAgainError, match="stopped by a signal"):
        days(place, capsys, "--from", DAYS[0], "--to", DAYS[2])
    monkeypatch.setattr(Table, "commit", commit)
    lines = days(place, capsys, "--from", DAYS[0], "--to", DAYS[2])
    assert [line["version"] for line in lines] == [2, 4, 6]


def test_late_files_of_a_done_day_are_refused_and_cleared_partitions_are_not(place: Place) -> None:
    done = run_night(place.night(DAYS[0]))
    part = place.partition(DAYS[0]) / "part-0.parquet"
    late = part.with_name("part-9.parquet")
    late.write_bytes(part.read_bytes())
    with pytest.raises(DataError, match=f"{DAYS[0]} is done with 2 files.*has 3 now"):
        run_night(place.night(DAYS[0]))
    for file in place.partition(DAYS[0]).iterdir():
        file.unlink()
    assert run_night(place.night(DAYS[0])).fingerprint == done.fingerprint


def test_the_day_s_version_takes_no_later_run_in(place: Place) -> None:
    first = capture(place.night(DAYS[0]).capture)
    assert version_of(Table.open(place.table), first.run_id) == 2
    capture(place.night(DAYS[1]).capture)
    newest = Table.open(place.table)
    assert newest.version == 4
    assert version_of(newest, first.run_id) == 2
    with pytest.raises(MismatchError, match=r"no commit of .* is of run 'other'"):
        version_of(newest, "other")


def test_a_day_that_was_rolled_back_before_its_tag_is_refused(place: Place) -> None:
    run_night(place.night(DAYS[0]))
    night = place.night(DAYS[1])
    capture(night.capture)
    rollback(Table.open(f"{place.table}@{DAYS[0]}"))
    with pytest.raises(MismatchError, match=r"95 rows of this run.*rollback at version 5"):
        run_night(night)


def test_a_day_after_a_rollback_is_not_made_without_the_rows_of_days_before(place: Place) -> None:
    run_night(place.night(DAYS[0]))
    run_night(place.night(DAYS[1]))
    rollback(Table.open(f"{place.table}@{DAYS[0]}"))
    with pytest.raises(DataError, match=rf"95 examples of .*@{DAYS[1]} went by the rollback at"):
        run_night(place.night(DAYS[2]))
    assert DAYS[2] not in tags.tag_names(Table.open(place.table).root)
    rollback(Table.open(f"{place.table}@{DAYS[1]}"))
    assert run_night(place.night(DAYS[2])).made


def test_a_day_that_is_done_late_says_that_its_tag_holds_later_days(place: Place) -> None:
    for day in (DAYS[0], DAYS[2]):
        run_night(place.night(day))
    lines: list[str] = []
    run_night(place.night(DAYS[1]), lines.append)
    assert any(f"{DAYS[1]}: done after {DAYS[2]}, whose rows" in line for line in lines)


def test_a_deleted_row_does_not_come_back_with_a_day_s_tag(place: Place) -> None:
    first = run_night(place.night(DAYS[0]))
    run_night(place.night(DAYS[1]))
    table = Table.open(f"{place.table}@{DAYS[0]}")
    gone = next(table.batches(["example_id"]))["example_id"][0].as_py()
    takedown = take_down(table, Request(ids=frozenset([gone])))
    assert takedown.holders is not None
    tags.delete_tags(table.root, [tag.name for tag in takedown.holders.tags])
    place.plan(DAYS[0]).unlink()
    lines: list[str] = []
    again = run_night(place.night(DAYS[0]), lines.append)
    assert (first.version, again.version) == (2, takedown.version)
    tagged = Table.open(f"{place.table}@{DAYS[0]}")
    kept = {name for b in tagged.batches(["example_id"]) for name in b["example_id"].to_pylist()}
    assert gone not in kept
    assert (len(kept), again.plan_rows) == (2 * ROWS - AGAIN - 1, 3 * ROWS - AGAIN - 2)
    assert any(
        f"versions before {again.version} hold rows that were deleted" in line for line in lines
    )
    # Nor where the version is gone for good.
    vacuum(tagged, Keep(retention=0))
    tags.delete_tags(table.root, [*tags.tag_names(table.root)])
    assert run_night(place.night(DAYS[0])).version == takedown.version


def test_a_night_s_labels_can_be_asked_for_again(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    run_night(place.night(DAYS[0]))
    asked = ["verify", f"{place.table}@{DAYS[0]}", "--json", "--rows", "32"]
    asked += ["--rescore", str(place.folder / "capture.yaml")]
    files = f"source.files={place.partition(DAYS[0])}/*.parquet"
    softlabels([*asked, "--set", files], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert (found["problems"], found["rescore"]["problems"]) == ([], [])
    assert found["rescore"]["positions"] > 0
    with pytest.raises(BadInputError, match=r"no file matches.*\{date\}"):
        softlabels(asked, standalone_mode=False)


@pytest.mark.slow
def test_all_of_it_on_an_object_store(place: Place, s3: S3) -> None:
    for name in ("nightly.yaml", "capture.yaml", "mix.yaml"):
        file = place.folder / name
        text = file.read_text()
        for part in ("labels", "images", "plans"):
            text = text.replace(str(place.folder / part), s3.url(part))
        file.write_text(text)
    with pytest.raises(TryAgainError, match="not whole yet: there is no 's3://"):
        run_night(place.night(DAYS[0]))
    for day in DAYS[:2]:
        folder = open_root(s3.url(f"images/day={day}"))
        for file in place.partition(day).iterdir():
            folder.write(file.name, file.read_bytes())
        report = run_night(place.night(day))
        again = run_night(place.night(day))
        assert (report.made, again.made) == (True, False)
        assert report.plan == s3.url(f"plans/plan-{day}.parquet")
        assert Plan.read(report.plan).fingerprint == again.fingerprint
    assert Table.open(f"{s3.url('labels')}@{DAYS[1]}").num_rows == 2 * ROWS - AGAIN


def test_another_plan_in_its_place_is_not_overwritten(place: Place) -> None:
    run_night(place.night(DAYS[0]))
    place.plan(DAYS[1]).write_bytes(place.plan(DAYS[0]).read_bytes())
    with pytest.raises(MismatchError, match="holds another plan"):
        run_night(place.night(DAYS[1]))
    assert place.plan(DAYS[1]).read_bytes() == place.plan(DAYS[0]).read_bytes()


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("capture.yaml", "day={date}", "day=x", r"source.files is .*: expected \{date\}"),
        ("mix.yaml", "@{date}", "", "no source reads '.*labels@{date}'"),
        ("nightly.yaml", "first: 2024-02-28", "first: 2024-02-29", "the first is 2024-02-29"),
        ("nightly.yaml", "marker:", "mark:", "unknown key 'mark'; did you mean 'marker'"),
        ("capture.yaml", "day={date}/*", "day={date}*/*", "is no folder a day"),
    ],
)
def test_specs_that_cannot_be_meant(
    place: Place, file: str, old: str, new: str, message: str
) -> None:
    place.change(file, old, new)
    with pytest.raises(BadInputError, match=message):
        run_night(place.night(DAYS[0]))
    assert not (place.folder / "labels").exists()


def test_a_recipe_may_say_the_day_anywhere(place: Place) -> None:
    recipe = place.night(DAYS[1]).recipe
    assert recipe.sources["today"].where == f"day = '{DAYS[1]}'"
    assert recipe.sources["today"].table == f"{place.table}@{DAYS[1]}"


def test_days_asked_for() -> None:
    yesterday = date(2024, 3, 1)

    def asked(day: Any, first: Any, to: Any, last: Any) -> list[str]:
        return [one.isoformat() for one in run._days(day, first, to, last, yesterday)]

    assert asked(None, None, None, None) == ["2024-03-01"]
    assert asked("2023-01-05", None, None, None) == ["2023-01-05"]
    assert asked(None, "2024-02-28", None, None) == list(DAYS)
    assert asked(None, "2024-02-27", "2024-02-28", None) == ["2024-02-27", "2024-02-28"]
    assert asked(None, None, None, 2) == ["2024-02-29", "2024-03-01"]
    for arguments in (
        ("2024-03-01", None, None, 2),
        (None, None, "2024-03-01", None),
        (None, "2024-03-02", "2024-03-01", None),
        ("20240301", None, None, None),
        ("2024-02-30", None, None, None),
        ("today", None, None, None),
    ):
        with pytest.raises(BadInputError):
            asked(*arguments)


def test_a_partition_rewritten_before_it_is_done_is_labelled_as_it_is_now(place: Place) -> None:
    night = place.night(DAYS[0])
    capture(night.capture)
    write_day(place.folder / "images", 0, ROWS + 10)  # ten images more
    report = run_night(night)
    assert report.table_rows == ROWS + 10
    assert report.rows == ROWS + 10  # of both runs
