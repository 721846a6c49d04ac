"""Which units of a run a worker does, and in which order, beside others at the same run.

Alone: all, in order. By shard: those whose number leaves a given rest, in order. By claims:
whatever nobody else is at, in an order of its own, until all are done. Each unit is committed once
however workers mix these.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from softlabels.errors import BadInputError
from softlabels.store.claims import LEASE, Claims

if TYPE_CHECKING:  # a worker's modules load torch, which a wrong option need not wait for
    from softlabels.teacher.run import Unit
    from softlabels.teacher.worker import Worker

LEAST_LEASE, MOST_LEASE = 1.0, 3_600.0


@dataclass(frozen=True)
class Sharing:
    """How a worker shares a run with others.

    Attributes:
        shard: (i, n): units whose number modulo n is i; none: all.
        claim: claim each unit before it is labelled.
        wait: with `claim`, stay until the units that others are at are done, and take over those
            whose worker has died; otherwise end when nothing is free.
        lease: with `claim`, seconds without a sign of life after which a worker is taken for dead.

    Raises:
        BadInputError: they do not go together, or a number is out of its range.
    """

    shard: tuple[int, int] | None = None
    claim: bool = False
    wait: bool = True
    lease: float = LEASE

    def __post_init__(self) -> None:
        if self.shard is not None and not 0 <= self.shard[0] < self.shard[1]:
            raise BadInputError(
                f"shard {self.shard[0]}/{self.shard[1]}: expected i/n with i from 0 to n - 1"
            )
        if self.shard is not None and self.claim:
            raise BadInputError("give a shard or claim units, not both")
        if not (self.wait or self.claim):
            raise BadInputError("not to wait for others (--no-wait) goes with claims (--claim)")
        if not LEAST_LEASE <= self.lease <= MOST_LEASE:
            raise BadInputError(
                f"lease {self.lease!r}: expected {LEAST_LEASE:g} to {MOST_LEASE:g} seconds"
            )

    @classmethod
    def parse(cls, shard: str | None, claim: bool, wait: bool, lease: float) -> Self:
        """As the command line gives them: a shard is "i/n"."""
        if shard is None:
            return cls(None, claim, wait, lease)
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard)
        if match is None:
            raise BadInputError(f"shard {shard!r}: expected i/n, such as 0/4")
        return cls((int(match[1]), int(match[2])), claim, wait, lease)

    def mine(self, units: "Sequence[Unit]") -> "list[Unit]":
        """Those of all the run's units that this worker may do."""
        if self.shard is None:
            return list(units)
        first, step = self.shard
        return list(units[first::step])

    def work(self, worker: "Worker", units: "Sequence[Unit]", run_id: str) -> None:
        """Has `worker` label its share of `units`.

        Raises:
            TryAgainError: it was told to stop, or storage does not answer.
        """
        if self.claim:
            self._claim(worker, units, run_id[:16])
            return
        for unit in units:
            worker.label(unit)

    def _claim(self, worker: "Worker", units: "Sequence[Unit]", run: str) -> None:
        claims = Claims(worker.table.root, run, self.lease)
        by_name = {unit.name: unit for unit in units}
        left = worker.left(units)
        worker.pass_over(set(units).difference(left))
        while left:
            name = claims.take(unit.name for unit in left)
            if name is not None:
                with claims.holding(name):
                    worker.label(by_name[name])
            elif self.wait:
                worker.wait(min(claims.every, 5.0), len(left))
            else:
                break
            before, left = left, worker.left(left)
            worker.pass_over(unit for unit in set(before).difference(left) if unit.name != name)
