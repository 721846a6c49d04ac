"""Captures by a language model: what they store, that it is right, that it repeats."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from softlabels.errors import BadInputError, DataError, MismatchError, TryAgainError
from softlabels.fingerprint import key64
from softlabels.store.inspect import verify
from softlabels.store.table import Table
from softlabels.targets import SoftTargets
from softlabels.teacher import language, source
from softlabels.teacher.capture import Progress, capture
from softlabels.teacher.estimate import estimate
from softlabels.teacher.extract import position_keys
from softlabels.teacher.language import SequenceAnnotator
from softlabels.teacher.run import prepare
from softlabels.teacher.spec import SequenceCaptureSpec
from tests.teacher.language_models import CONTEXT, VOCABULARY, dense, language_spec, tiny_model
from tests.teacher.texts import SENTENCES, write_lines


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SOFTLABELS_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with seven documents of 12 to 100 tokens."""
    (tmp_path / "src").mkdir()
    for number in range(7):
        text = " ".join(SENTENCES[i % 4] for i in range(number, 2 * number + 1))
        (tmp_path / "src" / f"{number}.txt").write_text(text)
    return tmp_path


def annotate(spec: SequenceCaptureSpec) -> tuple[list[dict[str, Any]], SoftTargets]:
    """Source rows and their targets before any rounding."""
    run, annotator = prepare(spec)
    batch = pa.Table.from_batches(
        run.source.batches(0, run.source.num_rows, run.read_columns)
    ).combine_chunks()
    (whole,) = batch.to_batches()
    names = batch["example_id"].to_pylist()
    done: list[int] = []
    found = annotator.annotate(whole, names, done.append)
    assert sum(done) == len(names)
    found.targets.check(names, run.contents.num_classes)
    return batch.to_pylist(), found.targets


def documents(row: dict[str, Any]) -> Iterator[tuple[list[int], list[int], int]]:
    """(tokens, positions in them, first position's number in the row) of each document of a row."""
    segments = row["segment_ids"] or [0] * len(row["input_ids"])
    for segment in sorted(set(segments)):
        start = segments.index(segment)
        stop = len(segments) - segments[::-1].index(segment)
        inside = [i for i in row["position_index"] if start <= i < stop]
        first = row["position_index"].index(inside[0]) if inside else 0
        yield row["input_ids"][start:stop], [i - start for i in inside], first


def check_against_each_document_alone(
    rows: list[dict[str, Any]], found: SoftTargets, model: Path, atol: float = 5e-5
) -> None:
    """Every target equals the float64 softmax of its document, run alone and without padding."""
    assert found.tail is not None
    assert found.entropy is not None
    assert found.label_logprobs is not None
    assert found.label_ranks is not None
    begin = 0
    for row in rows:
        for tokens, at, first in documents(row):
            if not at:
                continue
            expected = dense(model, tokens, VOCABULARY)[at]
            part = slice(begin + first, begin + first + len(at))
            head = np.take_along_axis(expected, found.ids[part], 1)
            np.testing.assert_allclose(found.logprobs[part], head, atol=atol)
            np.testing.assert_allclose(head[:, 0], expected.max(1), atol=atol)
            mass = 1 - np.exp(head).sum(1)
            np.testing.assert_allclose(np.exp(found.tail[part]), mass, atol=atol)
            entropy = -(np.exp(expected) * expected).sum(1)
            np.testing.assert_allclose(found.entropy[part], entropy, atol=atol * 10)
            labels = np.array(row["label_ids"][first : first + len(at)])
            of_label = expected[np.arange(len(at)), labels]
            np.testing.assert_allclose(found.label_logprobs[part], of_label, atol=atol)
            ranks = (expected > of_label[:, None] + atol).sum(1)
            assert (found.label_ranks[part] >= ranks).all()
            assert (found.label_ranks[part] <= (expected > of_label[:, None] - atol).sum(1)).all()
        begin += len(row["position_index"])
    assert begin == len(found.ids)


@pytest.mark.parametrize(
    "source",
    [
        {"packing": "packed"},
        {"packing": "packed", "isolate": False},
        {"packing": "documents"},
        {"packing": "documents", "length": 64},
    ],
    ids=["isolated", "one whole", "split", "long"],
)
def test_packing_padding_and_bucketing_change_nothing(
    folder: Path, llama: Path, source: dict[str, Any]
) -> None:
    rows, found = annotate(language_spec(folder, llama, source=source))
    check_against_each_document_alone(rows, found, llama)
    lengths = {len(row["input_ids"]) for row in rows}
    assert (len(lengths) > 1) is True


def test_isolated_documents_do_not_see_each_other(folder: Path, llama: Path) -> None:
    isolated, _ = annotate(language_spec(folder, llama))
    together, found = annotate(language_spec(folder, llama, source={"isolate": False}))
    assert any(len(set(row["segment_ids"])) > 1 for row in isolated)
    assert all(row["segment_ids"] is None for row in together)
    # The reference can tell: as if they were isolated, the same rows would be wrong.
    for row, other in zip(together, isolated, strict=True):
        assert row["input_ids"] == other["input_ids"]
        row["segment_ids"] = other["segment_ids"]
    with pytest.raises(AssertionError):
        check_against_each_document_alone(together, found, llama)


@pytest.mark.parametrize("changes", [{"batch_tokens": 1}, {"batch_tokens": 500}, {"head_rows": 1}])
def test_batches_decide_nothing_but_the_last_digits(
    folder: Path, llama: Path, changes: dict[str, Any]
) -> None:
    _, first = annotate(language_spec(folder, llama))
    _, other = annotate(language_spec(folder, llama, **changes))
    np.testing.assert_allclose(first.logprobs, other.logprobs, atol=2e-5)
    assert (first.ids == other.ids).mean() > 0.99
    assert first.draws is not None
    assert other.draws is not None
    assert (first.draws == other.draws).mean() > 0.98


def test_a_run_repeats_bit_for_bit(folder: Path, llama: Path) -> None:
    one, two = (language_spec(folder, llama, table=str(folder / name)) for name in ("a", "b"))
    capture(one)
    capture(two)
    first, second = (Table.open(spec.table) for spec in (one, two))
    assert [file.sha256 for file in first.files] == [file.sha256 for file in second.files]


def test_models_that_give_logits_of_whole_sequences_only(folder: Path, tmp_path: Path) -> None:
    opt = tiny_model(tmp_path / "opt", "opt")
    spec = language_spec(folder, opt)
    _, annotator = prepare(spec)
    assert isinstance(annotator, SequenceAnnotator)
    assert annotator._model.whole
    rows, found = annotate(spec)
    check_against_each_document_alone(rows, found, opt)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_masked_models_see_both_sides(folder: Path, tmp_path: Path, kind: str) -> None:
    bert = tiny_model(tmp_path / "bert", kind)
    spec = language_spec(folder, bert, teacher={"kind": "masked"}, source={"mask_rate": 0.3})
    rows, found = annotate(spec)
    check_against_each_document_alone(rows, found, bert)
    run, _ = prepare(spec)
    assert run.contents.alignment == "same"
    for row in rows:  # the label is the token that the mask stands for
        assert {row["input_ids"][i] for i in row["position_index"]} == {3}
        assert 3 not in row["label_ids"]


def test_a_padded_vocabulary_is_cut_and_the_rest_renormalised(folder: Path, tmp_path: Path) -> None:
    wide = tiny_model(tmp_path / "wide", vocab_size=VOCABULARY + 64)
    spec = language_spec(folder, wide)
    rows, found = annotate(spec)
    run, _ = prepare(spec)
    vocabulary = run.contents.num_classes
    assert vocabulary <= VOCABULARY
    assert run.contents.logits_width == VOCABULARY + 64
    assert found.ids.max() < vocabulary
    alone = dense(wide, rows[0]["input_ids"])
    share = np.exp(alone[:, :vocabulary]).sum(1)
    assert share.min() < 0.95  # some mass was on rows without a token
    expected = dense(wide, rows[0]["input_ids"], vocabulary)[:2]
    np.testing.assert_allclose(
        found.logprobs[:2], np.take_along_axis(expected, found.ids[:2], 1), atol=5e-5
    )


def test_temperatures_and_draws_at_one(folder: Path, llama: Path) -> None:
    spec = language_spec(folder, llama, temperatures=[2.0], draws_temperature=2.0)
    rows, found = annotate(spec)
    expected = dense(llama, next(documents(rows[0]))[0])[rows[0]["position_index"][:3]]
    tempered = expected / 2 - np.log(np.exp(expected / 2).sum(1, keepdims=True))
    head = found.logprobs[:3] / 2 + found.temper[2.0].shift[:3, None]
    np.testing.assert_allclose(head, np.take_along_axis(tempered, found.ids[:3], 1), atol=1e-4)


def test_what_a_table_holds(folder: Path, llama: Path) -> None:
    (folder / "src" / "empty.txt").write_text("")
    (folder / "src" / "bytes.txt").write_bytes(b"\xff\xfe\xfd")
    spec = language_spec(folder, llama, shard_rows=5, profile="compact")
    report = capture(spec)
    assert sum(report.skipped.values()) == 2
    table = Table.open(spec.table)
    assert report.rows == table.num_rows
    source = prepare(spec)[0].source
    assert report.rows == source.num_rows - (report.repeated or 0)
    assert report.units == len(table.files) == -(-source.num_rows // 5)
    assert verify(table)["problems"] == []
    contents = table.contents
    assert contents.classes is None
    assert contents.tokenizer_sha256 is not None
    assert contents.chat_template_sha256 is None
    assert (contents.alignment, contents.example_ids) == ("next", "content")
    assert contents.teacher.kind == "hf"
    sources, found = annotate(spec)
    stored = {row["example_id"]: row for b in table.batches() for row in b.to_pylist()}
    begin = 0
    for row in sources:
        kept = stored[row["example_id"]]
        for name in ("input_ids", "position_index", "segment_ids", "label_ids"):
            assert kept[name] == row[name]
        positions = len(row["position_index"])
        assert kept["num_positions"] == positions
        part = slice(begin, begin + positions)
        assert kept["topk_ids"] == found.ids[part].reshape(-1).tolist()
        assert (kept["label"], kept["top1_id"]) == (None, None)
        begin += positions


def test_lineage_of_a_commit(folder: Path, llama: Path) -> None:
    (folder / "src" / "empty.txt").write_text("")
    spec = language_spec(folder, llama)
    run, annotator = prepare(spec)
    from softlabels.teacher.labeller import Labeller

    found = Labeller(run, annotator).lineage(run.units, 3, "now", 1.0)
    assert found.source["skipped"] == dict(run.source.skipped)
    assert found.source["fingerprint"] == run.source.origin
    assert {"transformers", "tokenizers", "torch"} <= set(found.packages)


def test_the_same_command_again_does_nothing(folder: Path, llama: Path) -> None:
    spec = language_spec(folder, llama)
    first = capture(spec)
    again = capture(spec)
    assert (again.rows, again.committed, again.already) == (0, 0, first.rows)
    assert again.version == first.version
    more = language_spec(folder, llama, batch_tokens=32, head_rows=3)
    assert capture(more).run_id == first.run_id


def test_what_is_another_run(folder: Path, llama: Path) -> None:
    first = prepare(language_spec(folder, llama))[0].id
    seen = {first}
    for changes in ({"k": 4}, {"draws": 3}, {"seed": 1}, {"shard_rows": 3}, {"profile": "compact"}):
        seen.add(prepare(language_spec(folder, llama, **changes))[0].id)
    seen.add(prepare(language_spec(folder, llama, source={"length": 23}))[0].id)
    (folder / "src" / "0.txt").write_text("Another text.")
    seen.add(prepare(language_spec(folder, llama))[0].id)
    assert len(seen) == 8


def test_equal_documents_are_labelled_once(folder: Path, llama: Path) -> None:
    (folder / "src" / "8.txt").write_text((folder / "src" / "3.txt").read_text())
    spec = language_spec(folder, llama, source={"packing": "documents"})
    report = capture(spec)
    assert report.repeated
    assert report.rows == prepare(spec)[0].source.num_rows - report.repeated


def test_it_stops_after_the_forward_pass_in_hand(folder: Path, llama: Path) -> None:
    spec = language_spec(folder, llama, batch_tokens=24)
    passes = 0

    def done(rows: int, bytes_per_row: float) -> None:
        nonlocal passes
        passes += bool(rows)
        if passes == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TryAgainError, match="stopped by a signal"):
        capture(spec, Progress(done=done))
    assert passes == 2
    assert Table.open(spec.table).num_rows == 0
    whole = capture(spec.model_copy(update={"table": str(folder / "whole")}))
    assert capture(spec).rows == whole.rows
    first, second = (Table.open(str(folder / name)) for name in ("table", "whole"))
    assert [f.sha256 for f in first.files] == [f.sha256 for f in second.files]


def test_it_stops_while_text_is_made_into_tokens(folder: Path, llama: Path) -> None:
    spec = language_spec(folder, llama)
    told: list[int] = []

    def scanned(rows: int) -> None:
        told.append(rows)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TryAgainError, match="while planning"):
        capture(spec, Progress(scanned=scanned))
    assert len(told) == 1
    assert not (folder / "table").exists()
    assert capture(spec).rows > 0


def test_a_window_bounds_memory_and_changes_nothing(
    folder: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = language_spec(folder, llama)
    capture(spec)
    monkeypatch.setattr(language, "WINDOW_TOKENS", 40)
    monkeypatch.setattr(source, "READ_ROWS", 1)
    small = language_spec(folder, llama, table=str(folder / "small"), batch_tokens=40)
    sizes: list[int] = []
    before = SequenceAnnotator.annotate

    def annotate(self: SequenceAnnotator, batch: pa.RecordBatch, *rest: Any) -> Any:
        sizes.append(int(self.weigh(batch).sum()))
        return before(self, batch, *rest)

    monkeypatch.setattr(SequenceAnnotator, "annotate", annotate)
    capture(small)
    assert max(sizes) <= 40
    assert len(sizes) > 3
    stored = [
        {
            row["example_id"]: row["topk_ids"]
            for b in Table.open(t).batches()
            for row in b.to_pylist()
        }
        for t in (spec.table, small.table)
    ]
    assert list(stored[0]) == list(stored[1])
    same = [
        a == b for key in stored[0] for a, b in zip(stored[0][key], stored[1][key], strict=True)
    ]
    assert np.mean(same) > 0.99


def test_broken_logits_name_the_example_and_the_token(folder: Path, llama: Path) -> None:
    spec = language_spec(folder, llama)
    run, annotator = prepare(spec)
    assert isinstance(annotator, SequenceAnnotator)
    model: Any = annotator._model
    (batch, *_) = run.source.batches(0, run.source.num_rows, run.read_columns)
    row = next(r for r in batch.to_pylist() if len(set(r["segment_ids"])) > 1)
    tokens, at, _ = list(documents(row))[-1]
    wanted = model._base(input_ids=torch.tensor([tokens])).last_hidden_state[0, at[1]]
    token = len(row["input_ids"]) - len(tokens) + at[1]

    def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        same = (inputs[0] - wanted).abs().amax(-1) < 1e-4
        return output.masked_fill(same[..., None], torch.inf)

    model._model.lm_head.register_forward_hook(spoil)
    names = batch["example_id"].to_pylist()
    expected = rf"example '{row['example_id']}' are NaN or infinite at token {token}$"
    with pytest.raises(DataError, match=expected):
        annotator.annotate(batch, names, lambda rows: None)


def test_broken_weights_make_no_table(folder: Path, tmp_path: Path) -> None:
    sick = tiny_model(tmp_path / "sick")
    tensors = load_file(sick / "model.safetensors")
    tensors["lm_head.weight"][7] = torch.nan
    save_file(tensors, sick / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="gives NaN as logits"):
        capture(language_spec(folder, sick))
    assert not (folder / "table").exists()


def test_sequences_longer_than_the_context_are_refused_at_once(folder: Path, llama: Path) -> None:
    spec = language_spec(folder, llama, source={"length": CONTEXT + 1})
    with pytest.raises(BadInputError, match=rf"length is {CONTEXT + 1}.*at most {CONTEXT} tokens"):
        capture(spec)
    assert not (folder / "cache").exists()
    assert not (folder / "table").exists()


def test_tokenizers_that_do_not_fit_the_model(folder: Path, tmp_path: Path) -> None:
    narrow = tiny_model(tmp_path / "narrow", vocab_size=200)
    with pytest.raises(MismatchError, match=r"knows 3\d\d ids, but the head.*has 200 rows"):
        capture(language_spec(folder, narrow))
    with pytest.raises(BadInputError, match=r"k is 1000, the tokenizer knows"):
        capture(language_spec(folder, narrow, k=1000))
    with pytest.raises(BadInputError, match="device 'cuda:77'"):
        capture(language_spec(folder, narrow, device="cuda:77"))


def test_a_tokenizer_that_is_not_the_model_s(folder: Path, llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(llama, other, ignore=shutil.ignore_patterns("*.safetensors"))
    saved = json.loads((other / "tokenizer.json").read_text())
    vocabulary = saved["model"]["vocab"]
    one, two = (token for token, index in vocabulary.items() if index in (40, 41))
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(MismatchError, match=r"tokenizers differ: .*other.* has sha256"):
        capture(language_spec(folder, llama, teacher={"tokenizer": str(other)}))


def test_text_is_refused_before_the_model_is_loaded(
    folder: Path, llama: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "no_weights"
    shutil.copytree(llama, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    source: dict[str, Any] = {"packing": "documents", "too_long": "refuse", "length": 8}
    with pytest.raises(DataError, match=r"tokens, source.length is 8"):
        capture(language_spec(folder, bare, source=source))
    with pytest.raises(BadInputError, match="cannot be loaded"):
        capture(language_spec(folder, bare))


def test_an_id_of_its_own_that_is_also_that_of_a_part(folder: Path, llama: Path) -> None:
    records = [{"id": "a", "text": SENTENCES[0] * 2}, {"id": "a#1", "text": SENTENCES[1]}]
    source: dict[str, Any] = {"files": str(write_lines(folder / "x.jsonl", records))}
    source |= {"text": "text", "example_id": "id", "packing": "documents", "length": 24}
    with pytest.raises(DataError, match=r"id 'a#1' stands for two .*#1, #2.* are parts of a split"):
        capture(language_spec(folder, llama, source=source))


def test_chats_by_their_template(folder: Path, llama: Path) -> None:
    turns = [
        {"role": "user", "content": "Where is the cat?"},
        {"role": "assistant", "content": "On the mat."},
    ]
    write_lines(folder / "chats.jsonl", [{"messages": turns}])
    source = {"files": str(folder / "chats.jsonl"), "messages": "messages", "length": 64}
    source |= {"loss_on": "assistant", "packing": "documents"}
    spec = language_spec(folder, llama, source=source)
    capture(spec)
    assert Table.open(spec.table).contents.chat_template_sha256 is not None
    rows, found = annotate(spec)
    assert len(found.ids) < len(rows[0]["input_ids"]) / 2
    check_against_each_document_alone(rows, found, llama)


def test_draw_keys_of_positions() -> None:
    rows = np.array([key64(0, "a", 0), key64(0, "b", 0), key64(0, "c", 0)], np.uint64)
    counts = np.array([1000, 0, 2], np.int32)
    found = position_keys(rows, counts)
    assert found.dtype == np.uint64
    assert found[0] == rows[0]  # one position a row: as classification has always drawn
    assert found[1000] == rows[2]
    assert len(set(found.tolist())) == 1002
    alone = position_keys(rows[2:], counts[2:])
    np.testing.assert_array_equal(found[1000:], alone)
    np.testing.assert_array_equal(position_keys(rows[:1], counts[:1] - 900), found[:100])
    bits = np.unpackbits(found[1:1000].view(np.uint8)).reshape(-1, 64)
    assert abs(bits.mean(0) - 0.5).max() < 0.08
    golden = position_keys(np.array([1], np.uint64), np.array([3], np.int32)).tolist()
    assert golden == GOLDEN_KEYS


GOLDEN_KEYS = [1, 10945399932177679502, 16099129435832647910]


def test_estimate(folder: Path, llama: Path) -> None:
    spec = language_spec(folder, llama)
    found = estimate(spec)
    assert not (folder / "table").exists()
    rows, targets = annotate(spec)
    assert found["source_rows"] == found["rows_left"] == len(rows)
    assert abs(found["positions_left"] / len(targets.ids) - 1) < 0.2
    assert found["tokens_per_s"] > 0
    assert found["bytes_per_position"] > 20
    assert found["skipped"] == {}
    assert "batch_size" not in found
    capture(spec)
    assert estimate(spec)["rows_left"] == 0
