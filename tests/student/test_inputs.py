"""A run whose inputs are transformed, in threads or not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from softlabels.errors import BadInputError, DataError
from softlabels.student.seeds import Seeds
from softlabels.student.spec import CheckpointSpec, EvaluateSpec, InputSpec, RunSpec
from softlabels.student.trainer import Progress, train
from tests.student.problem import make_problem, run_spec

HERE = "tests.student.test_inputs"
DECODE = {"decode": "tests.student.problem:decode", "columns": ("features",)}


def jitter(inputs: Tensor, seeds: Seeds) -> Tensor:
    """Features with noise, each row's by its own generator."""
    noise = [np.random.default_rng(int(seed)).normal(size=inputs.shape[1]) for seed in seeds]
    return inputs + torch.from_numpy(np.stack(noise)).float() / 10


def mapping(inputs: Tensor, seeds: Seeds) -> dict[str, Tensor]:
    """The same by the name that the student has for it."""
    return {"features": jitter(inputs, seeds)}


def broken(inputs: Tensor, seeds: Seeds) -> Tensor:
    """Fails on every row."""
    raise ValueError("too dark")


class Counting(nn.Module):
    """Remembers the inputs that it is evaluated on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.evaluated: list[Tensor] = []

    def forward(self, features: Tensor) -> Tensor:
        if not self.training:
            self.evaluated.append(features)
        logits: Tensor = self.layer(features)
        return logits


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_problem(tmp_path_factory.mktemp("inputs"), rows=100)


def spec_of(folder: Path, plan: Path, transform: str | None = "jitter", **changes: Any) -> RunSpec:
    named = None if transform is None else f"{HERE}:{transform}"
    inputs = InputSpec(transform=named, **(DECODE | changes.pop("inputs", {})))
    checkpoints = CheckpointSpec(every=3)
    return run_spec(folder, plan, inputs=inputs, steps=10, checkpoint=checkpoints, **changes)


def weights_of(spec: RunSpec) -> bytes:
    return train(spec).student.read_bytes()


def test_threads_and_stops_change_no_bit_of_a_student(tmp_path: Path, plan: Path) -> None:
    whole = weights_of(spec_of(tmp_path / "whole", plan))
    for threads in (0, 2):
        spec = spec_of(tmp_path / str(threads), plan, inputs={"threads": threads})
        assert weights_of(spec) == whole
    spec = spec_of(tmp_path / "stopped", plan)

    stops = [2, 5, 8]

    def stop(at: Progress) -> None:
        if at.step == stops[0]:
            raise RuntimeError(f"stopped after {stops.pop(0)}")

    for _ in range(3):
        with pytest.raises(RuntimeError, match="stopped"):
            train(spec, report=stop)
    assert weights_of(spec) == whole
    assert weights_of(spec_of(tmp_path / "named", plan, "mapping")) == whole
    assert weights_of(spec_of(tmp_path / "plain", plan, None)) != whole


def test_micro_batches_are_cut_from_the_inputs_of_the_batch(tmp_path: Path, plan: Path) -> None:
    from softlabels.student.checkpoint import read_weights

    found = [
        read_weights(
            train(spec_of(tmp_path / str(size), plan, name, micro_batch_size=size)).student
        )
        for size, name in ((None, "jitter"), (5, "jitter"), (7, "mapping"))
    ]
    for name, values in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(values, other[name], rtol=1e-4, atol=1e-6)


def test_an_evaluation_is_of_plain_inputs(tmp_path: Path, plan: Path) -> None:
    model, spec = Counting(), spec_of(tmp_path, plan)
    spec = spec.model_copy(update={"evaluate": EvaluateSpec(plan=str(plan), batch_size=100)})
    train(spec, model=model)
    other = Counting()
    plain = spec_of(tmp_path / "plain", plan, None)
    plain = plain.model_copy(update={"evaluate": EvaluateSpec(plan=str(plan), batch_size=100)})
    train(plain, model=other)
    assert torch.equal(model.evaluated[-1], other.evaluated[-1])


def test_a_transform_that_fails_is_one_line_that_names_the_rows(tmp_path: Path, plan: Path) -> None:
    with pytest.raises(DataError, match=r"its transform failed on 32 rows, 'x\d+' to .*too dark"):
        train(spec_of(tmp_path, plan, "broken"))
    with pytest.raises(BadInputError, match="no callable 'nothing'"):
        train(spec_of(tmp_path, plan, "nothing"))


def test_what_makes_the_same_inputs_is_the_same_run() -> None:
    base: dict[str, Any] = {"plan": "p", "out": "o", "steps": 1, "student": {"module": "m:M"}}

    def identity(**inputs: Any) -> str:
        return RunSpec.model_validate(base | {"inputs": DECODE | inputs}).fingerprint()

    assert identity(threads=4) == identity(source="a/*.parquet") == identity()
    assert len({identity(), identity(transform="t:t"), identity(augment="t:t")}) == 3
    named = RunSpec.model_validate(base | {"inputs": DECODE}).identity()["inputs"]
    assert named == {"decode": DECODE["decode"], "columns": ["features"]}
