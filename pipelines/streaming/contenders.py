"""Who takes part: which module writes and reads, with which settings, in which environment."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Contender(NamedTuple):
    """One way to store and stream the rows.

    Attributes:
        title: in tables.
        module: of this package.
        loader: its class.
        data: contenders of the same name read the same files.
        writing: arguments of `write`.
        reading: arguments of the loader.
        peer: runs in the environment of the other libraries.
        compressed: whether its files are.
        per_sample: whether its interface hands out rows one by one.
        one_epoch: it has no later ones.
        resumes: it has a state that can be kept and gone back to.
        shuffle: how far rows are shuffled, in words.
        labels_rows: of the case of a million rows, how many it reads, where all would take minutes.
    """

    title: str
    module: str
    loader: str = "Loader"
    data: str = ""
    writing: Mapping[str, Any] = {}
    reading: Mapping[str, Any] = {}
    peer: bool = True
    compressed: bool = False
    per_sample: bool = False
    one_epoch: bool = False
    resumes: bool = False
    shuffle: str = "all rows"
    labels_rows: int | None = None


BUFFERED = "files, then a buffer"
ZSTD = {"compression": "zstd"}
CONTENDERS = {
    "ours": Contender(
        "softlabels",
        "ours",
        peer=False,
        compressed=True,
        resumes=True,
        shuffle="row groups, then a window",
    ),
    "ours-once": Contender(
        "softlabels, no cache",
        "ours",
        data="ours",
        reading={"cached": False},
        peer=False,
        compressed=True,
        one_epoch=True,
        shuffle="row groups, then a window",
    ),
    "arrays": Contender("memory-mapped arrays (the limit)", "arrays", peer=False),
    "parquet-ours": Contender(
        "pyarrow, softlabels' files",
        "parquet",
        writing={"defaults": False},
        peer=False,
        compressed=True,
        shuffle="row groups, then a window",
    ),
    "parquet": Contender(
        "pyarrow, its default settings",
        "parquet",
        peer=False,
        compressed=True,
        shuffle="row groups, then a window",
    ),
    "mosaic": Contender(
        "MosaicML Streaming, zstd",
        "mosaic",
        writing=ZSTD,
        compressed=True,
        per_sample=True,
        resumes=True,
        shuffle="shards, then a block",
        labels_rows=100_000,
    ),
    "lit": Contender(
        "litdata",
        "lit",
        per_sample=True,
        resumes=True,
        shuffle="chunks, then within",
        labels_rows=100_000,
    ),
    "lit-zstd": Contender(
        "litdata, zstd",
        "lit",
        writing=ZSTD,
        compressed=True,
        per_sample=True,
        resumes=True,
        shuffle="chunks, then within",
        labels_rows=100_000,
    ),
    "hf": Contender("HF datasets, by row", "hf", data="hf", per_sample=True),
    "hf-arrow": Contender("HF datasets, Arrow by hand", "hf", "ArrowLoader", data="hf"),
    "hf-stream": Contender(
        "HF datasets, iterable",
        "hf",
        "StreamLoader",
        data="hf",
        per_sample=True,
        resumes=True,
        shuffle=BUFFERED,
        labels_rows=100_000,
    ),
    "tar": Contender("WebDataset", "tar", per_sample=True, shuffle=BUFFERED, labels_rows=100_000),
    "lance": Contender("Lance", "lances"),
}
