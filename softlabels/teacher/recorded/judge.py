"""The pass over the sequences: k entries a position, their mass, and the tail."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.errors import BadInputError, DataError
from softlabels.fingerprint import sha256_json
from softlabels.schema import FLOATS, INTS
from softlabels.teacher.recorded.gather import Gather
from softlabels.teacher.recorded.reader import Context

KEPT = pa.schema(
    [
        ("place", pa.string()),
        ("example_id", pa.string()),
        ("input_ids", INTS),
        ("position_index", INTS),
        ("label_ids", INTS),
        ("label_logprobs", FLOATS),
        ("label_ranks", INTS),
        ("topk_ids", INTS),
        ("topk_logprobs", FLOATS),
        ("tail_logprob", FLOATS),
    ]
)


class Judge:
    """The pass over the sequences: k entries a position, their mass, and the tail."""

    def __init__(self, context: Context, first: Gather) -> None:
        self._context = context
        self._tally = first.tally
        assert first.fewest is not None
        self.k = context.spec.k or first.fewest
        if self.k > first.most:
            raise BadInputError(
                f"k is {self.k!r}, the records have at most {first.most!r} entries a position"
            )
        self._digits = first.precision.mass_error(self.k)
        self._precision = first.precision.kind
        self._largest = 0.0
        self._below = self._rows = 0

    @property
    def tail_error(self) -> float | None:
        """How far a derived tail's mass may be off, rounded up; None where tails are unknown."""
        spec = self._context.spec
        if spec.tail == "unknown":
            return None
        return spec.tail_error or _rounded_up(self._largest)

    def keep(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Rows of KEPT of rows of SEEN."""
        rows = [self._sequence(row) for row in batch.to_pylist()]
        return pa.RecordBatch.from_pylist([row for row in rows if row is not None], KEPT)

    def finish(self) -> None:
        """Raises as the first pass, and where the tails of all positions are an artefact."""
        spec = self._context.spec
        if spec.on_bad == "refuse":
            self._tally.require_none()
        self._tally.require_some(bool(self._rows), spec.files)
        if spec.layout == "axolotl" and spec.tail == "derived" and not self._below:
            raise DataError(
                "every position's probabilities sum to 1: axolotl's writers renormalise the top "
                "k, and what the tail was cannot be told; expected tail: unknown, found tail: "
                "derived"
            )

    def _sequence(self, row: dict[str, Any]) -> dict[str, Any] | None:
        counts = np.array(row["counts"], np.int64)
        ids, logprobs = _padded(row["entry_ids"], row["entry_logprobs"], counts, self.k)
        mass = np.exp(logprobs).sum(1)
        error = self._errors(row, mass)
        heavy = mass > 1 + error
        if heavy.any():
            at = int(np.argmax(heavy))
            detail = (
                f"they sum to {mass[at]:.6f} in position {at}, expected at most 1 + "
                f"{error[at]:.1e} by {self._precision}"
            )
            if not any(row["slack"]):
                self._tally.add("record with probabilities that sum above 1", row["place"], detail)
                return None
            # Of a lossy layout only these positions are wrong.
            reason = "position with probabilities that sum above 1"
            self._tally.add(reason, row["place"], detail, int(heavy.sum()))
        keep = ~heavy
        if not keep.any():
            self._tally.add("record without positions", row["place"])
            return None
        self._rows += 1
        self._largest = max(self._largest, float(error[keep].max()))
        whole = keep & (mass >= 1 - error)
        self._below += int((keep & ~whole).sum())
        if self._context.spec.tail == "derived":
            # Within its error the head is all there is: so that head and tail sum to 1.
            logprobs[whole] -= np.log(mass[whole])[:, None]
            tail = np.full(len(mass), -np.inf)
            tail[keep & ~whole] = np.log1p(-mass[keep & ~whole])
        else:
            over = mass > 1
            logprobs[over] -= np.log(mass[over])[:, None]
            tail = None
        if not self._labels_fit(row, ids, mass, error):
            return None
        _take_labels(row, ids, logprobs)
        return self._kept(row, keep, ids, logprobs, tail)

    def _labels_fit(
        self,
        row: dict[str, Any],
        ids: npt.NDArray[np.int64],
        mass: npt.NDArray[np.float64],
        error: npt.NDArray[np.float64],
    ) -> bool:
        """Whether each chosen token outside the top k has no more than that leaves; counts if not.

        Positions whose error nothing bounds are not judged.
        """
        outside = ~(ids == np.array(row["label_ids"])[:, None]).any(1)
        chosen = np.exp(np.array(row["label_logprobs"], np.float64))
        with np.errstate(invalid="ignore"):
            wrong = outside & (chosen > 1 - mass + 2 * error)
        if not wrong.any():
            return True
        at = int(np.argmax(wrong))
        self._tally.add(
            "record with a chosen token likelier than its top leaves room for",
            row["place"],
            f"{chosen[at]:.6f} in position {at}, the top {self.k} leaves {1 - mass[at]:.6f}",
        )
        return False

    def _errors(self, row: dict[str, Any], mass: npt.NDArray[np.float64]) -> Any:
        spec = self._context.spec
        slack = np.array(row["slack"], np.float64)
        if spec.tail_error is not None:
            return np.full(len(mass), spec.tail_error)
        if np.isnan(slack).any() and spec.tail == "derived":
            raise DataError(
                f"{row['place']}: tail is 'derived', but what this compression leaves out has no "
                "bound in the files: expected tail: unknown, or tail_error: how far the mass of "
                "the top k may be off"
            )
        lossy = slack != 0
        return np.where(lossy, np.nan_to_num(slack), self._digits)

    def _kept(
        self,
        row: dict[str, Any],
        keep: npt.NDArray[np.bool_],
        ids: npt.NDArray[np.int64],
        logprobs: npt.NDArray[np.float64],
        tail: npt.NDArray[np.float64] | None,
    ) -> dict[str, Any]:
        at = np.flatnonzero(keep)
        index = [row["position_index"][i] for i in at]
        name = row["name"] or sha256_json([row["input_ids"], index])
        return {
            "place": row["place"],
            "example_id": name,
            "input_ids": row["input_ids"],
            "position_index": index,
            "label_ids": [row["label_ids"][i] for i in at],
            "label_logprobs": [row["label_logprobs"][i] for i in at],
            "label_ranks": [row["label_ranks"][i] for i in at],
            "topk_ids": ids[keep].reshape(-1).tolist(),
            "topk_logprobs": logprobs[keep].reshape(-1).tolist(),
            "tail_logprob": None if tail is None else tail[keep].tolist(),
        }


def _padded(
    ids: list[int], logprobs: list[float], counts: npt.NDArray[np.int64], k: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The first k entries of each position, [P, k], padded with (-1, -inf)."""
    starts = np.cumsum(counts) - counts
    place = starts[:, None] + np.arange(k)
    used = np.arange(k) < counts[:, None]
    place = np.where(used, place, 0)
    found = np.where(used, np.array(ids, np.int64)[place], -1)
    return found, np.where(used, np.array(logprobs, np.float64)[place], -np.inf)


def _take_labels(
    row: dict[str, Any], ids: npt.NDArray[np.int64], logprobs: npt.NDArray[np.float64]
) -> None:
    """Labels in the top k get the log-probability that stands there, rescaled or not."""
    here = ids == np.array(row["label_ids"])[:, None]
    held = here.any(1) & (np.array(row["label_ids"]) >= 0)
    values = np.where(here, logprobs, 0.0).sum(1)
    row["label_logprobs"] = np.where(held, values, row["label_logprobs"]).tolist()


def _rounded_up(value: float) -> float:
    """One digit of it: equal for imports of one kind, which share a table."""
    unit = 10.0 ** math.floor(math.log10(value))
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.0e}")
