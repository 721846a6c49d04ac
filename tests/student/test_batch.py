from pathlib import Path

import numpy as np
import pytest
import torch

from softlabels.errors import BadInputError, MismatchError
from softlabels.student.batch import LabelSpace, label_space, targets_at, to_torch
from softlabels.student.losses import Targets
from softlabels.student.servable import require_servable
from softlabels.student.spec import LossSpec
from softlabels.student.stream import Stream
from tests.plans import make_plan
from tests.tables import dense_logprobs, make_table, make_targets


def test_values_at_temperature_1_and_2(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=40, k=4, classes=9, temperatures=[2.0], draws=3)
    stream = Stream(make_plan(table), batch_size=40, shuffle=False, epochs=1, temperatures=[2.0])
    (batch,) = stream
    dense = dense_logprobs(40, 9, 0)
    for temperature in (1.0, 2.0):
        scaled = dense / temperature
        scaled -= np.log(np.exp(scaled).sum(1, keepdims=True))
        inputs = to_torch(batch, temperature, draws=True)
        assert isinstance(inputs.targets, Targets)
        ids = inputs.targets.ids.numpy()
        expected = np.take_along_axis(scaled, ids, 1)
        np.testing.assert_allclose(inputs.targets.logprobs, expected, atol=6e-3)
        tail = np.log(1 - np.exp(expected).sum(1))
        np.testing.assert_allclose(inputs.targets.tail_logprob, tail, atol=1e-2)
        assert inputs.targets.draws is not None
    plain = to_torch(batch).targets
    assert isinstance(plain, Targets)
    assert plain.draws is None
    assert inputs.labels is not None
    assert inputs.labels.tolist() == [i % 9 for i in range(40)]
    with pytest.raises(MismatchError, match=r"temperature 3.0 is not stored.*\[1.0, 2.0\]"):
        to_torch(batch, 3.0)


def test_arrays_are_shared_not_copied(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=40)
    (batch,) = Stream(make_plan(table), batch_size=40, epochs=1)
    inputs = to_torch(batch)
    assert isinstance(inputs.targets, Targets)
    assert inputs.targets.ids.data_ptr() == batch.targets.ids.ctypes.data
    assert inputs.targets.logprobs.data_ptr() == batch.targets.logprobs.ctypes.data


def test_read_only_arrays_make_no_warning() -> None:
    soft = make_targets(dense_logprobs(5, 6), 2)
    soft.ids.flags.writeable = False
    assert torch.equal(targets_at(soft).ids, torch.tensor(soft.ids.tolist(), dtype=torch.int32))


def test_label_spaces() -> None:
    one = LabelSpace(2, ("a", "b"))
    one.require(LabelSpace(2, None), "here", "there")
    with pytest.raises(MismatchError, match="class 1 is 'b' in here, 'c' in there"):
        one.require(LabelSpace(2, ("a", "c")), "here", "there")
    with pytest.raises(MismatchError, match="here has 2 classes, there has 3"):
        one.require(LabelSpace(3, None), "here", "there")


def test_tables_of_two_label_spaces(tmp_path: Path) -> None:
    tables = [make_table(tmp_path / str(v), rows=30, classes=v) for v in (6, 7)]
    with pytest.raises(MismatchError, match="table 'a' has 6 classes, table 'b' has 7"):
        label_space(make_plan(tables), "the plan")


def test_empty_plan(tmp_path: Path) -> None:
    plan = make_plan(make_table(tmp_path / "t", rows=30), keep=lambda entry, rows: [])
    with pytest.raises(MismatchError, match="the plan reads no rows"):
        label_space(plan, "the plan")


def test_sampled_needs_equally_many_draws(tmp_path: Path) -> None:
    tables = [make_table(tmp_path / f"d{m}", rows=30, draws=m) for m in (2, 3)]
    with pytest.raises(MismatchError, match=r"equally many draws.*2: .*3: "):
        require_servable(make_plan(tables), LossSpec(tail="sampled"), [])
    require_servable(make_plan(tables), LossSpec(tail="sampled", kd_weight=0), [])
    require_servable(make_plan(tables[0]), LossSpec(tail="sampled"), ["label"])
    with pytest.raises(BadInputError, match="no column 'image'"):
        require_servable(make_plan(tables), LossSpec(), ["image"])
