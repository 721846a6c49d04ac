"""What one commit writes to the Delta log: units added, or put in the place of all that was there.

A commit goes out from the handle that was looked at and is never retried by delta-rs, so that a
racing writer makes it fail. Contents of a table are set when it is made, as a property; a version
that replaces them carries its own with the schema, since one Delta commit that exchanges files can
change the schema but no property.
"""

import json
import time
from collections.abc import Sequence

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Schema, Transaction
from deltalake.transaction import AddAction, RemoveAction

from softlabels.lineage import Contents, RunLineage
from softlabels.store.files import UnitShard

CONTENTS_PROPERTY = "softlabels.contents"
COMMIT_KEY = "softlabels"

_CARRIER = "example_id"
"""The column whose metadata holds the contents of a version that has its own."""


def append(delta: DeltaTable, units: Sequence[UnitShard], lineage: RunLineage) -> None:
    """Adds units, keys and lineage in one commit that follows `delta`'s version."""
    actions: list[AddAction | RemoveAction] = list(_adds(units))
    _commit(delta, actions, "append", delta.schema(), units, lineage)


def replace(
    delta: DeltaTable,
    units: Sequence[UnitShard],
    lineage: RunLineage,
    schema: pa.Schema,
    contents: Contents,
) -> None:
    """As `append`, but all files of `delta`'s version go, and schema and contents are new."""
    text = contents.model_dump_json()
    place = schema.get_field_index(_CARRIER)
    carrier = schema.field(place).with_metadata({CONTENTS_PROPERTY: text})
    marked = Schema.from_arrow(schema.set(place, carrier))
    actions: list[AddAction | RemoveAction] = list(_adds(units))
    _commit(delta, actions, "overwrite", marked, units, lineage)


def contents_of(delta: DeltaTable) -> str | None:
    """The contents record of `delta`'s version, JSON; None where there is none."""
    field = pa.schema(delta.schema().to_arrow()).field(0)
    own = (field.metadata or {}).get(CONTENTS_PROPERTY.encode())
    if own is not None and field.name == _CARRIER:
        return str(own.decode())
    return delta.metadata().configuration.get(CONTENTS_PROPERTY)


def _adds(units: Sequence[UnitShard]) -> list[AddAction]:
    now = int(time.time() * 1000)
    return [
        AddAction(
            path=unit.path,
            size=unit.size,
            partition_values={},
            modification_time=now,
            data_change=True,
            stats=json.dumps(unit.statistics),
        )
        for unit in units
        if unit.path is not None
    ]


def _commit(
    delta: DeltaTable,
    actions: list[AddAction | RemoveAction],
    mode: str,
    schema: Schema,
    units: Sequence[UnitShard],
    lineage: RunLineage,
) -> None:
    delta.create_write_transaction(
        actions,
        mode,
        schema,
        commit_properties=CommitProperties(
            custom_metadata={COMMIT_KEY: lineage.model_dump_json()},
            max_commit_retries=0,
            app_transactions=[Transaction(unit.key, 1) for unit in units],
        ),
        post_commithook_properties=PostCommitHookProperties(
            create_checkpoint=True, cleanup_expired_logs=False
        ),
    )
