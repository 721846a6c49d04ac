"""What storing SmolLM2's labels costs and loses, at several k, profiles and draws.

    python -m pipelines.smollm2.stats

Captures the held-out pages once (128 ids, 128 draws, profile precise: some minutes) and puts what
`softlabels stats` says of that table into README.md.
"""

import subprocess
import sys
from pathlib import Path

from pipelines.readme import put, require_place
from pipelines.smollm2.teacher import teacher_folder

SPEC = "pipelines/smollm2/capture-stats.yaml"
OUT = Path("out/stats-lm")


def main() -> None:
    """Captures what is not there yet, measures, and writes README's table."""
    require_place("stats-lm")
    teacher_folder()
    table, found = f"{OUT}/labels", OUT / "stats.md"
    for command in (
        ("capture", SPEC),
        ("verify", table),
        ("stats", table, "-o", str(found), "--force"),
    ):
        print("$ softlabels", *command, flush=True)
        subprocess.run([sys.executable, "-m", "softlabels", *command], check=True)
    put("stats-lm", found.read_text().replace(f"{Path.cwd()}/", ""))


if __name__ == "__main__":
    main()
