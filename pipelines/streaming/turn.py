"""One turn of one contender, in a process of its own: its figures as JSON on the last line.

python -m pipelines.streaming.turn prepare mosaic lm out/bench-stream 1536
python -m pipelines.streaming.turn read mosaic lm out/bench-stream 1536
"""

import argparse
import collections
import functools
import gc
import importlib
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipelines.streaming.cases import CASES, EXAMPLE_ID, Batch, Case, Loader, Resumable, load_source
from pipelines.streaming.contenders import CONTENDERS, Contender

EPOCHS = {"lm": 3, "labels": 2, "payload": 2}
WARM_ROWS = 64
WRITTEN = ".bytes"
"""The file that says, once all others are written, how large they are."""


def main() -> None:
    """Does the turn that the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("prepare", "read", "resume"))
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", type=int)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    contender = CONTENDERS[asked.contender]
    case = CASES[asked.case]._replace(rows=asked.rows)
    place = data_folder(asked.folder, asked.contender, case)
    warm = case._replace(rows=WARM_ROWS)
    module = importlib.import_module(f"pipelines.streaming.{contender.module}")
    loader = getattr(module, contender.loader)
    with tempfile.TemporaryDirectory(dir=asked.folder, ignore_cleanup_errors=True) as scratch:
        opened = functools.partial(
            loader, place, case, Path(scratch) / "cache", **contender.reading
        )
        if asked.what == "prepare":
            found = {}
            for one in (warm, case):
                source = asked.folder / source_name(one)
                folder = data_folder(asked.folder, asked.contender, one)
                found = write(module, contender, folder, source, one)
            found |= check(opened())
        else:
            small = data_folder(asked.folder, asked.contender, warm)
            warm_up(loader(small, warm, Path(scratch) / "warm", **contender.reading))
            found = (
                read(opened, contender, case)
                if asked.what == "read"
                else resume(opened, rows_of(contender, case))
            )
    print(json.dumps(found))


def source_name(case: Case) -> str:
    """The folder of the case's source."""
    return f"{case.name}-{case.rows}"


def data_folder(folder: Path, name: str, case: Case) -> Path:
    """Where the contender's files are."""
    return folder / f"{source_name(case)}-{CONTENDERS[name].data or name}"


def rows_of(contender: Contender, case: Case) -> int:
    """Rows that the contender stores and reads."""
    most = contender.labels_rows if case.name == "labels" else None
    return min(case.rows, most or case.rows)


def write(module: Any, contender: Contender, place: Path, data: Path, case: Case) -> dict[str, Any]:
    """Writes the contender's files unless they are there: their bytes a row."""
    rows = rows_of(contender, case)
    if not (place / WRITTEN).exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        source = load_source(data / "source", case, rows)
        module.write(source, place, case, data, **contender.writing)
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        (place / WRITTEN).write_text(str(size))
    return {"bytes": int((place / WRITTEN).read_text()) / rows}


def read(make: Callable[[], Loader], contender: Contender, case: Case) -> dict[str, Any]:
    """Figures of each epoch, the first one from opening the data set on; memory at the peak."""
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    epochs = []
    marks = [mark()]
    loader = make()
    first_batch = 0.0
    for number in range(1 if contender.one_epoch else EPOCHS[case.name]):
        rows = 0
        for batch in loader.epoch(number):
            rows += len(batch["tail"])
            if not first_batch:
                first_batch = time.perf_counter() - marks[0][1]
        marks.append(mark())
        (cpu, wall), (cpu_before, wall_before) = marks[-1], marks[-2]
        epochs.append({"rows": rows, "cpu": cpu - cpu_before, "wall": wall - wall_before})
    return {"epochs": epochs, "first_batch": first_batch, "memory": memory("VmHWM") - before}


def resume(make: Callable[[], Resumable], rows: int) -> dict[str, Any]:
    """Stops in mid-epoch and goes on: seconds to the first batch, bytes of the state, rows seen."""
    stopped, seen = make(), collections.Counter[str]()
    for batch in stopped.epoch(0):
        seen.update(keys_of(batch))
        if seen.total() >= rows // 2:
            break
    state = stopped.state()
    del stopped, batch
    gc.collect()
    start = time.perf_counter()
    left = make().resume(state)
    seen.update(keys_of(next(left)))
    seconds = time.perf_counter() - start
    for batch in left:
        seen.update(keys_of(batch))
    size = len(json.dumps(state, default=str))
    return {"seconds": seconds, "state": size, "rows": seen.total(), "distinct": len(seen)}


def keys_of(batch: Batch) -> list[str]:
    """The ids of a batch, in whichever form the library has them."""
    return [key.decode() if isinstance(key, bytes) else str(key) for key in batch[EXAMPLE_ID]]


def warm_up(loader: Loader) -> None:
    """Reads a few rows, so that what libraries load late is loaded: no first pass pays for it."""
    for _ in loader.epoch(0):
        pass
    del loader
    gc.collect()


def mark() -> tuple[float, float]:
    """CPU seconds of this process and those it has started and ended, and wall seconds."""
    both = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in both), time.perf_counter()


def memory(entry: str) -> int:
    """Bytes that the system counts for this process. Linux."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{entry}:")[2].split()[0]) * 1_024


def check(loader: Loader) -> dict[str, Any]:
    """What an epoch holds, however it is ordered: rows, distinct ids, and sums of every field."""
    rows, keys = 0, set[str]()
    sums: dict[str, float] = {}
    shapes: dict[str, str] = {}
    for batch in loader.epoch(0):
        rows += len(batch["tail"])
        keys |= set(keys_of(batch))
        for name, values in batch.items():
            if name != EXAMPLE_ID:
                sums[name] = sums.get(name, 0.0) + values.double().sum().item()
                shapes.setdefault(name, f"{values.dtype} {tuple(values.shape)}")
    return {
        "rows": rows,
        "distinct": len(keys),
        "sums": dict(sorted(sums.items())),
        "shapes": shapes,
    }


if __name__ == "__main__":
    main()
