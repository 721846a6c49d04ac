"""The nightly job of pipelines/nightly/ in a folder of its own, with small days."""

from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

from pipelines.nightly.make_days import FIRST, write_day
from pipelines.nightly.night import Night, night_of
from pipelines.nightly.spec import NightSpec

HERE = Path("pipelines/nightly")
ROWS = 100
AGAIN = ROWS // 20
DAYS = tuple((FIRST + timedelta(days=number)).isoformat() for number in range(3))


@dataclass(frozen=True)
class Place:
    """Where a job is: its spec and the folders that it names."""

    folder: Path

    @property
    def spec(self) -> str:
        return str(self.folder / "nightly.yaml")

    @property
    def table(self) -> str:
        return str(self.folder / "labels")

    def plan(self, day: str) -> Path:
        return self.folder / "plans" / f"plan-{day}.parquet"

    def partition(self, day: str) -> Path:
        return self.folder / "images" / f"day={day}"

    def night(self, day: str) -> Night:
        return night_of(NightSpec.read(self.spec), date.fromisoformat(day))

    def change(self, name: str, old: str, new: str) -> None:
        """Replaces text in one of the three files."""
        file = self.folder / name
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))


def make_place(folder: Path, days: int = 3) -> Place:
    """The committed specs, led into `folder`, and partitions of ROWS images in 50-row units.

    The working folder must be the checkout's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("nightly.yaml", "capture.yaml", "mix.yaml"):
        text = (HERE / name).read_text()
        text = text.replace("out/nightly", str(folder)).replace("pipelines/nightly", str(folder))
        (folder / name).write_text(text.replace("shard_rows: 500", "shard_rows: 50"))
    for number in range(days):
        write_day(folder / "images", number, ROWS)
    return Place(folder)
