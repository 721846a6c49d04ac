"""Reads hostile files one after the other, in little memory; says how each ended. A line a file.

python -m tests.faults.hostile CASES.jsonl, lines of {"kind": …, "path": …}.
"""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from softlabels.errors import SoftLabelsError
from softlabels.plan import Plan
from softlabels.query.recipe import Recipe
from softlabels.storage import open_root
from softlabels.store.inspect import verify
from softlabels.store.shards import bytes_by_column, open_shard, read_row_groups
from softlabels.store.table import Table
from softlabels.store.tags import read_tag
from softlabels.student import checkpoint
from softlabels.student.batch import label_space
from softlabels.student.saved import read_result
from softlabels.student.sequences import padded
from softlabels.student.spec import RunSpec
from softlabels.student.stream import Stream
from softlabels.student.tokens import tokenizer_sha256
from softlabels.teacher.documents import Skipped, open_documents
from softlabels.teacher.models import load_weights
from softlabels.teacher.recorded.files import open_files
from softlabels.teacher.recorded.spec import ImportSpec
from softlabels.teacher.source import open_source
from softlabels.teacher.spec import TextSpec, read_capture

SECONDS = 20
MEMORY = 500 << 20


def _plan(path: str) -> None:
    plan = Plan.read(path)
    space = label_space(plan, "the plan")
    columns = ["input_ids", "position_index", "segment_ids"] if space.alignment else []
    for batch in Stream(plan, batch_size=8, epochs=1, columns=columns):
        batch.targets.check(batch.example_ids.to_pylist(), space.num_classes)
        if space.alignment:
            padded(batch, space.num_classes, space.alignment)


def _source(path: str) -> None:
    source = open_source(path, ["a"])
    for batch in source.batches(0, source.num_rows, ["a"]):
        batch.nbytes  # noqa: B018 - whoever labels looks whether text is UTF-8


def _documents(path: str) -> None:
    skipped = Skipped()
    carry = ["n"] if path.endswith(".jsonl") else []
    for document in open_documents(TextSpec(files=path, text="a"), carry).documents(skipped):
        assert document is None or document.value
    if skipped.counts:
        raise SoftLabelsError(str(skipped))


def _records(path: str) -> None:
    for record in open_files(path, "axolotl").records():
        if record.broken:
            raise SoftLabelsError(str(record.broken))


def _shard(path: str) -> None:
    opened = open_shard(open_root(os.path.dirname(path)).buffer(os.path.basename(path)), path)
    bytes_by_column(opened)
    for group in range(opened.num_row_groups):
        read_row_groups(opened, path, [group])


READERS: dict[str, Callable[[str], object]] = {
    "plan": _plan,
    "shard": _shard,
    "source": _source,
    "documents": _documents,
    "records": _records,
    "recipe": Recipe.read,
    "capture spec": read_capture,
    "train spec": RunSpec.read,
    "import spec": ImportSpec.read,
    "weights": checkpoint.read_weights,
    "teacher": lambda path: load_weights(nn.Linear(2, 2), path),
    "checkpoint": lambda path: checkpoint.load(Path(path)),
    "run": lambda path: read_result(Path(path)),
    "tokenizer": tokenizer_sha256,
    "tag": lambda path: read_tag(open_root(path), "v1"),
    "table": lambda path: verify(Table.open(path)),
}


def _held(what: str) -> int:
    """Bytes of memory now (VmRSS), or the most since the peak was reset (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) << 10


def _too_long(*_: object) -> None:
    print(json.dumps({"ended": "hang"}), flush=True)
    os._exit(3)


def main() -> None:
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # what imports took for a moment does not count
    start = _held("VmRSS")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    # Threads reserve address space that they do not use: memory itself is measured.
    room = pages * os.sysconf("SC_PAGESIZE") + 2 * MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (room, hard))
    signal.signal(signal.SIGALRM, _too_long)
    for line in Path(sys.argv[1]).read_text().splitlines():
        case = json.loads(line)
        signal.alarm(SECONDS)
        began = time.monotonic()
        try:
            READERS[case["kind"]](case["path"])
            ended = "read"
        except SoftLabelsError as error:
            ended = f"refused: {str(error)[:500]}"
        except BaseException as error:
            ended = f"traceback: {type(error).__module__}.{type(error).__name__}: {error}"[:500]
        signal.alarm(0)
        seconds = round(time.monotonic() - began, 2)
        grown = (_held("VmHWM") - start) >> 20
        print(json.dumps({"ended": ended, "seconds": seconds, "grown_mb": grown}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
