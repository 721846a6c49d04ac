"""The weighted mixture of a position's teachers, as far as their stored ids say it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from softlabels.student.several import Teacher, neutral
from softlabels.student.temper import rescale_head


def mixture(
    teachers: Sequence[Teacher], num_classes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Sum over teachers of weight times probability, and where any of them stores an id.

    An id that a teacher does not store counts 0 for it, its share is in what is missing to 1: so
    the mixture is exact where every class is stored, and else a lower bound at each id.

    Returns:
        [N, V] of `dtype`, and bool [N, V].
    """
    n, device = len(teachers[0].targets.ids), teachers[0].targets.ids.device
    probs = torch.zeros((n, num_classes), dtype=dtype, device=device)
    inside = torch.zeros((n, num_classes), dtype=torch.bool, device=device)
    for teacher in teachers:
        targets = neutral(teacher)
        stored, at = targets.ids >= 0, targets.ids.clamp(min=0).long()
        head = rescale_head(targets.logprobs, targets.tail_logprob).to(dtype).exp() * stored
        if teacher.weight is not None:
            head = head * teacher.weight.to(dtype).unsqueeze(1)
        probs.scatter_add_(1, at, head)
        # Counted, not set: a pad points at class 0, which may be stored too.
        counts = torch.zeros_like(probs).scatter_add_(1, at, stored.to(dtype))
        inside |= counts > 0
    return probs, inside
