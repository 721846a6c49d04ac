"""A live teacher asked again about a sample of rows: are the stored labels still what it says?

Rows are taken in blocks of neighbours from units chosen at random, so that neither the source nor
the table is read whole. The teacher's answers are rounded by the table's profile before they are
compared: what is left is noise of the hardware and the batch, and whatever is wrong.

N positions, k stored ids a position.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from softlabels.errors import BadInputError, MismatchError
from softlabels.lineage import Contents
from softlabels.store import shards
from softlabels.store.table import Table, TableFile
from softlabels.targets import Floats, Ints, SoftTargets, position_name
from softlabels.teacher.labeller import Labeller
from softlabels.teacher.models import torch_threads
from softlabels.teacher.run import Run, Unit, prepare
from softlabels.teacher.spec import CaptureSpec, SequenceCaptureSpec

Doubles = npt.NDArray[np.float64]

BLOCK = 16
"""Neighbouring source rows that are labelled together: a read of storage costs as much for one."""

NOISE = {"float32": 0.01, "bfloat16": 0.25, "float16": 0.1}
"""Nats by which log-probabilities of one model may differ between machines and batches, by the
precision of its weights. Another teacher differs by nats."""

_PLACES = ("num_positions", "input_ids", "position_index", "segment_ids")
_SHOWN = 5
_VALUES = 4_000_000
"""Most comparisons of two ids at once."""
_LEAST_MASS = 1e-6
"""Of what is outside the shared ids: rounded values may leave less than nothing."""


@dataclass(frozen=True)
class Compared:
    """N positions compared.

    Attributes:
        delta: float64 [N], largest |difference| of a log-probability, nats. An id that one side
            lacks is there at most as likely as its last one: the difference is at least to that.
        excess: float64 [N], by how much a difference is above what rounding explains.
        kl: float64 [N], KL(stored‖live) over the ids that both have and one class for the rest.
        top1: bool [N], whether the likeliest id is another one.
    """

    delta: Doubles
    excess: Doubles
    kl: Doubles
    top1: npt.NDArray[np.bool_]


def rescore(
    table: Table,
    spec: CaptureSpec | SequenceCaptureSpec,
    rows: int = 256,
    tolerance: float | None = None,
    seed: int | None = None,
    planned: Callable[[int], None] = lambda rows: None,
    done: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any]:
    """Labels a sample of a table's rows again and says how far the stored labels are from it.

    Args:
        table: the version.
        spec: of the run that labelled it, with the same teacher and source.
        rows: source rows to label, about.
        tolerance: nats beyond the profile's step by which a log-probability may differ; none:
            by the precision of the teacher's weights (`NOISE`).
        seed: of the choice of rows; none: a new one.
        planned: told how many rows there are to label.
        done: told how many more are.

    Returns:
        rows compared, of_rows of the table, positions, absent: rows that the table does not hold
        from this run; max_delta, nats; kl_mean, kl_max, nats; top1_changed positions; labels
        changed in the source, positions; tolerance, seed; worst: examples with their difference;
        problems: a line each, empty when the labels are the teacher's.

    Raises:
        BadInputError: no row of the run can be compared.
        MismatchError: the spec is of another teacher, source or kind of label than the table.
    """
    with torch_threads(spec.threads):
        run, annotator = prepare(spec)
        labeller = Labeller(run, annotator)
        _require_fits(table, run)
        seed = int(np.random.default_rng().integers(2**32)) if seed is None else seed
        blocks = _choose(table, run, rows, seed)
        planned(sum(block.stop - block.start for _, block in blocks))
        batches: list[pa.RecordBatch] = []
        for _, block in blocks:
            everything = np.ones(block.stop - block.start, bool)
            batches += labeller.label(block, everything, done)
    live = pa.Table.from_batches(batches)
    stored, place = _stored(table, _files(table, run, [unit for unit, _ in blocks]), live)
    if not len(place):
        raise BadInputError(
            f"none of the {live.num_rows} rows that were labelled is in {table.root.uri!r} at "
            f"version {table.version}: they were deleted, or another run labelled them"
        )
    if tolerance is None:
        tolerance = NOISE[getattr(spec.teacher, "dtype", "float32")]
    found = _report(table.contents, stored, live.take(pa.array(place)), tolerance)
    absent = live.num_rows - len(place)
    return {"rows": len(place), "of_rows": table.num_rows, "absent": absent, "seed": seed} | found


def _require_fits(table: Table, run: Run) -> None:
    where = f"table {table.root.uri!r} at version {table.version}"
    if not table.contents.k:
        raise BadInputError(f"{where} stores draws alone, and no log-probability to compare")
    if table.contents.calibration is not None:
        raise MismatchError(
            f"{where} was calibrated at temperature {table.contents.calibration.temperature:g}: "
            "its labels are no longer the teacher's own; compare the version before that"
        )
    run.contents.require_same(table.contents, "the spec", where)
    if not any(table.committed(unit.key) for unit in run.units):
        raise MismatchError(
            f"the spec's run {run.id[:16]!r} has labelled nothing of {where}: its source or "
            "shard_rows is another; `softlabels log` lists the runs"
        )


def _choose(table: Table, run: Run, rows: int, seed: int) -> list[tuple[str, Unit]]:
    """Blocks of source rows to label, each with its unit's name, in source order."""
    rng = np.random.default_rng(seed)
    units = [unit for unit in run.units if table.committed(unit.key)]
    starts = np.concatenate([np.arange(unit.start, unit.stop, BLOCK) for unit in units])
    owners = np.repeat(np.arange(len(units)), [-(-(u.stop - u.start) // BLOCK) for u in units])
    chosen = np.sort(rng.permutation(len(starts))[: max(1, -(-rows // BLOCK))])
    blocks = []
    for start, owner in zip(starts[chosen].tolist(), owners[chosen].tolist(), strict=True):
        unit = units[owner]
        block = Unit("rescore", "", start, min(start + BLOCK, unit.stop))
        blocks.append((unit.name, block))
    return blocks


def _files(table: Table, run: Run, units: Sequence[str]) -> list[TableFile]:
    """Files that may hold rows of these units, those that were made of several files last."""
    chosen = set(units)
    own = [file for file in table.files if file.unit in chosen]
    # Joined files are named after the first unit in them alone.
    return own + [file for file in table.files if not file.unit[-1].isdecimal()]


def _stored(
    table: Table, files: Sequence[TableFile], live: pa.Table
) -> tuple[pa.Table, npt.NDArray[np.int64]]:
    """Rows of `files` that are in `live` too, and the place of each there."""
    wanted = _names(live["example_id"], live["view"]).combine_chunks()
    left = np.ones(len(wanted), bool)
    parts, places = [], []
    for file in files:
        if not left.any():
            break
        opened = shards.open_shard(table.root.buffer(file.path), file.path)
        for group in range(opened.num_row_groups):
            keys = shards.read_row_groups(opened, file.path, [group], ["example_id", "view"])
            names = _names(keys["example_id"], keys["view"])
            place = np.array(pc.fill_null(pc.index_in(names, value_set=wanted), -1), np.int64)
            rows = np.flatnonzero((place >= 0) & left[place])
            if len(rows):
                batch = shards.read_row_groups(opened, file.path, [group])
                parts.append(batch.take(pa.array(rows)))
                places.append(place[rows])
                left[place[rows]] = False
    if not parts:
        return live.slice(0, 0), np.zeros(0, np.int64)
    return pa.Table.from_batches(parts), np.concatenate(places)


def _names(examples: Any, views: Any) -> Any:
    """One text for each (example, view)."""
    return pc.binary_join_element_wise(examples, pc.cast(views, pa.string()), "\0")


def _targets(rows: pa.Table, contents: Contents) -> SoftTargets:
    columns = {name: rows[name].combine_chunks() for name in rows.schema.names}
    return SoftTargets.from_columns(columns, contents.k, contents.draws, contents.temperatures)


def compare(
    stored: SoftTargets, live: SoftTargets, profile: shards.Profile, noise: float
) -> Compared:
    """How far two targets of the same N positions are apart, both rounded by `profile`."""
    step = max(1, _VALUES // max(1, stored.k * live.k))
    parts = [
        _compare_some(
            (stored.ids[at], stored.logprobs[at]), (live.ids[at], live.logprobs[at]), profile, noise
        )
        for at in (slice(start, start + step) for start in range(0, max(1, len(stored.ids)), step))
    ]
    names = ("delta", "excess", "kl", "top1")
    return Compared(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _compare_some(
    stored: tuple[Ints, Floats], live: tuple[Ints, Floats], profile: shards.Profile, noise: float
) -> Compared:
    deltas, allowed = [], []
    for (ids, logs), (facing_ids, facing_logs) in ((stored, live), (live, stored)):
        place = _places(ids, facing_ids)
        there = _facing(facing_logs, place)
        least = facing_logs[:, -1:] if facing_logs.shape[1] else np.zeros((len(ids), 1), np.float32)
        with np.errstate(invalid="ignore"):
            apart = np.where(place >= 0, np.abs(logs - there), np.maximum(logs - least, 0))
        deltas.append(np.where(ids >= 0, apart, 0).astype(np.float64))
        allowed.append(_step(logs, profile) + noise)
    delta = np.concatenate(deltas, 1)
    return Compared(
        delta=delta.max(1, initial=0),
        excess=(delta - np.concatenate(allowed, 1)).max(1, initial=-np.inf),
        kl=_kl(stored, live),
        top1=(stored[0][:, :1] != live[0][:, :1]).any(1),
    )


def _places(ids: Ints, among: Ints) -> npt.NDArray[np.int64]:
    """Where each id stands in the other's row, int64 [N, k]; -1 where it does not."""
    same = (ids[:, :, None] == among[:, None, :]) & (ids >= 0)[:, :, None]
    if not among.shape[1]:
        return np.full(ids.shape, -1, np.int64)
    return np.where(same.any(2), same.argmax(2), -1)


def _step(logprobs: Floats, profile: shards.Profile) -> Doubles:
    """The distance of neighbouring values of the profile at each log-probability, nats."""
    depth = np.where(np.isfinite(logprobs), -logprobs, 0).astype(np.float64)
    if profile == "compact":
        return np.asarray(np.minimum(np.exp(depth / 2) / 96, 0.25), np.float64)
    return np.asarray(np.exp2(np.floor(np.log2(np.maximum(depth, 2.0**-14))) - 10), np.float64)


def _kl(stored: tuple[Ints, Floats], live: tuple[Ints, Floats]) -> Doubles:
    place = _places(stored[0], live[0])
    shared = place >= 0
    p = np.where(shared, np.exp(stored[1].astype(np.float64)), 0)
    q = np.where(shared, np.exp(_facing(live[1], place).astype(np.float64)), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = np.where(p > 0, p * np.log(p / q), 0).sum(1)
        rest_p, rest_q = (np.maximum(1 - mass.sum(1), _LEAST_MASS) for mass in (p, q))
        rest = rest_p * np.log(rest_p / rest_q)
    return np.asarray(np.maximum(inside + rest, 0), np.float64)


def _facing(values: Floats, place: npt.NDArray[np.int64]) -> Floats:
    """The values at these places of each row; any where there is none."""
    if not values.shape[1]:
        return np.zeros(place.shape, np.float32)
    return np.asarray(np.take_along_axis(values, np.maximum(place, 0), 1), np.float32)


def _report(contents: Contents, stored: pa.Table, live: pa.Table, noise: float) -> dict[str, Any]:
    """What `rescore` says of rows that face each other."""
    alike = np.ones(stored.num_rows, bool)
    for name in (name for name in _PLACES if name in stored.schema.names):
        pairs = zip(stored[name].to_pylist(), live[name].to_pylist(), strict=True)
        alike &= np.array([a == b for a, b in pairs])
    names = np.array(stored["example_id"].to_pylist(), object)
    mask = pa.array(alike)
    a, b = _targets(stored.filter(mask), contents), _targets(live.filter(mask), contents)
    found = compare(a, b, contents.profile, noise)

    def name_of(position: int) -> str:
        return position_name(names[alike].tolist(), a.num_positions, position)

    worst = np.argsort(-found.excess, kind="stable")[:_SHOWN].tolist()
    wrong = found.excess > 0
    problems = []
    if wrong.any():
        problems.append(
            f"{int(wrong.sum())} of {len(wrong)} positions are not what the teacher says now: "
            f"{name_of(worst[0])} by {found.delta[worst[0]]:.3g} nats"
        )
    if not alike.all():
        first = str(names[~alike][0])
        problems.append(f"{int((~alike).sum())} rows have other tokens now, such as {first!r}")
    labels = 0
    if a.label_ids is not None and b.label_ids is not None:
        labels = int((a.label_ids != b.label_ids).sum())
    return {
        "positions": len(wrong),
        "max_delta": float(found.delta.max(initial=0)),
        "kl_mean": float(found.kl.mean()) if len(wrong) else 0.0,
        "kl_max": float(found.kl.max(initial=0)),
        "top1_changed": int(found.top1.sum()),
        "labels_changed": labels,
        "tolerance": noise,
        "worst": [
            {"position": name_of(at), "delta": float(found.delta[at]), "kl": float(found.kl[at])}
            for at in worst
            if found.delta[at] > 0
        ],
        "problems": problems,
    }
