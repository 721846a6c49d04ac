"""The nightly job as a Dagster asset: daily partitions, retries, metadata, a check.

    NIGHTLY_SPEC=pipelines/nightly/nightly.yaml dagster dev -m pipelines.nightly.definitions

A partition is a day. It depends on the day before, so that a backfill goes in order. Only failures
that may pass are retried. The check `verify` stands before the tag: a version that fails it gets
none, and no plan.
"""

import dataclasses
import os
from collections.abc import Iterator
from datetime import date

import dagster as dg

from pipelines.nightly.spec import DEFAULT, NightSpec
from softlabels.errors import SoftLabelsError, TryAgainError
from softlabels.signals import stop_on_signal

ASSET = "soft_labels"
CHECK = "verify"
HOUR = 2
"""Of the day after, UTC, when the schedule asks for a partition."""

RETRIES = dg.RetryPolicy(
    max_retries=6, delay=60, backoff=dg.Backoff.EXPONENTIAL, jitter=dg.Jitter.PLUS_MINUS
)
"""Waits 1, 3, 7, 15, 31 and 63 minutes: two hours for a partition that is late."""

Events = Iterator[dg.AssetCheckResult | dg.MaterializeResult[None]]


def definitions(path: str, retries: dg.RetryPolicy = RETRIES) -> dg.Definitions:
    """The asset of a nightly spec, its check, job and schedule.

    Args:
        path: of the spec.
        retries: of failures that may pass, those that exit 75 on the command line.

    Raises:
        BadInputError: the spec is wrong.
    """
    spec = NightSpec.read(path)
    days = dg.DailyPartitionsDefinition(start_date=spec.first.isoformat(), timezone="UTC")
    day_before = dg.TimeWindowPartitionMapping(start_offset=-1, end_offset=-1)

    @dg.asset(
        name=ASSET,
        partitions_def=days,
        deps=[dg.AssetDep(ASSET, partition_mapping=day_before)],
        check_specs=[dg.AssetCheckSpec(CHECK, asset=ASSET, blocking=True)],
        retry_policy=retries,
        description="Soft labels of a day's partition: a tagged version and a plan.",
    )
    def soft_labels(context: dg.AssetExecutionContext) -> Events:
        yield from _events(context, spec)

    job = dg.define_asset_job("nightly", selection=[soft_labels])
    schedule = dg.build_schedule_from_partitioned_job(job, hour_of_day=HOUR)
    return dg.Definitions(assets=[soft_labels], jobs=[job], schedules=[schedule])


def _events(context: dg.AssetExecutionContext, spec: NightSpec) -> Events:
    # Here, so that loading the definitions loads neither torch nor a database.
    from pipelines.nightly.night import DamagedError, night_of, run_night
    from softlabels.store.table import Table

    failure = None
    with stop_on_signal() as stopped:
        try:
            night = night_of(spec, date.fromisoformat(context.partition_key))
            report = run_night(night, context.log.info, stopped)
        except DamagedError as error:
            failure = dg.Failure(str(error), allow_retries=False)
            problems = {"problems": error.report["problems"]}
            yield dg.AssetCheckResult(passed=False, check_name=CHECK, metadata=problems)
        except SoftLabelsError as error:
            # Somebody who ends a run does not want it to begin again.
            again = isinstance(error, TryAgainError) and not stopped()
            failure = dg.Failure(str(error), allow_retries=again)
    if failure is not None:
        raise failure  # here: Dagster keeps it, and would keep all that an error's traceback holds
    files = len(Table.open(f"{report.table}@{report.tag}").files)
    yield dg.MaterializeResult(
        metadata={k: v for k, v in dataclasses.asdict(report).items() if v is not None},
        check_results=[
            dg.AssetCheckResult(
                passed=True,
                check_name=CHECK,
                metadata={"files": files, "rows": report.table_rows},
            )
        ],
    )


defs = definitions(os.environ.get("NIGHTLY_SPEC", DEFAULT))
