"""log, tag, rollback, vacuum: the versions of a table, their names, their return and their end."""

import contextlib
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softlabels.cli.output import print_json, print_table, progress
from softlabels.cli.table import DryRunOption, JsonOption, TableArgument, YesOption, requires_yes
from softlabels.errors import counted

if TYPE_CHECKING:
    from softlabels.storage import Root
    from softlabels.store.rollback import Deletions, Rollback
    from softlabels.store.tags import Tag
    from softlabels.store.unneeded import Vacuum

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


def register(app: typer.Typer) -> None:
    """Adds the commands to the app."""
    app.command(rich_help_panel="Table")(log)
    app.command(rich_help_panel="Table")(tag)
    app.command(rich_help_panel="Table")(rollback)
    app.command(rich_help_panel="Table")(vacuum)


def log(
    table: TableArgument,
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=0, help="Most versions that are listed.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the versions of a table, newest first: what made each, its rows, its tags.

    Times are those of the clock of the machine that made a version, in UTC.
    """
    from softlabels.store.log import log_lines
    from softlabels.store.table import Table

    lines = log_lines(Table.open(table), limit)
    if as_json:
        for line in lines:
            line |= {k: line[k] and line[k].model_dump(mode="json") for k in ("run", "change")}
        print_json(lines)
        return
    print_table([_log_line(line) for line in lines])


def tag(
    table: TableArgument,
    name: Annotated[str | None, typer.Argument(help="The tag to make; none lists them.")] = None,
    delete: Annotated[
        list[str] | None,
        typer.Option("--delete", metavar="NAME", help="Delete the tag of exactly this name."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Give a version a name that never moves, list the names, or delete some.

    vacuum keeps what tags name. `mix` makes tags called plan-…, after the fingerprint of the plan
    that reads the version: delete such a tag when the plan is no longer trained from, wherever it
    lies. --delete may be given several times; a pattern is refused.

    Example: softlabels tag labels@12 v1
    """
    from softlabels.errors import BadInputError
    from softlabels.store import tags
    from softlabels.store.table import Table, parse_reference

    if delete:
        if name is not None or parse_reference(table)[1] is not None:
            raise BadInputError(
                f"--delete: expected TABLE and names alone, found {table!r} and {name!r}"
            )
        _delete(Table.open(table).root, delete, as_json)
        return
    opened = Table.open(table)
    if name is None:
        rows = _listed(opened.root)
    else:
        made = tags.make_tag(opened.root, name, opened.version, opened.snapshot_digest)
        rows = [_tag_line(made)]
    print_json(rows) if as_json else print_table(rows)


def _listed(root: "Root") -> list[dict[str, Any]]:
    """A line a tag; a damaged one is named too, so that it can be deleted."""
    from softlabels.errors import IntegrityError
    from softlabels.store import tags

    rows = []
    for name in tags.tag_names(root):
        try:
            rows.append(_tag_line(tags.read_tag(root, name)))
        except IntegrityError as error:
            rows.append({"name": name, "version": None, "made_at": str(error)})
    return rows


def _tag_line(tag: "Tag") -> dict[str, Any]:
    return {
        "name": tag.name,
        "version": tag.version,
        "made_at": tag.made_at,
        "plan": tag.plan,
        "snapshot_digest": tag.snapshot_digest,
    }


def _delete(root: "Root", names: list[str], as_json: bool) -> None:
    from softlabels.store import tags

    deleted = tags.delete_tags(root, names)
    left = tags.tags_by_version(root)
    rows: list[dict[str, Any]] = []
    for name, gone in deleted.items():
        version = None if gone is None else gone.version
        others = [] if version is None else [tag.name for tag in left.get(version, [])]
        rows.append({"deleted": name, "version": version, "other_tags": others})
    if as_json:
        print_json(rows)
        return
    for row in rows:
        if row["version"] is None:
            print(f"{row['deleted']}: deleted; it was damaged, so its version is not known")
        elif row["other_tags"]:
            kept = ", ".join(row["other_tags"])
            print(f"{row['deleted']}: deleted; version {row['version']} is still kept by {kept}")
        else:
            print(f"{row['deleted']}: deleted; version {row['version']} has no tag any more")


def rollback(
    table: TableArgument,
    keep_deletions: Annotated[
        bool, typer.Option("--keep-deletions", help="Leave out rows that were deleted since.")
    ] = False,
    bring_back_deleted: Annotated[
        bool, typer.Option("--bring-back-deleted", help="Have rows again that were deleted since.")
    ] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a new version that holds what an older one held. Nothing is erased.

    Columns and what the table says of its labels come back too, as before a calibration. Captured
    units that go stay committed: the same capture holds them for done. Where rows that `delete`
    took out would come back, it is refused until one of two options says what becomes of them.

    Example: softlabels rollback labels@12
    """
    from softlabels.errors import BadInputError
    from softlabels.store import rollback as rolling
    from softlabels.store.table import Table, parse_reference

    if parse_reference(table)[1] is None:
        raise BadInputError(
            f"{table!r}: expected TABLE@VERSION or TABLE@TAG, the one to go back to"
        )
    target = Table.open(table)
    deletions = _deletions(keep_deletions, bring_back_deleted)
    if dry_run:
        found = rolling.plan_rollback(target, deletions)
    else:
        found = rolling.rollback(target, table, deletions)
    if as_json:
        print_json(_rollback_values(found) | {"dry_run": dry_run})
        return
    _print_rollback(found, dry_run, keep_deletions)


def _deletions(keep: bool, bring_back: bool) -> "Deletions":
    from softlabels.errors import BadInputError

    if keep and bring_back:
        raise BadInputError("--keep-deletions or --bring-back-deleted? Give one of them")
    return "keep" if keep else "bring back" if bring_back else "refuse"


def vacuum(
    table: TableArgument,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    retention: Annotated[
        str,
        typer.Option(metavar="TIME", help="Keep versions that were the newest since: 7d, 12h, 0d."),
    ] = "30d",
    keep_versions: Annotated[
        int, typer.Option("--keep-versions", min=1, metavar="N", help="Keep the newest N.")
    ] = 1,
    grace: Annotated[
        str, typer.Option(metavar="TIME", help="Keep uncommitted files that are younger.")
    ] = "1d",
    abandoned: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Take unfinished captures for dead that are so silent."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the files that no kept version holds, and with --yes delete them for good.

    Kept are the newest version, all versions that tags name (plans' pins are tags), those within
    the retention, and what unfinished captures have stored, unless --abandoned 60d takes those for
    dead that gave no sign of life (start, file, claim) for so long: what they committed stays, and
    one that is resumed after all only labels some units again. Versions that lose files can never
    be opened again; the log still lists them.

    Example: softlabels vacuum labels --retention 7d --yes
    """
    from softlabels.errors import BadInputError
    from softlabels.store.table import Table, parse_reference
    from softlabels.store.vacuum import Keep, plan_vacuum
    from softlabels.store.vacuum import vacuum as run

    if parse_reference(table)[1] is not None:
        raise BadInputError(f"{table!r}: a table is vacuumed, not one version of it: leave out @…")
    silence = None if abandoned is None else _seconds("--abandoned", abandoned)
    times = _seconds("--retention", retention), _seconds("--grace", grace)
    keep = Keep(times[0], keep_versions, times[1], silence)
    opened = Table.open(table)
    dry_run = requires_yes(yes, dry_run)
    if dry_run:
        found = plan_vacuum(opened, keep)
    else:
        with contextlib.ExitStack() as stack:
            bar = progress()
            task = bar.add_task("delete", total=None)

            def planned(files: int) -> None:
                bar.update(task, total=files)
                if files:  # an empty one would print a line of its own
                    stack.enter_context(bar)

            found = run(opened, keep, planned, lambda: bar.advance(task))
    if as_json:
        print_json(_vacuum_values(found) | {"deleted": not dry_run, "dry_run": dry_run})
        return
    _print_vacuum(found, yes)


def _seconds(option: str, text: str) -> float:
    from softlabels.errors import BadInputError

    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)([smhdw])", text.strip())
    if match is None:
        raise BadInputError(
            f"{option} {text!r}: expected a number and s, m, h, d or w, such as 30d"
        )
    return float(match[1]) * _SECONDS[match[2]]


def _log_line(line: Mapping[str, Any]) -> dict[str, Any]:
    run, change = line["run"], line["change"]
    by, what, teacher, seconds = "", "", "", ""
    if run is not None:
        by, seconds = run.run_id[:12], f"{run.seconds:.1f}"
        what = counted(len(run.units), "unit")
        spec = run.spec.get("teacher")
        teacher = str(spec.get("name", "")) if isinstance(spec, Mapping) else ""
    elif change is not None:
        by, seconds = change.change_id[:12], f"{change.seconds:.1f}"
        what = f"of version {change.from_version}"
        if change.operation == "rollback":
            what = f"{what} to {change.arguments.get('to_version')}"
        source = change.arguments.get("source")
        if change.operation == "publish" and isinstance(source, Mapping):
            what = f"of {source.get('uri')}@{source.get('version')}"
    return {
        "version": line["version"],
        "when": datetime.fromtimestamp(line["timestamp"] / 1000, UTC).strftime("%F %T"),
        "made by": line["made_by"],
        "id": by,
        "what": what,
        "teacher": teacher,
        "added": "?" if line["added"] is None else f"{line['added']:+d}",
        "rows": "?" if line["rows"] is None else f"{line['rows']}",
        "files": "?" if line["files"] is None else f"{line['files']}",
        "seconds": seconds,
        "tags": "(vacuumed)" if line["vacuumed"] else ", ".join(line["tags"]),
    }


def _rollback_values(found: "Rollback") -> dict[str, Any]:
    return vars(found) | {
        "added": [file.path for file in found.added],
        "removed": [file.path for file in found.removed],
    }


def _print_rollback(found: "Rollback", dry_run: bool, kept_out: bool) -> None:
    where = f"{found.table}@{found.version}"
    deleted = counted(found.deleted_rows, "deleted row")
    without = f" without {deleted}" if kept_out and found.deleted_rows else ""
    if found.same:
        print(f"{where}: holds what version {found.to} holds{without} already, nothing was done")
        return
    if found.deleted_rows and not kept_out:
        print(f"{deleted} come{'s' if found.deleted_rows == 1 else ''} back")
    rewritten = f", {found.rewritten} after being written again" if found.rewritten else ""
    added = counted(len(found.added) + found.rewritten, "file comes", "files come")
    print(
        f"{added} back{rewritten}, {len(found.removed)} go; "
        f"{counted(found.rows_before, 'row')} -> {found.rows_after}"
    )
    if found.schema_changes:
        print(f"columns and what is the same in every row come back as at version {found.to}")
    if found.units:
        runs = ", ".join(run[:12] for run in found.runs)
        print(
            f"{counted(found.units, 'unit')} of run {runs} "
            f"{'goes and stays' if found.units == 1 else 'go and stay'} committed: the same "
            "capture will not label them again"
        )
        print(
            f"for their rows go back to version {found.from_version}; for new labels give the "
            "capture another shard_rows, which makes it a new run"
        )
    if dry_run:
        print(
            f"{found.table}: a new version would hold what version {found.to} holds{without}; "
            "nothing was done"
        )
    else:
        rows = counted(found.rows_after, "row")
        print(f"{where}: {rows}, as at version {found.to}{without}")


def _vacuum_values(found: "Vacuum") -> dict[str, Any]:
    return vars(found) | {
        "doomed": [vars(one) for one in found.doomed],
        "kept": [vars(one) for one in found.kept],
        "bytes": found.bytes,
    }


def _print_vacuum(found: "Vacuum", deleted: bool) -> None:
    from softlabels.store.closed import span_name

    if found.doomed:
        print_table([{"bytes": d.size, "file": d.path, "why": d.why} for d in found.doomed])
    for one in found.kept:
        print(f"kept: {counted(one.files, 'file')}, {counted(one.bytes, 'byte')} for {one.by}")
    for note in found.notes:
        print(note)
    if found.closes:
        which = ", ".join(span_name(*span) for span in found.closes)
        print(f"{which} {'can' if deleted else 'could'} not be opened any more")
    count = f"{counted(len(found.doomed), 'file')}, {counted(found.bytes, 'byte')}"
    if not found.doomed:
        print(f"{found.table}: nothing to remove")
    elif deleted:
        print(f"{found.table}: {count} deleted")
    else:
        print(f"{found.table}: {count} would be deleted; add --yes to do it")
