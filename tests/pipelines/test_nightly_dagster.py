"""The nightly job as a Dagster asset, materialised for real, in process."""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

dg = pytest.importorskip("dagster", reason="pip install 'softlabels[dagster]'")

from pipelines.nightly import night  # noqa: E402
from pipelines.nightly.definitions import ASSET, CHECK, RETRIES, definitions  # noqa: E402
from pipelines.nightly.night import run_night  # noqa: E402
from softlabels.store import tags  # noqa: E402
from softlabels.store.table import Table  # noqa: E402
from softlabels.teacher.capture import capture  # noqa: E402
from tests.pipelines.nights import DAYS, Place, make_place  # noqa: E402

ROOT = Path(__file__).parents[2]
KEY = dg.AssetKey(ASSET)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(ROOT)
    return make_place(tmp_path / "nightly")


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Dagster of this test alone, which writes nowhere else and tells nobody."""
    home = tmp_path / "dagster"
    home.mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    (home / "dagster.yaml").write_text((ROOT / "pipelines/nightly/dagster.yaml").read_text())
    with dg.DagsterInstance.get() as found:
        assert not found.telemetry_enabled
        yield found
    assert not (tmp_path / "nobody").exists()


def materialise(place: Place, instance: Any, day: str, retries: int = 1) -> Any:
    policy = dg.RetryPolicy(max_retries=retries, delay=0)
    assets = list(definitions(place.spec, policy).assets or ())
    return dg.materialize(assets, partition_key=day, instance=instance, raise_on_error=False)


def kinds(result: Any) -> Counter[str]:
    return Counter(event.event_type_value for event in result.all_events)


def failure(result: Any) -> str:
    (event,) = [e for e in result.all_events if e.event_type_value == "STEP_FAILURE"]
    return str(event.step_failure_data.user_failure_data.description)


def test_three_days_partitions(place: Place, instance: Any) -> None:
    for day in DAYS:
        result = materialise(place, instance, day)
        assert result.success
        (event,) = result.asset_materializations_for_node(ASSET)
        assert event.partition == day
        found = {name: value.value for name, value in event.metadata.items()}
        table = Table.open(f"{place.table}@{day}")
        assert found["tag"] == day
        assert found["version"] == table.version
        assert found["table_rows"] == table.num_rows
        assert found["bytes"] == sum(file.size for file in table.files)
        assert found["seconds"] > 0
        assert 0 < found["entropy"] < 2.4
        assert Path(found["plan"]) == place.plan(day)
        (check,) = result.get_asset_check_evaluations()
        assert (check.check_name, check.passed, check.blocking) == (CHECK, True, True)
        assert check.metadata["files"].value == len(table.files)
    assert instance.get_materialized_partitions(KEY) == set(DAYS)
    # The same numbers as on the command line, and a partition again changes nothing.
    before = {path: path.read_bytes() for path in place.folder.rglob("*.parquet")}
    again = materialise(place, instance, DAYS[1])
    (event,) = again.asset_materializations_for_node(ASSET)
    assert event.metadata["made"].value is False
    assert run_night(place.night(DAYS[1])).version == event.metadata["version"].value
    assert {path: path.read_bytes() for path in place.folder.rglob("*.parquet")} == before


def test_what_may_pass_is_tried_again_and_then_fails(place: Place, instance: Any) -> None:
    (place.partition(DAYS[0]) / "_SUCCESS").unlink()
    result = materialise(place, instance, DAYS[0], retries=2)
    assert not result.success
    assert kinds(result)["STEP_RESTARTED"] == 2
    assert "not whole yet" in failure(result)
    assert not (place.folder / "labels").exists()


def test_a_partition_that_is_whole_at_the_second_attempt(
    place: Place, instance: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = place.partition(DAYS[0]) / "_SUCCESS"
    marker.unlink()

    def run(*arguments: Any) -> Any:
        try:
            return run_night(*arguments)
        finally:
            marker.touch()  # comes when the first attempt has failed

    monkeypatch.setattr(night, "run_night", run)
    result = materialise(place, instance, DAYS[0])
    assert result.success
    assert kinds(result)["STEP_RESTARTED"] == 1


def test_a_failed_verify_is_a_failed_check_without_tag_or_second_try(
    place: Place, instance: Any
) -> None:
    capture(place.night(DAYS[0]).capture)
    file = place.folder / "labels" / Table.open(place.table).files[0].path
    damaged = bytearray(file.read_bytes())
    damaged[1000] ^= 1
    file.write_bytes(damaged)
    result = materialise(place, instance, DAYS[0])
    assert not result.success
    (check,) = result.get_asset_check_evaluations()
    assert not check.passed
    assert "sha256" in check.metadata["problems"].value[0]
    assert kinds(result)["STEP_RESTARTED"] == 0
    assert result.asset_materializations_for_node(ASSET) == []
    assert tags.tag_names(Table.open(place.table).root) == []
    assert not place.plan(DAYS[0]).exists()


def test_a_run_that_is_told_to_stop_does_not_begin_again(
    place: Place, instance: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Table.commit

    def signalled(self: Table, *arguments: Any, **settings: Any) -> Table:
        os.kill(os.getpid(), signal.SIGTERM)
        return commit(self, *arguments, **settings)

    monkeypatch.setattr(Table, "commit", signalled)
    result = materialise(place, instance, DAYS[0])
    assert not result.success
    assert kinds(result)["STEP_RESTARTED"] == 0
    assert "stopped by a signal" in failure(result)
    monkeypatch.setattr(Table, "commit", commit)
    assert materialise(place, instance, DAYS[0]).success


def test_what_cannot_pass_is_not_tried_again(place: Place, instance: Any) -> None:
    place.change("capture.yaml", "columns: [image]", "columns: [picture]")
    result = materialise(place, instance, DAYS[0])
    assert not result.success
    assert kinds(result)["STEP_RESTARTED"] == 0
    assert "no column 'picture'" in failure(result)


# Dagster's own schedule calls what it has deprecated.
@pytest.mark.filterwarnings("ignore:Function `JobDefinition.run_request:DeprecationWarning")
def test_days_wait_for_the_day_before_and_the_schedule_asks_for_yesterday(
    place: Place, instance: Any
) -> None:
    found = definitions(place.spec)
    dg.Definitions.validate_loadable(found)
    graph = found.resolve_asset_graph()
    node = graph.get(KEY)
    assert node.has_self_dependency
    assert node.partitions_def.get_first_partition_key() == DAYS[0]
    mapping = graph.get_partition_mapping(KEY, KEY)
    days = node.partitions_def
    mapped = mapping.get_upstream_mapped_partitions_result_for_partitions(
        days.subset_with_partition_keys([DAYS[1]]), days, days
    )
    assert set(mapped.partitions_subset.get_partition_keys()) == {DAYS[0]}
    schedule = found.resolve_schedule_def("nightly_schedule")
    at = datetime(2024, 3, 1, 2, 0, tzinfo=UTC)
    context = dg.build_schedule_context(
        instance=instance, scheduled_execution_time=at, repository_def=found.get_repository_def()
    )
    requests = schedule.evaluate_tick(context).run_requests or ()
    assert [request.partition_key for request in requests] == [DAYS[1]]
    assert RETRIES.max_retries == 6
