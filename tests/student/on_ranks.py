"""Runs of several processes, for tests: torchrun starts this with a file of specs.

    torchrun --nproc-per-node 2 -m tests.student.on_ranks runs.json

A start takes seconds, so that all runs share one. A run may say at which step rank 1 gets SIGTERM.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from softlabels.errors import SoftLabelsError
from softlabels.student.spec import RunSpec
from softlabels.student.trainer import Progress, train
from tests.student.problem import Linear


class FailsOnRank1(Linear):
    """Fails on one rank alone, in its second step."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, features: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2 and dist.is_initialized() and dist.get_rank() == 1:
            raise ValueError("a row of rank 1 is strange")
        return super().forward(features)


class PoisonedOnRank1(Linear):
    """Gives NaN on one rank alone, in its second step."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, features: Tensor) -> Tensor:
        self.calls += 1
        bad = self.calls == 2 and dist.is_initialized() and dist.get_rank() == 1
        return super().forward(features) * (float("nan") if bad else 1)


def run(case: dict[str, Any], rank: int) -> dict[str, Any]:
    """What a run ended with on this rank, plain JSON."""

    def report(at: Progress) -> None:
        if at.step == case.get("stop") and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    before = torch.get_rng_state()
    try:
        trained = train(RunSpec.model_validate(case["spec"]), report=report)
        return {"already": trained.already, "steps": trained.record["steps"]}
    except SoftLabelsError as error:
        return {
            "error": type(error).__name__,
            "message": str(error),
            "told_elsewhere": error.told_elsewhere,
        }
    finally:
        torch.set_rng_state(before)


def main() -> None:
    """Runs all cases, in order; each rank leaves what they ended with beside the file."""
    path = Path(sys.argv[1])
    cases = json.loads(path.read_text())
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    ended = {name: run(case, rank) for name, case in cases.items()}
    path.with_suffix(f".{rank}.json").write_text(json.dumps(ended))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
