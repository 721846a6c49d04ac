"""What one commit writes to the Delta log: units added, or put in the place of all that was there.

A commit goes out from the handle that was looked at and is never retried by delta-rs, so that a
racing writer makes it fail. Contents of a table are set when it is made, as a property; a version
that replaces them carries its own with the schema, since one Delta commit that exchanges files can
change the schema but no property.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Schema, Transaction
from deltalake.transaction import AddAction, RemoveAction

from softlabels.lineage import ChangeLineage, Contents, RunLineage
from softlabels.store.files import TableFile, UnitShard
from softlabels.store.records import CHANGE_KEY, COMMIT_KEY, State

CONTENTS_PROPERTY = "softlabels.contents"

_CARRIER = "example_id"
"""The column whose metadata holds the contents of a version that has its own."""


def append(
    delta: DeltaTable, state: State, units: Sequence[UnitShard], lineage: RunLineage
) -> None:
    """Adds units, keys and lineage in one commit that follows `delta`'s version.

    `state` is what that version holds, for the record of the next one.
    """
    _commit(delta, state, _Actions(units, ()), [unit.key for unit in units], lineage)


def replace(
    delta: DeltaTable,
    state: State,
    units: Sequence[UnitShard],
    removed: Sequence[TableFile],
    lineage: RunLineage,
    other: tuple[pa.Schema, Contents],
) -> None:
    """As `append`, but `removed`, all files there are, go; schema and contents are new."""
    actions = _Actions(units, removed, _carrying(*other))
    _commit(delta, state, actions, [unit.key for unit in units], lineage)


def change(
    delta: DeltaTable,
    state: State,
    added: Sequence[UnitShard],
    removed: Sequence[TableFile],
    lineage: ChangeLineage,
    other: tuple[pa.Schema, Contents] | None,
) -> None:
    """Takes files out and puts others in, in one commit that follows `delta`'s version.

    Where schema and contents become `other` ones, all files of the version must go: Delta sets a
    schema only with those that are all new.
    """
    actions = _Actions(added, removed, _carrying(*other) if other else None)
    _commit(delta, state, actions, [lineage.key], lineage)


def narrowed(
    lineage: RunLineage | ChangeLineage, units: Mapping[str, UnitShard]
) -> RunLineage | ChangeLineage:
    """A lineage that tells of these units alone, by key, of all that its commit was to add."""
    if isinstance(lineage, ChangeLineage):
        return lineage
    # What another attempt has committed already is in that commit's record, not in this one's.
    names = {key.rpartition("/")[2] for key in units}
    return lineage.model_copy(
        update={
            "units": tuple(u for u in lineage.units if u.rpartition("/")[2] in names),
            "num_rows": sum(unit.num_rows for unit in units.values()),
        }
    )


@dataclass(frozen=True)
class _Actions:
    added: Sequence[UnitShard]
    removed: Sequence[TableFile]
    schema: Schema | None = None
    """Of the new version, where it is another: then all files of the old one go by themselves."""


def _carrying(schema: pa.Schema, contents: Contents) -> Schema:
    text = contents.model_dump_json()
    place = schema.get_field_index(_CARRIER)
    carrier = schema.field(place).with_metadata({CONTENTS_PROPERTY: text})
    return Schema.from_arrow(schema.set(place, carrier))


def contents_of(delta: DeltaTable) -> str | None:
    """The contents record of `delta`'s version, JSON; None where there is none."""
    field = pa.schema(delta.schema().to_arrow()).field(0)
    own = (field.metadata or {}).get(CONTENTS_PROPERTY.encode())
    if own is not None and field.name == _CARRIER:
        return str(own.decode())
    return delta.metadata().configuration.get(CONTENTS_PROPERTY)


def _commit(
    delta: DeltaTable,
    state: State,
    actions: _Actions,
    keys: Sequence[str],
    lineage: RunLineage | ChangeLineage,
) -> None:
    now = int(time.time() * 1000)
    adds: list[AddAction | RemoveAction] = [
        AddAction(
            path=unit.path,
            size=unit.size,
            partition_values={},
            modification_time=now,
            data_change=True,
            stats=json.dumps(unit.statistics),
        )
        for unit in actions.added
        if unit.path is not None
    ]
    gone = [RemoveAction(file.path, True, now, file.size, {}) for file in actions.removed]
    record = state.after(actions.added, actions.removed, keys, actions.schema)
    said = CHANGE_KEY if isinstance(lineage, ChangeLineage) else COMMIT_KEY
    delta.create_write_transaction(
        adds if actions.schema else [*gone, *adds],
        "overwrite" if actions.schema else "append",
        actions.schema or delta.schema(),
        commit_properties=CommitProperties(
            custom_metadata=record.texts({said: lineage.model_dump_json()}),
            max_commit_retries=0,
            app_transactions=[Transaction(key, 1) for key in keys],
        ),
        post_commithook_properties=PostCommitHookProperties(
            create_checkpoint=True, cleanup_expired_logs=False
        ),
    )
