"""One student on several ranks: copied (DDP) or sharded (FSDP2); gradients are summed.

torch divides summed gradients by the number of ranks; here each rank has divided by the weight of
the whole batch already, so they are only summed.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# DTensor and FSDP2 are imported where a student is sharded: their import takes seconds.


def copied(loss: nn.Module) -> nn.Module:
    """The module with its gradients summed over ranks; each starts from rank 0's weights."""
    # Students have parameters that no loss touches, such as poolers.
    found = DistributedDataParallel(loss, find_unused_parameters=True)
    found.register_comm_hook(None, _summed)
    return found


def sharded(loss: nn.Module) -> nn.Module:
    """The module, changed in place: each rank holds a part of every parameter.

    The elements of the outermost `nn.ModuleList`s, a transformer's layers, are gathered one by
    one, all else at once. Make the optimiser after this.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for layer in _layers(loss):
        fully_shard(layer)
    fully_shard(loss)
    for module in loss.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return loss


@contextlib.contextmanager
def syncing(module: nn.Module, last: bool) -> Iterator[None]:
    """Forward and backward of a micro-batch: ranks exchange gradients after the last alone."""
    if isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
        return
    if _is_sharded(module):
        cast(Any, module).set_requires_gradient_sync(last)
        cast(Any, module).set_is_last_backward(last)
    yield


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Where parts of the module may be called on their own, by all ranks alike."""
    if not _is_sharded(module):
        yield
        return
    cast(Any, module).unshard()
    try:
        yield
    finally:
        cast(Any, module).reshard()


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with none sharded; every rank must call it."""
    return {name: _whole(value) for name, value in tensors.items()}


def placed(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, sharded where those of the same name and shape in `like` are.

    Every rank must have the same, and call it.
    """
    return {name: _placed(value, like.get(name)) for name, value in tensors.items()}


def number(value: Tensor) -> float:
    """The value of a tensor of one element, sharded or not; every rank must call it."""
    return float(_whole(value))


def own_part(value: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return cast(Any, value).to_local() if hasattr(value, "to_local") else value


def _whole(value: Tensor) -> Tensor:
    return cast(Any, value).full_tensor() if hasattr(value, "full_tensor") else value


def _placed(value: Tensor, like: Any) -> Tensor:
    if not hasattr(like, "placements") or like.shape != value.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _is_sharded(module: nn.Module) -> bool:
    return hasattr(module, "unshard")


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)


def _summed(
    _: None,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
    return cast(torch.futures.Future[Tensor], work.get_future().then(lambda d: d.value()[0]))
