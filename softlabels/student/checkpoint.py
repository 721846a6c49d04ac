"""Checkpoints: everything that makes a continued run bit for bit the undisturbed one.

    checkpoints/step-00000200/student.safetensors     parameters and buffers
                              optimizer.safetensors   "<parameter>/<state>" by name
                              state.json              step, reading position, random numbers,
                                                      lineage, and the sha256 of all three

A folder gets its name by one rename when everything in it is on the disk, so a killed writer
leaves no checkpoint rather than half of one. Nothing is ever pickled. A damaged checkpoint is
refused, with the name of the older one: falling back by itself would hide a failing disk.
"""

import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from softlabels.errors import BadInputError, IntegrityError, MismatchError, one_line
from softlabels.fingerprint import sha256_bytes, sha256_json
from softlabels.storage import storage_errors
from softlabels.student.sharding import placed

FORMAT_VERSION = 1

STUDENT, OPTIMIZER, STATE = "student.safetensors", "optimizer.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_PACKAGES = ("softlabels", "torch", "numpy", "pyarrow", "safetensors")


DAMAGED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What JSON of a damaged record, or what is looked for in it, raises."""

UNREADABLE_TENSORS = (SafetensorError, KeyError, OverflowError, RuntimeError, ValueError)
"""What reading bytes that are no safetensors file, or hold types unknown to torch, raises."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole, checked checkpoint.

    Attributes:
        path: its folder.
        student: the module's state dict.
        optimizer: the optimiser's tensors, as `optimizer_tensors`.
        state: what else the run wrote, plain JSON.
    """

    path: Path
    student: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save(
    folder: Path,
    step: int,
    student: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """The new folder in `folder` for `step`; only the newest `keep` stay.

    Args:
        folder: the run's `checkpoints`.
        step: optimiser steps done.
        student: the module's state dict.
        optimizer: the optimiser's tensors.
        state: plain JSON values, finite; "format_version" and "sha256" are added.
        keep: at least 1.

    Raises:
        StorageError: the folder cannot be written.
    """
    files = {STUDENT: tensor_bytes(student), OPTIMIZER: tensor_bytes(optimizer)}
    record = {
        **state,
        "format_version": FORMAT_VERSION,
        "sha256": {name: sha256_bytes(data) for name, data in files.items()},
    }
    record["sha256"][STATE] = sha256_json(record)
    files[STATE] = json.dumps(record, indent=1, allow_nan=False).encode()
    target = folder / f"step-{step:08d}"
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    with storage_errors("write", str(target)):
        temporary.mkdir(parents=True)
        for name, data in files.items():
            with open(temporary / name, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _sync(temporary)
        temporary.rename(target)
        _sync(folder)
    for old in steps(folder)[:-keep]:
        _remove(old)
    return target


def steps(folder: Path) -> list[Path]:
    """The checkpoint folders, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint; None when there is none yet.

    Raises:
        IntegrityError: it is damaged, or of a newer release; says which older one there is.
    """
    found = steps(folder)
    if not found:
        return None
    try:
        return load(found[-1])
    except IntegrityError as error:
        older = f"from {str(found[-2])!r}" if len(found) > 1 else "from the start"
        raise IntegrityError(f"{error}; remove that folder to go on {older}") from error


def load(path: Path) -> Checkpoint:
    """The checkpoint in a folder, every byte checked.

    Raises:
        IntegrityError: a file is missing or changed, or the format is newer.
    """
    where = f"checkpoint {str(path)!r} is damaged"
    try:
        state = json.loads((path / STATE).read_bytes())
        expected = state.get("sha256", {})
        version = int(state["format_version"])
        data = {name: (path / name).read_bytes() for name in (STUDENT, OPTIMIZER)}
    except (OSError, *DAMAGED) as error:
        raise IntegrityError(f"{where}: {one_line(error)[:200]}") from error
    if version > FORMAT_VERSION:
        raise IntegrityError(
            f"checkpoint {str(path)!r} has format version {version}, this release reads up to "
            f"{FORMAT_VERSION}: upgrade softlabels"
        )
    found = {name: sha256_bytes(value) for name, value in data.items()}
    try:
        rest = {name: value for name, value in expected.items() if name != STATE}
        found[STATE] = sha256_json({**state, "sha256": rest})
    except DAMAGED as error:
        raise IntegrityError(f"{where}: {one_line(error)[:200]}") from error
    for name, digest in found.items():
        if expected.get(name) != digest:
            raise IntegrityError(
                f"{where}: {name} has sha256 {digest!r}, expected {expected.get(name)!r}"
            )
    try:
        student, optimizer = (safetensors.torch.load(data[name]) for name in (STUDENT, OPTIMIZER))
    except UNREADABLE_TENSORS as error:
        raise IntegrityError(f"{where}: {one_line(error)[:200]}") from error
    return Checkpoint(path, student, optimizer, state)


def sweep(folder: Path) -> None:
    """Removes what killed writers left; call it only while no other process writes here."""
    if folder.is_dir():
        for path in folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """`tensors` as a safetensors file; equal tensors give equal bytes."""
    # A copy each: safetensors refuses tensors that share memory, which tied weights do.
    plain = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}
    return safetensors.torch.save(plain)


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copies a whole state dict into a module.

    Raises:
        MismatchError: a name or a shape is not the module's.
    """
    try:
        model.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        reason = one_line(error)[:300]
        raise MismatchError(f"weights of {where} do not fit the student: {reason}") from error


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        BadInputError: there is no such file, or it is no safetensors file.
    """
    try:
        return safetensors.torch.load(Path(path).read_bytes())
    except (OSError, *UNREADABLE_TENSORS) as error:
        reason = one_line(error)
        raise BadInputError(f"cannot read weights {os.fspath(path)!r}: {reason}") from error


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by "<parameter>/<state>"."""
    states = optimizer.state_dict()["state"]
    return {
        f"{name}/{key}": value
        for index, name in enumerate(_trained(model))
        for key, value in states.get(index, {}).items()
        if value is not None
    }


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Puts what `optimizer_tensors` gave back into an optimiser over the same parameters."""
    places = {name: index for index, name in enumerate(_trained(model))}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        if name not in places:
            raise MismatchError(f"the checkpoint trains {name!r}, which the student does not")
        state.setdefault(places[name], {})[field] = value
    for place, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        own = state.get(place, {})
        own |= placed(own, {name: parameter for name in own if name != "step"})
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_state() -> dict[str, Any]:
    """The state of torch's random numbers, as hex: what dropout will draw next."""
    state: dict[str, Any] = {"cpu": _hex(torch.get_rng_state())}
    if torch.cuda.is_available():
        state["cuda"] = [_hex(one) for one in torch.cuda.get_rng_state_all()]
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Undoes everything drawn since `random_state`; cuda's only on as many devices."""
    torch.set_rng_state(_from_hex(state["cpu"]))
    devices = state.get("cuda", [])
    if devices and torch.cuda.is_available() and torch.cuda.device_count() == len(devices):
        torch.cuda.set_rng_state_all([_from_hex(one) for one in devices])


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide a run's bits."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def record_sha256(record: Mapping[str, Any]) -> str:
    """The sha256 of a record as it is read back from JSON; figures may be NaN."""
    plain = json.loads(json.dumps(record))
    return sha256_bytes(json.dumps(plain, sort_keys=True).encode())


def _trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _hex(state: Tensor) -> str:
    return bytes(state.numpy()).hex()


def _from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _remove(path: Path) -> None:
    # Out of sight first: a removal that is cut short must not look like a damaged checkpoint.
    hidden = path.with_name(f".{path.name}.{os.getpid()}.old")
    with storage_errors("remove", str(path)):
        path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
