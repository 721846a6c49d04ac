"""A small file whose every byte is covered by its own checksum."""

import json
from pathlib import Path

import pytest

from softlabels.storage import open_root
from softlabels.store import runs, tags
from softlabels.store.sealed import seal, unseal
from softlabels.store.tags import Tag

TAG = Tag(name="v1", version=12, snapshot_digest="9" * 64, made_at="2026-01-01T00:00:00+00:00")


def test_what_was_sealed_comes_back() -> None:
    data = seal(TAG)
    assert unseal(Tag, data) == TAG
    assert set(json.loads(data)) == {*TAG.model_dump(), "sha256"}


def test_any_byte_that_differs_is_noticed() -> None:
    data = seal(TAG)
    for place in range(len(data)):
        for bits in (1, 2, 4, 8, 16, 32, 64, 128):
            damaged = bytearray(data)
            damaged[place] ^= bits
            with pytest.raises(ValueError, match=r"checksum|validation error"):
                unseal(Tag, bytes(damaged))


def test_files_of_earlier_releases_have_no_seal() -> None:
    assert unseal(Tag, TAG.model_dump_json().encode()) == TAG


def test_tags_and_runs_are_sealed(tmp_path: Path) -> None:
    root = open_root(tmp_path)
    tags.make_tag(root, "v1", 3, "9" * 64)
    record = runs.RunRecord(
        run_id="a" * 64, units=3, rows=9, spec={}, source={}, started_at="2026-01-01"
    )
    runs.record_run(root, record)
    for folder in (tags.FOLDER, runs.FOLDER):
        for name in root.names(folder):
            assert b',"sha256":"' in root.read(f"{folder}/{name}")
    assert tags.read_tag(root, "v1").version == 3
    assert runs.run_records(root) == [record]
