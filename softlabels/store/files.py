"""Data files of a table: what their names say, what the log says of them, which are staged."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from softlabels.errors import IntegrityError
from softlabels.fingerprint import sha256_bytes
from softlabels.schema import COLUMNS, STATISTICS
from softlabels.storage import Root
from softlabels.store import shards

FOLDER = "data"

_FILE_NAME = re.compile(
    r"data/(?P<unit>[0-9a-f]{16}-\d{6}c?)-[0-9a-f]{8}-(?P<sha256>[0-9a-f]{64})-(?P<footer>[0-9a-f]{64})\.parquet"
)


_KINDS = ("minValues", "maxValues", "nullCount")


@dataclass(frozen=True)
class TableFile:
    """One data file of a table version; its name carries its checksums.

    Attributes:
        path: relative to the table's root.
        size: bytes.
        num_rows: rows, by the log.
        known: what the log says of its values: least, greatest and nulls of each column of
            STATISTICS in turn, None where it says nothing.
    """

    path: str
    size: int
    num_rows: int
    known: tuple[float | None, ...]

    @cached_property
    def bounds(self) -> Mapping[str, tuple[Any, Any]]:
        """Least and greatest value of columns that have statistics."""
        return {
            name: (least, greatest)
            for name, least, greatest, _ in self._by_column()
            if least is not None and greatest is not None
        }

    @property
    def statistics(self) -> dict[str, Any]:
        """What the log says of its values, as `Shard.statistics`."""
        kinds = list(zip(*self._by_column(), strict=True))
        names = kinds[0]
        return {
            "numRecords": self.num_rows,
            **{
                kind: {n: v for n, v in zip(names, values, strict=True) if v is not None}
                for kind, values in zip(_KINDS, kinds[1:], strict=True)
            },
        }

    def _by_column(self) -> Iterator[tuple[str, Any, Any, Any]]:
        least, greatest, nulls = (self.known[start::3] for start in range(3))
        return zip(STATISTICS, least, greatest, nulls, strict=True)

    @property
    def unit(self) -> str:
        """The unit it holds, "<first 16 digits of the run id>-<number>".

        A compacted file holds several: its name is that of the first, with a "c" behind.
        """
        return self._named("unit")

    @property
    def compacted(self) -> bool:
        """Whether its rows come from several units, and maybe runs."""
        return self.unit.endswith("c")

    @property
    def sha256(self) -> str:
        """Of the whole file."""
        return self._named("sha256")

    @property
    def footer_sha256(self) -> str:
        """Of its Parquet footer."""
        return self._named("footer")

    def _named(self, part: str) -> str:
        match = _FILE_NAME.fullmatch(self.path)
        if match is None:
            raise IntegrityError(f"data file {self.path!r} was not written by softlabels")
        return match[part]


@dataclass(frozen=True)
class UnitShard:
    """A unit of a run, stored and ready to be committed.

    Attributes:
        key: Delta app id, "<run id>/<unit>"; each is committed once. `Table.change` has no use
            for it.
        path: of its file below the root; None for a unit without rows.
        size: bytes.
        num_rows: rows.
        statistics: as `Shard.statistics`.
    """

    key: str
    path: str | None
    size: int
    num_rows: int
    statistics: Mapping[str, Any]


def file_path(unit: str, attempt: str, shard: shards.Shard) -> str:
    """Where a shard of `unit` is stored below the root; `attempt` is 8 random hex digits."""
    return f"{FOLDER}/{unit}-{attempt}-{shard.sha256}-{shard.footer_sha256}.parquet"


def readded(file: TableFile) -> UnitShard:
    """A file of some version, ready to be added by `Table.change` exactly as it was."""
    return UnitShard("", file.path, file.size, file.num_rows, file.statistics)


def table_files(actions: pa.Table) -> list[TableFile]:
    """Data files as add actions of the log describe them, column by column: there may be many."""
    rows = len(actions)

    def leaf(kind: str, name: str) -> list[Any]:
        parent = actions.schema.field(kind).type if kind in actions.column_names else None
        if parent is None or parent.get_field_index(name) < 0:
            return [None] * rows
        return list(pc.struct_field(actions[kind], name).to_pylist())

    known = [leaf(kind, name) for name in STATISTICS for kind in ("min", "max", "null_count")]
    names = ("path", "size_bytes", "num_records")
    columns = [actions[name].to_pylist() for name in names]
    return list(map(TableFile, *columns, zip(*known, strict=True)))


def known_of(statistics: Mapping[str, Any]) -> tuple[float | None, ...]:
    """`TableFile.known` of statistics as they are written: delta-rs reads them by column type."""
    return tuple(
        _typed(name, (statistics.get(kind) or {}).get(name), kind)
        for name in STATISTICS
        for kind in _KINDS
    )


def _typed(name: str, value: Any, kind: str) -> float | None:
    if value is None or kind == "nullCount" or COLUMNS[name].type != pa.float32():
        return None if value is None else int(value)
    return float(np.float32(value))


def logged_file(add: Mapping[str, Any]) -> TableFile:
    """A data file as an entry of the log has it, as `table_files`."""
    said = json.loads(add.get("stats") or "{}")
    return TableFile(add["path"], add["size"], said.get("numRecords"), known_of(said))


def staged(root: Root, units: Mapping[str, str]) -> dict[str, UnitShard]:
    """Units whose shard an earlier attempt has stored whole, ready to be committed.

    A file whose bytes are not those that its name says is passed over.

    Args:
        root: of the table.
        units: keys by unit name.

    Returns:
        By unit name.
    """
    found: dict[str, UnitShard] = {}
    for name in root.names(FOLDER):
        path = f"{FOLDER}/{name}"
        match = _FILE_NAME.fullmatch(path)
        if match is None or match["unit"] not in units or match["unit"] in found:
            continue
        data = root.buffer(path)
        if sha256_bytes(memoryview(data)) != match["sha256"]:
            continue
        statistics = shards.statistics_of(shards.open_shard(data, path), path)
        found[match["unit"]] = UnitShard(
            units[match["unit"]], path, len(data), statistics["numRecords"], statistics
        )
    return found
