"""A few steps of a run, timed: where their time goes. Nothing is written."""

from typing import Any

from torch import nn

from softlabels.student.batch import Decode
from softlabels.student.build import pick_device
from softlabels.student.fit import require_fit
from softlabels.student.group import joined
from softlabels.student.profile import PARTS, profile
from softlabels.student.run import Run
from softlabels.student.spec import RunSpec
from softlabels.student.step import take
from softlabels.student.trainer import step_once, threads

WARM_UP = 3
"""Steps that are not measured: threads start, caches fill, torch compiles."""


def measure(
    spec: RunSpec,
    steps: int,
    *,
    model: nn.Module | None = None,
    decode: Decode | None = None,
) -> dict[str, Any]:
    """The time of each part of a new run's first steps, and its bottleneck in words.

    The same on each rank: seconds are means over ranks.

    Args:
        spec: of the run; its `out` is not touched.
        steps: to measure, after WARM_UP others.
        model: as for `train`.
        decode: as for `train`.

    Raises:
        SoftLabelsError: as `train`.
    """
    device = pick_device(spec.device)
    with joined(device) as group, threads(spec.threads):
        plan, other = group.together(lambda: require_fit(spec))
        spec = spec.model_copy(update={"steps": WARM_UP + steps, "epochs": None})
        run = group.together(lambda: Run.prepare(spec, plan, other, model, decode, group, True))
        run.spread()
        run.model.train()
        batches = iter(run.stream)
        for step in range(WARM_UP + steps):
            if step == WARM_UP:
                run.clock.clear()
            step_once(run, take(run, batches), lambda: False)
        seconds = group.gather(list(run.clock.stop().values())).mean(0)
        return profile(dict(zip(PARTS, seconds.tolist(), strict=True)), steps)
