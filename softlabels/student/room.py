"""Whether a language model is large enough for a plan: its vocabulary and its context."""

from typing import Any

from torch import nn

from softlabels.errors import MismatchError
from softlabels.student.sequences import SequenceInputs

MAX_PADDING = 1024
"""A head may have fewer than this many rows above the vocabulary, to make its size round."""


def require_width(width: int, num_classes: int) -> None:
    """Raises MismatchError unless `width` is that of a head over `num_classes` tokens."""
    if not num_classes <= width < num_classes + MAX_PADDING:
        raise MismatchError(
            f"the student's head has {width} rows, the plan's vocabulary has {num_classes}: "
            f"expected as many, or fewer than {MAX_PADDING} more as padding"
        )


def require_room(model: nn.Module, inputs: SequenceInputs) -> None:
    """Raises MismatchError when a batch is longer than the student's context, where it says one."""
    config: Any = getattr(model, "config", None)
    context = getattr(config, "max_position_embeddings", None)
    if not isinstance(context, int):
        return
    length = int(inputs.input_ids.shape[1])
    if length > context and inputs.position_ids is not None:
        length = int(inputs.position_ids.max()) + 1  # documents of a row begin at 0 each
    if length > context:
        raise MismatchError(
            f"the plan's sequences have up to {length} tokens, the student takes "
            f"{context} (max_position_embeddings): give it a longer context, or capture with a "
            f"source.length of {context}"
        )
