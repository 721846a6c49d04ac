"""Examples that a recipe leaves out: those of the user's own file, as `suspects` writes it.

A row is (example_id, view) where the file has a column `view`, else an example in all its views.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from softlabels.errors import BadInputError
from softlabels.fingerprint import sha256_json
from softlabels.query.attached import open_files
from softlabels.query.sampling import Keys, Mask, flat_numbers
from softlabels.query.sql import quote_name
from softlabels.query.view import CONFIG, Session


@dataclass(frozen=True)
class Excluded:
    """What is left out.

    Attributes:
        sha256: of the sorted distinct rows, by which a plan knows them: one digest whatever the
            file's format, order and other columns.
        by_view: whether single views are meant.
        digests: bytes of 16 each, [n], of the md5 of each row.
    """

    sha256: str
    by_view: bool
    digests: npt.NDArray[np.bytes_]

    @property
    def halves(self) -> tuple[str, str]:
        """SQL of the first and of the last 64 bits of a row's md5."""
        return _half("left", self.by_view), _half("right", self.by_view)

    def holds(self, high: Keys, low: Keys) -> Mask:
        """Which of some rows, given by the two halves of their md5, are left out."""
        return np.isin(_digests(high, low), self.digests)


def read_excluded(path: str) -> Excluded:
    """The examples in a Parquet, CSV or JSON file of this machine.

    Args:
        path: of the file, which has a column example_id and, where views are meant, view.

    Raises:
        BadInputError: it is missing or unreadable, has no example_id, or a row has none or no view.
    """
    (file,) = open_files({"exclude": path}, CONFIG, [])
    names = {name.lower(): quote_name(name) for name in file.columns}
    if "example_id" not in names:
        raise BadInputError(
            f"file 'exclude': {path!r} has no column example_id, only {list(file.columns)!r}"
        )
    by_view = "view" in names
    view = names.get("view", "0")
    whole = f"TRY_CAST({view} AS INTEGER)"
    # Of 1.5, which an INTEGER would round, no view is meant.
    rows = (
        f"SELECT DISTINCT {names['example_id']} AS example_id, CASE WHEN {whole} = "
        f'TRY_CAST({view} AS DOUBLE) THEN {whole} END AS "view" FROM exclude'
    )
    halves = f"{_half('left', by_view)} AS high, {_half('right', by_view)} AS low"
    with Session({}, attached=[file]) as session:
        found = session.run(f'SELECT *, {halves} FROM ({rows}) ORDER BY example_id, "view"')
    for name in ("example_id", "view"):
        missing = pc.or_kleene(
            pc.is_null(found[name]), pc.equal(pc.cast(found[name], "string"), "")
        )
        if pc.any(missing).as_py():
            raise BadInputError(
                f"file 'exclude': {path!r} has a row without {name}: expected one in each row"
            )
    ids = found["example_id"].to_pylist()
    what = {"example_id": ids} | ({"view": found["view"].to_pylist()} if by_view else {})
    high, low = (flat_numbers(found[name], np.uint64) for name in ("high", "low"))
    return Excluded(sha256_json(what), by_view, _digests(high, low))


def _half(end: str, by_view: bool) -> str:
    row = "example_id || '/' || \"view\"" if by_view else "example_id"
    return f"('0x' || {end}(md5({row}), 16))::UBIGINT"


def _digests(high: Keys, low: Keys) -> npt.NDArray[np.bytes_]:
    return np.ascontiguousarray(np.stack([high, low], axis=1)).view("S16").reshape(-1)
