"""Sums over the processes of one training run."""

import torch


def sum_over_ranks(value: float, device: torch.device | str = "cpu") -> float:
    """`value` summed over all ranks; itself where `torch.distributed` was not initialised.

    Every rank must call it. What a step divides by is the same on all ranks: gradients that are
    then summed are those of one process on the whole batch.

    Args:
        value: this rank's part.
        device: where the process group communicates.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return float(total)
