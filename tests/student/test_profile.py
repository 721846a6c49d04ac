import re
import time
from pathlib import Path
from typing import Any

import pytest

from softlabels.errors import BadInputError
from softlabels.student.measure import measure
from softlabels.student.profile import (
    BACKWARD,
    DATA,
    FORWARD,
    INPUTS,
    OTHER,
    PARTS,
    RANKS,
    Clock,
    bottleneck,
    profile,
)
from tests.student.problem import make_problem, run_spec


def test_a_part_within_another_counts_once() -> None:
    clock = Clock()
    begun = time.perf_counter()
    with clock.part(FORWARD):
        time.sleep(0.02)
        with clock.part(INPUTS):
            time.sleep(0.03)
    time.sleep(0.01)
    spent = clock.stop()
    total = time.perf_counter() - begun
    assert 0.03 <= spent[INPUTS] < total
    assert 0.02 <= spent[FORWARD] <= total - 0.04
    assert spent[OTHER] >= 0.01
    assert sum(spent.values()) == pytest.approx(total, abs=0.01)
    clock.clear()
    assert sum(clock.stop().values()) < 0.01


def test_a_part_that_raises_is_left() -> None:
    clock = Clock()
    with pytest.raises(ValueError, match="x"), clock.part(BACKWARD):
        raise ValueError("x")
    before = clock.stop()[BACKWARD]
    time.sleep(0.01)
    assert clock.stop()[BACKWARD] == before


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ({DATA: 0.41, FORWARD: 0.5, BACKWARD: 0.09}, "waits for data 41% of the time: "),
        ({INPUTS: 0.3, FORWARD: 0.7}, "makes and moves inputs 30%"),
        ({RANKS: 0.2, DATA: 0.1, FORWARD: 0.7}, "waits for other ranks 20%"),
        ({DATA: 0.01, FORWARD: 0.4, BACKWARD: 0.59}, r"computes \(backward\) 59%.*is the limit"),
    ],
)
def test_the_bottleneck_in_words(shares: dict[str, float], words: str) -> None:
    every = dict.fromkeys(PARTS, 0.0) | shares
    assert re.match(words, bottleneck(every))
    found = profile({name: 2 * share for name, share in every.items()}, steps=4)
    assert found["seconds"] == pytest.approx(2)
    for name, share in every.items():
        assert found["parts"][name]["share"] == pytest.approx(share)
        assert found["parts"][name]["seconds_per_step"] == pytest.approx(share / 2)


def test_slow_inputs_are_found(tmp_path: Path) -> None:
    plan = make_problem(tmp_path)
    slow: dict[str, Any] = {
        "decode": "tests.student.problem:slow_decode",
        "columns": ("features",),
        "threads": 0,
    }
    found = measure(run_spec(tmp_path, plan, inputs=slow), 5)
    assert found["steps"] == 5
    waiting = sum(found["parts"][name]["seconds_per_step"] for name in (DATA, INPUTS))
    assert waiting >= 0.02
    assert "waits for data" in found["bottleneck"] or "inputs" in found["bottleneck"]
    assert not (tmp_path / "run").exists()
    with pytest.raises(BadInputError, match="no plan at"):
        measure(run_spec(tmp_path, Path("nowhere")), 5)
