"""`log_lines`: what they cost; what they say is tested beside the commands that make versions."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from softlabels.storage import Root
from softlabels.store.log import log_lines
from softlabels.store.table import Table
from tests.tables import make_table


def test_each_entry_of_the_log_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_table(tmp_path / "t", rows=20)
    table = Table.open(str(tmp_path / "t"))
    real, reads = Root.read, Counter[str]()

    def read(self: Root, path: str, *arguments: Any) -> bytes:
        reads[path] += path.startswith("_delta_log/")
        return real(self, path, *arguments)

    monkeypatch.setattr(Root, "read", read)
    assert [(line["version"], line["rows"]) for line in log_lines(table)] == [(1, 20), (0, 0)]
    assert +reads == {f"_delta_log/{version:020d}.json": 1 for version in (0, 1)}
