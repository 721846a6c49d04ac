"""Teachers: what turns source columns into logits."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from softlabels.errors import BadInputError, DataError, MismatchError
from softlabels.fingerprint import sha256_bytes, sha256_json, sha256_stream
from softlabels.imports import load_object, source_sha256
from softlabels.lineage import TeacherLineage
from softlabels.teacher.spec import CaptureSpec

_BUILDING = threading.Lock()

Augment = Callable[[Any, npt.NDArray[np.int64]], Any]
"""Inputs of B rows, as decode gives them, and a seed of each, int64 [B], to other inputs."""


class TorchTeacher:
    """A torch module in evaluation mode with the decode function that feeds it."""

    def __init__(
        self,
        module: nn.Module,
        decode: Callable[[Mapping[str, pa.Array]], Any],
        num_classes: int,
        device: torch.device,
        lineage: TeacherLineage,
        augment: Augment | None = None,
    ) -> None:
        self.lineage = lineage
        self.num_classes = num_classes
        self.device = device
        self.module = module.to(device).eval()
        self._decode, self._augment = decode, augment

    @torch.inference_mode()
    def logits(
        self,
        columns: Mapping[str, pa.Array],
        names: list[str],
        seeds: npt.NDArray[np.int64] | None = None,
    ) -> Tensor:
        """Logits of rows, float [B, V] on the teacher's device.

        Args:
            columns: the source columns of B rows.
            names: their example ids, for messages.
            seeds: int64 [B], of the augmented views that they are; None: they are plain.

        Raises:
            MismatchError: the module gives another shape than [B, num_classes].
            DataError: decode, augment or the module fails, or a logit is NaN or +inf; names the
                example.
        """
        rows = f"in examples {names[0]!r} to {names[-1]!r}"
        with _failures(f"decode failed {rows}"):
            inputs = self._decode(columns)
        if seeds is not None and self._augment is not None:
            with _failures(f"augment failed {rows}"):
                inputs = self._augment(inputs, seeds)
        if not isinstance(inputs, Tensor):
            raise DataError(f"decode gave {type(inputs).__name__} {rows}, expected a tensor")
        with _failures(f"the teacher failed {rows}"):
            logits = self.module(inputs.to(self.device))
        expected = (len(names), self.num_classes)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise MismatchError(
                f"the teacher gave {found}, expected logits of shape {expected}: "
                f"the spec says {self.num_classes} classes"
            )
        bad = logits.isnan().any(1) | (logits == torch.inf).any(1) | (logits == -torch.inf).all(1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise DataError(f"the teacher's logits for example {names[row]!r} are NaN or infinite")
        return logits


def load_teacher(spec: CaptureSpec) -> TorchTeacher:
    """The teacher that a spec names, its weights loaded and fingerprinted.

    Raises:
        BadInputError: an import path, an argument, the weights file or the device is wrong.
        MismatchError: the weights do not fit the module.
    """
    module_class = load_object(spec.teacher.module)
    decode = load_object(spec.source.decode)
    try:
        # A module that starts from random weights must not differ by run, nor by what another
        # thread draws meanwhile.
        with _BUILDING:
            torch.manual_seed(0)
            module = module_class(**spec.teacher.arguments)
    except Exception as error:
        raise BadInputError(
            f"{spec.teacher.module!r} cannot be made of teacher.arguments: {_one_line(error)}"
        ) from error
    if not isinstance(module, nn.Module):
        raise BadInputError(
            f"{spec.teacher.module!r} is no torch.nn.Module: {type(module).__name__}"
        )
    if spec.teacher.weights is not None:
        load_weights(module, spec.teacher.weights)
    lineage = TeacherLineage(
        name=spec.teacher.name,
        revision=spec.teacher.revision,
        kind="torch",
        code=spec.teacher.module,
        code_sha256=source_sha256(module_class),
        arguments=spec.teacher.arguments,
        weights_sha256=_file_or_weights_sha256(module, spec.teacher.weights),
        decode=spec.source.decode,
        decode_sha256=source_sha256(decode),
    )
    device = pick_device(spec.device)
    augment = None if spec.source.augment is None else load_object(spec.source.augment)
    return TorchTeacher(module, decode, spec.teacher.num_classes, device, lineage, augment)


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Runs torch's work on so many threads; None: as many as it is set to."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_weights(module: nn.Module, path: str) -> None:
    """Loads a safetensors file into a module, every tensor of both accounted for."""
    if not Path(path).is_file():
        raise BadInputError(f"there is no weights file {path!r}")
    try:
        found = load_file(path)
    except (SafetensorError, OSError, KeyError, RuntimeError, ValueError) as error:
        raise BadInputError(
            f"{path!r} is not a whole safetensors file: {_one_line(error)}"
        ) from error
    wanted = module.state_dict()
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or extra:
        raise MismatchError(
            f"weights {path!r} do not fit the module: missing {missing[:5]}, unknown {extra[:5]}"
        )
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise MismatchError(
                f"weights {path!r} do not fit the module: {name!r} has shape "
                f"{tuple(tensor.shape)}, the module wants {tuple(wanted[name].shape)}"
            )
    module.load_state_dict(found)


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA or MPS where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInputError(f"device {name!r} is not to be had here: {_one_line(error)}") from error
    return device


def weights_sha256(module: nn.Module) -> str:
    """The sha256 of a module's tensors by name, type, shape and bytes, whatever file held them."""
    seen: dict[tuple[Any, ...], str] = {}
    tensors = {}
    for name, value in module.state_dict().items():
        # A head is often the same tensor as the embeddings.
        place = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if place not in seen or not value.numel():
            seen[place] = _tensor_sha256(value)
        tensors[name] = [str(value.dtype), list(value.shape), seen[place]]
    return sha256_json(tensors)


def _file_or_weights_sha256(module: nn.Module, path: str | None) -> str:
    if path is None:
        return weights_sha256(module)
    with open(path, "rb") as stream:
        return sha256_stream(stream)


def _tensor_sha256(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return sha256_bytes(flat.view(torch.uint8).numpy().tobytes())


@contextlib.contextmanager
def _failures(what: str) -> Iterator[None]:
    # The user's own code may raise anything; what it read is what matters to them.
    try:
        yield
    except Exception as error:
        raise DataError(f"{what}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
