"""DistillKit's bit-packed Parquet: decoded as its format defines it, or refused by name."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from softlabels.errors import BadInputError, DataError
from softlabels.store.inspect import verify
from softlabels.teacher.recorded.distillkit import Bin, Compression, decode, unpack_bits
from softlabels.teacher.recorded.report import import_recorded
from tests.teacher.recorded.recordings import (
    Teacher,
    imported,
    require_true,
    spec_of,
    write_tokenizer,
)

K = 12
D = 512
EXACT = {"d": D, "k": K, "exact_k": K, "residual_bins": [], "delta_encoding": False}
CURVE = {
    "d": D,
    "k": K,
    "exact_k": 4,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, "sqrt"],
    "residual_bins": [],
    "delta_encoding": False,
}
BINS = {
    "d": D,
    "k": K,
    "exact_k": 4,
    "polynomial_terms": [0, 1, 2],
    "residual_bins": [
        {"scale_dtype": "float16", "element_bits": 5, "num_elements": 3},
        {"scale_dtype": "float32", "element_bits": 8, "num_elements": 5},
    ],
    "delta_encoding": False,
}


def pack(numbers: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Numbers [P, n] as a stream of bits, most significant first, padded to bytes."""
    text = ["".join(format(int(x), f"0{bits}b") for x in row) for row in numbers]
    size = -(-len(text[0]) // 8) * 8
    return np.array(
        [[int(t.ljust(size, "0")[i : i + 8], 2) for i in range(0, size, 8)] for t in text], np.uint8
    )


def raw(values: torch.Tensor, dtype: str) -> np.ndarray[Any, Any]:
    """The little-endian bytes of values [P, n] in a dtype."""
    return values.to(getattr(torch, dtype)).contiguous().view(torch.uint8).numpy()


def encode(logprobs: np.ndarray[Any, Any], settings: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Falling log-probabilities [P, k] in bytes, as the format's definition says."""
    c = Compression.model_validate(settings)
    values = torch.from_numpy(logprobs).float()
    if c.delta_encoding:
        values = torch.cat([values[:, :1], values.diff(dim=1)], 1)
    parts = [raw(values[:, : c.exact_k], c.exact_dtype)] if c.exact_k else []
    rest = values[:, c.exact_k :]
    if c.polynomial_terms:
        at = torch.linspace(0, 1, rest.shape[1]) if c.normalize_t else torch.arange(rest.shape[1])
        at = at.double()
        basis = torch.stack(
            [at**t if isinstance(t, int) else getattr(at, t)() for t in c.polynomial_terms], 1
        )
        fitted = torch.linalg.lstsq(basis, rest.double().T).solution.T
        parts.append(raw(fitted, c.term_dtype))
        rest = rest - (fitted @ basis.T).float()
    begin = 0
    for b in c.residual_bins:
        part = rest[:, begin : begin + b.num_elements]
        begin += b.num_elements
        half = 1 << (b.element_bits - 1)
        scale = (part.abs().amax(1, keepdim=True) / half).to(getattr(torch, b.scale_dtype))
        scale[scale == 0] = 1
        levels = (part / scale.float()).round().clamp(-half, half - 1) + half
        parts += [raw(scale, b.scale_dtype), pack(levels.numpy(), b.element_bits)]
    return np.concatenate(parts, 1)


def tops(teacher: Teacher, tokens: list[int], k: int) -> tuple[Any, Any]:
    """Ids and logprobs [P, k] after every token but the last."""
    pairs = np.array([teacher.top(token, k) for token in tokens[:-1]])
    return pairs[:, :, 0].astype(np.int64), pairs[:, :, 1]


def write(teacher: Teacher, folder: Path, settings: dict[str, Any], seeds: int = 3) -> Any:
    """A data set as its sampler writes it, with the settings beside it."""
    schema = pa.schema(
        [
            ("input_ids", pa.list_(pa.uint64())),
            ("compressed_logprobs", pa.list_(pa.list_(pa.uint8()))),
            ("bytepacked_indices", pa.list_(pa.list_(pa.uint8()))),
        ]
    )
    rows = []
    for seed in range(seeds):
        tokens = teacher.write(30, seed)
        ids, logprobs = tops(teacher, tokens, K)
        rows.append(
            {
                "input_ids": tokens,
                "compressed_logprobs": encode(logprobs, settings).tolist(),
                "bytepacked_indices": pack(ids, 9).tolist(),
            }
        )
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "data_0.parquet")
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(settings))
    return rows


def spec(teacher: Teacher, folder: Path, **changes: Any) -> Any:
    """The import of what `write` has written."""
    files = str(folder / "*.parquet")
    return spec_of(teacher, folder, **{"layout": "distillkit", "files": files} | changes)


def test_exact_values_come_back_whole(teacher: Teacher, tmp_path: Path) -> None:
    write(teacher, tmp_path, EXACT)
    report, table, rows, _ = imported(spec(teacher, tmp_path))
    require_true(teacher, [row | {"label_logprobs": _labels(teacher, row)} for row in rows], K)
    assert report["positions"] == 3 * 29
    assert [row["position_index"] for row in rows] == [list(range(29))] * 3
    found = verify(table)
    assert found["problems"] == []
    assert found["alignment"]["verdict"] in ("right", "too few")


def _labels(teacher: Teacher, row: dict[str, Any]) -> list[float]:
    """What a label's logprob should be, where it was not recorded: those in the top are."""
    found = []
    for index, value in zip(row["position_index"], row["label_logprobs"], strict=True):
        before, label = row["input_ids"][index], row["input_ids"][index + 1]
        inside = teacher.rank(label, before) < K
        assert math.isnan(value) != inside
        found.append(value if inside else float(teacher.logprobs[before, label]))
    return found


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("delta", [False, True])
def test_decoded_values_are_within_their_bound(teacher: Teacher, dtype: str, delta: bool) -> None:
    _, logprobs = tops(teacher, teacher.write(60, 1), K)
    for settings in (EXACT, BINS, BINS | {"exact_k": 0, "residual_bins": [
        {"scale_dtype": "bfloat16", "element_bits": 7, "num_elements": 12}]},
    ):  # fmt: skip
        settings = settings | {"exact_dtype": dtype, "delta_encoding": delta}
        found = decode(encode(logprobs, settings), Compression.model_validate(settings))
        truth = np.exp(logprobs).sum(1)
        off = np.abs(np.exp(found.logprobs).sum(1) - truth)
        assert (off <= found.slack + 1e-6).all()
        assert np.isfinite(found.slack).all()
        assert np.abs(found.logprobs - logprobs).max() < (2.0 if delta else 0.6)
        if settings["exact_k"] == K and dtype in ("float32", "float64"):
            np.testing.assert_allclose(found.logprobs, logprobs, atol=1e-4 if delta else 0)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("terms", [[0, 1, "sqrt"], [0, 1, 2, 3, 4, "sqrt"], [0, "exp"]])
def test_a_curve_is_what_its_coefficients_say(
    teacher: Teacher, terms: list[Any], normalize: bool
) -> None:
    settings = CURVE | {"polynomial_terms": terms, "normalize_t": normalize}
    _, logprobs = tops(teacher, teacher.write(20, 1), K)
    packed = encode(logprobs, settings)
    compression = Compression.model_validate(settings)
    found = decode(packed, compression)
    assert packed.shape[1] == compression.value_bytes == 8 + 4 * len(terms)
    coefficients = packed[:, 8:].copy().view("<f4").astype(np.float64)
    at = np.linspace(0, 1, 8) if normalize else np.arange(8.0)
    named = {"sqrt": np.sqrt, "exp": np.exp}
    basis = [at**t if isinstance(t, int) else named[t](at) for t in terms]
    truth = coefficients @ np.array(basis)
    np.testing.assert_allclose(found.logprobs[:, 4:], truth, atol=2e-4)
    halves = torch.from_numpy(logprobs[:, :4]).float().bfloat16().double().numpy()
    np.testing.assert_array_equal(found.logprobs[:, :4], halves)
    # What the curve misses is nowhere written.
    assert np.isnan(found.slack).all()


def test_a_single_bit_has_two_values() -> None:
    single = Bin(scale_dtype="float32", element_bits=1, num_elements=4)
    settings = Compression(d=8, k=4, exact_k=0, residual_bins=(single,), delta_encoding=False)
    packed = np.concatenate([np.array([[0.5]], "<f4").view(np.uint8), [[0b01100000]]], 1)
    found = decode(packed.astype(np.uint8), settings)
    assert found.logprobs.tolist() == [[-0.5, 0.5, 0.5, -0.5]]


@pytest.mark.parametrize("bits", [1, 7, 9, 16, 17, 20])
def test_bits_round_trip(bits: int) -> None:
    numbers = np.random.default_rng(bits).integers(0, 1 << bits, (5, 13))
    assert np.array_equal(unpack_bits(pack(numbers, bits), bits, 13), numbers)


def test_a_curve_without_residuals_has_no_tail_unless_its_error_is_given(
    teacher: Teacher, tmp_path: Path
) -> None:
    write(teacher, tmp_path, CURVE)
    with pytest.raises(DataError, match=r"tail is 'derived'.*expected tail: unknown, or tail_err"):
        import_recorded(spec(teacher, tmp_path))
    _, _, _, targets = imported(
        spec(teacher, tmp_path, tail="unknown", on_bad="skip", table=str(tmp_path / "a"))
    )
    assert targets.tail is None
    report, table, _, targets = imported(spec(teacher, tmp_path, tail_error=0.2))
    assert report["recorded"]["tail_error"] == pytest.approx(0.2)
    assert targets.tail is not None
    assert verify(table)["problems"] == []


def test_bins_bound_the_tail(teacher: Teacher, tmp_path: Path) -> None:
    write(teacher, tmp_path, BINS)
    report, table, _, targets = imported(spec(teacher, tmp_path, on_bad="skip"))
    assert 1e-3 < report["recorded"]["tail_error"] < 0.5
    assert verify(table)["problems"] == []
    assert targets.tail is not None


def test_the_sampler_s_padding_token_is_no_label(teacher: Teacher, tmp_path: Path) -> None:
    rows = write(teacher, tmp_path, EXACT, seeds=1)
    rows[0]["input_ids"][-1] = 0  # <|endoftext|>, which pads where nothing else does
    table = pq.read_table(tmp_path / "data_0.parquet")
    pq.write_table(pa.Table.from_pylist(rows, table.schema), tmp_path / "data_0.parquet")
    found = imported(spec(teacher, tmp_path))[2][0]
    assert found["label_ids"][-1] == -1
    assert found["label_ids"][:-1] == found["input_ids"][1:-1]
    assert found["position_index"][-1] == 28


def test_a_padding_token_of_id_0_is_one(teacher: Teacher, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer")
    place = folder / "tokenizer_config.json"
    config = json.loads(place.read_text())
    config |= {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    place.write_text(json.dumps(config))
    rows = write(teacher, tmp_path, EXACT, seeds=1)
    rows[0]["input_ids"][-1] = 0
    table = pq.read_table(tmp_path / "data_0.parquet")
    pq.write_table(pa.Table.from_pylist(rows, table.schema), tmp_path / "data_0.parquet")
    found = imported(spec(teacher, tmp_path, tokenizer=str(folder)))[2][0]
    assert found["label_ids"][-1] == -1


def test_plain_top_values(teacher: Teacher, tmp_path: Path) -> None:
    tokens = teacher.write(30, 2)
    ids, logprobs = tops(teacher, tokens, K)
    row = {"input_ids": tokens, "token_ids": ids.tolist(), "top_values": logprobs.tolist()}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    rows = imported(spec(teacher, tmp_path))[2]
    assert np.array(rows[0]["topk_ids"]).reshape(-1, K).tolist() == ids.tolist()


def test_what_cannot_be_read_exactly_is_refused_by_name(teacher: Teacher, tmp_path: Path) -> None:
    legacy = {
        "input_ids": [3, 4],
        "packed_indices": [[1]],
        "exact_values": [[0.5]],
        "coeffs": [[1.0]],
    }
    pq.write_table(pa.Table.from_pylist([legacy]), tmp_path / "x.parquet")
    (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(EXACT))
    with pytest.raises(DataError, match="legacy logit compression: it keeps centred logits"):
        import_recorded(spec(teacher, tmp_path))


def test_settings_that_do_not_fit(teacher: Teacher, tmp_path: Path) -> None:
    write(teacher, tmp_path, EXACT)
    shorter = EXACT | {"exact_k": 11, "polynomial_terms": [0], "term_dtype": "float16"}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(shorter))
    with pytest.raises(DataError, match="expected 46 bytes a position, found 48"):
        import_recorded(spec(teacher, tmp_path, compression=str(tmp_path / "other.yaml")))
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(EXACT | {"d": 64}))
    with pytest.raises(BadInputError, match="for d 64 ids, the tokenizer has 290"):
        import_recorded(spec(teacher, tmp_path, compression=str(tmp_path / "other.yaml")))
    (tmp_path / "compression_config.yaml").write_text("k: [")
    with pytest.raises(BadInputError, match=r"'compression_config.yaml' cannot be read"):
        import_recorded(spec(teacher, tmp_path))
    (tmp_path / "compression_config.yaml").unlink()
    with pytest.raises(BadInputError, match=r"there is no 'compression_config.yaml' beside"):
        import_recorded(spec(teacher, tmp_path))


def test_other_settings_are_another_run(teacher: Teacher, tmp_path: Path) -> None:
    write(teacher, tmp_path, EXACT)
    settings = spec(teacher, tmp_path)
    first = import_recorded(settings)
    (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(EXACT | {"d": 511}))
    assert import_recorded(settings)["run_id"] != first["run_id"]
    (tmp_path / "elsewhere.yaml").write_text(yaml.safe_dump(EXACT))
    moved = spec(teacher, tmp_path, compression=str(tmp_path / "elsewhere.yaml"), on_bad="skip")
    assert import_recorded(moved)["run_id"] == first["run_id"]


def test_a_row_cut_short(teacher: Teacher, tmp_path: Path) -> None:
    rows = write(teacher, tmp_path, EXACT)
    schema = pq.read_schema(tmp_path / "data_0.parquet")
    rows[1]["input_ids"] = rows[1]["input_ids"][:-1]
    rows[2]["compressed_logprobs"][3] = rows[2]["compressed_logprobs"][3][:-1]
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "data_0.parquet")
    report = import_recorded(spec(teacher, tmp_path, on_bad="skip"))
    assert report["rows"] == 1
    assert report["skipped"] == {
        "record whose logprobs differ in length": 1,
        "record whose positions differ in length": 1,
    }
    data = (tmp_path / "data_0.parquet").read_bytes()
    (tmp_path / "data_0.parquet").write_bytes(data[:-200])
    with pytest.raises(DataError, match=r"'data_0.parquet' is no whole Parquet file"):
        import_recorded(spec(teacher, tmp_path))


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("token_ids", [[-1] * K] * 29, "record whose token_ids holds no token id"),
        ("token_ids", [[2**40] * K] * 29, "record whose token_ids holds no token id"),
        ("token_ids", [["a"] * K] * 29, "record whose token_ids holds no token id"),
        ("token_ids", [["a", None] * (K // 2)] * 29, "record whose token_ids holds no token id"),
        ("top_values", [["a"] * K] * 29, "record whose top_values hold no numbers"),
        ("top_values", [[None] * K] * 29, "record whose top_values hold no numbers"),
    ],
)
def test_values_that_are_none_are_a_bad_record(
    teacher: Teacher, tmp_path: Path, column: str, value: Any, reason: str
) -> None:
    tokens = teacher.write(30, 2)
    ids, logprobs = tops(teacher, tokens, K)
    good = {"input_ids": tokens, "token_ids": ids.tolist(), "top_values": logprobs.tolist()}
    for name, row in (("a", good), ("b", good | {column: value})):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"{name}.parquet")
    report = imported(spec(teacher, tmp_path, on_bad="skip"))[0]
    assert (report["rows"], report["skipped"]) == (1, {reason: 1})


@pytest.mark.parametrize("column", ["bytepacked_indices", "compressed_logprobs"])
@pytest.mark.parametrize("wrong", [300, -1])
def test_packed_values_that_are_no_bytes_are_a_bad_record(
    teacher: Teacher, tmp_path: Path, column: str, wrong: int
) -> None:
    rows = write(teacher, tmp_path, EXACT, seeds=2)
    rows[1][column][0][0] = wrong  # astype(uint8) would make another value of it
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data_0.parquet")
    report = imported(spec(teacher, tmp_path, on_bad="skip"))[0]
    assert report["skipped"] == {f"record whose {column} holds no bytes": 1}
