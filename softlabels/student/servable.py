"""Whether the tables of a plan hold what a loss and a student's inputs need."""

import math
from collections.abc import Iterable

from softlabels.errors import BadInputError, MismatchError
from softlabels.plan import Plan, PlanTable
from softlabels.schema import COLUMNS
from softlabels.student.members import slot_plan
from softlabels.student.spec import LossSpec
from softlabels.student.tempered import stored_temperature


def require_servable(plan: Plan, loss: LossSpec, columns: Iterable[str]) -> None:
    """Raises unless every table of the plan holds what the loss and the inputs need.

    Columns are needed of the first teachers' tables alone.

    Raises:
        BadInputError: a column is not in a table, or a reverse KL to several teachers is asked for.
        MismatchError: the temperature is not stored; or tail is "sampled" and there are no draws,
            draws of another temperature, or not equally many in all tables; or another tail, and
            there are draws alone.
    """
    if plan.num_members > 1 and loss.divergence == "reverse":
        raise BadInputError(
            f"divergence 'reverse': expected one teacher a row, the plan has ensembles of up to "
            f"{plan.num_members}: use 'forward'"
        )
    for table in plan.tables.values():
        name, contents = f"table {table.name!r}", table.contents
        recorded = contents.recorded
        if recorded is not None and recorded.tail == "unknown" and loss.kd_weight:
            raise MismatchError(
                f"{name} was recorded with tail {recorded.tail!r}: the mass outside its top "
                f"{contents.k} is unknown, and tail {loss.tail!r} needs it; only kd_weight 0 does "
                "not"
            )
        if not contents.k and loss.tail != "sampled" and loss.kd_weight:
            raise MismatchError(
                f"tail {loss.tail!r} needs stored ids, {name} has k {contents.k!r} and draws "
                f"{contents.draws!r} alone: use tail 'sampled'"
            )
        for asked in dict.fromkeys((1.0, loss.temperature)):
            stored_temperature(contents, table.temperature, asked, name)
    for slot in range(plan.num_members):
        tables = slot_plan(plan, slot).tables.values()
        if not slot:
            _require_columns(tables, columns)
        if loss.tail == "sampled" and loss.kd_weight:
            _require_draws(tables, loss.temperature)


def _require_columns(tables: Iterable[PlanTable], columns: Iterable[str]) -> None:
    for table in tables:
        carried = table.contents.carried
        missing = sorted(set(columns) - set(carried) - set(COLUMNS))
        if missing:
            raise BadInputError(
                f"inputs.columns: table {table.name!r} has no column {missing[0]!r}, it carries "
                f"{list(carried)!r}; take one of these, or capture with carry"
            )


def _require_draws(tables: Iterable[PlanTable], temperature: float) -> None:
    """Raises unless tail "sampled" can be served; each teacher's rows need equally many draws."""
    counts = {}
    for table in tables:
        name, contents = f"table {table.name!r}", table.contents
        if not contents.draws:
            raise MismatchError(
                f"tail 'sampled' needs stored draws, {name} has draws {contents.draws!r}: "
                "use tail 'bucket', or capture with `draws`"
            )
        wanted = stored_temperature(contents, table.temperature, temperature, name)
        if not math.isclose(contents.draws_temperature, wanted, rel_tol=1e-9):
            raise MismatchError(
                f"tail 'sampled' at temperature {wanted!r} needs draws made there, "
                f"{name} has draws made at {contents.draws_temperature!r}: use tail 'bucket'"
            )
        counts[contents.draws] = name
    if len(counts) > 1:
        raise MismatchError(
            f"tail 'sampled' needs equally many draws in every table, found {counts!r}: "
            "use tail 'bucket'"
        )
