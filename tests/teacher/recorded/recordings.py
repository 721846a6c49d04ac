"""A small teacher whose distributions are known whole, and how engines would have recorded it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from softlabels.store.table import Table
from softlabels.targets import SoftTargets
from softlabels.teacher.recorded.report import import_recorded
from softlabels.teacher.recorded.spec import ImportSpec
from softlabels.teacher.tokenizer import load_tokenizer

Values = npt.NDArray[np.float64]

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "the cat sat on the mat",
    "a dog and a cat",
    "naïve café, 日本語 text",
    "the end of the day",
]


def write_tokenizer(folder: Path, sentencepiece: bool = False) -> Path:
    """A folder with a small tokenizer: byte-level BPE, or one that writes spaces as "▁"."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    if sentencepiece:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=290,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@dataclass(frozen=True)
class Teacher:
    """Knows log p(next | token) for every pair.

    Attributes:
        logprobs: float64 [V, V], nats.
        spelling: the bytes of each token.
        folder: of its tokenizer.
    """

    logprobs: Values
    spelling: Sequence[bytes]
    folder: Path

    @classmethod
    def make(cls, folder: Path) -> "Teacher":
        """One with a tokenizer of its own in `folder`."""
        tokenizer = load_tokenizer(str(write_tokenizer(folder)))
        size = tokenizer.num_ids
        logits = np.random.default_rng(5).normal(0, 3, (size, size))
        # float32, as engines compute it.
        logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        backend = tokenizer.model.backend_tokenizer
        spelling = [_spelling(backend.id_to_token(i)) for i in range(size)]
        return cls(logprobs.astype(np.float32).astype(np.float64), spelling, folder)

    @property
    def size(self) -> int:
        """V."""
        return len(self.spelling)

    def write(self, length: int, seed: int, begin: Sequence[int] = ()) -> list[int]:
        """`length` tokens, each drawn after the one before, `begin` first."""
        random = np.random.default_rng(seed)
        tokens = list(begin) or [int(random.integers(3, self.size))]
        while len(tokens) < length:
            probs = np.exp(self.logprobs[tokens[-1]])
            tokens.append(int(random.choice(self.size, p=probs / probs.sum())))
        return tokens

    def top(self, token: int, k: int) -> list[tuple[int, float]]:
        """The k likeliest after a token: (id, logprob), by falling probability."""
        order = np.argsort(-self.logprobs[token], kind="stable")[:k]
        return [(int(i), float(self.logprobs[token, i])) for i in order]

    def rank(self, token: int, after: int) -> int:
        """The place of `token` among what follows `after`, from 0."""
        return int((self.logprobs[after] > self.logprobs[after, token]).sum())

    def named(self, token: int) -> dict[str, Any]:
        """How OpenAI names a token: its text, and its bytes."""
        data = self.spelling[token]
        return {"token": data.decode(errors="replace"), "bytes": list(data)}


def _spelling(token: str) -> bytes:
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in plain]
    letters = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(hidden)}
    return token.encode() if token.startswith("<|") else bytes(letters[c] for c in token)


def chat_response(
    teacher: Teacher, tokens: Sequence[int], start: int, k: int, engine: str = "openai"
) -> dict[str, Any]:
    """A chat response for tokens[start:], as OpenAI or vLLM list the top k."""
    content = []
    for place in range(start, len(tokens)):
        before, chosen = tokens[place - 1], tokens[place]
        listed = teacher.top(before, k)
        value = float(teacher.logprobs[before, chosen])
        if engine == "vllm":
            # The chosen token first, the likeliest after it, k in all.
            listed = [(chosen, value), *(pair for pair in listed if pair[0] != chosen)][:k]
        content.append(
            teacher.named(chosen)
            | {"logprob": value}
            | {"top_logprobs": [teacher.named(t) | {"logprob": v} for t, v in listed]}
        )
    return {"choices": [{"index": 0, "logprobs": {"content": content}}]}


def prompt_logprobs(teacher: Teacher, tokens: Sequence[int], k: int) -> list[Any]:
    """vLLM's list of dicts: None first, then the top k, the chosen token beside them."""
    found: list[Any] = [None]
    for before, chosen in pairwise(tokens):
        entries = {chosen: (float(teacher.logprobs[before, chosen]), teacher.rank(chosen, before))}
        entries |= {t: (v, rank) for rank, (t, v) in enumerate(teacher.top(before, k))}
        found.append({str(t): {"logprob": v, "rank": rank + 1} for t, (v, rank) in entries.items()})
    return found


def write_lines(file: Path, records: Sequence[Mapping[str, Any] | str]) -> Path:
    """A JSONL file; a string is a line as it is."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(line + "\n" for line in lines))
    return file


def spec_of(teacher: Teacher, folder: Path, **changes: Any) -> ImportSpec:
    """An import of folder/records.* into folder/table."""
    settings = {
        "table": str(folder / "table"),
        "layout": "openai",
        "files": str(folder / "records.jsonl"),
        "tokenizer": str(teacher.folder),
        "teacher": {"name": "bigram", "revision": "1"},
        "scale": "raw",
    }
    return ImportSpec.model_validate(settings | changes)


def imported(spec: ImportSpec) -> tuple[dict[str, Any], Table, list[dict[str, Any]], SoftTargets]:
    """The report of an import, its table, its rows and their targets."""
    report = import_recorded(spec)
    table = Table.open(spec.table)
    (batch,) = table.batches()
    columns = {name: batch[name] for name in batch.schema.names}
    return report, table, batch.to_pylist(), SoftTargets.from_columns(columns, table.contents.k)


def require_true(
    teacher: Teacher, rows: Sequence[Mapping[str, Any]], k: int, mass_error: float = 2e-6
) -> None:
    """Every stored position is what the teacher says after the token that it stands at."""
    for row in rows:
        tokens = row["input_ids"]
        for j, index in enumerate(row["position_index"]):
            truth = teacher.logprobs[tokens[index]]
            pairs = teacher.top(tokens[index], k)
            ids = row["topk_ids"][j * k : j * k + k]
            used = sum(i >= 0 for i in ids)
            assert used > 0
            assert ids == [t for t, _ in pairs][:used] + [-1] * (k - used)
            values = np.array(row["topk_logprobs"][j * k : j * k + used])
            np.testing.assert_allclose(values, [v for _, v in pairs][:used], rtol=2**-10)
            tail = 1 - np.exp([v for _, v in pairs[:used]]).sum()
            np.testing.assert_allclose(
                np.exp(row["tail_logprob"][j]), tail, rtol=2**-8, atol=mass_error
            )
            label = tokens[index + 1]
            assert row["label_ids"][j] == label
            np.testing.assert_allclose(row["label_logprobs"][j], truth[label], rtol=2**-10)
