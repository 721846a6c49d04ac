"""Every planted fault is found, by name and with its figures; clean tables raise none."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.fashion.inputs import CLASSES
from softlabels.report.contents import duplicates
from softlabels.report.finding import Finding
from softlabels.report.findings import table_findings
from softlabels.report.gather import gather
from softlabels.report.page import render
from softlabels.report.rows import SAMPLE_FILES, Part, of_table, sample
from softlabels.report.verdict import run_findings
from softlabels.schema import table_schema
from softlabels.store.table import Table
from tests.report.planted import ROWS, findings, ids, label, labels, source, with_labels
from tests.sequences import make_uneven
from tests.store import markov
from tests.store.markov import make_language
from tests.tables import make_contents, make_table


def only(found: list[Finding]) -> Finding:
    """The one finding there is."""
    assert len(found) == 1, [(f.id, f.sentence) for f in found]
    return found[0]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return label(tmp_path_factory.mktemp("clean"))


@pytest.mark.parametrize("rows", [ROWS, 300, 40])
def test_clean_labels_raise_nothing(tmp_path: Path, clean: Table, rows: int) -> None:
    table = clean if rows == ROWS else label(tmp_path, source().slice(0, rows))
    found = [f for f in findings(table) if f.id != "few-labels"]
    assert found == []


def test_clean_compact_labels_raise_nothing(tmp_path: Path) -> None:
    assert ids(findings(label(tmp_path, profile="compact", k=4))) == []


@pytest.mark.parametrize("alignment", ["causal", "uneven"])
def test_clean_language_tables_raise_nothing(tmp_path: Path, alignment: str) -> None:
    table = make_language(tmp_path / "t") if alignment == "causal" else make_uneven(tmp_path / "t")
    assert ids(findings(table)) == []


@pytest.mark.parametrize("shift", [1, -1, 2])
def test_labels_shifted_by_rows(tmp_path: Path, shift: int) -> None:
    found = only(findings(label(tmp_path, with_labels(np.roll(labels(), shift)))))
    assert (found.id, found.severity) == ("labels-shifted", "error")
    assert f"labels are off by {abs(shift)}." in found.sentence
    assert ("next row" if shift > 0 else "previous row") in found.sentence


@pytest.mark.parametrize("shift", [1, -1])
def test_targets_shifted_by_a_token(tmp_path: Path, shift: int) -> None:
    found = only(findings(make_language(tmp_path / "t", shift=shift)))
    assert (found.id, found.severity) == ("targets-shifted", "error")
    assert f"shifted by {shift:+d}" in found.sentence


def test_wrong_tokenizer(tmp_path: Path) -> None:
    # The teacher reads the ids of a tokenizer that numbers its tokens differently.
    probs = markov.chain(40)
    tokens = markov.walk(probs, 40, 30)
    other = np.append(0, 1 + np.random.default_rng(1).permutation(39))
    made = markov.causal(tokens, probs[other], k=8, draws=4)
    found = only(findings(markov.write(tmp_path / "t", made, 40, 8, 4)))
    assert (found.id, found.severity) == ("wrong-tokenizer", "error")
    assert f"guessing evenly costs {np.log(40):.2f}" in found.sentence


@pytest.mark.parametrize("rows", [ROWS, 600])
def test_uncalibrated_teacher(tmp_path: Path, rows: int) -> None:
    table = label(tmp_path, source().slice(0, rows), arguments={"scale": 3.0})
    found = only(findings(table))
    assert (found.id, found.severity) == ("uncalibrated", "warning")
    assert "at temperature 3." in found.sentence or "at temperature 2." in found.sentence


def test_temperature_applied_twice(tmp_path: Path) -> None:
    found = only(findings(label(tmp_path, arguments={"scale": 0.5})))
    assert (found.id, found.severity) == ("temperature-twice", "warning")
    assert "at temperature 0.49" in found.sentence


@pytest.mark.parametrize(("power", "name"), [(2.5, "uncalibrated"), (0.4, "temperature-twice")])
def test_temperature_of_language_models(tmp_path: Path, power: float, name: str) -> None:
    probs = markov.chain(40, sharpness=1.5)
    tokens = markov.walk(probs, 60, 30)
    wrong = probs**power / (probs**power).sum(1, keepdims=True)
    made = markov.causal(tokens, wrong, k=20, draws=4)
    assert only(findings(markov.write(tmp_path / "t", made, 40, 20, 4))).id == name


def test_k_too_small(tmp_path: Path) -> None:
    table = make_table(tmp_path / "few", rows=600, k=2, classes=100)
    found = next(f for f in findings(table) if f.id == "k-too-small")
    assert found.severity == "warning"
    mass = gather(table.root.uri)["parts"][0]["kept"]["by_k"][-1]["mean"]
    assert f"hold {100 * mass:.1f} %" in found.sentence
    drawn = make_table(tmp_path / "drawn", rows=600, k=2, classes=100, draws=2)
    assert "k-too-small" not in ids(findings(drawn))


def test_duplicated_rows(tmp_path: Path) -> None:
    rows = source()
    again = rows.slice(0, 60).set_column(0, "example_id", pa.array([f"copy{i}" for i in range(60)]))
    found = only(findings(label(tmp_path, pa.concat_tables([rows, again]).combine_chunks())))
    assert (found.id, found.severity) == ("duplicated-rows", "warning")
    assert found.sentence.startswith(f"60 of {ROWS + 60} rows")
    assert "copy0" in found.sentence


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_label_noise(tmp_path: Path, share: float) -> None:
    rng = np.random.default_rng(0)
    noisy = np.where(rng.random(ROWS) < share, rng.integers(0, 10, ROWS), labels())
    found = only(findings(label(tmp_path, with_labels(noisy))))
    assert (found.id, found.severity) == ("label-noise", "warning")
    guessed = int(found.sentence.split()[1])
    assert abs(guessed - 100 * share) <= 4


def test_noise_and_over_confidence_are_told_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noisy = np.where(rng.random(ROWS) < 0.2, rng.integers(0, 10, ROWS), labels())
    table = label(tmp_path, with_labels(noisy), arguments={"scale": 3.0})
    assert sorted(ids(findings(table))) == ["label-noise", "uncalibrated"]


def test_truncated_labels(tmp_path: Path) -> None:
    rows = source().filter(pa.array(labels() < 8))
    found = only(findings(label(tmp_path, rows)))
    assert (found.id, found.severity) == ("truncated-classes", "warning")
    assert "2 of 10 classes are never a label" in found.sentence
    assert "Bag, Ankle boot" in found.sentence


def test_truncated_teacher(tmp_path: Path) -> None:
    # A head that never says 8 or 9: their logits are cut to the least of the others.
    rows = source()
    cut = np.array(rows["logits"].to_pylist(), np.float32)
    cut[:, 8:] = cut.min(1, keepdims=True) - 3
    given = pa.array(cut.tolist(), pa.list_(pa.float32()))
    found = findings(label(tmp_path, rows.set_column(2, "logits", given)))
    named = next(f for f in found if f.id == "truncated-classes")
    assert "never chooses 2 that are labels" in named.sentence


def test_classes_in_another_order(tmp_path: Path) -> None:
    order = np.random.default_rng(3).permutation(10)
    found = only(findings(label(tmp_path, with_labels(order[labels()]))))
    assert (found.id, found.severity) == ("class-order", "error")


def test_a_teacher_that_knows_nothing(tmp_path: Path) -> None:
    mixed = np.random.default_rng(0).permutation(labels())
    found = only(findings(label(tmp_path, with_labels(mixed))))
    assert (found.id, found.severity) == ("teacher-knows-nothing", "error")


def test_a_rare_class_is_no_proof_of_knowing_nothing(tmp_path: Path) -> None:
    # One in fifty, which a calibrated teacher never thinks more likely than not.
    rng = np.random.default_rng(0)
    probs = np.where(rng.random(ROWS) < 0.1, 0.2, 0.0005)
    rare = rng.random(ROWS) < probs
    logits = np.stack([np.zeros(ROWS), np.log(probs / (1 - probs))], 1)
    rows = with_labels(rare.astype(int)).set_column(
        2, "logits", pa.array(logits.tolist(), pa.list_(pa.float32()))
    )
    table = label(tmp_path, rows, classes=("no", "yes"), k=2, arguments={"classes": 2})
    teacher = gather(table.root.uri)["parts"][0]["teacher"]
    assert teacher["accuracy"] == teacher["majority"]
    assert "teacher-knows-nothing" not in ids(findings(table))


def test_a_certain_teacher_adds_nothing(tmp_path: Path) -> None:
    rows = source()
    sure = np.eye(10, dtype=np.float32)[labels()] * 20
    given = pa.array(sure.tolist(), pa.list_(pa.float32()))
    assert ids(findings(label(tmp_path, rows.set_column(2, "logits", given)))) == ["no-entropy"]


def test_unlabelled_rows_are_said_and_not_judged(tmp_path: Path) -> None:
    table = label(
        tmp_path,
        source().drop_columns(["label"]),
        source={
            "files": str(tmp_path / "source.parquet"),
            "columns": ["logits"],
            "decode": "tests.report.planted:decode",
            "example_id": "example_id",
        },
    )
    found = only(findings(table))
    assert (found.id, found.severity) == ("few-labels", "note")
    facts = gather(table.root.uri)["parts"][0]
    assert facts["teacher"] is None
    assert len(facts["examples"]["unsure"]) == 8


def test_a_recorded_tail_of_few_digits(clean: Table) -> None:
    facts = gather(clean.root.uri)["parts"][0]
    facts["codec"]["tail_error"] = 0.05
    assert only(table_findings(facts)).id == "codec-loss"
    facts["codec"] |= {"tail_error": None, "kl_mean": 0.01}
    assert "0.01 nats" in only(table_findings(facts)).sentence


def test_figures_are_those_of_plain_numpy(clean: Table) -> None:
    facts = gather(clean.root.uri)["parts"][0]
    # Rows of two row groups are no neighbours: what lies between was perhaps not looked at.
    ends = np.cumsum([group.num_rows for group in of_table(clean).groups])[:-1]
    pairs = [(row, row + 1) for row in range(ROWS - 1) if row + 1 not in ends]
    other = sum(labels()[a] != labels()[b] for a, b in pairs)
    assert len(ends) > 0
    assert facts["teacher"]["shifted"]["+1"]["rows"] == other
    logits = np.array(source()["logits"].to_pylist())
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    choice, top = logs.argmax(1), np.exp(logs.max(1))
    found = facts["teacher"]
    assert found["accuracy"] == (choice == labels()).mean()
    assert found["nll"] == pytest.approx(-logs[np.arange(ROWS), labels()].mean(), rel=2e-3)
    assert found["entropy"] == pytest.approx(-(np.exp(logs) * logs).sum(1).mean(), rel=2e-3)
    assert found["confidence"] == pytest.approx(top.mean(), rel=2e-3)
    edges = np.linspace(0, 1, 16)
    bins = [(top > low) & (top <= high) for low, high in pairwise(edges)]
    apart = sum(abs((choice == labels())[b].sum() - top[b].sum()) for b in bins) / ROWS
    assert found["ece"] == pytest.approx(apart, abs=2e-3)
    assert facts["kept"]["by_k"][0]["mean"] == pytest.approx(top.mean(), rel=2e-3)
    assert [row["k"] for row in facts["kept"]["by_k"]] == [1, 2, 4, 8, 10]
    counts = {c["name"]: (c["labels"], c["chosen"]) for c in facts["classes"]["classes"]}
    assert counts == {
        name: (int((labels() == n).sum()), int((choice == n).sum()))
        for n, name in enumerate(CLASSES)
    }
    hardest = np.argsort(logs[np.arange(ROWS), labels()])[:8]
    ids_ = source()["example_id"].to_pylist()
    assert [e["id"] for e in facts["examples"]["hardest"]] == [ids_[n] for n in hardest]
    assert facts["examples"]["hardest"][0]["picture"]["uri"].startswith("data:image/png;base64,")


def test_an_id_that_is_there_twice(clean: Table) -> None:
    part = of_table(clean)
    again = Part(
        part.name,
        part.shards,
        part.contents,
        [*part.groups[:1], *part.groups],
        3_000,
        2,
        part.footers,
    )
    assert duplicates(sample(again))["same_id"] == part.groups[0].num_rows
    facts = gather(clean.root.uri)["parts"][0]
    facts["duplicates"]["same_id"] = 3
    assert only(table_findings(facts)).id == "id-twice"


def test_an_empty_table_and_draws_alone(tmp_path: Path) -> None:
    empty = Table.open_or_create(str(tmp_path / "e"), table_schema(), make_contents())
    facts = gather(empty.root.uri)
    found = run_findings(facts)
    assert ids(found) == ["no-rows"]
    assert "There are no rows." in render(facts, found, None)
    drawn = make_table(tmp_path / "d", rows=300, k=0, draws=4)
    facts = gather(drawn.root.uri)
    assert facts["parts"][0]["teacher"] is None
    assert facts["parts"][0]["looked_at"]["labelled"] == 300
    assert run_findings(facts) == []
    render(facts, [], None)


def test_large_tables_are_sampled_from_everywhere(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=2_000, shard_rows=100, row_group_rows=20)
    seen = sample(of_table(table), positions=200)
    assert 150 <= seen.num_rows <= 220
    assert not seen.whole
    files = {group.path for group in seen.groups}
    assert len(files) >= 6
    assert len(set(seen.names)) == seen.num_rows
    # What is said of a row is said of that row.
    for row in (0, 77, seen.num_rows - 1):
        group, number = seen.place(row)
        (batch,) = seen.part.read([group], ["example_id"])
        assert batch["example_id"][number].as_py() == seen.names[row]
    found = gather(table.root.uri)["parts"][0]
    assert found["looked_at"]["rows"] < 2_000  # no more than SAMPLE_FILES files
    assert found["classes"]["rows"] == 100 * SAMPLE_FILES
