"""Likely label errors: planted ones are found, and their number is estimated."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from softlabels.errors import BadInputError
from softlabels.query.noise import estimate_noise, fit_noise
from softlabels.query.suspects import Doubt, suspects
from softlabels.store import shards
from tests.query.planted import Planted, log_softmax, make_planted
from tests.query.tables import reordered
from tests.sequences import make_uneven
from tests.tables import make_targets

ROWS = 6000


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """A teacher that is nearly always sure, and 5 % of labels replaced by another class."""
    folder = tmp_path_factory.mktemp("noisy") / "t"
    return make_planted(folder, rows=ROWS, noise=0.05, sharpness=12.0)


def places(found: pa.Table) -> np.ndarray:
    return np.array([int(name[1:]) for name in found["example_id"].to_pylist()])


@pytest.mark.parametrize(
    ("heat", "k", "temperatures"), [(1.0, None, ()), (1.7, None, ()), (2.0, 3, (2.0,))]
)
def test_planted_noise_is_estimated_within_a_point(
    tmp_path: Path, heat: float, k: int | None, temperatures: tuple[float, ...]
) -> None:
    planted = make_planted(
        tmp_path / "t",
        rows=ROWS,
        k=k,
        heat=heat,
        temperatures=temperatures,
        noise=0.05,
        sharpness=4.0,
        seed=1,
    )
    found = estimate_noise(planted.table)
    assert found is not None
    share = planted.wrong.mean()
    assert abs(found.wrong - share) < 0.01
    # Its standard error is what repeated draws of the labels would scatter by.
    assert 0.002 < found.wrong_se < 0.006
    assert abs(found.wrong - share) < 3 * found.wrong_se
    assert found.temperature == pytest.approx(heat, rel=0.05)
    assert found.nll < found.nll_clean
    assert found.noise == pytest.approx(found.wrong * 8 / 7)


def test_the_standard_error_is_that_of_repeated_fits() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1500, 5)) * 4
    fits = []
    for _ in range(50):
        labels = np.argmax(logits + rng.gumbel(size=logits.shape), 1)
        random = rng.random(1500) < 0.1
        labels = np.where(random, rng.integers(0, 5, 1500), labels)

        def label_probs(temperature: float, labels: np.ndarray = labels) -> np.ndarray:
            return np.asarray(np.exp(log_softmax(logits / temperature)[np.arange(1500), labels]))

        fits.append(fit_noise(label_probs, 5))
    noises = np.array([fit.noise for fit in fits])
    assert noises.mean() == pytest.approx(0.1, abs=0.005)
    # Of 50 fits, the scatter itself is known to 10 %.
    assert np.mean([fit.noise_se for fit in fits]) == pytest.approx(noises.std(), rel=0.25)
    # Had T been known, the noise would be known better.
    assert fit_noise(label_probs, 5, (1.0,)).noise_se < 0.97 * fits[-1].noise_se


def test_clean_labels_are_called_clean(tmp_path: Path) -> None:
    planted = make_planted(tmp_path / "t", rows=ROWS, heat=1.5, sharpness=4.0)
    found = estimate_noise(planted.table)
    assert found is not None
    assert found.wrong < 0.003
    assert found.temperature == pytest.approx(1.5, rel=0.05)


def test_planted_errors_are_found_worst_first(noisy: Planted) -> None:
    noise = estimate_noise(noisy.table)
    found = suspects(noisy.table, noise=noise)
    at = places(found)
    hits = noisy.wrong[at]
    recall, precision = hits.sum() / noisy.wrong.sum(), hits.mean()
    assert recall > 0.75
    assert precision > 0.65
    assert hits[: len(hits) // 3].mean() > 0.9
    margins = found["margin"].to_numpy()
    assert (np.diff(margins) >= 0).all()
    # The probability of an error is what it says: its sum is the number of errors found.
    assert np.sum(found["error_prob"].to_numpy()) == pytest.approx(hits.sum(), rel=0.1)
    assert found["label"].to_pylist() == noisy.labels[at].tolist()


@pytest.mark.parametrize(("sharpness", "bias"), [(1.0, 2.0), (12.0, 0.0)])
def test_suspects_are_those_of_a_dense_computation(
    tmp_path: Path, sharpness: float, bias: float
) -> None:
    planted = make_planted(tmp_path / "t", rows=3000, noise=0.05, sharpness=sharpness, bias=bias)
    probs, labels = np.exp(planted.truth), planted.labels
    own = probs[np.arange(3000), labels]
    thresholds = np.array([own[labels == c].mean() for c in range(8)])
    masked = np.where(probs >= thresholds, probs, -1)
    expected = (masked.max(1) >= 0) & (masked.argmax(1) != labels)
    expected &= probs.argmax(1) != labels
    found = suspects(planted.table)
    at = places(found)
    # Rounded to float16's precision a row at the threshold may fall on either side.
    assert len(set(at) ^ set(np.flatnonzero(expected))) <= 4
    assert np.mean(found["suggested"].to_numpy() == masked[at].argmax(1)) > 0.99
    row = found.slice(0, 1).to_pylist()[0]
    assert row["suggested_name"] == f"class{row['suggested']}"
    assert row["label_name"] == f"class{labels[at[0]]}"
    assert row["label_prob"] == pytest.approx(own[at[0]], rel=0.02)
    assert row["suggested_prob"] == pytest.approx(masked[at[0]].max(), rel=0.01)
    assert row["error_prob"] is None


def test_only_the_rows_asked_for_are_judged(noisy: Planted) -> None:
    found = places(suspects(noisy.table, where="number < 1000"))
    assert len(found)
    assert found.max() < 1000


def test_the_order_of_the_rows_changes_nothing(tmp_path: Path, noisy: Planted) -> None:
    order = np.random.default_rng(0).permutation(ROWS)
    other = reordered(noisy.table, tmp_path / "u", order)
    assert suspects(other).equals(suspects(noisy.table))


def test_sequences_are_gathered_by_row(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = make_uneven(tmp_path / "t", rows=30, vocabulary=30, k=6)
    planted: dict[str, list[int]] = {}

    def spoil(batch: pa.RecordBatch) -> pa.RecordBatch:
        """One position of every third row is sure of another class than its label."""
        counts = np.array(batch["num_positions"].to_pylist())
        dense = np.full((int(counts.sum()), 30), np.log(0.5 / 29))
        labels = rng.integers(0, 30, len(dense))
        dense[np.arange(len(dense)), labels] = np.log(0.5)
        starts = np.cumsum(counts) - counts
        for row in range(0, batch.num_rows, 3):
            place = int(rng.integers(counts[row]))
            at = starts[row] + place
            dense[at] = np.log(0.02 / 29)
            dense[at, (labels[at] + 1) % 30] = np.log(0.98)
            planted.setdefault(str(batch["example_id"][row]), []).append(place)
        targets = make_targets(dense, 6, labels, 3)
        columns = shards.round_to_profile(targets, "precise")
        made = type(columns)(**{**vars(columns), "num_positions": counts.astype(np.int32)})
        new = made.columns(sequences=True)
        names = batch.schema.names
        return pa.RecordBatch.from_arrays([new.get(n, batch[n]) for n in names], names=names)

    spoiled = reordered(table, tmp_path / "u", np.arange(30), change=spoil)
    found = suspects(spoiled, doubt=Doubt(rank=1)).to_pylist()
    assert {row["example_id"]: row["positions"] for row in found} == planted
    assert all(row["top1_probs"][0] == pytest.approx(0.98, abs=1e-3) for row in found)
    assert all(row["label_probs"][0] < 0.001 for row in found)
    assert [row["excess"] for row in found] == sorted((r["excess"] for r in found), reverse=True)
    tokens = {r["example_id"]: r for b in spoiled.batches() for r in b.to_pylist()}
    for row in found:
        whole = tokens[row["example_id"]]
        index = whole["position_index"][row["positions"][0]]
        assert row["token_ids"] == [whole["input_ids"][index]]
    assert suspects(spoiled, doubt=Doubt(rank=1, sure=0.99)).num_rows == 0
    assert suspects(spoiled, doubt=Doubt(rank=1, below=1e-4)).num_rows == 0
    assert estimate_noise(spoiled) is not None


@pytest.mark.parametrize("values", [{"below": 0}, {"sure": 1.5}, {"rank": 0}])
def test_settings_that_cannot_be_meant_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(BadInputError, match=next(iter(values))):
        Doubt(**values)  # type: ignore[arg-type]


def test_a_table_without_labels_is_refused(tmp_path: Path, noisy: Planted) -> None:
    def bare(batch: pa.RecordBatch) -> pa.RecordBatch:
        names = batch.schema.names
        gone = {"label", "label_ids", "label_logprobs", "label_ranks"}
        arrays = [pa.nulls(batch.num_rows, batch[n].type) if n in gone else batch[n] for n in names]
        return pa.RecordBatch.from_arrays(arrays, names=names)

    table = reordered(noisy.table, tmp_path / "u", np.arange(200), change=bare)
    with pytest.raises(BadInputError, match="none of 200 rows"):
        suspects(table)
    assert estimate_noise(table) is None
