"""How long writers wait for each other where there are no turns."""

import time
import uuid

import pytest

from softlabels.store.pacing import LONGEST_WAIT, Pace


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "monotonic", made)
    return made


@pytest.fixture
def place() -> str:
    return uuid.uuid4().hex


def commit(place: str, others: int, attempt: float = 0.2) -> None:
    pace = Pace(place)
    pace.tried(attempt)
    pace.ended(others)


def waits(place: str) -> tuple[float, float]:
    """The least and the most of many first waits."""
    drawn = [Pace(place).first_wait() for _ in range(1000)]
    return min(drawn), max(drawn)


def test_who_is_alone_never_waits(place: str, clock: Clock) -> None:
    assert waits(place) == (0, 0)
    for _ in range(3):
        commit(place, others=0)
        assert waits(place) == (0, 0)


def test_who_has_won_against_others_lets_them_go_first(place: str, clock: Clock) -> None:
    commit(place, others=1)
    least, most = waits(place)
    assert 0.2 <= least < 0.25
    assert 0.55 < most <= 0.6
    clock.now += 0.3  # spent with other work
    least, most = waits(place)
    assert least == 0
    assert 0.25 < most <= 0.3
    assert waits("elsewhere") == (0, 0)


def test_who_wins_at_once_and_sees_nobody_does_not_forget_the_others(
    place: str, clock: Clock
) -> None:
    commit(place, others=2)
    for _ in range(5):
        clock.now += 1
        commit(place, others=0)
        assert waits(place)[0] > 0
    clock.now += 1.1
    commit(place, others=0)
    assert waits(place) == (0, 0), "nobody was seen for 30 attempts' time"


def test_who_has_lost_more_often_waits_less(place: str) -> None:
    pace = Pace(place)
    pace.tried(0.8)
    most = [max(pace.lost_wait(losses) for _ in range(1000)) for losses in (1, 2, 8)]
    assert 0.7 < most[0] <= 0.8
    assert 0.35 < most[1] <= 0.4
    assert 0.08 < most[2] <= 0.1


def test_slow_attempts_do_not_make_long_waits(place: str, clock: Clock) -> None:
    commit(place, others=1, attempt=600)
    assert waits(place)[1] == LONGEST_WAIT
    pace = Pace(place)
    pace.tried(600)
    assert max(pace.lost_wait(1) for _ in range(100)) <= LONGEST_WAIT
