"""A student's machine: `softlabels[student]`, a copied plan and table, and nothing else."""

import json
import os
import re
import shutil
import subprocess
import venv
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from softlabels.query.mix import Recipe, mix
from softlabels.query.recipe import Source
from tests.tables import make_table

ROOT = Path(__file__).parents[2]
ABSENT = ("duckdb", "polars", "deltalake", "transformers", "pandas", "matplotlib", "s3fs")

STUDENT = """
import numpy as np, torch

class Linear(torch.nn.Linear):
    def __init__(self): super().__init__(4, 10)

def decode(columns):
    buffers = b"".join(columns["features"].to_pylist())
    return torch.from_numpy(np.frombuffer(buffers, np.float32).reshape(-1, 4).copy())
"""

RUN = """
plan: plan.parquet
out: run
student: {module: "student.py:Linear"}
inputs: {decode: "student.py:decode", columns: [features]}
steps: 20
batch_size: 32
evaluate: {plan: plan.parquet}
"""


def requirements(
    name: str, extras: frozenset[str], found: dict[str, metadata.Distribution]
) -> None:
    """Adds a distribution and all that it needs on this machine to `found`."""
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return
    if name in found and not extras:
        return
    found[name] = distribution
    for text in distribution.requires or ():
        from packaging.requirements import Requirement

        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": e}) for e in extras or {""}):
            requirements(requirement.name, frozenset(requirement.extras), found)


def copy_installation(target: Path) -> None:
    """Links the student extra's packages, as pip resolves them, into another site-packages."""
    found: dict[str, metadata.Distribution] = {}
    requirements("softlabels", frozenset({"student"}), found)
    for name, distribution in found.items():
        if name == "softlabels":
            (target / "softlabels").symlink_to(ROOT / "softlabels")
        tops = {Path(file).parts[0] for file in distribution.files or ()}
        for top in sorted(tops - {"..", "__pycache__"}):
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and not (target / top).exists() and source.suffix != ".pth":
                (target / top).symlink_to(source)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder with a plan made elsewhere, its table copied beside it, and the student's code."""
    values = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    features = pa.array([row.tobytes() for row in values], pa.binary())
    make_table(tmp_path / "elsewhere" / "labels", carried={"features": features})
    source = Source(table=str(tmp_path / "elsewhere" / "labels"))
    mix(Recipe(sources={"labels": source})).write(tmp_path / "elsewhere" / "plan.parquet")
    here = tmp_path / "here"
    shutil.copytree(tmp_path / "elsewhere", here)
    shutil.rmtree(tmp_path / "elsewhere")
    shutil.rmtree(here / "labels" / "_delta_log")  # no log is needed to train
    (here / "student.py").write_text(STUDENT)
    (here / "run.yaml").write_text(RUN)
    return here


def train_and_evaluate(python: Path, machine: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(
            [str(python), *command], cwd=machine, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    present = f"import importlib.util as u; print([n for n in {ABSENT} if u.find_spec(n)])"
    assert run("-c", present) == "[]\n"
    run("-m", "softlabels", "train", "run.yaml")
    record = json.loads((machine / "run" / "student.json").read_text())
    assert record["steps"] == 20
    found = json.loads(
        run("-m", "softlabels", "evaluate", "run", "--plan", "plan.parquet", "--json")
    )
    assert found["student"]["rows"] == 300
    assert re.search("fingerprint", run("-m", "softlabels", "plan", "show", "plan.parquet"))


def test_trains_and_evaluates_with_the_student_extra_alone(machine: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    copy_installation(site)
    train_and_evaluate(tmp_path / "env" / "bin" / "python", machine)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trains_and_evaluates_after_pip_install(machine: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "-c", "constraints.txt"]
    subprocess.run([*install, ".[student]"], cwd=ROOT, check=True)
    train_and_evaluate(python, machine)
