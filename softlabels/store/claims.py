"""Claims: which worker is at which unit, so that many at one run do not do the same work.

A claim is an object that exactly one worker makes. Its holder writes it again every few seconds
with a higher count, its beat; whoever has seen one unchanged for the lease, by its own monotonic
clock, takes it over. No two machines' clocks are ever compared.

Claims only save work. A worker that was thought dead may come back, and two may take over one claim
at once: then a unit is labelled twice and committed once, for exactly-once rests on the commit.
"""

import contextlib
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from softlabels.errors import SoftLabelsError
from softlabels.storage import Root

FOLDER = "_softlabels/claims"
LEASE = 60.0
"""Seconds without a beat after which a worker is taken for dead."""

BEATS_A_LEASE = 10
GIVE_UP_SECONDS = 5.0
"""Longest wait for a claim to be given up; if storage is silent it is taken over in the end."""

LOOKED_AT = 50
"""Claims of others that are read at one look; a random choice where there are more."""


class Claim(BaseModel):
    """What a worker says of the unit it is at.

    Attributes:
        worker: random, 32 hex digits; another process is another worker.
        beat: how often it was written.
        every: seconds between two beats.
        name: host and process, for people.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    worker: str
    beat: int
    every: Annotated[float, Field(gt=0, le=600)]
    name: str


def claim_path(unit: str) -> str:
    """Where a unit's claim lies below the root."""
    return f"{FOLDER}/{unit[:16]}/{unit}.json"


def claimed_units(root: Root, run: str) -> list[str]:
    """Names of the units of a run that are claimed, `run` being the first 16 digits of its id."""
    names = root.names(f"{FOLDER}/{run}")
    return [name.removesuffix(".json") for name in names if name.endswith(".json")]


def read_claim(root: Root, unit: str) -> Claim | None:
    """A unit's claim; None where there is none any more, or nobody can read it."""
    try:
        return Claim.model_validate_json(root.read(claim_path(unit)))
    except (ValidationError, SoftLabelsError):
        return None


def sweep(root: Root, run: str, committed: Callable[[str], bool]) -> None:
    """Removes claims of units that are in the table: a worker may die right after a commit."""
    with contextlib.suppress(SoftLabelsError):
        for unit in claimed_units(root, run):
            if committed(unit):
                root.delete(claim_path(unit))


@dataclass(frozen=True)
class _Seen:
    """A claim as it was first seen, and when by this worker's clock."""

    claim: Claim | None
    since: float


class Claims:
    """The claims of one run as one worker makes and sees them.

    Args:
        root: of the table.
        run: the first 16 digits of the run's id.
        lease: seconds without a beat after which another worker is taken for dead; one that says
            it beats rarely gets three of its beats.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        root: Root,
        run: str,
        lease: float = LEASE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.worker = uuid.uuid4().hex
        self.every = lease / BEATS_A_LEASE
        self._root, self._run, self._lease, self._clock = root, run, lease, clock
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._seen: dict[str, _Seen] = {}
        self._random = random.Random(self.worker)

    def take(self, units: Iterable[str]) -> str | None:
        """A unit among `units` that is this worker's now; None while others hold them all.

        Workers draw in orders of their own, so that they seldom want the same unit.

        Raises:
            StorageError: claims cannot be written here.
        """
        wanted = set(units)
        held = wanted.intersection(claimed_units(self._root, self._run))
        abandoned = self._look(sorted(held))
        free = sorted(wanted - held)
        self._random.shuffle(free)
        for unit in free:
            if self._root.create(claim_path(unit), self._beat(1)):
                return unit
        for unit in abandoned:
            del self._seen[unit]
            self._root.write(claim_path(unit), self._beat(1))
            if self._is_mine(unit):  # of several at once the last one has it
                return unit
        return None

    @contextlib.contextmanager
    def holding(self, unit: str) -> Iterator[None]:
        """Keeps the claim of a unit alive, and gives it up at the end, however that comes."""
        over = threading.Event()

        def live() -> None:
            beat = 1
            while not over.wait(self.every):
                beat += 1
                # A claim that cannot be written is one that others may take: that costs work only.
                with contextlib.suppress(SoftLabelsError):
                    if self._is_mine(unit):
                        self._root.write(claim_path(unit), self._beat(beat))
            with contextlib.suppress(SoftLabelsError):
                if self._is_mine(unit):
                    self._root.delete(claim_path(unit))

        thread = threading.Thread(target=live, name=f"claim {unit}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(GIVE_UP_SECONDS)

    def _look(self, held: list[str]) -> list[str]:
        """Looks at claims; those that nobody has written for too long."""
        abandoned = []
        for unit in self._random.sample(held, min(LOOKED_AT, len(held))):
            claim, now = read_claim(self._root, unit), self._clock()
            seen = self._seen.get(unit)
            if seen is None or seen.claim != claim:
                self._seen[unit] = _Seen(claim, now)
            elif now - seen.since >= max(self._lease, 3 * claim.every if claim else 0.0):
                abandoned.append(unit)
        return abandoned

    def _is_mine(self, unit: str) -> bool:
        claim = read_claim(self._root, unit)
        return claim is not None and claim.worker == self.worker

    def _beat(self, number: int) -> bytes:
        claim = Claim(worker=self.worker, beat=number, every=self.every, name=self._name)
        return claim.model_dump_json().encode()
