"""What the order of a plan goes by: its entries, and which source of the recipe each is of."""

from typing import Any

import numpy as np
import numpy.typing as npt

from softlabels.errors import IntegrityError
from softlabels.plan import Plan
from softlabels.plan_entries import one_array, to_ints
from softlabels.student.order import Int64s, Order
from softlabels.targets import to_numpy


def plan_order(plan: Plan, seed: int, shuffle: bool, shuffle_rows: int) -> Order:
    """The order of every epoch of a plan.

    Raises:
        IntegrityError: an entry has fewer than no rows or repeats.
    """
    order = Order(
        fingerprint=plan.fingerprint,
        stages=entry_column(plan, "stage", np.int32),
        num_rows=entry_column(plan, "num_rows", np.int32),
        repeats=entry_column(plan, "repeats", np.int32),
        seed=seed,
        shuffle=shuffle,
        shuffle_rows=shuffle_rows,
        sources=entry_sources(plan),
    )
    for name, values in (("num_rows", order.num_rows), ("repeats", order.repeats)):
        if (values < 0).any():
            entry = int(np.argmax(values < 0))
            raise IntegrityError(f"entry {entry} of the plan has {name} {int(values[entry])!r}")
    return order


def entry_column(plan: Plan, name: str, kind: type[np.generic]) -> npt.NDArray[Any]:
    """A column of the plan's entries, [E] of type `kind`."""
    return np.asarray(to_numpy(one_array(plan.entries[name]), kind))


def entry_sources(plan: Plan) -> Int64s:
    """A number for each entry, int64 [E], the same for all of one source.

    The plan's report says how many rows each source has, and its recipe in which stage; entries
    are in that order. Where a plan was not made by `mix`, so that these do not fit its entries,
    each table is a source.
    """
    reads = to_ints(plan.entries["num_rows"]) * to_ints(plan.entries["repeats"])
    ends, borders = np.cumsum(reads), _borders(plan)
    if len(borders) and len(ends) and borders[-1] == ends[-1] and np.isin(borders, ends).all():
        found: Int64s = np.searchsorted(borders, ends - reads, side="right")
        return found
    return to_ints(one_array(plan.entries["table"]).dictionary_encode().indices)


def _borders(plan: Plan) -> Int64s:
    """Rows up to the end of each source, in plan order; of none where the recipe does not say."""
    try:
        stages = {source["name"]: int(source["stage"]) for source in plan.recipe["sources"]}
        ordered = sorted(plan.report, key=lambda source: stages[source.source])
    except (KeyError, TypeError, ValueError):
        ordered = []
    return np.cumsum([source.reads for source in ordered], dtype=np.int64)
