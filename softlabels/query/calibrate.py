"""A table's labels at the temperature that fits its hard labels best, as a new version.

T is fitted on the labelled rows of one half of the examples and judged on those of the other, so
that the figures are of rows that it has not seen. Halves are those of a recipe's
`split: {holdout: 0.5}`.

Files are written one by one beside the table's, then one commit puts them in the place of all that
were there. Before it the table is as it was, however the process ends, and the same call takes up
what an earlier one has written.
"""

import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from softlabels.errors import BadInputError, DataError, MismatchError, TryAgainError
from softlabels.fingerprint import sha256_json
from softlabels.lineage import Calibration, Contents, RunLineage
from softlabels.query.fitting import RANGE, Fit, LabelledRows, best_temperature, measure
from softlabels.query.recipe import Source
from softlabels.query.rewrite import Rewriting, require_exact
from softlabels.query.selection import Numbers, select
from softlabels.query.tempering import Exact, serve_draws
from softlabels.schema import FORMAT_VERSION
from softlabels.signals import stop_on_signal
from softlabels.store.files import staged
from softlabels.store.table import Table, UnitShard, parse_reference

LEAST = 50
"""Labelled positions of either half below which nothing is fitted."""

LEAST_GAIN = 1e-4
"""Nats of the held-out NLL below which a new version is not worth its files."""

DIGITS = 6
"""Of T and the figures that are stored: further ones differ by processor."""

_PACKAGES = ("softlabels", "numpy", "pyarrow", "deltalake", "duckdb")


@dataclass
class Calibrated:
    """What a call of `calibrate` did, or would do.

    Attributes:
        table: URI of the table that holds the result.
        version: of it that was made, or was there already; None where none is.
        parent: version of the labels that were calibrated.
        temperature: T; `temperature_se` its standard error, where any T could be fitted.
        calibration: what the new version's lineage says; None where nothing is to be made.
        fits: NLL on the half that T was fitted on, by temperature; of whole targets of 1 and T.
        unlabelled: positions of the fitted half without a label; `unknown` those whose label has
            an unknown probability or none.
        rows: of the new version.
        units: files of it; `found` those that an earlier call had written.
        left_out: what the new version lacks, and why.
        notes: what else to know.
        seconds: time it took.
    """

    table: str
    version: int | None
    parent: int
    temperature: float
    calibration: Calibration | None
    temperature_se: float | None = None
    fits: dict[float, float] = field(default_factory=dict)
    unlabelled: int = 0
    unknown: int = 0
    rows: int = 0
    units: int = 0
    found: int = 0
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def calibrate(
    reference: str,
    where: str | None = None,
    temperature: float | None = None,
    output: str | None = None,
    again: bool = False,
    dry_run: bool = False,
    written: Callable[[int, int], None] = lambda rows, total: None,
) -> Calibrated:
    """Fits T and stores the labels at it.

    Args:
        reference: of the table; its newest version, unless `output` is given.
        where: SQL that chooses the labelled rows for fit and figures; all rows are calibrated.
        temperature: T, instead of a fit.
        output: another table to put the result into.
        again: of labels that are calibrated already, once more.
        dry_run: only fit; nothing is written.
        written: told how many more rows were written, and of how many.

    Raises:
        BadInputError: an argument cannot be meant, there are too few labels, or the labels are
            calibrated already.
        MismatchError: targets at T are not exact, or the table was changed meanwhile.
        DataError: no temperature fits.
        TryAgainError: it was told to stop; the same call goes on.
    """
    began = time.monotonic()
    table = _opened(reference, output, again)
    exact = Exact.of(table.contents)
    if temperature is not None:
        if not RANGE[0] <= temperature <= RANGE[1] or temperature == 1:
            raise BadInputError(
                f"temperature {temperature!r}: expected a number from {RANGE[0]} to {RANGE[1]} "
                "that is not 1"
            )
        exact.require(temperature, table.contents, f"table {table.root.uri!r}")
    elif exact == Exact(whole=False, stored=(1.0,)):
        raise MismatchError(
            f"table {table.root.uri!r} stores {table.contents.k} of "
            f"{table.contents.num_classes} classes and no temperature but 1: how its mass outside "
            "them spreads at another cannot be told; capture it with `temperatures: [0.75, 1.5, "
            f"2]`, of which the best is taken, or with k = {table.contents.num_classes}"
        )
    require_exact(table, exact)
    with stop_on_signal() as stopped:
        report = _fitted(table, exact, where, temperature)
        report.table = output or table.root.uri
        if report.calibration is not None:
            job = _Job(table, exact, report, output)
            job.say()
            if dry_run:
                job.require_newest()
            else:
                job.run(written, stopped)
    report.seconds = round(time.monotonic() - began, 3)
    return report


def _opened(reference: str, output: str | None, again: bool) -> Table:
    table = Table.open(reference)
    done = table.contents.calibration
    if done is not None and not again:
        raise BadInputError(
            f"table {table.root.uri!r} is calibrated already, by temperature {done.temperature!r} "
            f"from labels {done.snapshot_digest[:12]!r}: its labels would be tempered twice; with "
            "--again they are"
        )
    if not table.num_rows:
        raise BadInputError(f"table {table.root.uri!r} has no rows at version {table.version}")
    if output is not None and parse_reference(output)[1] is not None:
        raise BadInputError(f"{output!r}: expected a table, not one version of it (TABLE@...)")
    return table


def _fitted(table: Table, exact: Exact, where: str | None, temperature: float | None) -> Calibrated:
    """T and its figures; the calibration is None where it would change nothing for the better."""
    extra = () if exact.whole else tuple(t for t in exact.stored if t != 1)
    half = LabelledRows(table, _half(table, where, "train"), extra)
    rest = LabelledRows(table, _half(table, where, "holdout"), extra)
    given = temperature is not None
    fits: dict[float, Fit] = {}
    error = None
    if temperature is None:
        _require_labels(half, where)
        candidates = exact.stored
        if exact.whole:
            best, error = best_temperature(half)
            candidates = (1.0, _within(best))
        fits = dict(zip(candidates, measure(half, candidates, exact.whole), strict=True))
        temperature = min(fits, key=lambda t: fits[t].nll)
    report = Calibrated(table.root.uri, None, table.version, temperature, None, error)
    report.fits = {t: round(fit.nll, DIGITS) for t, fit in fits.items()}
    report.unlabelled, report.unknown = half.unlabelled, half.unknown
    before = after = None
    if any(True for _ in rest):
        before, after = measure(rest, (1.0, temperature), exact.whole)
    if not given:
        if before is None or after is None or before.positions < LEAST:
            raise BadInputError(_too_few(rest.positions, where))
        if temperature == 1:
            report.notes.append(
                f"nothing is made: of the stored temperatures {list(exact.stored)!r}, 1 fits best"
            )
            return report
        if after.nll > before.nll - LEAST_GAIN:
            report.notes.append(
                f"nothing is made: {temperature:g} does not lower the NLL of the examples held "
                f"out by {LEAST_GAIN:g} nats, it is {before.nll:.5f} at 1, {after.nll:.5f} at it"
            )
            return report
    report.calibration = Calibration(
        temperature=temperature,
        snapshot_digest=table.snapshot_digest,
        fitted=not given,
        where=where,
        rows=0 if given else half.positions,
        held_out=rest.positions,
        nll_before=None if before is None else round(before.nll, DIGITS),
        nll_after=None if after is None else round(after.nll, DIGITS),
        ece_before=None if before is None else round(before.ece, DIGITS),
        ece_after=None if after is None else round(after.ece, DIGITS),
    )
    if not given and not exact.whole and temperature in (min(exact.stored), max(exact.stored)):
        report.notes.append(
            f"{temperature:g} is at the edge of the stored temperatures: a better one may lie "
            f"beyond; only a capture with it can tell (stored: {list(exact.stored)!r})"
        )
    return report


def _half(table: Table, where: str | None, side: str) -> Numbers:
    split = {"take": side, "holdout": 0.5}
    source = Source.model_validate({"table": table.root.uri, "where": where, "split": split})
    return select(table, source, 0, with_keys=False).rows


def _require_labels(half: LabelledRows, where: str | None) -> None:
    for _ in half:
        pass
    if half.positions < LEAST:
        raise BadInputError(_too_few(half.positions, where))


def _too_few(positions: int, where: str | None) -> str:
    chosen = "" if where is None else f" that fulfil {where!r}"
    return (
        f"{positions} positions{chosen} of half of the examples have a hard label of known "
        f"probability: expected at least {LEAST} in each half; give a temperature instead of a fit"
    )


def _within(temperature: float) -> float:
    low, high = RANGE
    if not low * 1.01 < temperature < high / 1.01:
        raise DataError(
            f"no temperature from {low} to {high} fits: the hard labels are as likely as chance "
            "or always the likeliest; `softlabels report` says what is wrong with them"
        )
    return float(f"{temperature:.{DIGITS}g}")


class _Job:
    """A calibration on its way into a table."""

    def __init__(self, table: Table, exact: Exact, report: Calibrated, output: str | None) -> None:
        self._table, self._report, self._output = table, report, output
        self._temperature = report.temperature
        self._keeps_draws = not exact.whole and serve_draws(table.contents, self._temperature)
        self._extra = exact.rebased(self._temperature)
        self._rewriting = Rewriting(table, self._temperature, exact.whole, self._extra)
        self._dropped = [] if exact.whole else self._not_kept(exact)
        self.id = sha256_json(
            {
                "format_version": FORMAT_VERSION,
                "labels": table.snapshot_digest,
                "temperature": self._temperature,
            }
        )
        names = [f"{self.id[:16]}-{number:06d}" for number in range(len(table.files))]
        self._units = {name: f"{self.id}/{name}" for name in names}

    def say(self) -> None:
        """Puts into the report what the new version will lack."""
        report, contents = self._report, self._table.contents
        report.rows, report.units = self._table.num_rows, len(self._units)
        if contents.draws and not self._keeps_draws:
            report.left_out.append(
                f"{contents.draws} draws a position: they were drawn from the tail at temperature "
                f"{contents.draws_temperature:g}"
            )
        if self._dropped:
            report.left_out.append(
                f"temperatures {', '.join(f'{t:g}' for t in self._dropped)}: relative to "
                f"{self._temperature:g} they are no short decimals"
            )
        if not self._rewriting.whole:
            report.left_out.append("entropy: of the mass outside the stored ids it is not known")

    def run(self, written: Callable[[int, int], None], stopped: Callable[[], bool]) -> None:
        """Writes what is not written yet, then commits all of it."""
        target = self._target()
        if all(target.committed(key) for key in self._units.values()):
            self._done(target)
            return
        self.require_newest()
        started, before = datetime.now(UTC), time.monotonic()
        ready = staged(target.root, self._units)
        self._report.found = len(ready)
        for file, (name, key) in zip(self._table.files, self._units.items(), strict=True):
            if name not in ready:
                if stopped():
                    raise TryAgainError(
                        f"stopped by a signal: {len(ready)} of {len(self._units)} files are "
                        "written, the table is as it was; run the same command to go on"
                    )
                shard = self._rewriting.shard(file, name)
                ready[name] = target.store_shard(key, name, shard)
            written(file.num_rows, self._report.rows)
        units = [ready[name] for name in self._units]
        lineage = self._lineage(started, time.monotonic() - before)
        self._done(self._committed(target, units, lineage))

    def require_newest(self) -> None:
        """Raises MismatchError where a version would be replaced that is not the calibrated one."""
        if self._output is not None:
            return
        newest = self._table.latest()
        done = all(newest.committed(key) for key in self._units.values())
        if not done and newest.snapshot_digest != self._table.snapshot_digest:
            raise MismatchError(
                f"version {self._table.version} of {self._table.root.uri!r} is not its newest, "
                f"{newest.version}, which holds something else and would be replaced: calibrate "
                "the newest one, or put the result elsewhere with --to"
            )

    def contents(self) -> Contents:
        """What the new version says of itself."""
        contents = self._table.contents
        changes: dict[str, Any] = {
            "temperatures": tuple(sorted(self._extra)),
            "calibration": self._report.calibration,
            "draws_temperature": 1.0,
        }
        if not self._keeps_draws:
            changes["draws"] = 0
        return contents.model_copy(update=changes)

    def _committed(self, target: Table, units: list[UnitShard], lineage: RunLineage) -> Table:
        if self._output is None:
            schema = self._rewriting.schema
            return self._table.replace(units, lineage, schema, self.contents())
        return target.commit(units, lineage, self._require_own)

    def _target(self) -> Table:
        if self._output is None:
            return self._table.latest()
        target = Table.open_or_create(self._output, self._rewriting.schema, self.contents())
        self._require_own(target)
        return target

    def _require_own(self, table: Table) -> None:
        other = next((f for f in table.files if f.unit[:16] != self.id[:16]), None)
        if other is not None:
            raise MismatchError(
                f"table {table.root.uri!r} holds rows of run {other.unit[:16]!r}, this calibration "
                f"is run {self.id[:16]!r}: use another table"
            )

    def _not_kept(self, exact: Exact) -> list[float]:
        kept = {*self._extra.values(), self._temperature}
        return [t for t in exact.stored if t not in kept]

    def _done(self, table: Table) -> None:
        self._report.table, self._report.version = table.root.uri, table.version

    def _lineage(self, started: datetime, seconds: float) -> RunLineage:
        assert self._report.calibration is not None
        spec = {"calibrate": self._report.calibration.model_dump(mode="json")}
        return RunLineage(
            run_id=self.id,
            units=tuple(self._units),
            num_rows=self._report.rows,
            spec=spec,
            spec_sha256=sha256_json(spec),
            source={
                "parent": {
                    "uri": self._table.root.uri,
                    "version": self._table.version,
                    "snapshot_digest": self._table.snapshot_digest,
                }
            },
            packages={name: importlib.metadata.version(name) for name in _PACKAGES},
            device="cpu",
            started_at=started.isoformat(timespec="seconds"),
            seconds=round(seconds, 3),
        )
