"""Small teachers and decode functions that specs in tests name by import path."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

FEATURES = 4
CLASSES = 6
NAN_AT = 13.0
"""First feature of the row for which SickTeacher fails."""


def decode(columns: Mapping[str, pa.Array]) -> Tensor:
    """Column x, list<float> of FEATURES values a row, as float32 [B, FEATURES]."""
    flat = columns["x"].flatten().to_pylist()
    return torch.tensor(flat, dtype=torch.float32).reshape(-1, FEATURES)


def decode_blob(columns: Mapping[str, pa.Array]) -> Tensor:
    """The first FEATURES bytes of column blob, as float32 [B, FEATURES] in [0, 1]."""
    heads = [value[:FEATURES] for value in columns["blob"].to_pylist()]
    return (
        torch.from_numpy(np.frombuffer(b"".join(heads), np.uint8) / 255.0)
        .float()
        .reshape(-1, FEATURES)
    )


def decode_wrong_key(columns: Mapping[str, pa.Array]) -> Tensor:
    """Asks for a column that the spec does not name."""
    return decode({"x": columns["nothing"]})


def decode_refuse(columns: Mapping[str, pa.Array]) -> Tensor:
    """Finds its input wrong."""
    raise ValueError("not an image")


def decode_list(columns: Mapping[str, pa.Array]) -> Any:
    """Gives a list where a tensor is wanted."""
    return columns["x"].to_pylist()


def decode_narrow(columns: Mapping[str, pa.Array]) -> Tensor:
    """Loses a feature, so that the module cannot multiply."""
    return decode(columns)[:, 1:]


class Linear(nn.Module):
    """scale * (W x + b), random by the seed that load_teacher sets."""

    def __init__(self, classes: int = CLASSES, scale: float = 3.0, dtype: str = "float32") -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, classes)
        self.scale = scale
        self.dtype = getattr(torch, dtype)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x) * self.scale
        return logits.to(self.dtype)


class RowByRow(Linear):
    """Gives the same bits for a row in whatever batch it stands."""

    def forward(self, x: Tensor) -> Tensor:
        products = self.layer.weight.double()[None] * x.double()[:, None, :]
        return ((products.sum(2) + self.layer.bias.double()) * self.scale).float()


class Slow(RowByRow):
    """Sleeps before each batch."""

    def __init__(self, seconds: float, classes: int = CLASSES) -> None:
        super().__init__(classes)
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return super().forward(x)


class SlowLinear(Linear):
    """Sleeps before each batch; a row's last bits may depend on its batch."""

    def __init__(self, seconds: float, classes: int = CLASSES) -> None:
        super().__init__(classes)
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return super().forward(x)


class Sick(RowByRow):
    """NaN in one logit of the row whose first feature is NAN_AT."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        logits[x[:, 0] == NAN_AT, 1] = torch.nan
        return logits


class Infinite(Linear):
    """+inf in one logit of every row."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).index_fill(1, torch.tensor([0]), torch.inf)


class Extreme(Linear):
    """One hot: a million for the first class, nothing for the others."""

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.full((len(x), self.layer.out_features), -1e6)
        logits[:, 0] = 1e6
        return logits


class Pair(Linear):
    """Gives a tuple, as many models do."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class WithBuffer(Linear):
    """Holds a buffer of NaN, which is part of its state, and one number without dimensions."""

    def __init__(self, fill: float = float("nan")) -> None:
        super().__init__()
        self.register_buffer("mark", torch.full((3,), fill))
        self.register_buffer("count", torch.tensor(7))


class Picky(Linear):
    """Refuses its arguments."""

    def __init__(self, size: str = "") -> None:
        raise ValueError(f"no model of\nsize {size!r}")


def not_a_module() -> str:
    """Gives no torch module."""
    return "teacher"
