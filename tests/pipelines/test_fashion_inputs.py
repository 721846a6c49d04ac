"""The Fashion-MNIST inputs: decoding, the committed files, the teacher's weights."""

import ast
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from pipelines.fashion import make_data
from pipelines.fashion.inputs import CLASSES, MEAN, PIXELS, STD, decode
from pipelines.fashion.student import MLPStudent
from pipelines.fashion.teacher import ConvTeacher

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "data" / "fashion"


def some_images(rows: int) -> tuple[np.ndarray, pa.Array]:
    """Random images as uint8 [rows, 784] and as an Arrow binary array."""
    pixels = np.random.default_rng(0).integers(0, 256, (rows, PIXELS), dtype=np.uint8)
    return pixels, pa.array([row.tobytes() for row in pixels], pa.binary())


def reference(pixels: np.ndarray) -> torch.Tensor:
    """The documented normalisation in float64."""
    return torch.from_numpy((pixels / 255 - MEAN) / STD).reshape(-1, 1, 28, 28)


def committed(split: str) -> pa.Table:
    return pq.ParquetFile(FOLDER / f"{split}.parquet", page_checksum_verification=True).read()


def test_decode_returns_the_documented_values() -> None:
    pixels, column = some_images(7)
    images = decode({"image": column, "label": pa.array(range(7))})
    assert images.dtype == torch.float32
    assert images.shape == (7, 1, 28, 28)
    torch.testing.assert_close(images.double(), reference(pixels), atol=1e-6, rtol=0)


def test_decode_keeps_rows_row_major() -> None:
    pixels = np.zeros((1, PIXELS), np.uint8)
    pixels[0, 2 * 28 + 5] = 255
    images = decode({"image": pa.array([pixels.tobytes()], pa.binary())})
    assert images[0, 0].argmax().item() == 2 * 28 + 5
    assert images[0, 0, 2, 5].item() == pytest.approx((1 - MEAN) / STD, abs=1e-6)


@pytest.mark.parametrize("arrow_type", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize(("offset", "rows"), [(0, 3), (2, 4), (6, 1), (3, 0), (7, 0)])
def test_decode_of_a_slice_is_the_slice_of_decode(
    arrow_type: pa.DataType, offset: int, rows: int
) -> None:
    pixels, column = some_images(7)
    part = column.cast(arrow_type).slice(offset, rows)
    expected = reference(pixels[offset : offset + rows])
    torch.testing.assert_close(decode({"image": part}).double(), expected, atol=1e-6, rtol=0)


def test_decode_of_a_slice_of_a_slice() -> None:
    pixels, column = some_images(9)
    part = column.slice(2, 6).slice(1, 3)
    expected = reference(pixels[3:6])
    torch.testing.assert_close(decode({"image": part}).double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("empty", [pa.array([], pa.binary()), pa.nulls(0, pa.binary())])
def test_decode_of_no_rows_is_an_empty_batch(empty: pa.Array) -> None:
    assert decode({"image": empty}).shape == (0, 1, 28, 28)


def test_decode_result_can_be_changed_in_place() -> None:
    pixels, column = some_images(2)
    decode({"image": column}).zero_()
    torch.testing.assert_close(
        decode({"image": column}).double(), reference(pixels), atol=1e-6, rtol=0
    )


def test_decode_refuses_a_null_only_where_it_is_in_the_slice() -> None:
    _, column = some_images(3)
    with_null = pa.concat_arrays([column, pa.nulls(1, pa.binary()), column])
    with pytest.raises(ValueError, match="expected no nulls, found 1"):
        decode({"image": with_null})
    assert decode({"image": with_null.slice(4, 3)}).shape == (3, 1, 28, 28)


@pytest.mark.parametrize("size", [0, 783, 785])
def test_decode_refuses_an_image_of_another_size_and_names_the_row(size: int) -> None:
    _, column = some_images(3)
    wrong = pa.concat_arrays([column, pa.array([b"\0" * size], pa.binary())])
    with pytest.raises(ValueError, match=f"expected 784 bytes.*found {size} in row 2"):
        decode({"image": wrong.slice(1)})


def test_decode_refuses_lengths_that_only_add_up() -> None:
    pair = pa.array([b"\0" * 783, b"\0" * 785], pa.binary())
    with pytest.raises(ValueError, match="found 783 in row 0"):
        decode({"image": pair})


def test_decode_refuses_another_type_and_a_missing_column() -> None:
    with pytest.raises(ValueError, match="expected binary values, found 'string'"):
        decode({"image": pa.array(["a"])})
    with pytest.raises(ValueError, match=r"expected a column 'image', found \['label'\]"):
        decode({"label": pa.array([1])})


@pytest.mark.parametrize(
    ("split", "rows", "fewest", "most"),
    [("train", 15_000, 1_350, 1_650), ("test", 10_000, 1_000, 1_000)],
)
def test_committed_rows_are_counted_typed_unique_and_balanced(
    split: str, rows: int, fewest: int, most: int
) -> None:
    table = committed(split)
    assert table.num_rows == rows
    assert [(field.name, str(field.type), field.nullable) for field in table.schema] == [
        ("example_id", "string", False),
        ("image", "binary", False),
        ("label", "int32", False),
        ("part", "string", False),
    ]
    assert tuple(json.loads(table.schema.metadata[b"classes"])) == CLASSES
    ids = table["example_id"].to_pylist()
    assert len(set(ids)) == rows
    assert all(one.startswith(f"{split}-") and len(one) == len(split) + 6 for one in ids)
    counts = Counter(table["label"].to_pylist())
    assert sorted(counts) == list(range(len(CLASSES)))
    assert fewest <= min(counts.values()) <= max(counts.values()) <= most


def test_no_image_occurs_twice_within_or_between_the_committed_files() -> None:
    images = committed("train")["image"].to_pylist() + committed("test")["image"].to_pylist()
    assert len(set(images)) == 25_000


def test_the_first_rows_of_the_training_file_hold_every_class() -> None:
    counts = Counter(committed("train")["label"].to_pylist()[:300])
    assert len(counts) == 10
    assert min(counts.values()) >= 15


def test_committed_training_rows_are_the_first_of_the_documented_order() -> None:
    expected = make_data.shuffled_indices(60_000)[: make_data.TRAIN_ROWS]
    ids = committed("train")["example_id"].to_pylist()
    assert ids == [f"train-{index:05d}" for index in expected]


def test_a_table_written_twice_has_the_same_bytes(tmp_path: Path) -> None:
    pixels, _ = some_images(5)
    labels = np.arange(5, dtype=np.int32)
    table = make_data.as_table("test", np.arange(5), pixels, labels, ["test"] * 5)
    make_data.write(table, tmp_path / "a")
    make_data.write(table, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_shared_image_is_refused_before_anything_is_written() -> None:
    pixels, _ = some_images(4)
    make_data.refuse_shared_images(pixels[:2], pixels[2:])
    with pytest.raises(ValueError, match="found 1 copies in 5"):
        make_data.refuse_shared_images(pixels[:3], pixels[2:])


def test_teacher_weights_load_strictly_and_score_as_recorded() -> None:
    teacher = ConvTeacher()
    teacher.load_state_dict(load_file(FOLDER / "teacher.safetensors"), strict=True)
    teacher.eval()
    table = committed("test").slice(0, 5_000).combine_chunks()
    images = decode({"image": table["image"].chunk(0)})
    with torch.inference_mode():
        top1 = torch.cat([teacher(batch).argmax(1) for batch in torch.split(images, 500)])
    accuracy = (top1.numpy() == table["label"].to_numpy()).mean()
    recorded = json.loads((FOLDER / "teacher.json").read_text(encoding="utf-8"))
    assert accuracy >= 0.91
    assert recorded["metrics"]["test"]["accuracy"] == pytest.approx(accuracy, abs=0.01)
    assert recorded["parameters"] == sum(value.numel() for value in teacher.parameters())


def test_the_student_is_at_least_five_times_smaller_and_imports_no_teacher() -> None:
    student, teacher = MLPStudent(), ConvTeacher()
    assert student(torch.zeros(2, 1, 28, 28)).shape == teacher(torch.zeros(2, 1, 28, 28)).shape
    sizes = [sum(value.numel() for value in model.parameters()) for model in (student, teacher)]
    assert 5 * sizes[0] <= sizes[1]
    for name in ("student", "teacher"):
        tree = ast.parse((ROOT / "pipelines" / "fashion" / f"{name}.py").read_text())
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {module for module in modules if module and module.startswith("pipelines")}


def test_the_committed_inputs_fit_their_budget() -> None:
    names = ("test.parquet", "train.parquet", "teacher.safetensors", "teacher.json")
    sizes = {name: (FOLDER / name).stat().st_size for name in names}
    assert sum(sizes.values()) <= 12_000_000, sizes
    assert "Zalando SE" in (FOLDER / "LICENSE-fashion-mnist.txt").read_text(encoding="utf-8")


def test_the_last_committed_training_rows_are_kept_for_choosing() -> None:
    parts = committed("train")["part"].to_pylist()
    assert parts == ["train"] * 12_000 + ["validation"] * 3_000
    assert set(committed("test")["part"].to_pylist()) == {"test"}
