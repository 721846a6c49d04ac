"""Which rows of a run need no label: those that the table has from elsewhere, or must not have."""

import numpy as np
import numpy.typing as npt

from softlabels.store.deleted import deleted_keys
from softlabels.store.inspect import row_keys
from softlabels.store.table import Table, TableFile
from softlabels.teacher.run import Keys, Unit

Mask = npt.NDArray[np.bool_]


class Elsewhere:
    """What other runs have labelled of this one's examples, learnt from each file once.

    Attributes:
        here: bool [source rows], whether the table has the example from another run.
        deleted: bool [source rows], whether it was deleted from the table, for good.

    Where an example comes several times in the source, the first time stands for all; `deleted` is
    set at each.
    """

    def __init__(self, run: str, keys: Keys, examples: Keys) -> None:
        self._run, self._examples = run, examples
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]
        self._looked_at: Table | None = None
        self.here = np.zeros(len(keys), bool)
        self.deleted = np.zeros(len(keys), bool)

    def learn(self, table: Table) -> None:
        """Looks at what is in `table`, and deleted from it, that was not looked at before."""
        self.learn_files(table)
        deleted = deleted_keys(table.root)
        self.deleted[:] = np.isin(self._examples, deleted) if len(deleted) else False

    def learn_files(self, table: Table) -> None:
        """As `learn`, but the files alone."""
        before, new = self._looked_at, table.files
        if before is not None:
            new = table.files_since(before)
            if any(self._is_foreign(before, file) for file in before.files_since(table)):
                # What is gone from the table may be labelled again.
                self.here[:] = False
                new = table.files
        foreign = [file for file in new if self._is_foreign(table, file)]
        for batch in table.batches(["example_id", "view"], foreign):
            self.here[self._rows_of(row_keys(batch))] = True
        self._looked_at = table

    def of(self, unit: Unit) -> Mask:
        """Bool [unit rows], those that need no label."""
        part = slice(unit.start, unit.stop)
        return np.asarray(self.here[part] | self.deleted[part])

    def _is_foreign(self, table: Table, file: TableFile) -> bool:
        # Rows of units that this table knows as committed are not labelled again. A published
        # copy has this run's files without its units; a compacted file may hold rows of any run.
        return file.compacted or not table.committed(f"{self._run}/{file.unit}")

    def _rows_of(self, keys: Keys) -> npt.NDArray[np.int64]:
        """The first source row of each of these keys that the source has."""
        places = np.searchsorted(self._sorted, keys)
        inside = places < len(self._sorted)
        places, keys = places[inside], keys[inside]
        return np.asarray(self._order[places[self._sorted[places] == keys]])
