"""Tiny tokenizers, text files and specs: what tests of text sources start from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from softlabels.teacher.spec import SequenceCaptureSpec

SENTENCES = (
    "The cat sat on the mat and looked at the sea.",
    "A dog ran over the hill, over the sea, over the moon!",
    "Where is the end of the hill? The cat knows — naïve as it is.",
    "Numbers: 1 2 3 4 5 6 7 8 9, and then some more of them.",
)
END, START, STOP, MASK, CLS, SEP = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<mask>",
    "<cls>",
    "<sep>",
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = (
    {"role": "user", "content": "Where is the cat?"},
    {"role": "assistant", "content": "On the mat."},
    {"role": "user", "content": "And the dog?"},
    {"role": "assistant", "content": "Over the hill."},
)


def tiny_tokenizer(
    folder: Path,
    chat_template: str | None = None,
    vocabulary: int = 320,
    closes: bool = False,
    **names: Any,
) -> Path:
    """Writes a byte-level BPE tokenizer of some 320 tokens as transformers reads it; its folder.

    Args:
        folder: made where it is not there.
        chat_template: its own one.
        vocabulary: tokens at most.
        closes: it puts <cls> before and <sep> after every text, as BERT's does.
        names: entries of tokenizer_config.json, over eos_token and mask_token; None drops one.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END, START, STOP, MASK, CLS, SEP]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if closes:
        pairs = [(CLS, special.index(CLS)), (SEP, special.index(SEP))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{CLS} $A {SEP}", special_tokens=pairs
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "mask_token": MASK,
        "additional_special_tokens": [START, STOP, CLS, SEP],
        "chat_template": chat_template,
        "model_max_length": 16,
    }
    kept = {key: value for key, value in (settings | names).items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return folder


def text_spec(
    folder: Path, tokenizer: Path, kind: str = "causal", seed: int = 0, **source: Any
) -> SequenceCaptureSpec:
    """The spec of a capture of text, table folder/table, by a teacher that is never loaded."""
    return SequenceCaptureSpec.model_validate(
        {
            "table": str(folder / "table"),
            "teacher": {"name": "toy", "model": str(folder / "model"), "kind": kind}
            | {"tokenizer": str(tokenizer)},
            "carry": source.pop("carry", ()),
            "seed": seed,
            "source": source,
        }
    )


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    """Writes a JSONL file of records; text and bytes go in as they are."""
    lines = [
        r if isinstance(r, bytes) else r.encode() if isinstance(r, str) else json.dumps(r).encode()
        for r in records
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path
