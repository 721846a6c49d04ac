"""Makes the committed text: pages of Python's documentation, split by page. Needs python3.11-doc.

    python -m pipelines.smollm2.make_data

Writes `data/lm/train.parquet` and `data/lm/heldout.parquet` (columns path, text), the same bytes
again from the same pages. Pages are ordered by the sha256 of their path, so that the first n are
a fair sample of all, and the split is by page: no held-out page is trained on.
"""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

PAGES = Path("/usr/share/doc/python3.11/html/_sources")
SECTIONS = ("extending", "faq", "howto", "library", "reference", "tutorial", "using")
SHORTEST, LONGEST = 2_000, 60_000
"""Characters of a page: stubs teach nothing, and one huge page would be a tenth of the text."""
HELD_OUT_SHARE = 0.08
TRAIN_CHARACTERS = 3_600_000
"""About a million tokens of SmolLM2."""
DATA = Path("data/lm")


def main() -> None:
    """Writes both files and says what is in them."""
    pages: dict[str, list[tuple[str, str]]] = {"train": [], "heldout": []}
    characters = 0
    for path in sorted(_paths(), key=_place):
        text = (PAGES / path).read_text("utf-8")
        if not SHORTEST <= len(text) <= LONGEST:
            continue
        split = "heldout" if _place(path) < HELD_OUT_SHARE else "train"
        if split == "train" and characters + len(text) > TRAIN_CHARACTERS:
            break
        characters += len(text) if split == "train" else 0
        pages[split].append((path, text))
    DATA.mkdir(parents=True, exist_ok=True)
    for split, found in pages.items():
        paths, texts = zip(*found, strict=True)
        table = pa.table({"path": pa.array(paths), "text": pa.array(texts)})
        file = DATA / f"{split}.parquet"
        pq.write_table(table, file, compression="zstd", compression_level=19)
        size = file.stat().st_size
        print(f"{file}: {len(found)} pages, {sum(map(len, texts)):,} characters, {size:,} bytes")


def _paths() -> list[str]:
    found = [p for section in SECTIONS for p in (PAGES / section).rglob("*.rst.txt")]
    return [str(path.relative_to(PAGES)) for path in found]


def _place(path: str) -> float:
    """Where a page stands, 0 to 1, by its name alone."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64


if __name__ == "__main__":
    main()
