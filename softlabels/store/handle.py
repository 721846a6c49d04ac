"""Handles of delta-rs: opened, brought up to date, and its panics turned into errors."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Schema
from deltalake.exceptions import DeltaError, TableNotFoundError

from softlabels.errors import BadInputError, IntegrityError, StorageError, one_line
from softlabels.storage import Root, delta_options, open_root, patiently, raise_storage_error
from softlabels.store.entries import has_beginning, without_checkpoints

T = TypeVar("T")


def table_root(uri: str) -> Root:
    """The root of a table at `uri`."""
    root = open_root(uri)
    if "%" in root.uri:
        # delta-rs decodes it in some places and not in others: "a%20b" would write into "a b".
        raise BadInputError(f"table {root.uri!r}: a '%' cannot be in a table's place, rename it")
    return root


def without_panics(root: Root, call: Callable[[], T]) -> T:
    """What `call` into delta-rs returns.

    Raises:
        IntegrityError: it panicked, as it does over some damaged logs. A panic is no Exception and
            would pass by all that handles errors.
    """
    try:
        return call()
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise IntegrityError(
            f"the log of table {root.uri!r} cannot be understood, it is damaged: "
            f"{one_line(error)}; should a checkpoint be: {without_checkpoints(root)}"
        ) from error


def open_delta(root: Root, version: int | None) -> DeltaTable:
    """A handle at a version; None: the newest.

    Raises:
        BadInputError: there is no table, or no such version.
        IntegrityError: its log is damaged.
        StorageError: it cannot be read.
        TryAgainError: storage does not answer.
    """

    def load() -> DeltaTable:
        delta = DeltaTable(root.uri, storage_options=delta_options(root))
        newest = delta.version()
        # delta-rs counts up to any version that it is asked for, for hours if it is large.
        if version is not None and version > newest:
            raise BadInputError(f"table {root.uri!r} has no version {version}, only 0 to {newest}")
        if version is not None and version != newest:
            delta.load_as_version(version)
        return delta

    return _told("open table", root, load)


def bring_up_to_date(root: Root, delta: DeltaTable) -> DeltaTable:
    """A handle at the newest version: `delta`, which reads only what is new, or another.

    Raises:
        As `open_delta`; `delta` is of no more use then.
    """
    held: DeltaTable | None = delta

    def load() -> DeltaTable:
        nonlocal held
        ours, held = held, None  # one that failed half way is not asked again
        if ours is None:
            return DeltaTable(root.uri, storage_options=delta_options(root))
        ours.update_incremental()
        return ours

    return _told("open table", root, load)


def create_delta(
    root: Root,
    schema: Schema,
    properties: Mapping[str, str],
    texts: Mapping[str, str],
) -> DeltaTable:
    """A handle to a new table without rows, or to one that another worker made first.

    Args:
        root: where.
        schema: of its rows.
        properties: of the table.
        texts: what its first log entry carries.

    Raises:
        StorageError: the place cannot be written.
        TryAgainError: storage does not answer.
    """
    try:
        return without_panics(
            root,
            lambda: DeltaTable.create(
                root.uri,
                schema=schema,
                name="softlabels",
                configuration=properties,
                raise_if_key_not_exists=False,
                storage_options=delta_options(root),
                # With retries, of two that create at once the later would become version 1 and put
                # its contents in place of the first one's.
                commit_properties=CommitProperties(
                    max_commit_retries=0, custom_metadata=dict(texts)
                ),
            ),
        )
    except (DeltaError, OSError) as error:
        try:
            return open_delta(root, None)
        except BadInputError:
            raise_storage_error("make a table at", root.uri, error)


def add_actions(root: Root, delta: DeltaTable) -> pa.Table:
    """What a handle says of its version's files."""
    return _told("read the log of", root, lambda: pa.table(delta.get_add_actions()))


def _told(action: str, root: Root, call: Callable[[], T]) -> T:
    """What `call` returns, which may be made again: delta-rs gives up on a body that breaks off."""

    def attempt() -> T:
        try:
            return without_panics(root, call)
        except TableNotFoundError as error:
            raise BadInputError(f"there is no table at {root.uri!r}") from error

    try:
        return patiently(action, root.uri, attempt)
    except StorageError as told:
        # What storage does not give is an OSError; this is about what was read.
        if isinstance(told.__cause__, DeltaError) and "Kernel error" in str(told.__cause__):
            if not has_beginning(root):
                raise StorageError(
                    f"there is no whole table at {root.uri!r}: its log has no beginning, as of a "
                    "publish that was stopped; publish there again"
                ) from told
            raise IntegrityError(
                f"{told}; the log is damaged; should a checkpoint be: {without_checkpoints(root)}"
            ) from told
        raise
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise IntegrityError(
            f"the log of table {root.uri!r} is damaged: {one_line(error)}"
        ) from error
