"""The committed pages as rows of tokens for the benchmark: whole pieces of one page each."""

from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import torch
from torch import Tensor

DATA = Path("data/lm")
Split = Literal["train", "heldout"]


def pieces(split: Split, tokenizer: Any, length: int, rows: int) -> Tensor:
    """int64 [rows, length], pages cut every `length` tokens in the file's order.

    A page's last piece is left out where it is shorter, so nothing is padded and every row is of
    one page that it attends to from its own first token on.

    Raises:
        ValueError: the text holds fewer pieces.
    """
    found: list[list[int]] = []
    for text in pq.read_table(DATA / f"{split}.parquet")["text"].to_pylist():
        ids = tokenizer(text, verbose=False)["input_ids"]
        whole = len(ids) // length
        found += [ids[length * i : length * (i + 1)] for i in range(whole)]
        if len(found) >= rows:
            return torch.tensor(found[:rows])
    raise ValueError(f"{split}: expected {rows!r} pieces of {length!r} tokens, found {len(found)}")
