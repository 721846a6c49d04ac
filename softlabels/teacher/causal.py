"""Language models of transformers: loading, and logits of chosen positions and no others."""

import contextlib
import copy
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softlabels.errors import (
    BadInputError,
    DataError,
    MismatchError,
    SoftLabelsError,
    TryAgainError,
    one_line,
)
from softlabels.fingerprint import sha256_json
from softlabels.lineage import TeacherLineage
from softlabels.teacher.models import weights_sha256
from softlabels.teacher.spec import ModelSpec

_TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
"""How far logits may be from the model's own, as a share of the largest: they are products of
other shapes."""

_UNSAID = {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"}
_PROBE_TOKENS = 8


class LanguageModel:
    """A language model in evaluation mode, on its device.

    Attributes:
        lineage: which teacher it is.
        device: where it runs.
        width: rows of its head, V or more.
        causal: whether a position sees only what comes before it.
        whole: whether logits are to be had of whole sequences only, not of hidden states.
    """

    def __init__(
        self, model: nn.Module, spec: ModelSpec, lineage: TeacherLineage, device: torch.device
    ) -> None:
        self.lineage = lineage
        self.device = device
        self.causal = spec.kind == "causal"
        self._model: Any = model.to(device).eval()
        padding = getattr(self._model.config, "pad_token_id", None)
        self.padding = padding if isinstance(padding, int) and padding >= 0 else 0
        self._base: nn.Module | None = None
        self._head: Any = None
        self.width = self._probe(spec)

    @property
    def whole(self) -> bool:
        """Whether the model's own logits of whole sequences are all there is."""
        return self._head is None

    @torch.inference_mode()
    def logits(self, tokens: Tensor, real: Tensor, at: Tensor, rows: int) -> Iterator[Tensor]:
        """Logits of some positions, float32 [at most `rows`, width] at a time, in order.

        Args:
            tokens: int64 [B, L], padded on the right.
            real: bool [B, L], false where padded.
            at: int64 [n], position numbers in the flat [B * L].
            rows: positions whose logits are in memory at once.
        """
        if self._head is None:
            found = self._forward(self._model, tokens, real).logits.flatten(0, 1)
            for start in range(0, len(at), rows):
                yield found[at[start : start + rows]].float()
            return
        output = self._forward(self._base, tokens, real)
        hidden = output.last_hidden_state.flatten(0, 1)
        for start in range(0, len(at), rows):
            yield self._of_hidden(output, hidden[at[start : start + rows]]).float()

    def _forward(self, module: Any, tokens: Tensor, real: Tensor) -> Any:
        # Padding stands on the right, where a causal model does not see it; without a mask
        # attention takes its quickest way.
        if self.causal:
            return module(input_ids=tokens, use_cache=False)
        return module(input_ids=tokens, attention_mask=real.long())

    def _of_hidden(self, output: Any, hidden: Tensor) -> Tensor:
        # The model's own way from hidden states to logits, whatever it does there.
        replay = self._head._modules[self._head.base_model_prefix]
        replay.output = type(output)(**{**output, "last_hidden_state": hidden[None]})
        dummy = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        logits: Tensor = self._head(input_ids=dummy).logits[0]
        return logits

    @torch.inference_mode()
    def _probe(self, spec: ModelSpec) -> int:
        vocabulary = self._model.config.get_text_config().vocab_size
        length = min(_PROBE_TOKENS, context_of(self._model.config) or _PROBE_TOKENS)
        steps = torch.arange(2 * length, device=self.device).reshape(2, -1)
        tokens = (vocabulary - 1 - 3 * steps) % vocabulary
        real = torch.ones_like(tokens, dtype=torch.bool)
        own = self._forward(self._model, tokens, real).logits.float()
        if own.isnan().any():
            raise DataError(
                f"model {spec.model!r} gives NaN as logits: its weights are broken, or "
                f"dtype {spec.dtype!r} cannot hold what it computes"
            )
        if self.causal:
            changed = tokens.clone()
            changed[:, -1] = (changed[:, -1] + 1) % vocabulary
            other = self._forward(self._model, changed, real).logits.float()
            if not _close(own[:, :-1], other[:, :-1], spec):
                raise BadInputError(
                    f"teacher.kind is 'causal', but {type(self._model).__name__} of "
                    f"{spec.model!r} sees the tokens after a position: expected a causal model, "
                    "or kind: masked"
                )
        self._split_head()
        if self._head is not None:
            at = torch.arange(tokens.numel(), device=self.device)
            try:
                found = torch.cat(list(self.logits(tokens, real, at, _PROBE_TOKENS + 1)))
                same = _close(own.flatten(0, 1), found, spec)
            except Exception:  # a model that reads more of its base than the hidden states
                same = False
            if not same:
                self._head = self._base = None
        return int(own.shape[-1])

    def _split_head(self) -> None:
        prefix = self._model.base_model_prefix
        base = self._model._modules.get(prefix)
        if base is None:
            return
        head = copy.copy(self._model)
        head._modules = {**self._model._modules, prefix: _Replay()}
        self._base, self._head = base, head


class _Replay(nn.Module):
    """Stands in for a base model: gives an output that is already there."""

    output: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


def _close(expected: Tensor, found: Tensor, spec: ModelSpec) -> bool:
    if expected.shape != found.shape:
        return False
    expected, found = (z.nan_to_num(posinf=0.0, neginf=0.0) for z in (expected, found))
    largest = expected.abs().amax().clamp(min=1e-6)
    return bool((expected - found).abs().amax() <= _TOLERANCE[spec.dtype] * largest)


def read_config(spec: ModelSpec) -> Any:
    """The model's configuration, without its weights.

    Raises:
        BadInputError: there is no such model, or it is none of the spec's kind.
        TryAgainError: the hub cannot be reached.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    with _loading(spec):
        config = AutoConfig.from_pretrained(**_place(spec))
    auto: Any = AutoModelForCausalLM if spec.kind == "causal" else AutoModelForMaskedLM
    if type(config) not in auto._model_mapping:
        raise BadInputError(
            f"teacher.kind is {spec.kind!r}, but model {spec.model!r} is of type "
            f"{config.model_type!r}, which transformers has no {spec.kind} language model of"
        )
    return config


def context_of(config: Any) -> int | None:
    """Most tokens of a sequence that a model takes; None where it says none."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def load_language_model(spec: ModelSpec, device: torch.device, config: Any = None) -> LanguageModel:
    """The model of a spec, its weights fingerprinted, its way to logits tried out.

    Args:
        spec: of the model.
        device: where it is to run.
        config: `read_config(spec)`, where that was done already.

    Raises:
        BadInputError: there is no such model, or it is not of the kind that the spec says.
        MismatchError: its files lack weights that the model needs.
        TryAgainError: the hub cannot be reached.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    config = config or read_config(spec)
    auto: Any = AutoModelForCausalLM if spec.kind == "causal" else AutoModelForMaskedLM
    with _loading(spec):
        model, loaded = auto.from_pretrained(
            **_place(spec),
            dtype=getattr(torch, spec.dtype),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    absent = sorted({*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])})
    if absent:
        raise MismatchError(
            f"model {spec.model!r} lacks weights that {type(model).__name__} needs, such as "
            f"{absent[:3]}: {len(absent)} tensors would be random; expected a checkpoint of that "
            f"class, found one of {config.architectures!r}"
        )
    lineage = TeacherLineage(
        name=spec.name,
        revision=spec.revision,
        kind="hf",
        code=f"transformers:{type(model).__name__}",
        arguments={"dtype": spec.dtype, "config_sha256": _config_sha256(config)},
        weights_sha256=weights_sha256(model),
    )
    with _loading(spec):  # it is tried out on a few tokens
        return LanguageModel(model, spec, lineage, device)


def _config_sha256(config: Any) -> str:
    # Weights alone do not say what a model computes: scales, caps and rotations stand here. What
    # is as transformers' defaults have it is left out, as a later release may know more of it.
    found = config.to_diff_dict()
    return sha256_json({key: value for key, value in found.items() if key not in _UNSAID})


def _place(spec: ModelSpec) -> dict[str, Any]:
    path = Path(spec.model)
    common: dict[str, Any] = {"trust_remote_code": False, "local_files_only": path.exists()}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BadInputError(f"there is no model file {spec.model!r}")
        place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        return place | common
    if not path.is_dir() and (path.is_absolute() or spec.model.startswith(".")):
        raise BadInputError(f"there is no model folder {spec.model!r}")
    if not path.exists() and spec.revision:
        common["revision"] = spec.revision
    return {"pretrained_model_name_or_path": spec.model} | common


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers from writing progress bars and advice to the terminal."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _loading(spec: ModelSpec) -> Iterator[None]:
    try:
        with quiet_transformers(), contextlib.ExitStack() as stack:
            if spec.model.endswith(".gguf"):
                # Its progress bar heeds no setting.
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    except SoftLabelsError:
        raise
    except Exception as error:  # whatever a damaged file makes of the loader
        if _unreachable(error):
            raise TryAgainError(
                f"model {spec.model!r} is not on this machine and the hub cannot be reached: "
                f"{one_line(error)[:200]}"
            ) from error
        raise BadInputError(
            f"model {spec.model!r} {_missing(spec.model)}cannot be loaded: "
            f"{type(error).__name__}: "
            f"{one_line(error)[:300]}"
        ) from error


def _missing(model: str) -> str:
    return "" if os.path.exists(model) else "is no folder or file of this machine and "


def _unreachable(error: BaseException | None) -> bool:
    while error is not None:
        if type(error).__name__ in {"ConnectError", "ConnectTimeout", "ConnectionError"}:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def forward_failures(what: str) -> Iterator[None]:
    """Says which examples a forward pass failed at."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        raise DataError(
            f"the teacher failed {what}: {type(error).__name__}: {one_line(error)}"
        ) from error
