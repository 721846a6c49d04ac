"""How long one who commits waits for the others, where no lock file gives out turns.

Of several that commit at once the quickest wins. Left to themselves the winners would win again,
for they know the log already and whoever lost must read what is new first. So who has just won lets
others go first, for as long as a few attempts take, and who has lost waits the less the more often
that was. Nobody asks anybody: each goes by what it saw during its own last commits. Nothing rests
on it but who is first.
"""

import random
import time
from dataclasses import dataclass

LONGEST_WAIT = 5.0
"""Seconds."""

_REMEMBERED = 30
"""Attempts' time for which others are taken to be still at it: who wins at once sees nobody."""

_LET_GO_FIRST = (1.0, 3.0)
"""Attempts' time that a winner stands back, least and most."""


@dataclass(frozen=True)
class _Last:
    """How the last commit of this process to a table went.

    Attributes:
        attempt: seconds that its last attempt took.
        ended: when, by the monotonic clock.
        seen: when another was last seen to commit meanwhile.
    """

    attempt: float
    ended: float
    seen: float


_last: dict[str, _Last] = {}
"""By URI of the table."""


class Pace:
    """The waits of one commit.

    Args:
        place: URI of the table.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._attempt = 0.0

    def first_wait(self) -> float:
        """Seconds before the first attempt: none unless others were seen at it just now."""
        last = _last.get(self._place)
        if last is None:
            return 0.0
        now = time.monotonic()
        if now - last.seen > _REMEMBERED * last.attempt:
            return 0.0
        stands_back = random.uniform(*_LET_GO_FIRST) * last.attempt
        return min(LONGEST_WAIT, max(0.0, last.ended + stands_back - now))

    def lost_wait(self, losses: int) -> float:
        """Seconds before the next attempt of one who has lost `losses` races, at least one."""
        return min(LONGEST_WAIT, random.uniform(0.0, self._attempt / losses))

    def tried(self, seconds: float) -> None:
        """An attempt, with the look before it, took so long."""
        self._attempt = seconds

    def ended(self, others: int) -> None:
        """The commit is made; others made so many versions meanwhile."""
        now, before = time.monotonic(), _last.get(self._place)
        seen = now if others > 0 else before.seen if before else float("-inf")
        _last[self._place] = _Last(self._attempt, now, seen)
