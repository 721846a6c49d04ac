"""The processes of one training run: who is who, and what they tell each other.

torchrun starts them and says by environment variables which is which. Without it, or with one
process, all of this costs nothing. They talk over gloo, on the CPU: what is said here is a few
numbers a step, and must not wait for a GPU.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from softlabels import errors
from softlabels.errors import SoftLabelsError, TryAgainError, one_line

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: which this is.
        size: how many there are.
        control: torch's group for numbers on the CPU; None: the default one.
    """

    rank: int = 0
    size: int = 1
    control: Any = None

    def gather(self, values: Sequence[float]) -> npt.NDArray[np.float64]:
        """What every rank said, float64 [size, len(values)]; all must call it.

        Raises:
            TryAgainError: one of them has ended.
        """
        own = torch.tensor([float(value) for value in values], dtype=torch.float64)
        if self.size == 1:
            return own[None].numpy()
        found = [torch.empty_like(own) for _ in range(self.size)]
        with peers():
            dist.all_gather(found, own, group=self.control)
        return torch.stack(found).numpy()

    def together(self, make: Callable[[], T]) -> T:
        """What `make` gives on this rank, unless it fails on one: then all raise that error.

        The lowest rank that failed tells it; on the others it is `told_elsewhere`.
        """
        made: T | None = None
        failed: SoftLabelsError | None = None
        try:
            made = make()
        except SoftLabelsError as error:
            if self.size == 1:
                raise
            failed = error
        if self.size > 1:
            own = None if failed is None else [type(failed).__name__, str(failed)]
            said = [self._told(own, rank) for rank in range(self.size)]
            first = next((rank for rank, one in enumerate(said) if one is not None), None)
            if first == self.rank:
                assert failed is not None
                raise failed
            if first is not None:
                raise _elsewhere(*said[first]) from failed
        return cast(T, made)

    def first(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, the only one that calls it: plain JSON, and small.

        Raises:
            SoftLabelsError: on all ranks, when it fails.
        """
        made = self.together(lambda: make() if self.rank == 0 else None)
        return cast(T, made if self.size == 1 else self._told(made, 0))

    def _told(self, value: Any, rank: int) -> Any:
        """A value of one rank, as JSON: nobody unpickles what another has sent."""
        data = json.dumps(value).encode() if self.rank == rank else b""
        size = torch.tensor([len(data)])
        with peers():
            dist.broadcast(size, src=rank, group=self.control)
            own = torch.zeros(int(size), dtype=torch.uint8)
            if self.rank == rank:
                own = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            dist.broadcast(own, src=rank, group=self.control)
        return json.loads(own.numpy().tobytes())

    def tensors(self, mine: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The tensors of rank 0, on the CPU; what other ranks give does not count."""
        if self.size == 1:
            return dict(mine or {})
        shapes = self.first(
            lambda: {n: (list(t.shape), str(t.dtype)) for n, t in (mine or {}).items()}
        )
        found = {}
        for name, (shape, dtype) in shapes.items():
            own = (
                mine[name].contiguous()
                if self.rank == 0 and mine
                else torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
            )
            with peers():
                dist.broadcast(own, src=0, group=self.control)
            found[name] = own
        return found


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """The group of this process: torchrun's, one that the caller has made, or itself alone.

    Raises:
        TryAgainError: the others did not come.
    """
    if not dist.is_available():
        yield Group()
        return
    own = not dist.is_initialized()
    if own:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield Group()
            return
        with peers():
            _join("nccl" if device.type == "cuda" else "gloo")
    try:
        with peers():
            control = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        yield Group(dist.get_rank(), dist.get_world_size(), control)
    finally:
        if own:
            dist.destroy_process_group()


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """One line where another process has ended in the middle of a step."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise TryAgainError(
            "another process of the run ended or does not answer, its own message says why; the "
            f"same command goes on from the newest checkpoint ({one_line(error)[:160]})"
        ) from error


def _join(backend: str) -> None:
    # torchrun's store outlives a restart, with the addresses of processes that are gone: a faster
    # rank read those of the last attempt and was refused.
    store, rank, size = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = dist.PrefixStore(f"softlabels/{attempt}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=own, rank=rank, world_size=size)


def _elsewhere(name: str, message: str) -> SoftLabelsError:
    kind = getattr(errors, name, SoftLabelsError)
    error: SoftLabelsError = kind(message)
    error.told_elsewhere = True
    return error
