"""Claims: one holder a unit while workers live, another's after they died, whatever clocks say."""

import inspect
import json
import threading
import time
from pathlib import Path

import pytest

from softlabels.storage import Root, open_root
from softlabels.store.claims import (
    LOOKED_AT,
    Claims,
    claim_path,
    claimed_units,
    read_claim,
    sweep,
)

RUN = "0123456789abcdef"
UNITS = [f"{RUN}-{number:06d}" for number in range(6)]


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return open_root(tmp_path)


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_unit_has_one_holder_and_is_free_after(root: Root) -> None:
    one, other = Claims(root, RUN), Claims(root, RUN)
    first = one.take(UNITS[:2])
    second = other.take(UNITS[:2])
    assert {first, second} == set(UNITS[:2])
    assert one.take(UNITS[:2]) is None
    assert first is not None
    claim = read_claim(root, first)
    assert claim is not None
    assert claim.worker == one.worker
    with one.holding(first):
        assert first in claimed_units(root, RUN)
    assert claimed_units(root, RUN) == [second]
    assert other.take(UNITS[:2]) == first


def test_workers_draw_in_orders_of_their_own(root: Root) -> None:
    taken = [Claims(root, f"{number:016x}").take(UNITS) for number in range(40)]
    assert len(set(taken)) > 3


def test_many_at_once_each_unit_once(root: Root) -> None:
    units = [f"{RUN}-{number:06d}" for number in range(60)]
    start, taken = threading.Barrier(8), []

    def work() -> None:
        claims = Claims(root, RUN)
        start.wait()
        while (unit := claims.take(units)) is not None:
            taken.append(unit)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == units


def test_a_claim_that_nobody_writes_is_taken_over_after_the_lease(root: Root) -> None:
    dead = Claims(root, RUN, lease=10)
    unit = dead.take(UNITS[:1])
    clock = Clock()
    other = Claims(root, RUN, lease=10, clock=clock)
    assert other.take(UNITS[:1]) is None  # seen first now, however old it is
    clock.now += 9.9
    assert other.take(UNITS[:1]) is None
    clock.now += 0.2
    assert other.take(UNITS[:1]) == unit
    # Its first holder comes back: it neither writes nor removes what is another's.
    with dead.holding(UNITS[0]):
        pass
    claim = read_claim(root, UNITS[0])
    assert claim is not None
    assert claim.worker == other.worker


def test_a_claim_that_is_written_is_not(root: Root) -> None:
    clock = Clock()
    other = Claims(root, RUN, lease=10, clock=clock)
    for beat in range(5):
        text = {"worker": "a" * 32, "beat": beat, "every": 1.0, "name": "there:1"}
        root.write(claim_path(UNITS[0]), json.dumps(text).encode())
        assert other.take(UNITS[:1]) is None
        clock.now += 9.0
    clock.now += 2.0
    assert other.take(UNITS[:1]) == UNITS[0]


def test_a_worker_with_a_longer_lease_gets_its_own_time(root: Root) -> None:
    Claims(root, RUN, lease=600).take(UNITS[:1])  # beats every minute
    clock = Clock()
    hasty = Claims(root, RUN, lease=5, clock=clock)
    assert hasty.take(UNITS[:1]) is None
    clock.now += 100
    assert hasty.take(UNITS[:1]) is None
    clock.now += 100
    assert hasty.take(UNITS[:1]) == UNITS[0]


@pytest.mark.parametrize("text", [b"", b"{}", b"\xff", b'{"worker": 3}', b"[" * 5000])
def test_a_damaged_claim_is_as_one_of_a_dead_worker(root: Root, text: bytes) -> None:
    root.write(claim_path(UNITS[0]), text)
    clock = Clock()
    claims = Claims(root, RUN, lease=10, clock=clock)
    assert claims.take(UNITS[:1]) is None
    clock.now += 11
    assert claims.take(UNITS[:1]) == UNITS[0]


def test_the_holder_beats_and_stops(root: Root) -> None:
    claims = Claims(root, RUN, lease=0.2)
    unit = claims.take(UNITS[:1])
    assert unit is not None
    with claims.holding(unit):
        deadline = time.monotonic() + 20
        while (claim := read_claim(root, unit)) is None or claim.beat < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert claim.worker == claims.worker
    time.sleep(0.1)
    assert claimed_units(root, RUN) == []


def test_a_failure_gives_the_unit_up(root: Root) -> None:
    claims = Claims(root, RUN)
    unit = claims.take(UNITS[:1])
    assert unit is not None
    with pytest.raises(ZeroDivisionError), claims.holding(unit):
        raise ZeroDivisionError
    assert claimed_units(root, RUN) == []


def test_of_many_claims_some_are_looked_at_each_time_and_all_in_the_end(root: Root) -> None:
    units = [f"{RUN}-{number:06d}" for number in range(LOOKED_AT + 10)]
    for unit in units:
        root.write(claim_path(unit), b"{}")
    clock = Clock()
    claims = Claims(root, RUN, lease=10, clock=clock)
    taken: set[str] = set()
    for _ in range(3 * len(units)):
        clock.now += 6
        found = claims.take(set(units) - taken)
        taken |= {found} if found else set()
    assert taken == set(units)


def test_claims_of_committed_units_go(root: Root) -> None:
    claims = Claims(root, RUN)
    for _ in range(3):
        claims.take(UNITS)
    left = claimed_units(root, RUN)[1:]
    sweep(root, RUN, lambda unit: unit not in left)
    assert claimed_units(root, RUN) == left
    sweep(root, "f" * 16, lambda unit: True)  # of a run that has none


def test_no_clock_that_can_be_set_is_asked() -> None:
    assert inspect.signature(Claims).parameters["clock"].default is time.monotonic
