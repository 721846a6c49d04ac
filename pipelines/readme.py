"""README's tables, which scripts write: each stands between two marks of its name."""

from pathlib import Path

from softlabels.errors import BadInputError

README = Path("README.md")


def require_place(name: str, readme: Path = README) -> None:
    """Raises BadInputError unless README has a place for the table: before hours of work."""
    _around(name, readme)


def put(name: str, table: str, readme: Path = README) -> None:
    """Replaces what stands between `<!-- name -->` and `<!-- /name -->`."""
    before, after = _around(name, readme)
    readme.write_text(before + table + after)


def _around(name: str, readme: Path) -> tuple[str, str]:
    text = readme.read_text()
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    for mark in (start, end):
        if mark not in text:
            raise BadInputError(
                f"{readme}: the table's place is not there, has no {mark.strip()!r}"
            )
    before, _, after = text.partition(start)
    return before + start, after[after.index(end) :]
