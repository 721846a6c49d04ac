import json
import threading
from pathlib import Path

import pytest

from softlabels.errors import BadInputError, IntegrityError
from softlabels.storage import Root, open_root
from softlabels.store import tags
from softlabels.store.table import Table
from tests.tables import forget_records, make_table


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return open_root(tmp_path)


def test_a_tag_stands_for_one_version_for_ever(root: Root) -> None:
    made = tags.make_tag(root, "v1", 3, "a" * 64)
    assert tags.read_tag(root, "v1") == made
    assert tags.make_tag(root, "v1", 3, "a" * 64) == made, "the same again is no error"
    assert tags.make_tag(root, "v1", 4, "a" * 64) == made, "a version that holds the same"
    for version in (3, 4):
        with pytest.raises(BadInputError, match=r"stands for version 3.*never move"):
            tags.make_tag(root, "v1", version, "b" * 64)
    assert tags.read_tag(root, "v1") == made


def test_tags_are_listed_in_order_and_nothing_else_is(root: Root) -> None:
    assert tags.tag_names(root) == []
    for name in ("v2", "a.b-c_d", "v10"):
        tags.make_tag(root, name, 1, "a" * 64)
    root.write(f"{tags.FOLDER}/v3.json.0123.tmp", b"left by a crash")
    assert tags.tag_names(root) == ["a.b-c_d", "v10", "v2"]
    with pytest.raises(BadInputError, match=r"no tag 'v1' \(tags: a\.b-c_d, v10, v2\)"):
        tags.read_tag(root, "v1")


@pytest.mark.parametrize(
    "name", ["", "12", "../v", "a/b", ".hidden", "-x", "a b", "v1\n", "a@b", "x" * 101, "é", "a\0"]
)
def test_names_that_are_no_names_are_refused(root: Root, name: str) -> None:
    with pytest.raises(BadInputError, match="tag name"):
        tags.make_tag(root, name, 1, "a" * 64)
    with pytest.raises(BadInputError, match="tag name"):
        tags.read_tag(root, name)
    assert root.names(tags.FOLDER) == []


def test_of_many_that_tag_at_once_one_wins(root: Root) -> None:
    barrier = threading.Barrier(8)
    results: list[tuple[int, bool]] = []

    def run(version: int) -> None:
        barrier.wait()
        try:
            tags.make_tag(root, "v1", version, f"{version}" * 64)
        except BadInputError:
            results.append((version, False))
        else:
            results.append((version, True))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [version for version, won in results if won]
    assert (len(results), winners) == (8, [tags.read_tag(root, "v1").version])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "v1"}', '{"name": "v1", "extra": 1}'])
def test_a_damaged_tag_is_said_to_be_damaged(root: Root, text: str) -> None:
    root.write(f"{tags.FOLDER}/v1.json", text.encode())
    with pytest.raises(IntegrityError, match=r"tag 'v1' .* is damaged"):
        tags.read_tag(root, "v1")


def test_a_tag_opens_its_version_unless_that_has_changed(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=60, shard_rows=20)
    tags.make_tag(table.root, "v1", table.version, table.snapshot_digest)
    assert Table.open(f"{tmp_path / 't'}@v1").version == table.version

    # Somebody rewrites history: the log entry of the tagged version loses a file.
    entry = tmp_path / "t" / "_delta_log" / f"{table.version:020d}.json"
    lines = entry.read_text().splitlines()
    last = max(i for i, line in enumerate(lines) if "add" in json.loads(line))
    entry.write_text("\n".join(lines[:last] + lines[last + 1 :]) + "\n")
    forget_records(tmp_path / "t")  # with them it cannot be opened by its number either
    with pytest.raises(IntegrityError, match=r"tag 'v1' .* was made for snapshot .* is now"):
        Table.open(f"{tmp_path / 't'}@v1")
    assert Table.open(f"{tmp_path / 't'}@{table.version}").num_rows == 40


def test_tags_are_deleted_by_their_exact_names_or_not_at_all(root: Root) -> None:
    made = {n: tags.make_tag(root, n, v, "a" * 64) for n, v in (("v1", 3), ("v10", 3), ("v2", 4))}
    for names in (["v1", "v3"], ["v*"], ["V1"], ["v1.json"], ["../tags/v1"], ["v1", "12"]):
        with pytest.raises(BadInputError, match=r"has no tag|tag name"):
            tags.delete_tags(root, names)
    assert tags.tag_names(root) == ["v1", "v10", "v2"]
    assert tags.tags_by_version(root) == {3: [made["v1"], made["v10"]], 4: [made["v2"]]}
    assert tags.delete_tags(root, ["v1", "v2", "v1"]) == {"v1": made["v1"], "v2": made["v2"]}
    assert tags.all_tags(root) == [made["v10"]]
    assert tags.make_tag(root, "v1", 9, "b" * 64).version == 9, "the name is free again"


def test_a_damaged_tag_can_be_deleted_and_is_no_tag_till_then(root: Root) -> None:
    tags.make_tag(root, "v1", 3, "a" * 64)
    root.write(f"{tags.FOLDER}/v2.json", root.read(f"{tags.FOLDER}/v1.json"))
    with pytest.raises(IntegrityError, match=r"tag 'v2' .* is damaged: it calls itself 'v1'"):
        tags.read_tag(root, "v2")
    with pytest.raises(IntegrityError, match="damaged"):
        tags.all_tags(root)
    assert tags.delete_tags(root, ["v2"]) == {"v2": None}
    assert [tag.name for tag in tags.all_tags(root)] == ["v1"]


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("plan-0123456789abcdef", "0123456789abcdef"),
        ("plan-0123456789abcdef-12", "0123456789abcdef"),
        ("plan-b", None),
        ("plan-0123456789ABCDEF", None),
        ("v1", None),
    ],
)
def test_a_tag_says_which_plan_pins_its_version(root: Root, name: str, plan: str | None) -> None:
    assert tags.make_tag(root, name, 1, "a" * 64).plan == plan
