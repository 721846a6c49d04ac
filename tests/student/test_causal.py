import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softlabels.errors import BadInputError, MismatchError
from softlabels.plan import Plan
from softlabels.student.batch import targets_at
from softlabels.student.causal import LanguageModel, Outputs
from softlabels.student.pretrained import build_language_model
from softlabels.student.sequences import COLUMNS, padded
from softlabels.student.spec import Fused, LanguageModelSpec
from softlabels.student.stream import Batch, Stream
from tests.student.language import CLASSES, LLAMA, draw, make_language_plan

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 8}
GEMMA2 = QWEN3 | {"model_type": "gemma2"}
GRANITE = LLAMA | {"model_type": "granite", "logits_scaling": 4.0}
MAMBA = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2}
BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
ROBERTA = BERT | {"model_type": "roberta", "pad_token_id": 1}


def build(config: dict[str, Any], kind: Any = "causal_lm", **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_language_model(LanguageModelSpec(config=config, **changes), kind, CLASSES)


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Batch]:
    """A batch of plain rows, of isolated documents, of masked rows and of masked documents."""
    folder = tmp_path_factory.mktemp("tables")
    found = {}
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "documents": {"documents": 3, "isolated": True},
        "masked": {"alignment": "same"},
        "masked documents": {"alignment": "same", "documents": 3, "isolated": True},
    }
    for name, options in kinds.items():
        path = make_language_plan(folder, name, rows=6, **options)
        stream = Stream(Plan.read(path), batch_size=6, shuffle=False, columns=COLUMNS)
        found[name] = next(iter(stream))
    return found


def alone(model: Any, batch: Batch, documents: int, alignment: str) -> Tensor:
    """Logits at the batch's positions, each document in a forward pass of its own."""
    drawn = draw(rows=6, documents=documents, alignment=alignment)
    found = []
    for number in range(6):
        ids, segments = drawn.input_ids[number], drawn.segments[number]
        for document in range(max(segments) + 1):
            here = [i for i, one in enumerate(segments) if one == document]
            logits = model(torch.tensor([[ids[i] for i in here]])).logits[0]
            found += [logits[here.index(p)] for p in drawn.positions[number] if p in here]
    return torch.stack(found)[:, :CLASSES]


def logits_of(outputs: Outputs) -> Tensor:
    return torch.cat([logits for _, logits in outputs.chunks()])


@pytest.mark.parametrize("config", [LLAMA, QWEN3, GEMMA2, GPT2], ids=lambda c: c["model_type"])
@pytest.mark.parametrize("name", ["plain", "documents"])
@pytest.mark.parametrize("fused", ["auto", "never"])
def test_documents_are_seen_alone(
    batches: dict[str, Batch], config: dict[str, Any], name: str, fused: Fused
) -> None:
    model = build(config).eval()
    outputs = LanguageModel(model, CLASSES, "next", fused=fused)(batches[name])
    assert (outputs.weight is not None) == (fused == "auto" and config is not GEMMA2)
    expected = alone(model, batches[name], 3 if name == "documents" else 1, "next")
    torch.testing.assert_close(logits_of(outputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_documents_are_seen_alone_in_training_too(
    batches: dict[str, Batch], checkpointed: bool
) -> None:
    model = build(LLAMA, gradient_checkpointing=checkpointed)
    model.train()
    outputs = LanguageModel(model, CLASSES, "next")(batches["documents"])
    expected = alone(model.eval(), batches["documents"], 3, "next")
    torch.testing.assert_close(logits_of(outputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [BERT, ROBERTA], ids=lambda c: c["model_type"])
@pytest.mark.parametrize("name", ["masked", "masked documents"])
def test_masked_documents_are_seen_alone(
    batches: dict[str, Batch], config: dict[str, Any], name: str
) -> None:
    model = build(config, "masked_lm").eval()
    outputs = LanguageModel(model, CLASSES, "same")(batches[name])
    assert outputs.weight is None
    expected = alone(model, batches[name], 3 if "documents" in name else 1, "same")
    torch.testing.assert_close(logits_of(outputs), expected, rtol=1e-4, atol=1e-5)


def gradients(model: nn.Module, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    outputs.loss(targets_at(batch.targets), tail="bucket").loss.backward()  # type: ignore[no-untyped-call]
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_fused_unfused_and_recomputed_gradients_agree(batches: dict[str, Batch]) -> None:
    model: Any = build(LLAMA | {"tie_word_embeddings": True, "vocab_size": CLASSES + 7})
    batch = batches["documents"]
    modes: tuple[Fused, ...] = ("auto", "never")
    found = [
        gradients(model, LanguageModel(model, CLASSES, "next", fused=f)(batch), batch)
        for f in modes
    ]
    again = build(
        LLAMA | {"tie_word_embeddings": True, "vocab_size": CLASSES + 7},
        gradient_checkpointing=True,
    ).train()
    found.append(gradients(again, LanguageModel(again, CLASSES, "next")(batch), batch))
    assert len(found[0]) == len(list(model.parameters()))
    for name, value in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-6)


def test_layers_are_really_recomputed(batches: dict[str, Batch]) -> None:
    calls = []
    for checkpointed in (False, True):
        model: Any = build(LLAMA, gradient_checkpointing=checkpointed).train()
        count = [0]
        model.model.layers[0].self_attn.register_forward_hook(
            lambda *_, c=count: c.__setitem__(0, c[0] + 1)
        )
        outputs = LanguageModel(model, CLASSES, "next")(batches["plain"])
        count[0] = 0  # what looking at the student cost
        gradients(model, outputs, batches["plain"])
        calls.append(count[0])
    assert calls == [0, 1]


def test_padding_rows_of_the_head_take_no_part(batches: dict[str, Batch]) -> None:
    modes: tuple[Fused, ...] = ("auto", "never")
    for fused in modes:
        model: Any = build(LLAMA | {"vocab_size": CLASSES + 7})
        outputs = LanguageModel(model, CLASSES, "next", fused=fused)(batches["plain"])
        assert logits_of(outputs).shape[1] == CLASSES
        found = gradients(model, outputs, batches["plain"])["lm_head.weight"]
        assert found[:CLASSES].abs().sum(1).min() > 0
        assert found[CLASSES:].abs().max() == 0


@pytest.mark.parametrize("width", [CLASSES - 1, CLASSES + 1024])
@pytest.mark.parametrize("fused", ["auto", "never"])
def test_another_width_is_refused(batches: dict[str, Batch], width: int, fused: Fused) -> None:
    # One token fewer is only a matter of the head here: the embedding has all.
    model: Any = build(LLAMA | {"vocab_size": CLASSES + 1023})
    model.lm_head = nn.Linear(32, width, bias=False)
    with pytest.raises(MismatchError, match=rf"head has {width} rows.* vocabulary has {CLASSES}"):
        LanguageModel(model, CLASSES, "next", fused=fused)(batches["plain"])


@pytest.mark.parametrize(
    ("config", "fused"),
    [(LLAMA, True), (GPT2, True), (MAMBA, True), (GEMMA2, False), (GRANITE, False)],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_heads_that_bend_or_scale_logits_are_not_fused(
    batches: dict[str, Batch], config: dict[str, Any], fused: bool
) -> None:
    model: Any = build(config).eval()
    outputs = LanguageModel(model, CLASSES, "next")(batches["plain"])
    assert (outputs.weight is not None) == fused
    expected = LanguageModel(model, CLASSES, "next", fused="never")(batches["plain"])
    torch.testing.assert_close(logits_of(outputs), logits_of(expected), rtol=1e-4, atol=1e-5)
    if not fused:
        with pytest.raises(MismatchError, match=r"loss\.fused 'always'"):
            LanguageModel(model, CLASSES, "next", fused="always")(batches["plain"])


class Plain(nn.Module):
    """Says something of each token alone."""

    def __init__(self, width: int = CLASSES) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 8)
        self.head = nn.Linear(8, width)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(input_ids))
        return logits


class Mean(Plain):
    """Adds the mean of what the mask and the causal order let it see; of all else nothing."""

    def __init__(self, causal: bool = True, masked: bool = True) -> None:
        super().__init__()
        self.causal, self.masked = causal, masked

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        x = self.embed(input_ids)
        length = input_ids.shape[1]
        seen = torch.ones(len(x), length, length)
        if self.causal:
            seen = seen.tril()
        if attention_mask is not None and self.masked:
            seen = seen * (
                attention_mask[:, None] if attention_mask.ndim == 2 else attention_mask[:, 0]
            )
        x = x + seen @ x / seen.sum(2, keepdim=True) + position_ids.unsqueeze(2)
        logits: Tensor = self.head(x)
        return logits


class OwnHead(Plain):
    """Gives hidden states and its head, and no logits."""

    def hidden_and_head(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.embed(input_ids) + position_ids.unsqueeze(2), self.head.weight, self.head.bias

    def forward(self, input_ids: Tensor) -> Tensor:
        raise NotImplementedError


def test_any_module_is_a_student(batches: dict[str, Batch]) -> None:
    batch = batches["plain"]
    inputs = padded(batch, CLASSES, "next")
    plain = Plain()
    found = LanguageModel(plain, CLASSES, "next")(batch)
    expected = plain(inputs.input_ids).flatten(0, 1)[inputs.at]
    assert torch.equal(found.values, expected)
    own = OwnHead()
    found = LanguageModel(own, CLASSES, "next", fused="always")(batch)
    positions = torch.arange(inputs.input_ids.shape[1]).expand_as(inputs.input_ids).flatten()
    hidden = own.embed(inputs.input_ids).flatten(0, 1)[inputs.at]
    hidden = hidden + positions[inputs.at].unsqueeze(1)
    torch.testing.assert_close(logits_of(found), own.head(hidden))
    assert LanguageModel(Mean(), CLASSES, "next")(batch).values.shape == expected.shape


@pytest.mark.parametrize(
    ("model", "name", "alignment", "message"),
    [
        (Mean(causal=False), "plain", "next", "the student sees later tokens"),
        (Mean(), "documents", "next", "sees from one into another"),
        (Mean(causal=False, masked=False), "masked", "same", "sees their padding"),
        (Mean(causal=False, masked=False), "masked documents", "same", "sees from one into"),
    ],
)
def test_a_student_that_sees_too_much_is_refused(
    batches: dict[str, Batch], model: nn.Module, name: str, alignment: str, message: str
) -> None:
    with pytest.raises(MismatchError, match=message):
        LanguageModel(model, CLASSES, alignment)(batches[name])


def test_a_student_that_heeds_its_mask_is_not_refused(batches: dict[str, Batch]) -> None:
    for name in ("masked", "masked documents"):
        LanguageModel(Mean(causal=False), CLASSES, "same")(batches[name])


def test_state_space_models_cannot_keep_documents_apart(batches: dict[str, Batch]) -> None:
    with pytest.raises(MismatchError, match="sees from one into another"):
        LanguageModel(build(MAMBA), CLASSES, "next")(batches["documents"])


def test_looking_leaves_mode_and_random_numbers_alone(batches: dict[str, Batch]) -> None:
    model = build(LLAMA | {"attention_dropout": 0.5}).train()
    torch.manual_seed(3)
    first = LanguageModel(model, CLASSES, "next")
    values = [first(batches["plain"]).values, first(batches["plain"]).values]
    torch.manual_seed(3)
    inputs = padded(batches["plain"], CLASSES, "next")
    model_: Any = model
    for value in values:
        hidden = model_.model(
            inputs.input_ids, attention_mask=inputs.attention_mask, use_cache=False
        )
        assert torch.equal(hidden[0].flatten(0, 1)[inputs.at], value)
    assert model.training
    assert not torch.equal(values[0], values[1])


def test_logits_of_the_wrong_shape_are_refused(batches: dict[str, Batch]) -> None:
    class Flat(Plain):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids).flatten(0, 1)

    with pytest.raises(MismatchError, match=r"logits of shape \(24, 30\).*\(2, 12\)"):
        LanguageModel(Flat(), CLASSES, "next")(batches["plain"])


def test_checkpoints_and_configs(tmp_path: Path) -> None:
    model: Any = build(LLAMA)
    model.save_pretrained(tmp_path / "trained")
    again = build_language_model(
        LanguageModelSpec(checkpoint=str(tmp_path / "trained")), "causal_lm"
    )
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    half = LanguageModelSpec(config=str(tmp_path / "trained"), dtype="bfloat16")
    new: Any = build_language_model(half, "causal_lm")
    assert new.lm_head.weight.dtype == torch.bfloat16
    assert new.config.vocab_size == CLASSES


def test_a_bfloat16_student_gives_gradients_of_its_own_dtype(batches: dict[str, Batch]) -> None:
    model = build(LLAMA, dtype="bfloat16")
    found = gradients(
        model, LanguageModel(model, CLASSES, "next")(batches["plain"]), batches["plain"]
    )
    wide = build(LLAMA)
    expected = gradients(
        wide, LanguageModel(wide, CLASSES, "next")(batches["plain"]), batches["plain"]
    )
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        apart = (value.float() - expected[name]).norm() / expected[name].norm()
        assert apart < 0.05, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": {"model_type": "nothing"}}, "cannot build"),
        ({"config": LLAMA | {"hiden_size": 3}}, "config has no setting 'hiden_size'"),
        ({"config": "/nowhere/at/all"}, "cannot build '/nowhere/at/all'"),
        ({"checkpoint": "/nowhere/at/all"}, "there is no folder '/nowhere/at/all'"),
    ],
)
def test_what_cannot_be_built_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message) as caught:
        build_language_model(LanguageModelSpec(**settings), "causal_lm", CLASSES)
    assert "\n" not in str(caught.value)


def test_checkpoints_that_lack_weights_or_are_pickles_are_refused(tmp_path: Path) -> None:
    model: Any = build(LLAMA)
    model.save_pretrained(tmp_path / "one")
    config = json.loads((tmp_path / "one/config.json").read_text())
    (tmp_path / "one/config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    spec = LanguageModelSpec(checkpoint=str(tmp_path / "one"))
    with pytest.raises(MismatchError, match=r"missing keys .*layers\.2\."):
        build_language_model(spec, "causal_lm")
    (tmp_path / "one/config.json").write_text(json.dumps(config))
    (tmp_path / "one/model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "one/pytorch_model.bin")
    with pytest.raises(BadInputError, match="cannot build"):
        build_language_model(spec, "causal_lm")


class Ahead(nn.Module):
    """Sees the next token, by a way whose weights begin at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(CLASSES, 8), nn.Linear(8, CLASSES)
        self.way = nn.Linear(8, 8, bias=False)
        nn.init.zeros_(self.way.weight)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        found: Tensor = self.head(x + self.way(torch.cat([x[:, 1:], x[:, -1:]], 1)))
        return found


def test_a_way_to_later_tokens_that_opens_in_training_is_found(batches: dict[str, Batch]) -> None:
    model = Ahead()
    call = LanguageModel(model, CLASSES, "next")
    call(batches["plain"])
    nn.init.normal_(model.way.weight)
    with pytest.raises(MismatchError, match="sees later tokens"):
        call(batches["plain"])


class ApartWhenAlone(nn.Module):
    """Keeps documents apart in batches of one row only, as some attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(CLASSES, 8), nn.Linear(8, CLASSES)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        rows, length = input_ids.shape
        seen = torch.ones(length, length).tril().expand(rows, -1, -1)
        if rows == 1:
            document = (position_ids == 0).cumsum(1)
            seen = seen * (document[:, :, None] == document[:, None, :])
        found: Tensor = self.head(seen / seen.sum(-1, keepdim=True) @ self.embed(input_ids))
        return found


def test_documents_are_looked_at_in_batches_of_several_rows(batches: dict[str, Batch]) -> None:
    with pytest.raises(MismatchError, match="sees from one into another"):
        LanguageModel(ApartWhenAlone(), CLASSES, "next")(batches["documents"])


def test_weights_that_a_checkpoint_has_too_many_are_refused(tmp_path: Path) -> None:
    deep: Any = build(LLAMA | {"num_hidden_layers": 3})
    deep.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(MismatchError, match=r"unexpected keys.*layers\.2"):
        build_language_model(LanguageModelSpec(checkpoint=str(tmp_path)), "causal_lm", CLASSES)
