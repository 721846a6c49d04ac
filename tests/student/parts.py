"""Random decoded rows, and whether two are equal: what tests of caches compare."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pyarrow as pa

from softlabels.student.rows import Rows
from softlabels.targets import SoftTargets, Temper


def random_rows(
    rng: np.random.Generator,
    rows: int,
    positions: tuple[int, int] = (1, 1),
    k: int = 3,
    draws: int = 0,
    temperatures: tuple[float, ...] = (),
    unknown: tuple[str, ...] = (),
    columns: bool = True,
) -> Rows:
    """`rows` rows of `positions` (least, most) positions each; fields in `unknown` are None."""
    counts = rng.integers(positions[0], positions[1] + 1, rows).astype(np.int32)
    n = int(counts.sum())

    def ints(*shape: int) -> Any:
        return rng.integers(-1, 1 << 30, shape).astype(np.int32)

    def floats(*shape: int) -> Any:
        return rng.normal(size=shape).astype(np.float32)

    targets = SoftTargets(
        num_positions=counts,
        ids=ints(n, k),
        logprobs=floats(n, k),
        tail=floats(n),
        draws=ints(n, draws) if draws else None,
        entropy=floats(n),
        label_ids=ints(n),
        label_logprobs=floats(n),
        label_ranks=ints(n),
        temper={t: Temper(floats(n), floats(n)) for t in temperatures},
    )
    names = pa.array([f"e{i}" * int(rng.integers(1, 4)) for i in rng.integers(0, 999, rows)])
    more = {
        "number": pa.array(rng.integers(0, 1 << 40, rows)),
        "long": pa.array([rng.bytes(int(rng.integers(0, 3000))) for _ in range(rows)], pa.binary()),
        "list": pa.array([list(range(i % 5)) for i in range(rows)], pa.list_(pa.int32())),
    }
    known: Any = dict.fromkeys(unknown)
    return Rows(replace(targets, **known), names, more if columns else {})


def assert_same(found: Rows, expected: Rows) -> None:
    """Raises unless all that two values hold is equal, bit for bit, and of the same types."""
    for name in ("position_weights", "kept", "whole", "member_weights"):
        same_array(getattr(found, name), getattr(expected, name), name)
    assert found.example_ids.equals(expected.example_ids)
    assert list(found.columns) == list(expected.columns)
    for name, values in expected.columns.items():
        assert found.columns[name].equals(values), name
    same_targets(found.targets, expected.targets)
    assert len(found.others) == len(expected.others)
    for one, other in zip(found.others, expected.others, strict=True):
        same_targets(one, other)


def same_targets(found: SoftTargets, expected: SoftTargets) -> None:
    """Raises unless they are equal bit for bit."""
    for field in fields(SoftTargets):
        if field.name != "temper":
            same_array(getattr(found, field.name), getattr(expected, field.name), field.name)
    assert set(found.temper) == set(expected.temper)
    for temperature, own in expected.temper.items():
        same_array(found.temper[temperature].shift, own.shift, "shift")
        same_array(found.temper[temperature].tail, own.tail, "tail")


def same_array(found: Any, expected: Any, name: str) -> None:
    """Raises unless both are None, or arrays of one type, shape and content."""
    assert (found is None) == (expected is None), name
    if expected is not None:
        assert found.dtype == expected.dtype, name
        np.testing.assert_array_equal(found, expected, err_msg=name)
