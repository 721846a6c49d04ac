from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pipelines.streaming.shuffle import app, shuffle_quality
from softlabels.student.order import Order
from tests.plans import make_plan
from tests.tables import make_table


def make_order(shuffle_rows: int, shuffle: bool = True, groups: int = 40) -> Order:
    ones = np.ones(groups, np.int64)
    return Order("0" * 64, 0 * ones, 50 * ones, ones, 3, shuffle, shuffle_rows)


def test_a_shuffle_of_all_rows_is_as_chance_has_it() -> None:
    found = shuffle_quality(make_order(2_000), 0, 20)
    assert found.variance == pytest.approx(1, abs=0.1)
    assert found.neighbours == pytest.approx(1, abs=0.35)
    assert found.correlation == pytest.approx(0, abs=0.05)


def test_rows_in_the_plan_s_order_are_as_far_from_it_as_can_be() -> None:
    found = shuffle_quality(make_order(1, shuffle=False), 0, 25)
    # A batch is of one row group: B^2 (1 - 1/G) over B (1/G) (1 - 1/G) G, chance's part.
    assert found.variance == pytest.approx(25 * 1999 / 1975)
    assert found.correlation == pytest.approx(1)
    assert found.neighbours == pytest.approx((24 / 25) * 2000 / 24, rel=0.01)


def test_more_rows_come_nearer_as_the_row_groups_of_a_block_say() -> None:
    found = [shuffle_quality(make_order(rows), 0, 20) for rows in (1, 100, 500, 2_000)]
    variances = [one.variance for one in found]
    assert variances == sorted(variances, reverse=True)
    # Of two row groups a block: each batch is of two of the 40.
    assert variances[1] == pytest.approx(1 + 20 / 2 * (1 - 2 / 40) - 1 / 2, rel=0.1)
    assert all(abs(one.correlation) < 0.3 for one in found)


def test_the_command_prints_a_line_for_each_size(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=2_000, k=2, shard_rows=1_000, row_group_rows=100)
    path = tmp_path / "plan.parquet"
    make_plan(table).write(path)
    done = CliRunner().invoke(app, [str(path), "--batch-size", "50"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["1,024", "2,000 (all)"]
