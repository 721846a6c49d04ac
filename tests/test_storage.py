"""Paths that leave their root, writes that fail half way, names that race."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from softlabels.errors import BadInputError, IntegrityError, SoftLabelsError, StorageError
from softlabels.storage import find_files, open_root, safe_relative

HOSTILE = [
    "",
    "../x",
    "a/../../x",
    "a/..",
    "/etc/passwd",
    "//host/x",
    "~/x",
    "~root/x",
    "s3://bucket/x",
    "file:///etc/passwd",
    "C:/x",
    "a\\..\\x",
    "a\0b",
]


@pytest.mark.parametrize("path", HOSTILE)
def test_a_path_that_leaves_its_root_is_refused_by_every_method(path: str, tmp_path: Path) -> None:
    root = open_root(tmp_path / "root")
    with pytest.raises(IntegrityError, match="expected a plain relative path"):
        safe_relative(path)
    for method in (root.full, root.read, root.buffer, root.open, root.size, root.exists):
        with pytest.raises(IntegrityError):
            method(path)
    for act in (root.names, root.delete):
        with pytest.raises(IntegrityError):
            act(path)
    for write in (root.write, root.create):
        with pytest.raises(IntegrityError):
            write(path, b"x")


@pytest.mark.parametrize(
    ("path", "normal"), [("a/b", "a/b"), ("a//b", "a/b"), ("./a/./b", "a/b"), ("a/b:c", "a/b:c")]
)
def test_a_plain_path_is_normalised(path: str, normal: str) -> None:
    assert safe_relative(path) == normal


def test_a_link_that_leaves_the_root_is_refused_and_one_inside_is_not(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root" / "d").mkdir(parents=True)
    (tmp_path / "root" / "d" / "file").write_bytes(b"inside")
    (tmp_path / "root" / "out").symlink_to(tmp_path / "secret")
    (tmp_path / "root" / "up").symlink_to(tmp_path)
    (tmp_path / "root" / "in").symlink_to(tmp_path / "root" / "d")
    (tmp_path / "root" / "self").symlink_to(tmp_path / "root" / "self")
    (tmp_path / "other").symlink_to(tmp_path / "root")
    root = open_root(tmp_path / "root")
    for path in ("out", "up/secret", "up/new"):
        with pytest.raises(IntegrityError, match="by a link"):
            root.read(path)
        with pytest.raises(IntegrityError, match="by a link"):
            root.write(path, b"x")
    assert (tmp_path / "secret").read_bytes() == b"secret"
    assert root.read("in/file") == b"inside"
    assert open_root(tmp_path / "other").read("d/file") == b"inside"  # the root may be a link
    with pytest.raises(StorageError, match="symbolic links"):
        root.read("self")


def test_what_is_written_is_read_by_every_reader(tmp_path: Path) -> None:
    root = open_root(tmp_path)
    root.write("a/b/file", b"old")
    root.write("a/b/file", memoryview(b"newer"))
    assert root.read("a/b/file") == b"newer" == root.buffer("a/b/file").to_pybytes()
    with root.open("a/b/file") as file:
        assert file.read() == b"newer"
    assert root.size("a/b/file") == 5
    assert root.names("a/b") == ["file"]
    assert root.names("a") == [] == root.names("none")
    root.delete("a/b/file")
    root.delete("a/b/file")
    assert not root.exists("a/b/file")


def test_what_cannot_be_read_is_one_line_with_the_path(tmp_path: Path) -> None:
    root = open_root(tmp_path)
    (tmp_path / "folder").mkdir()
    for method in (root.read, root.buffer, root.open, root.size):
        with pytest.raises(StorageError, match=r"cannot read '.*/none': .*No such file") as caught:
            method("none")
        assert "\n" not in str(caught.value)
    with pytest.raises(StorageError, match="Is a directory"):
        root.read("folder")


def test_a_write_that_fails_leaves_neither_a_part_nor_a_temporary_file(tmp_path: Path) -> None:
    root = open_root(tmp_path)
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "file").write_bytes(b"x")
    for path in ("folder", "file/below"):
        with pytest.raises(StorageError, match="cannot write"):
            root.write(path, b"data")
    assert not root.create("folder", b"data")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder", "inner"]


def test_a_file_size_limit_is_an_error_and_the_old_bytes_stay(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    program = (
        "import resource, sys\n"
        "from softlabels.errors import StorageError\n"
        "from softlabels.storage import open_root\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "root = open_root(sys.argv[1])\n"
        "for act in (root.write, root.create):\n"
        "    for name in ('file', 'new'):\n"
        "        try: act(name, bytes(5000))\n"
        "        except StorageError as error: print(error)\n"
        "        else: raise SystemExit('no error')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("File too large") == 4
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_error_and_leaves_nothing(full_disk: Path) -> None:
    root = open_root(full_disk)
    root.write("small", b"fits")
    for act in (root.write, root.create):
        with pytest.raises(StorageError, match="No space left"):
            act("big", bytes(200_000))
    assert [p.name for p in full_disk.iterdir()] == ["small"]


def test_create_has_exactly_one_winner_and_whole_contents(tmp_path: Path) -> None:
    root = open_root(tmp_path)
    writers, rounds = 8, 200
    barrier = threading.Barrier(writers)
    wins: list[list[int]] = [[] for _ in range(rounds)]

    def run(writer: int) -> None:
        for number in range(rounds):
            barrier.wait()
            if root.create(f"race/{number}", bytes([writer]) * 3000):
                wins[number].append(writer)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(winners) for winners in wins] == [1] * rounds
    for number, (winner,) in enumerate(wins):
        assert root.read(f"race/{number}") == bytes([winner]) * 3000
    assert len(root.names("race")) == rounds, "temporary files are left"


def test_a_reader_never_sees_a_part_of_a_replaced_file(tmp_path: Path) -> None:
    root = open_root(tmp_path)
    root.write("f", b"0" * 100_000)
    stop = threading.Event()

    def rewrite() -> None:
        for number in range(60):
            root.write("f", str(number % 10).encode() * 100_000)
        stop.set()

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        while not stop.is_set():
            data = root.read("f")
            assert len(data) == 100_000
            assert len(set(data)) == 1
    finally:
        thread.join()


@pytest.mark.parametrize(
    "uri",
    [
        "s3://KEY:SECRET@bucket/x",
        "s3://SECRET@bucket/x",
        "https://host/x?sig=SECRET",
        "az://container/x?sv=1&sig=SECRET",
        "file://me:SECRET@host/x",
        "simplecache::s3://KEY:SECRET@bucket/x",
        "s3://[KEY:SECRET@bucket/x",
        "foo://KEY:SECRET@x/y",
    ],
)
def test_a_uri_with_a_secret_is_refused_and_the_secret_is_not_repeated(uri: str) -> None:
    for act in (open_root, lambda uri: find_files(uri + "/*.parquet")):
        with pytest.raises(BadInputError) as caught:
            act(uri)
        assert "SECRET" not in str(caught.value)
        assert "SECRET" not in str(caught.value.__cause__ or "")


def test_a_scheme_that_nothing_serves_and_a_nul_are_refused() -> None:
    with pytest.raises(BadInputError, match="cannot open 'foo://a/b'"):
        open_root("foo://a/b")
    with pytest.raises(BadInputError, match="NUL"):
        open_root("a\0b")


@pytest.mark.parametrize("uri", ["", "s3://", "s3://b//t", "s3://b/./t", "s3://b/x/../t"])
def test_places_that_clients_take_differently_are_refused(uri: str) -> None:
    with pytest.raises(BadInputError, match=r"^(cannot open|expected a folder)"):
        open_root(uri)


def test_local_roots_have_absolute_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in ("t", "./t", "t/", "x/../t", str(tmp_path / "t"), f"file://{tmp_path}/t"):
        root = open_root(uri)
        assert (root.uri, root.is_local) == (str(tmp_path / "t"), True), uri
    assert open_root("/").path == "/"
    assert not open_root("memory://somewhere").is_local


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("d/*.parquet", ["a.parquet", "b.parquet"]),
        ("./d/*.parquet", ["a.parquet", "b.parquet"]),
        ("d/../d/*.parquet", ["a.parquet", "b.parquet"]),
        ("d//*.parquet", ["a.parquet", "b.parquet"]),
        ("d/a.parquet", ["a.parquet"]),
        ("d/?.parquet", ["a.parquet", "b.parquet"]),
        ("d/[b-z]*", ["b.parquet"]),
        ("d/*", ["a.parquet", "b.parquet"]),
        ("*/*.parquet", ["d/a.parquet", "d/b.parquet"]),
        ("**/*.parquet", ["d/a.parquet", "d/b.parquet", "d/sub/c.parquet", "top.parquet"]),
        ("d/**", ["a.parquet", "b.parquet", "sub/c.parquet"]),
        ("*.parquet", ["top.parquet"]),
        ("top.parquet", ["top.parquet"]),
    ],
)
def test_files_are_found_below_the_first_wildcard(
    pattern: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("top", "d/a", "d/b", "d/sub/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.parquet").write_bytes(name.encode())
    monkeypatch.chdir(tmp_path)
    for given in (pattern, f"{tmp_path}/{pattern}", f"file://{tmp_path}/{pattern}"):
        root, found = find_files(given)
        assert found == expected, given
        assert all(root.read(path) for path in found), "each can be read from the root"


@pytest.mark.parametrize("pattern", ["none/*", "d", "d/", ".", "*.csv", ""])
def test_what_matches_no_file_is_refused(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SoftLabelsError, match="no file matches"):
        find_files(pattern)
