"""Data files of a table: what their names say, what the log says of them, which are staged."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softlabels.errors import IntegrityError
from softlabels.fingerprint import sha256_bytes
from softlabels.storage import Root
from softlabels.store import shards

FOLDER = "data"

_FILE_NAME = re.compile(
    r"data/(?P<unit>[0-9a-f]{16}-\d{6})-[0-9a-f]{8}-(?P<sha256>[0-9a-f]{64})-(?P<footer>[0-9a-f]{64})\.parquet"
)


@dataclass(frozen=True)
class TableFile:
    """One data file of a table version; its name carries its checksums.

    Attributes:
        path: relative to the table's root.
        size: bytes.
        num_rows: rows, by the log.
        bounds: least and greatest value of columns that have statistics.
    """

    path: str
    size: int
    num_rows: int
    bounds: Mapping[str, tuple[Any, Any]]

    @property
    def unit(self) -> str:
        """The unit it holds, "<first 16 digits of the run id>-<number>"."""
        return self._named("unit")

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
        key: Delta app id, "<run id>/<unit>"; each is committed once.
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


def table_file(action: Mapping[str, Any]) -> TableFile:
    """A data file as an add action of the log describes it."""
    least, greatest = action.get("min") or {}, action.get("max") or {}
    bounds = {
        name: (low, greatest[name])
        for name, low in least.items()
        if low is not None and greatest.get(name) is not None
    }
    return TableFile(action["path"], action["size_bytes"], action["num_records"], bounds)


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
