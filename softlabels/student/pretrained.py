"""Students that `transformers` builds: new ones from a config, trained ones from safetensors.

The package is loaded only here, and only when a spec names such a student. Code that a repository
brings along is never run, and nothing is unpickled.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from softlabels.errors import BadInputError, MismatchError, SoftLabelsError, one_line
from softlabels.storage import open_root, storage_errors
from softlabels.student.checkpoint import STUDENT
from softlabels.student.room import require_width
from softlabels.student.spec import LanguageModelSpec
from softlabels.student.tokens import NAME

Kind = Literal["causal_lm", "masked_lm"]
_CLASSES = {"causal_lm": "AutoModelForCausalLM", "masked_lm": "AutoModelForMaskedLM"}
CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
"""What `transformers` calls them."""


def build_language_model(
    spec: LanguageModelSpec, kind: Kind, num_classes: int | None = None
) -> nn.Module:
    """A student of `transformers`; a new one's weights come from torch's random numbers.

    Args:
        spec: which.
        kind: what it is for.
        num_classes: V of the plan; also vocab_size of a new one whose config does not say.

    Raises:
        BadInputError: `transformers` is not installed, or there is no such config or checkpoint.
        MismatchError: the checkpoint lacks weights that the model has, or it has another
            vocabulary.
    """
    transformers = _transformers()
    build = getattr(transformers, _CLASSES[kind])
    dtype = getattr(torch, spec.dtype)
    where = f"student.{kind}"
    with _built(spec, where), _quiet(transformers):
        if spec.checkpoint is not None:
            model = _trained(build, spec.checkpoint, dtype, where)
            _require_width(model.config, num_classes)
        else:
            config = _config(transformers, spec.config, num_classes)
            _require_width(config, num_classes)
            model = build.from_config(config, dtype=dtype, trust_remote_code=False)
    if spec.gradient_checkpointing:
        _checkpoint_layers(model)
    return cast(nn.Module, model)


def _require_width(config: Any, num_classes: int | None) -> None:
    # Before a forward pass: a narrow embedding fails there with an index out of range.
    width = getattr(config, "vocab_size", None)
    if num_classes is not None and isinstance(width, int):
        require_width(width, num_classes)


def leave_folder(out: Path, model: nn.Module, tokenizer: str | None) -> list[str]:
    """Makes a finished student's folder one that `transformers`, or the next run, can load.

    Does nothing for a module that is not of `transformers`.

    Args:
        out: holds student.safetensors.
        model: the student.
        tokenizer: its tokenizer.json, or a folder with one; None: not known.

    Returns:
        Names of the files beside the weights, which are those of student.safetensors.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return []
    root = open_root(out)
    root.write(CONFIG, cast(Any, config).to_json_string(use_diff=False).encode())
    if tokenizer is not None:
        place = Path(tokenizer)
        root.write(NAME, (place / NAME if place.is_dir() else place).read_bytes())
    with storage_errors("write", str(out)):
        (out / _WEIGHTS).unlink(missing_ok=True)
        try:
            os.link(out / STUDENT, out / _WEIGHTS)
        except OSError:  # not every file system has links
            shutil.copyfile(out / STUDENT, out / _WEIGHTS)
    return [CONFIG] if tokenizer is None else [CONFIG, NAME]


@contextlib.contextmanager
def _built(spec: LanguageModelSpec, where: str) -> Iterator[None]:
    """One line where `transformers` refuses; it does so with any kind of error."""
    try:
        yield
    except SoftLabelsError:
        raise
    except Exception as error:
        asked = spec.checkpoint if spec.config is None else spec.config
        reason = one_line(f"{type(error).__name__}: {error}")[:300]
        raise BadInputError(f"{where}: cannot build {asked!r:.200}: {reason}") from error


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keeps progress bars and advice off the terminal: a user's mistake is one line."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise BadInputError(
            "student: models of transformers need it installed: pip install 'softlabels[hf]'"
        ) from error
    return transformers


def _config(
    transformers: Any, config: str | Mapping[str, Any] | None, num_classes: int | None
) -> Any:
    if isinstance(config, str):
        return transformers.AutoConfig.from_pretrained(config, trust_remote_code=False)
    settings = dict(config or {})
    if num_classes is not None:
        settings.setdefault("vocab_size", num_classes)
    kind = settings.pop("model_type")
    made = transformers.AutoConfig.for_model(kind, **settings)
    # transformers keeps settings that no model reads: a misspelt one would go unnoticed.
    known = {*transformers.AutoConfig.for_model(kind).to_dict(), *made.attribute_map}
    if unknown := sorted(set(settings) & (set(made.to_dict()) - known)):
        raise ValueError(f"config has no setting {unknown[0]!r}")
    return made


def _trained(build: Any, checkpoint: str, dtype: torch.dtype, where: str) -> Any:
    if "/" in checkpoint and checkpoint.startswith((".", "/")) and not Path(checkpoint).is_dir():
        raise BadInputError(f"{where}.checkpoint: there is no folder {checkpoint!r}")
    model, found = build.from_pretrained(
        checkpoint,
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    # transformers fills these with random numbers, or leaves them out, and only warns.
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, found.get(what) or ())):
            raise MismatchError(
                f"{where}.checkpoint {checkpoint!r} does not fit {type(model).__name__}: "
                f"{what.replace('_', ' ')} {names[:3]!r}, {len(names)} in all"
            )
    return model


def _checkpoint_layers(model: Any) -> None:
    # The second name is that of transformers before 5.20.
    arguments = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(arguments)
    else:
        model.gradient_checkpointing_enable(arguments)
