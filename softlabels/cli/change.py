"""delete, compact, publish: a table with rows less, in fewer files, in another place."""

import contextlib
import dataclasses
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softlabels.cli.output import print_json, print_table, progress
from softlabels.cli.table import DryRunOption, JsonOption, TableArgument, YesOption, requires_yes
from softlabels.errors import counted

if TYPE_CHECKING:
    from softlabels.query.takedown import Takedown
    from softlabels.store.compact import Compaction
    from softlabels.store.holders import Holders
    from softlabels.store.publish import Published

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def register(app: typer.Typer) -> None:
    """Adds the commands to the app."""
    app.command(rich_help_panel="Table")(delete)
    app.command(rich_help_panel="Table")(compact)
    app.command(rich_help_panel="Table")(publish)


def delete(
    table: Annotated[str, typer.Argument(metavar="TABLE", help="A table.")],
    where: Annotated[
        str | None, typer.Option(metavar="SQL", help="Delete the examples of which this is true.")
    ] = None,
    ids: Annotated[
        Path | None,
        typer.Option(
            "--ids",
            metavar="FILE",
            help="Delete these: one example_id a line; -: of standard input.",
        ),
    ] = None,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    record_where: Annotated[
        bool, typer.Option("--record-where", help="Put the SQL into the log, not its sha256 only.")
    ] = False,
    allow_again: Annotated[
        bool,
        typer.Option(
            "--allow-again",
            help="Captures may label them again; with --ids, also those deleted before.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete examples, as a data subject or a licence asks; without --yes only say which.

    All views of an example go, as one new version; other rows keep their bits and their order.
    Later captures pass the examples over. Older versions still hold them: what keeps those is
    named, with the commands that remove them for good. Published copies, exports, plans' caches
    and tables that were made of this one are not touched.

    Example: softlabels delete labels --where "license = 'withdrawn'" --yes
    """
    from softlabels.errors import BadInputError
    from softlabels.query.takedown import Request, Watching, plan_takedown, take_down
    from softlabels.store.table import Table, parse_reference

    if parse_reference(table)[1] is not None:
        raise BadInputError(
            f"{table!r}: rows are deleted from a table's newest version: leave out @…"
        )
    if (where is None) == (ids is None):
        raise BadInputError("expected either --where SQL or --ids FILE")
    dry_run = requires_yes(yes, dry_run)
    wanted = None if ids is None else _read_ids(ids)
    request = Request(where, wanted, record_where, allow_again)
    with _bytes_bar() as bars:
        watching = Watching(bars.begin, bars.advance)
        run = plan_takedown if dry_run else take_down
        found = run(Table.open(table), request, watching)
    if as_json:
        print_json(_takedown_values(found) | {"deleted": not dry_run, "dry_run": dry_run})
        return
    _print_takedown(found, table, not dry_run, allow_again)


def compact(
    table: Annotated[str, typer.Argument(metavar="TABLE", help="A table.")],
    target_size: Annotated[
        str,
        typer.Option("--target-size", metavar="SIZE", help="What files come near: 128MB, 1GiB."),
    ] = "128MB",
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make large files of neighbouring small ones: the same rows in the same order, proven.

    A new version; older ones, tags and plans keep their files until vacuum removes what none of
    them needs. Files of half the size and more are let be, and those of captures that are not
    finished. A plan of the new version is another than one of the old.

    Example: softlabels compact labels --dry-run
    """
    from softlabels.errors import BadInputError
    from softlabels.store.compact import Watching, plan_compaction
    from softlabels.store.compact import compact as run
    from softlabels.store.table import Table, parse_reference

    if parse_reference(table)[1] is not None:
        raise BadInputError(f"{table!r}: a table's newest version is compacted: leave out @…")
    target = _bytes("--target-size", target_size)
    opened = Table.open(table)
    if dry_run:
        found = plan_compaction(opened, target)
    else:
        with _bytes_bar() as bars:
            watching = Watching(lambda size: bars.begin("compact", size), bars.advance)
            found = run(opened, target, watching)
    if as_json:
        print_json(dataclasses.asdict(found) | {"dry_run": dry_run})
        return
    _print_compaction(found, dry_run)


def publish(
    table: TableArgument,
    uri: Annotated[str, typer.Argument(metavar="URI", help="Where to: a folder, s3://, hf://, …")],
    tag: Annotated[
        str | None,
        typer.Option("--tag", metavar="NAME", help="Tag the version there; default: TABLE@TAG's."),
    ] = None,
    no_tag: Annotated[bool, typer.Option("--no-tag", help="Make no tag there.")] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Copy one version to another place, whole, with what is known of its labels.

    Also to stores on which no table can be written to. Every file's sha256 is checked after it has
    arrived, the log comes last: until then readers see no table, or the version before. Publish a
    later version to the same place and it becomes the copy's next. The copy has the same digest,
    and plans read it by --root. A version that is named by its tag has that tag there too; where
    the tag stands for something else there, nothing is copied. Other tags stay behind. The same
    command goes on where it stopped.

    Example: softlabels publish labels@v3 s3://bucket/labels
    """
    from softlabels.errors import BadInputError
    from softlabels.store.publish import Watching, plan_publish
    from softlabels.store.publish import publish as run
    from softlabels.store.table import Table, parse_reference

    if tag is not None and no_tag:
        raise BadInputError("--tag or --no-tag? Give one of them")
    mark = parse_reference(table)[1] or ""
    tag = None if no_tag else tag or (None if mark.isdecimal() else mark or None)
    opened = Table.open(table)
    if dry_run:
        found = plan_publish(opened, uri, tag)
    else:
        with _bytes_bar() as bars:
            watching = Watching(lambda size: bars.begin("publish", size), bars.advance)
            found = run(opened, uri, tag, watching)
    if as_json:
        print_json(dataclasses.asdict(found) | {"dry_run": dry_run})
        return
    _print_published(found, dry_run)


@dataclasses.dataclass
class _Bars:
    """One bar a kind of work, of which there may be several one after the other."""

    begin: Callable[[str, int], None]
    advance: Callable[[int], None]


@contextlib.contextmanager
def _bytes_bar() -> Iterator[_Bars]:
    with contextlib.ExitStack() as stack:
        bar, counted = progress(in_bytes=True), progress()
        shown: list[Any] = []

        def begin(kind: str, total: int) -> None:
            if not total:
                shown.clear()
                return
            # Old files are counted, all else is measured in bytes.
            display = counted if "older" in kind else bar
            if not display.live.is_started:  # an empty one would print a line of its own
                stack.close()
                stack.enter_context(display)
            shown[:] = [display, display.add_task(kind, total=total)]

        def advance(number: int) -> None:
            if shown:
                shown[0].advance(shown[1], number)

        yield _Bars(begin, advance)


def _bytes(option: str, text: str) -> int:
    from softlabels.errors import BadInputError

    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)\s*([a-z]+)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise BadInputError(f"{option} {text!r}: expected a number and a unit, such as 128MB")
    return int(float(match[1]) * _UNITS[match[2]])


def _read_ids(path: Path) -> frozenset[str]:
    from softlabels.errors import BadInputError, StorageError
    from softlabels.query.doomed import read_ids

    try:
        if str(path) == "-":
            return read_ids(sys.stdin)
        with path.open(encoding="utf-8", newline="\n") as lines:
            return read_ids(lines)
    except FileNotFoundError as error:
        raise BadInputError(f"--ids: there is no file {str(path)!r}") from error
    except UnicodeDecodeError as error:
        raise BadInputError(f"--ids {str(path)!r}: expected UTF-8 text, one id a line") from error
    except OSError as error:
        raise StorageError(f"--ids {str(path)!r}: cannot be read: {error.strerror}") from error


def _takedown_values(found: "Takedown") -> dict[str, Any]:
    holders = found.holders
    return vars(found) | {
        "holders": holders
        and {
            "versions": holders.versions,
            "tags": [tag.model_dump() for tag in holders.tags],
            "files": holders.files,
            "uncommitted": holders.uncommitted,
        }
    }


def _print_takedown(found: "Takedown", table: str, deleted: bool, allow_again: bool) -> None:
    if found.some_ids:
        print(f"examples: {', '.join(found.some_ids)}{', …' if found.examples > 10 else ''}")
    if found.unknown:
        print(f"{counted(found.unknown, 'id that was', 'ids that were')} asked for: of no row")
    if found.lifted:
        print(f"{counted(found.lifted, 'example')} may be labelled again")
    if found.earlier and not found.rows:
        which = counted_versions([(version, version) for version in found.earlier], "is", "are")
        print(f"the same was asked for before: {which} without these rows")
    if found.holders is not None:
        _print_holders(found.holders, table)
    rewritten = counted(found.rewritten, "file is written", "files are written")
    files = f"{rewritten} again, {found.dropped} dropped"
    what = f"{counted(found.rows, 'row')} of {counted(found.examples, 'example')}"
    where = f"{found.table}@{found.version}"
    if not found.rows:
        print(f"{where}: no row matches, nothing was deleted")
    elif not deleted:
        print(
            f"{found.table}: {what} would be deleted, {found.rows_left} left ({files}); add --yes "
            "to do it"
        )
    else:
        again = "" if allow_again else "; captures will pass them over"
        print(f"{where}: {what} deleted, {found.rows_left} left ({files}){again}")


def _print_holders(holders: "Holders", table: str) -> None:
    """What keeps the rows, and the commands that remove them for good."""
    if holders.uncommitted:
        count = counted(holders.uncommitted, "file holds", "files hold")
        print(
            f"{count} such rows and no version: a capture's, or left behind; vacuum removes what "
            "is older than --grace (1d), so run it then once more"
        )
    if not holders.versions:
        print("no older version holds the rows any more")
        return
    which = counted_versions(holders.versions, "still holds", "still hold")
    print(f"{which} such rows; to remove them for good:")
    place = shlex.quote(table)
    for tag in holders.tags:
        note = f"version {tag.version}, of {tag.made_at}"
        if tag.plan:
            note += "; its plan cannot be trained from any more"
        print(f"  softlabels tag {place} --delete {tag.name}    # {note}")
    print(f"  softlabels vacuum {place} --retention 0d --yes")


def counted_versions(ranges: Sequence[tuple[int, int]], verb: str, plural: str) -> str:
    """ "version 2 is", "versions 1 to 3, 5 are": the subject of a sentence and its verb."""
    one = len(ranges) == 1 and ranges[0][0] == ranges[0][1]
    numbers = ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in ranges)
    return f"version {numbers} {verb}" if one else f"versions {numbers} {plural}"


def _print_compaction(found: "Compaction", dry_run: bool) -> None:
    if found.open_files:
        files = counted(found.open_files, "small file")
        print(f"{files} of captures that are not finished: left alone")
    where = f"{found.table}@{found.version}"
    if not found.made:
        print(f"{where}: nothing to compact, {counted(found.files, 'file')}")
        return
    if found.found:
        print(f"{counted(found.found, 'file')} written by an earlier attempt")
    counts = f"{counted(found.taken, 'file')} of {counted(found.taken_bytes, 'byte')}"
    if dry_run:
        print(f"{found.table}: {counts} would become about {found.made}; nothing was done")
        return
    print_table(
        [
            {
                "": "small files",
                "before": found.taken,
                "bytes": found.taken_bytes,
                "after": found.made,
                "bytes then": found.made_bytes,
            }
        ]
    )
    print(f"{where}: {counted(found.rows, 'row')} as before, {counts} became {found.made}")


def _print_published(found: "Published", dry_run: bool) -> None:
    if found.deleted_rows:
        rows = counted(found.deleted_rows, "row")
        print(
            f"warning: {found.source}@{found.source_version} holds {rows} that you deleted since",
            file=sys.stderr,
        )
    what = f"{found.source}@{found.source_version}"
    copied = f"{found.copied} of {counted(found.files, 'file')}, {found.copied_bytes} bytes"
    if dry_run:
        if found.version is not None:
            print(f"{found.target}@{found.version}: holds it already")
        named = "" if found.tag is None else f", tagged {found.tag!r}"
        print(f"{found.target}: {copied} would be copied of {what}{named}; nothing was done")
        return
    if found.tag is not None:
        print(f"{found.tag}: tag of version {found.version} there")
    if not found.new:
        missing = f", {copied}: missing before, there again" if found.copied else ""
        print(f"{found.target}@{found.version}: holds {what} already{missing}")
        return
    print(
        f"{found.target}@{found.version}: {counted(found.rows, 'row')} of {what}, {copied} copied"
    )
