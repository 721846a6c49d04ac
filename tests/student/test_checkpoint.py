import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from softlabels.errors import BadInputError, IntegrityError, MismatchError, StorageError
from softlabels.student import checkpoint

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}


def save(folder: Path, step: int, keep: int = 2) -> Path:
    state = {"step": step, "loss": 0.1 + 0.2}
    return checkpoint.save(folder, step, TENSORS, {"a/exp_avg": torch.ones(2, 3)}, state, keep)


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 7)
    assert path.name == "step-00000007"
    loaded = checkpoint.load_newest(tmp_path / "checkpoints")
    assert loaded is not None
    assert loaded.state["step"] == 7
    assert loaded.state["loss"] == 0.1 + 0.2
    for name, value in TENSORS.items():
        assert torch.equal(loaded.student[name], value)
    assert torch.equal(loaded.optimizer["a/exp_avg"], torch.ones(2, 3))


def test_none_yet(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path / "checkpoints") is None


def test_newest_stay(tmp_path: Path) -> None:
    for step in (5, 90, 100, 123_456_789):
        save(tmp_path, step)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000100", "step-123456789"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000100", "step-123456789"]


def test_half_written_one_is_never_taken(tmp_path: Path) -> None:
    save(tmp_path, 5)
    left = tmp_path / ".step-00000006.1.tmp"
    left.mkdir()
    (left / "state.json").write_text("{")
    newest = checkpoint.load_newest(tmp_path)
    assert newest is not None
    assert newest.state["step"] == 5
    checkpoint.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("name", ["student.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 5)
    path = save(tmp_path, 6) / name
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(data.replace(b"0.3", b"0.4") if name == "state.json" else data[:-1] + b"x")
    with pytest.raises(
        IntegrityError, match=r"step-00000006' is damaged.*step-00000005'"
    ) as caught:
        checkpoint.load_newest(tmp_path)
    assert "\n" not in str(caught.value)


def test_every_flipped_byte_of_the_state_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    data = (path / "state.json").read_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        try:
            same = json.loads(changed) == json.loads(data)
        except ValueError:
            same = False
        (path / "state.json").write_bytes(changed)
        if not same:
            with pytest.raises(IntegrityError):
                checkpoint.load(path)


def test_newer_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 5) / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"format_version": 2}))
    with pytest.raises(IntegrityError, match="format version 2, this release reads up to 1"):
        checkpoint.load(path.parent)


def test_an_infinite_format_version_is_damage(tmp_path: Path) -> None:
    path = save(tmp_path, 5) / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"format_version": float("inf")}))
    with pytest.raises(IntegrityError, match="is damaged"):
        checkpoint.load(path.parent)


def test_nan_state_and_unwritable_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.save(tmp_path / "c", 1, TENSORS, {}, {"loss": float("nan")}, 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        save(tmp_path / "file" / "checkpoints", 1)


class Tied(nn.Module):
    """Two layers that share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight


def test_tied_and_strided_weights(tmp_path: Path) -> None:
    model = Tied()
    model.first.weight.data = torch.arange(9.0).reshape(3, 3).t()
    data = checkpoint.tensor_bytes(model.state_dict())
    (tmp_path / "w.safetensors").write_bytes(data)
    other = Tied()
    checkpoint.load_weights(other, checkpoint.read_weights(tmp_path / "w.safetensors"), "w")
    assert torch.equal(other.second.weight, model.first.weight)
    assert other.first.weight is other.second.weight
    assert checkpoint.tensor_bytes(other.state_dict()) == data


def test_weights_of_another_module_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"weights of 'w' do not fit.*size mismatch") as caught:
        checkpoint.load_weights(nn.Linear(2, 3), nn.Linear(3, 3).state_dict(), "'w'")
    assert "\n" not in str(caught.value)
    (tmp_path / "w").write_bytes(b"no tensors")
    with pytest.raises(BadInputError, match="cannot read weights"):
        checkpoint.read_weights(tmp_path / "w")


def two_layers() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model.get_parameter("0.bias").requires_grad_(False)
    return model


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(trained, 0.1)
    return torch.optim.SGD(trained, 0.1, momentum=0.9 if name == "momentum" else 0.0)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "momentum", "sgd"])
def test_optimizer_state_by_name(name: str) -> None:
    model = two_layers()
    optimizer = make_optimizer(name, model)
    step(model, optimizer)
    data = checkpoint.tensor_bytes(checkpoint.optimizer_tensors(model, optimizer))
    saved = safetensors.torch.load(data)
    trained = {"0.weight", "1.weight", "1.bias"}
    assert {key.rpartition("/")[0] for key in saved} == (set() if name == "sgd" else trained)
    copy = two_layers()
    copy.load_state_dict(model.state_dict())
    other = make_optimizer(name, copy)
    checkpoint.load_optimizer(copy, other, saved)
    step(model, optimizer)
    step(copy, other)
    for mine, theirs in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_optimizer_of_another_student_is_refused() -> None:
    other = nn.Linear(3, 3)
    with pytest.raises(MismatchError, match=r"trains '0\.weight', which the student does not"):
        checkpoint.load_optimizer(
            other, make_optimizer("sgd", other), {"0.weight/exp_avg": torch.ones(3, 3)}
        )


def test_random_numbers_go_on() -> None:
    state = json.loads(json.dumps(checkpoint.random_state()))
    expected = torch.rand(5)
    checkpoint.restore_random_state(state)
    assert torch.equal(torch.rand(5), expected)
