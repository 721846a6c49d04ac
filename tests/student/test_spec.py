from pathlib import Path

import pytest

from softlabels.errors import BadInputError
from softlabels.student.spec import OptimizerSpec, RunSpec

YAML = """
plan: train.plan.parquet
out: run
student: {module: "tests.student.problem:Linear", arguments: {classes: 6}}
inputs: {decode: "tests.student.problem:decode", columns: [features]}
loss: {tail: bucket, temperature: 1.0, kd_weight: 1.0}
optimizer: {name: adamw, lr: 3.0e-3, weight_decay: 0.01, schedule: cosine, clip_norm: 1.0}
steps: 600
evaluate: {plan: test.plan.parquet, every: 100}
checkpoint: {every: 200, keep: 2}
"""


def write(folder: Path, text: str = YAML) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_read_and_changes(tmp_path: Path) -> None:
    spec = RunSpec.read(write(tmp_path), ["loss.kd_weight=0", "optimizer.lr=1e-2", "threads=2"])
    assert spec.loss.kd_weight == 0
    assert spec.optimizer == OptimizerSpec(lr=1e-2)
    assert spec.student is not None
    assert dict(spec.student.arguments) == {"classes": 6}
    assert spec.inputs.columns == ("features",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'; did you mean 'lr'"),
        ("los.tail=bucket", "unknown key 'los'; did you mean 'loss'"),
        ("epochs=3", "exactly one of steps and epochs, found steps 600 and epochs 3"),
        ("steps=null", "exactly one of steps and epochs, found steps None and epochs None"),
        ("optimizer.lr=.nan", "optimizer.lr"),
        ("optimizer.lr=0", "greater than 0"),
        ("optimizer.lr=1e40", "less than or equal to 10000"),
        ("loss.kd_weight=1.5", "loss.kd_weight"),
        ("loss.temperature=.inf", "loss.temperature"),
        ("loss.tail=drop", "loss.tail"),
        ("checkpoint.keep=0", "checkpoint.keep"),
        ("batch_size=0", "batch_size"),
        ("out=s3://bucket/run", "expected a local folder, found 's3://bucket/run'"),
    ],
)
def test_refused_in_one_line(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(BadInputError) as caught:
        RunSpec.read(write(tmp_path), [change])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_plan_key(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="key 'plan' is missing"):
        RunSpec.read(write(tmp_path, "out: run\nsteps: 1\n"))


@pytest.mark.parametrize(
    "change",
    [
        "plan=elsewhere.parquet",
        "out=other",
        "roots={labels: /elsewhere}",
        "device=cpu",
        "threads=4",
        "log_every=1",
        "checkpoint.every=7",
        "evaluate.every=7",
        "evaluate=null",
    ],
)
def test_places_and_cadence_are_not_identity(tmp_path: Path, change: str) -> None:
    path = write(tmp_path)
    assert RunSpec.read(path, [change]).fingerprint() == RunSpec.read(path).fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "steps=601",
        "batch_size=65",
        "optimizer.lr=0.004",
        "loss.kd_weight=0",
        "student.arguments.classes=7",
        "inputs.columns=[image]",
        "classes=[a, b]",
    ],
)
def test_what_decides_weights_is_identity(tmp_path: Path, change: str) -> None:
    path = write(tmp_path)
    assert RunSpec.read(path, [change]).fingerprint() != RunSpec.read(path).fingerprint()


def test_fingerprint_is_pinned(tmp_path: Path) -> None:
    # Another digest would refuse every run that was begun before.
    spec = RunSpec(plan="p", out="o", steps=1)
    assert spec.fingerprint() == (
        "8046f2844150df8d926740bd7398264039ca525a69890d99ed0a45c4458a5c3f"
    )
